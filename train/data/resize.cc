// Resizes a part of an image, with results equal to the bit to PIL's bilinear `Image.resize(size, box=…)`.
//
// PIL weights the source pixels with a triangle that widens with the scale (antialiasing), in fixed point: first along
// rows, rounded to bytes, then along columns.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__SSE4_1__)
#include <immintrin.h>
#endif

namespace {

constexpr int FRACTION_BITS = 22;  // of a weight, so that sums of weights times bytes fit in 32 bits
constexpr int32_t HALF = 1 << (FRACTION_BITS - 1);
constexpr int MOST_UNROLLED = 7;  // taps, which a scale of 3 needs

inline uint8_t rounded(int32_t sum) { return uint8_t(sum >> FRACTION_BITS); }

// Source pixels of each result along one axis, and their weights.
struct Weights {
  int taps = 0;             // per result; most results have zeros at the end
  std::vector<int> first;   // first source pixel of each result
  std::vector<int32_t> of;  // [results, taps]

  // `extent` of the `length` source pixels, from `start` on, are resized. If mirrored, results go from right to left.
  Weights(int length, double start, double extent, int results, bool mirrored) : first(results) {
    const double scale = extent / results, reach = std::max(scale, 1.0), narrowing = 1.0 / reach;
    const auto begin = [=](int i) { return std::max(int(start + (i + 0.5) * scale - reach + 0.5), 0); };
    const auto end = [=](int i) { return std::min(int(start + (i + 0.5) * scale + reach + 0.5), length); };
    for (int i = 0; i < results; i++) taps = std::max(taps, end(i) - begin(i));
    of.assign(int64_t(results) * taps, 0);
    std::vector<double> real(taps);
    for (int i = 0; i < results; i++) {
      const int from = begin(i), count = end(i) - from, result = mirrored ? results - 1 - i : i;
      const double center = start + (i + 0.5) * scale;
      double sum = 0;
      for (int t = 0; t < count; t++) {
        real[t] = std::max(1.0 - std::abs((t + from - center + 0.5) * narrowing), 0.0);
        sum += real[t];
      }
      // No result may read past the last pixel, not even with a weight of 0.
      first[result] = std::min(from, length - taps);
      int32_t* weights = &of[int64_t(result) * taps + from - first[result]];
      for (int t = 0; t < count; t++) weights[t] = int32_t(0.5 + real[t] / sum * (1 << FRACTION_BITS));
    }
  }
};

// Computes results `begin` … `end - 1` of one row.
void pass_row(const uint8_t* row, int channels, const Weights& w, int begin, int end, uint8_t* out) {
  for (int i = begin; i < end; i++) {
    const uint8_t* pixel = row + w.first[i] * channels;
    const int32_t* weight = &w.of[int64_t(i) * w.taps];
    for (int c = 0; c < channels; c++) {
      int32_t sum = HALF;
      for (int t = 0; t < w.taps; t++) sum += pixel[t * channels + c] * weight[t];
      out[i * channels + c] = rounded(sum);
    }
  }
}

#if defined(__SSE4_1__)
// The same for three channels, with one pixel per vector. It reads and writes one byte past the last pixel.
template <int TAPS>
void pass_row_of_colors(const uint8_t* row, const Weights& w, int begin, int end, uint8_t* out) {
  const __m128i lowest_bytes = _mm_set1_epi32(0x0c080400);
  const int32_t* weight = &w.of[int64_t(begin) * TAPS];
  for (int i = begin; i < end; i++, weight += TAPS) {
    const uint8_t* pixel = row + w.first[i] * 3;
    __m128i sum = _mm_set1_epi32(HALF);
#pragma GCC unroll 7
    for (int t = 0; t < TAPS; t++) {
      int32_t bytes;
      std::memcpy(&bytes, pixel + 3 * t, 4);
      const __m128i colors = _mm_cvtepu8_epi32(_mm_cvtsi32_si128(bytes));
      sum = _mm_add_epi32(sum, _mm_mullo_epi32(colors, _mm_set1_epi32(weight[t])));
    }
    const int32_t bytes = _mm_cvtsi128_si32(_mm_shuffle_epi8(_mm_srai_epi32(sum, FRACTION_BITS), lowest_bytes));
    std::memcpy(out + i * 3, &bytes, 4);
  }
}

using PassRow = void (*)(const uint8_t*, const Weights&, int, int, uint8_t*);
constexpr PassRow OF_COLORS[MOST_UNROLLED + 1] = {
    nullptr,
    pass_row_of_colors<1>,
    pass_row_of_colors<2>,
    pass_row_of_colors<3>,
    pass_row_of_colors<4>,
    pass_row_of_colors<5>,
    pass_row_of_colors<6>,
    pass_row_of_colors<7>,
};
#endif

#if defined(__AVX512VBMI__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define GATHERS_BYTES 1
// The same in vectors of 16 results. For each tap, one instruction gathers the pixels from a window of 64 bytes.
class Gathering {
 public:
  Gathering() = default;
  // Prepares for rows of `row_bytes` bytes.
  Gathering(const Weights& w, int channels, int results, int row_bytes, bool mirrored) : taps_(w.taps) {
    const int total = results * channels;
    for (int base = 0; base < total; base += LANES) {
      const int end = std::min(base + LANES, total), leftmost = base / channels, rightmost = (end - 1) / channels;
      const int low = mirrored ? rightmost : leftmost, high = mirrored ? leftmost : rightmost;
      const int begin = w.first[low] * channels;
      fits = fits && (w.first[high] + taps_) * channels - begin <= WINDOW;
      if (!fits) return;
      const int left = std::min(row_bytes - begin, WINDOW);
      windows_.push_back({begin, end - base, ~uint64_t(0) >> (WINDOW - left)});
      for (int t = 0; t < taps_; t++) {
        Tap tap{};
        for (int i = base; i < end; i++) {
          tap.index[i - base] = (w.first[i / channels] + t) * channels + i % channels - begin;
          tap.weight[i - base] = w.of[int64_t(i / channels) * taps_ + t];
        }
        of_windows_.push_back(tap);
      }
    }
  }

  // False if the pixels of a vector are too far apart for one window.
  bool fits = true;

  // Processes rows that begin `stride` bytes apart; the rows of results begin `out_stride` bytes apart.
  template <int ROWS>
  void pass(const uint8_t* rows, int64_t stride, uint8_t* out, int64_t out_stride) const {
    const Tap* tap = of_windows_.data();
    for (const Window& window : windows_) {
      __m512i bytes[ROWS], sums[ROWS];
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; r++) {
        bytes[r] = _mm512_maskz_loadu_epi8(window.read, rows + r * stride + window.begin);
        sums[r] = _mm512_set1_epi32(HALF);
      }
      for (int t = 0; t < taps_; t++, tap++) {
        const __m512i index = _mm512_load_si512(tap->index), weight = _mm512_load_si512(tap->weight);
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++) {
          const __m512i pixels = _mm512_maskz_permutexvar_epi8(LOWEST_BYTES, index, bytes[r]);
          sums[r] = _mm512_add_epi32(sums[r], _mm512_mullo_epi32(pixels, weight));
        }
      }
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; r++) {
        const __m128i results = _mm512_cvtepi32_epi8(_mm512_srai_epi32(sums[r], FRACTION_BITS));
        _mm_mask_storeu_epi8(out + r * out_stride, (1u << window.kept) - 1, results);
      }
      out += LANES;
    }
  }

 private:
  static constexpr int LANES = 16, WINDOW = 64;
  static constexpr uint64_t LOWEST_BYTES = 0x1111111111111111;  // of 16 numbers
  struct Window {
    int begin, kept;  // first byte; number of results
    uint64_t read;    // mask of its bytes that belong to the row
  };
  struct alignas(64) Tap {
    int32_t index[LANES], weight[LANES];
  };
  int taps_ = 0;
  std::vector<Window> windows_;
  std::vector<Tap> of_windows_;
};
#endif

// The pass along rows of `width` pixels, by the fastest available method.
class RowPass {
 public:
  RowPass(const Weights& w, int channels, int results, int width, bool mirrored)
      : weights_(w), channels_(channels), results_(results) {
#if defined(GATHERS_BYTES)
    gathering_ = Gathering(w, channels, results, width * channels, mirrored);
#endif
#if defined(__SSE4_1__)
    if (channels == 3 && w.taps <= MOST_UNROLLED) {
      const auto last = [&](int i) { return w.first[i] + w.taps == width; };
      end_ = results;
      while (begin_ < end_ && last(begin_)) begin_++;
      while (begin_ < end_ && last(end_ - 1)) end_--;
    }
#endif
  }

  // Processes up to `TOGETHER` rows that begin `stride` bytes apart. The rows of results are contiguous, and one byte
  // past them is written, too.
  void operator()(const uint8_t* rows, int64_t stride, int count, uint8_t* out) const {
    const int64_t line = int64_t(results_) * channels_;
#if defined(GATHERS_BYTES)
    if (gathering_.fits) {
      if (count == TOGETHER) return gathering_.pass<TOGETHER>(rows, stride, out, line);
      for (int r = 0; r < count; r++) gathering_.pass<1>(rows + r * stride, stride, out + r * line, line);
      return;
    }
#endif
    for (int r = 0; r < count; r++, rows += stride, out += line) {
      pass_row(rows, channels_, weights_, 0, begin_, out);
#if defined(__SSE4_1__)
      if (begin_ < end_) OF_COLORS[weights_.taps](rows, weights_, begin_, end_, out);
#endif
      pass_row(rows, channels_, weights_, end_, results_, out);
    }
  }

  static constexpr int TOGETHER = 4;

 private:
  const Weights& weights_;
  int channels_, results_;
  int begin_ = 0, end_ = 0;  // range of the results that may read a byte past their pixels
#if defined(GATHERS_BYTES)
  Gathering gathering_;
#endif
};

// Computes one row of `length` results from `taps` contiguous rows.
void pass_columns(const uint8_t* rows, const int32_t* weights, int taps, int length, uint8_t* out) {
  constexpr int BLOCK = 64;
  int done = 0;
#if defined(__AVX512F__)
  constexpr int VECTORS = 4, LANES = BLOCK / VECTORS;
  for (; done + BLOCK <= length; done += BLOCK) {
    __m512i sums[VECTORS];
#pragma GCC unroll 4
    for (__m512i& sum : sums) sum = _mm512_set1_epi32(HALF);
    for (int t = 0; t < taps; t++) {
      const uint8_t* row = rows + int64_t(t) * length + done;
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; v++) {
        const __m512i pixels = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(row + v * LANES)));
        sums[v] = _mm512_add_epi32(sums[v], _mm512_mullo_epi32(pixels, _mm512_set1_epi32(weights[t])));
      }
    }
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++) {
      const __m512i shifted = _mm512_srai_epi32(sums[v], FRACTION_BITS);
      _mm_storeu_si128((__m128i*)(out + done + v * LANES), _mm512_cvtepi32_epi8(shifted));
    }
  }
#endif
  for (; done < length; done += BLOCK) {
    const int n = std::min(BLOCK, length - done);
    int32_t sums[BLOCK];
    std::fill(sums, sums + BLOCK, HALF);
    for (int t = 0; t < taps; t++) {
      const uint8_t* row = rows + int64_t(t) * length + done;
      for (int i = 0; i < n; i++) sums[i] += row[i] * weights[t];  // the compiler vectorises this
    }
    for (int i = 0; i < n; i++) out[done + i] = rounded(sums[i]);
  }
}

}  // namespace

// `pixels`: [height, width, channels], with rows `stride` bytes apart. `box`: left, top, width and height of the part
// to resize, in pixels, inside the image. `out`: [size, size, channels], mirrored if `mirrored`.
extern "C" void repvgg_resize(const uint8_t* pixels, int64_t stride, int32_t height, int32_t width, int32_t channels,
                              const double* box, int32_t size, int32_t mirrored, uint8_t* out) {
  const Weights across(width, box[0], box[2], size, mirrored), down(height, box[1], box[3], size, false);
  const RowPass pass(across, channels, size, width, mirrored);
  const int64_t line = int64_t(size) * channels;
  const int end = down.first.back() + down.taps;
  // Keeps a few row-resized rows at a time, from `begin` to `next`, so that they stay in the core's first-level cache.
  const int capacity = down.taps + 4 * RowPass::TOGETHER;
  static thread_local std::vector<uint8_t> passed;
  passed.resize(capacity * line + 1);
  int begin = down.first.front(), next = begin;
  for (int y = 0; y < size; y++, out += line) {
    const int first = down.first[y];
    while (next < first + down.taps) {
      const int count = std::min(RowPass::TOGETHER, end - next);
      if (next + count > begin + capacity) {
        if (first < next) std::memmove(passed.data(), &passed[(first - begin) * line], (next - first) * line);
        begin = first, next = std::max(next, first);
        continue;
      }
      pass(pixels + next * stride, stride, count, &passed[(next - begin) * line]);
      next += count;
    }
    pass_columns(&passed[(first - begin) * line], &down.of[int64_t(y) * down.taps], down.taps, line, out);
  }
}
