// 3x3 convolutions for CPUs, as calls that XLA makes (its foreign function interface).
//
// Two algorithms on NHWC images, padding 1, each with bias and, if asked for, ReLU:
//
// - direct: rows of output pixels times panels of output channels, straight from a zero-padded copy of a few input
//   rows; stride 1 and 2; in float32, or of uint8 images and int8 kernels with int32 sums (AVX-512 VNNI).
// - Winograd F(m x m, 3x3), m = 2 or 4 (Lavin and Gray, arXiv 1509.09308), float32, stride 1: a block of tiles is
//   transformed, multiplied and transformed back before the next one is begun, so that nothing leaves the core's cache
//   but the result. m = 4 takes 2.25, m = 2 takes 4 multiplications for the direct sum's 9.
//
// Both end in the same product: up to MAX_ROWS rows of the left matrix, each number broadcast, times two vectors of
// output channels, all accumulators in registers. The kernel comes packed in panels of one vector's channels
// (`native.pack_kernel`), zeros in what its last vector has too many. Threads are XLA's own: tasks are taken from a
// counter, by the caller as well, so that a busy pool makes a call slower but never stops it.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <optional>
#include <thread>

#if defined(__AVX512VNNI__)
#include <immintrin.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16, MAX_ROWS = 14;  // 28 accumulators, 2 panels and a broadcast in 32 registers
#elif defined(__AVX__)
constexpr int LANES = 8, MAX_ROWS = 6;  // 12, 2 and 1 of 16
#else
constexpr int LANES = 4, MAX_ROWS = 12;  // 24, 2 and 1 of 32 (Arm)
#endif
constexpr int PANELS = 2;             // vectors of output channels in one product
constexpr int WIDTH = PANELS * LANES;
constexpr int64_t AHEAD = 6144;       // numbers: the kernel is fetched before it is needed, as it rarely fits the cache
constexpr int64_t CACHE = 1 << 19;    // bytes of a core's cache that a task's inputs may take

typedef float Vec __attribute__((vector_size(LANES * sizeof(float))));

inline Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

// The first `count` numbers; zeros behind them.
inline Vec load(const float* p, int64_t count) {
  if (count >= LANES) return load(p);
  Vec v{};
  std::memcpy(&v, p, count * sizeof(float));
  return v;
}

inline void store(float* p, Vec v, int64_t count) {
  if (count >= LANES)
    store(p, v);
  else
    std::memcpy(p, &v, count * sizeof(float));
}

// ReLU; what is not a number stays so.
inline Vec positive(Vec v) { return v < 0.0f ? Vec{} : v; }

struct Shape {
  int64_t images, height, width, inputs, outputs, stride, groups;
  int64_t rows() const { return (height - 1) / stride + 1; }
  int64_t columns() const { return (width - 1) / stride + 1; }
  int64_t group_inputs() const { return inputs / groups; }
  int64_t group_outputs() const { return outputs / groups; }
  int64_t panels() const { return (group_outputs() + LANES - 1) / LANES; }  // of a group
};

// The left matrix of a product: `row` apart lie its rows, each made of `outer` x `inner` runs of `length` numbers.
struct Left {
  int64_t row, outer, outer_step, inner, inner_step, length;
};

// What a float product begins and ends with, from one channel on.
struct Ends {
  const float* bias;  // none if null
  bool relu;
  Ends from(int64_t channel) const { return {bias + channel, relu}; }
};

// ROWS x (COUNT * LANES) numbers of a product; `width` columns are stored.
template <int ROWS, int COUNT>
void multiply(const Left& left, const float* a, const float* b, int64_t panel, const Ends& ends, float* out,
              int64_t out_row, int64_t width) {
  Vec sums[ROWS][COUNT];
#pragma GCC unroll 16
  for (int m = 0; m < ROWS; m++)
#pragma GCC unroll 2
    for (int v = 0; v < COUNT; v++) sums[m][v] = ends.bias ? load(ends.bias + v * LANES) : Vec{};
  for (int64_t i = 0; i < left.outer; i++)
    for (int64_t j = 0; j < left.inner; j++) {
      const float* x = a + i * left.outer_step + j * left.inner_step;
      for (int64_t k = 0; k < left.length; k++, b += LANES) {
        Vec w[COUNT];
#pragma GCC unroll 2
        for (int v = 0; v < COUNT; v++) {
          w[v] = load(b + v * panel);
          __builtin_prefetch(b + v * panel + AHEAD);
        }
#pragma GCC unroll 16
        for (int m = 0; m < ROWS; m++)
#pragma GCC unroll 2
          for (int v = 0; v < COUNT; v++) sums[m][v] += x[m * left.row + k] * w[v];
      }
    }
#pragma GCC unroll 16
  for (int m = 0; m < ROWS; m++)
#pragma GCC unroll 2
    for (int v = 0; v < COUNT; v++) {
      Vec y = ends.relu ? positive(sums[m][v]) : sums[m][v];
      store(out + m * out_row + v * LANES, y, width - v * LANES);
    }
}

// Float32: one number at a time.
struct Floats {
  using Element = float;
  using Weight = float;
  using Out = float;
  using Ends = ::Ends;
  static constexpr int STEP = 1;
  template <int ROWS, int COUNT>
  static constexpr auto product = multiply<ROWS, COUNT>;
};

#if defined(__AVX512VNNI__)
// Unlike __m512i, whose pointers may alias anything, the compiler keeps arrays of these in registers.
typedef int32_t Ints __attribute__((vector_size(LANES * sizeof(int32_t))));

// What an integer product begins and ends with: an int32 bias, and the factor that makes a sum a uint8.
struct IntegerEnds {
  const int32_t* bias;
  const float* factor;
  IntegerEnds from(int64_t channel) const { return {bias + channel, factor + channel}; }
};

inline void finish(__m512i sum, const float*, int32_t* out, __mmask16 mask) {
  _mm512_mask_storeu_epi32(out, mask, sum);
}

// To the nearest, ties to even, saturated: as `QuantizedNet` rounds.
inline void finish(__m512i sum, const float* factor, uint8_t* out, __mmask16 mask) {
  const __m512 real = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), _mm512_loadu_ps(factor));
  const __m512 inside = _mm512_min_ps(_mm512_max_ps(real, _mm512_setzero_ps()), _mm512_set1_ps(255.0f));
  _mm512_mask_cvtepi32_storeu_epi8(out, mask, _mm512_cvtps_epi32(inside));
}

// The same product of bytes, four channels at a time: `left.length` counts bytes.
template <typename Out, int ROWS, int COUNT>
void multiply_bytes(const Left& left, const uint8_t* a, const int8_t* b, int64_t panel, const IntegerEnds& ends,
                    Out* out, int64_t out_row, int64_t width) {
  Ints sums[ROWS][COUNT];
#pragma GCC unroll 16
  for (int m = 0; m < ROWS; m++)
#pragma GCC unroll 2
    for (int v = 0; v < COUNT; v++) std::memcpy(&sums[m][v], ends.bias + v * LANES, sizeof(Ints));
  for (int64_t i = 0; i < left.outer; i++)
    for (int64_t j = 0; j < left.inner; j++) {
      const uint8_t* x = a + i * left.outer_step + j * left.inner_step;
      for (int64_t k = 0; k < left.length; k += 4, b += 4 * LANES) {
        Ints w[COUNT];
#pragma GCC unroll 2
        for (int v = 0; v < COUNT; v++) {
          std::memcpy(&w[v], b + v * panel, sizeof(Ints));
          __builtin_prefetch(b + v * panel + AHEAD);
        }
#pragma GCC unroll 16
        for (int m = 0; m < ROWS; m++) {
          int32_t four;
          std::memcpy(&four, x + m * left.row + k, 4);
          const Ints pixels = four - Ints{};
#pragma GCC unroll 2
          for (int v = 0; v < COUNT; v++)
            sums[m][v] = Ints(_mm512_dpbusd_epi32(__m512i(sums[m][v]), __m512i(pixels), __m512i(w[v])));
        }
      }
    }
#pragma GCC unroll 16
  for (int m = 0; m < ROWS; m++)
#pragma GCC unroll 2
    for (int v = 0; v < COUNT; v++) {
      const int64_t stored = std::min<int64_t>(std::max<int64_t>(width - v * LANES, 0), LANES);
      const __mmask16 mask = (1u << stored) - 1;
      finish(__m512i(sums[m][v]), ends.factor + v * LANES, out + m * out_row + v * LANES, mask);
    }
}

// uint8 times int8, to int32 or rounded to uint8.
template <typename Result>
struct Bytes {
  using Element = uint8_t;
  using Weight = int8_t;
  using Out = Result;
  using Ends = IntegerEnds;
  static constexpr int STEP = 4;
  template <int ROWS, int COUNT>
  static constexpr auto product = multiply_bytes<Result, ROWS, COUNT>;
};
#endif

// The products of one kind, by rows and panels.
template <typename Kind>
struct Table {
  using Multiply = void (*)(const Left&, const typename Kind::Element*, const typename Kind::Weight*, int64_t,
                            const typename Kind::Ends&, typename Kind::Out*, int64_t, int64_t);
  Multiply of[MAX_ROWS + 1][PANELS + 1] = {};
  constexpr Table() { fill<MAX_ROWS>(); }

 private:
  template <int ROWS>
  constexpr void fill() {
    of[ROWS][1] = Kind::template product<ROWS, 1>;
    of[ROWS][2] = Kind::template product<ROWS, 2>;
    if constexpr (ROWS > 1) fill<ROWS - 1>();
  }
};
template <typename Kind>
constexpr Table<Kind> TABLE;

// `count` rows in products of nearly equal height: `act(first, height)`.
template <typename Act>
void in_rows(int64_t count, Act act) {
  const int64_t parts = (count + MAX_ROWS - 1) / MAX_ROWS;
  for (int64_t part = 0; part < parts; part++) {
    const int64_t first = count * part / parts, end = count * (part + 1) / parts;
    act(first, end - first);
  }
}

// Memory of the thread's own, kept for its next task.
template <typename Element>
Element* scratch(int64_t count) {
  thread_local std::unique_ptr<void, decltype(&std::free)> memory(nullptr, &std::free);
  thread_local int64_t size = 0;
  const int64_t bytes = count * sizeof(Element);
  if (size < bytes) {
    memory.reset();
    void* found = nullptr;
    if (posix_memalign(&found, 64, bytes)) std::abort();
    memory.reset(found);
    size = bytes;
  }
  return static_cast<Element*>(memory.get());
}

// Tasks 0 … count - 1, by the pool's threads and the caller.
template <typename Task>
void in_parallel(ffi::ThreadPool& pool, int64_t count, const Task& task) {
  struct State {
    std::atomic<int64_t> next{0}, done{0};
  };
  auto state = std::make_shared<State>();
  // `task` is only touched by who has claimed a number, and the caller waits for those.
  auto work = [state, count, &task] {
    int64_t finished = 0;
    for (int64_t i; (i = state->next.fetch_add(1)) < count; finished++) task(i);
    state->done.fetch_add(finished);
  };
  for (int64_t helpers = std::min(pool.num_threads(), count) - 1; helpers > 0; helpers--)
    pool.Schedule(decltype(work)(work));  // a copy: the pool outlives this call
  work();
  for (int spins = 0; state->done.load() < count; spins++)
    if (spins > 1000) std::this_thread::yield();
}

// Into how many parts the panels of a group are cut, so that `tasks` tasks keep all threads busy.
int64_t panel_parts(int64_t tasks, int64_t pairs, int64_t threads) {
  if (tasks >= 3 * threads || tasks % threads == 0) return 1;
  return std::min(pairs, (3 * threads + tasks - 1) / tasks);
}

struct Range {
  int64_t first, end;
};

// The panels of part `part` of `parts`; whole pairs.
Range panel_range(int64_t panels, int64_t part, int64_t parts) {
  const int64_t pairs = (panels + PANELS - 1) / PANELS;
  return {pairs * part / parts * PANELS, std::min(panels, pairs * (part + 1) / parts * PANELS)};
}

// The rows of the input that output rows `first` ... `first + count - 1` read, copied with `zero` around them; a pixel
// takes `pixel` elements, zeros in what it has too many.
template <typename Element>
void copy_padded(const Shape& s, const Element* image, int64_t first, int64_t count, int64_t pixel, Element zero,
                 Element* to) {
  const int64_t width = (s.columns() - 1) * s.stride + 3, line = width * pixel;
  const int64_t copied = std::min(s.width, width - 1);
  for (int64_t r = 0; r < (count - 1) * s.stride + 3; r++, to += line) {
    const int64_t row = first * s.stride + r - 1;
    if (row < 0 || row >= s.height) {
      std::fill(to, to + line, zero);
      continue;
    }
    const Element* from = image + row * s.width * s.inputs;
    std::fill(to, to + pixel, zero);
    if (pixel == s.inputs)
      std::memcpy(to + pixel, from, copied * pixel * sizeof(Element));
    else
      for (int64_t c = 0; c < copied; c++) {
        std::memcpy(to + (1 + c) * pixel, from + c * s.inputs, s.inputs * sizeof(Element));
        std::fill(to + (1 + c) * pixel + s.inputs, to + (2 + c) * pixel, Element(0));
      }
    std::fill(to + (1 + copied) * pixel, to + line, zero);
  }
}

template <typename Kind>
void direct(const Shape& s, const typename Kind::Element* x, const typename Kind::Weight* packed,
            const typename Kind::Ends& ends, typename Kind::Element zero, typename Kind::Out* y,
            ffi::ThreadPool& pool) {
  using Element = typename Kind::Element;
  constexpr int64_t STEP = Kind::STEP, BUDGET = CACHE / sizeof(Element);
  const int64_t inner = (s.group_inputs() + STEP - 1) / STEP * STEP, pixel = s.groups * inner;
  const int64_t width = (s.columns() - 1) * s.stride + 3, line = width * pixel;
  const int64_t panels = s.panels(), panel = 9 * inner * LANES, threads = std::max<int64_t>(pool.num_threads(), 1);
  // Some rows of one image, or several whole images, at a time.
  const int64_t fit = std::max<int64_t>(1, (BUDGET / line - 3) / s.stride + 1);
  int64_t rows = std::min(fit, s.rows());
  if (s.images * ((s.rows() + rows - 1) / rows) < 2 * threads)
    rows = std::max<int64_t>(1, std::min(rows, s.rows() / 2));
  const int64_t parts_of_image = (s.rows() + rows - 1) / rows;
  const int64_t patch = ((rows - 1) * s.stride + 3) * line;
  int64_t together = parts_of_image > 1 ? 1 : std::max<int64_t>(1, BUDGET / patch);
  together = std::min(together, std::max<int64_t>(1, s.images / threads));
  const int64_t blocks = parts_of_image * ((s.images + together - 1) / together);
  const int64_t cuts = panel_parts(blocks, (panels + PANELS - 1) / PANELS, threads);
  const bool whole = s.groups == 1;  // then the three pixels of a row are one run
  const Left left{s.stride * pixel, 3, line, whole ? 1 : 3, pixel, whole ? 3 * inner : inner};
  in_parallel(pool, blocks * cuts, [&](int64_t task) {
    const int64_t block = task / cuts, cut = task % cuts;
    const int64_t image = block / parts_of_image * together, first = block % parts_of_image * rows;
    const int64_t images = std::min(together, s.images - image), count = std::min(rows, s.rows() - first);
    Element* patches = scratch<Element>(images * patch);
    for (int64_t n = 0; n < images; n++)
      copy_padded(s, x + (image + n) * s.height * s.width * s.inputs, first, count, pixel, zero, patches + n * patch);
    for (int64_t group = 0; group < s.groups; group++) {
      const Range range = panel_range(panels, cut, cuts);
      for (int64_t p = range.first; p < range.end; p += PANELS) {
        const int64_t used = std::min<int64_t>(PANELS, range.end - p), channel = group * s.group_outputs() + p * LANES;
        const int64_t stored = std::min<int64_t>(used * LANES, s.group_outputs() - p * LANES);
        const auto* weights = packed + (group * panels + p) * panel;
        const auto own = ends.from((group * panels + p) * LANES);
        for (int64_t n = 0; n < images; n++)
          for (int64_t r = 0; r < count; r++) {
            const Element* a = patches + n * patch + r * s.stride * line + group * inner;
            auto* out = y + (((image + n) * s.rows() + first + r) * s.columns()) * s.outputs + channel;
            in_rows(s.columns(), [&](int64_t c, int64_t height) {
              TABLE<Kind>.of[height][used](left, a + c * left.row, weights, panel, own, out + c * s.outputs, s.outputs,
                                           stored);
            });
          }
      }
    }
  });
}

// One pass of B^T over a column or row of a tile, and of A^T back. m = 4 interpolates at 0, +-A, +-B and infinity: with
// A = 5/8 and B = 3/2, exact in binary, the rounding error is half of that with the usual 1 and 2.
constexpr float A = 0.625f, B = 1.5f, AA = A * A, BB = B * B;

inline void input_pass(const Vec (&d)[4], Vec (&t)[4]) {
  t[0] = d[0] - d[2];
  t[1] = d[1] + d[2];
  t[2] = d[2] - d[1];
  t[3] = d[1] - d[3];
}

inline void input_pass(const Vec (&d)[6], Vec (&t)[6]) {
  const Vec even = d[4] - BB * d[2], odd = A * (d[3] - BB * d[1]);
  const Vec even2 = d[4] - AA * d[2], odd2 = B * (d[3] - AA * d[1]);
  t[0] = AA * BB * d[0] - (AA + BB) * d[2] + d[4];
  t[1] = even + odd;
  t[2] = even - odd;
  t[3] = even2 + odd2;
  t[4] = even2 - odd2;
  t[5] = AA * BB * d[1] - (AA + BB) * d[3] + d[5];
}

inline void output_pass(const Vec (&m)[4], Vec (&y)[2]) {
  y[0] = m[0] + m[1] + m[2];
  y[1] = m[1] - m[2] - m[3];
}

inline void output_pass(const Vec (&m)[6], Vec (&y)[4]) {
  const Vec sum = m[1] + m[2], difference = m[1] - m[2], sum2 = m[3] + m[4], difference2 = m[3] - m[4];
  y[0] = m[0] + sum + sum2;
  y[1] = A * difference + B * difference2;
  y[2] = AA * sum + BB * sum2;
  y[3] = A * AA * difference + B * BB * difference2 + m[5];
}

// B^T d B of one tile whose pixels lie at `pixels`; position p of channel c goes to `out[p * step + c]`.
template <int SIZE>
void transform_input(const float* const* pixels, int64_t channels, float* out, int64_t step) {
  for (int64_t c = 0; c < channels; c += LANES) {
    Vec passed[SIZE][SIZE];
#pragma GCC unroll 6
    for (int j = 0; j < SIZE; j++) {
      Vec d[SIZE], t[SIZE];
#pragma GCC unroll 6
      for (int i = 0; i < SIZE; i++) d[i] = load(pixels[i * SIZE + j] + c, channels - c);
      input_pass(d, t);
#pragma GCC unroll 6
      for (int i = 0; i < SIZE; i++) passed[i][j] = t[i];
    }
#pragma GCC unroll 6
    for (int i = 0; i < SIZE; i++) {
      Vec t[SIZE];
      input_pass(passed[i], t);
#pragma GCC unroll 6
      for (int j = 0; j < SIZE; j++) store(out + (i * SIZE + j) * step + c, t[j], channels - c);
    }
  }
}

// A^T m A of one tile for `channels` channels, plus bias; `height` x `width` of it is inside the image.
template <int TILE>
void transform_output(const float* products, int64_t step, int64_t channels, const float* bias, bool relu, float* y,
                      int64_t line, int64_t pixel, int64_t height, int64_t width) {
  constexpr int SIZE = TILE + 2;
  for (; channels > 0; channels -= LANES, products += LANES, bias += LANES, y += LANES) {
    const Vec start = load(bias);
    Vec passed[TILE][SIZE];
#pragma GCC unroll 6
    for (int j = 0; j < SIZE; j++) {
      Vec m[SIZE], t[TILE];
#pragma GCC unroll 6
      for (int i = 0; i < SIZE; i++) m[i] = load(products + (i * SIZE + j) * step);
      output_pass(m, t);
#pragma GCC unroll 4
      for (int i = 0; i < TILE; i++) passed[i][j] = t[i];
    }
#pragma GCC unroll 4
    for (int i = 0; i < TILE; i++) {
      if (i >= height) break;
      Vec t[TILE];
      output_pass(passed[i], t);
#pragma GCC unroll 4
      for (int j = 0; j < TILE; j++) {
        if (j >= width) break;
        const Vec found = t[j] + start;
        store(y + i * line + j * pixel, relu ? positive(found) : found, channels);
      }
    }
  }
}

template <int TILE>
void winograd(const Shape& s, const float* x, const float* packed, const float* bias, bool relu, float* y,
              ffi::ThreadPool& pool) {
  constexpr int SIZE = TILE + 2, POSITIONS = SIZE * SIZE;
  const int64_t inner = s.group_inputs(), panels = s.panels(), panel = POSITIONS * inner * LANES;
  const int64_t down = (s.height + TILE - 1) / TILE, across = (s.width + TILE - 1) / TILE;
  const int64_t tiles = s.images * down * across, threads = std::max<int64_t>(pool.num_threads(), 1);
  // Whole products' worth of tiles in a block, and blocks of equal size.
  const int64_t fit = CACHE / int64_t(sizeof(float)) / (POSITIONS * inner);
  const int64_t most = std::max<int64_t>(1, std::min<int64_t>(fit / MAX_ROWS, 8)) * MAX_ROWS;
  const int64_t blocks = (tiles + most - 1) / most, longest = (tiles + blocks - 1) / blocks;
  const int64_t cuts = panel_parts(blocks * s.groups, (panels + PANELS - 1) / PANELS, threads);
  const Left left{inner, 1, 0, 1, 0, inner};
  const int64_t step = longest * inner;
  in_parallel(pool, blocks * s.groups * cuts, [&](int64_t task) {
    const int64_t cut = task % cuts, group = task / cuts % s.groups, block = task / cuts / s.groups;
    const int64_t first = tiles * block / blocks, count = tiles * (block + 1) / blocks - first;
    float* zeros = scratch<float>(inner + POSITIONS * longest * (inner + WIDTH));
    float *transformed = zeros + inner, *products = transformed + POSITIONS * step;
    std::memset(zeros, 0, inner * sizeof(float));
    for (int64_t t = 0; t < count; t++) {
      const int64_t tile = first + t, image = tile / (down * across);
      const int64_t top = tile / across % down * TILE - 1, side = tile % across * TILE - 1;
      const float* pixels[POSITIONS];
      for (int i = 0; i < SIZE; i++)
        for (int j = 0; j < SIZE; j++) {
          const int64_t r = top + i, c = side + j;
          const bool inside = r >= 0 && r < s.height && c >= 0 && c < s.width;
          pixels[i * SIZE + j] =
              inside ? x + ((image * s.height + r) * s.width + c) * s.inputs + group * inner : zeros;
        }
      transform_input<SIZE>(pixels, inner, transformed + t * inner, step);
    }
    const Range range = panel_range(panels, cut, cuts);
    for (int64_t p = range.first; p < range.end; p += PANELS) {
      const int64_t used = std::min<int64_t>(PANELS, range.end - p);
      const float* weights = packed + (group * panels + p) * panel;
      for (int64_t position = 0; position < POSITIONS; position++)
        in_rows(count, [&](int64_t t, int64_t height) {
          TABLE<Floats>.of[height][used](left, transformed + position * step + t * inner,
                                         weights + position * inner * LANES, panel, Ends{nullptr, false},
                                         products + (position * longest + t) * WIDTH, WIDTH, WIDTH);
        });
      const int64_t channel = group * s.group_outputs() + p * LANES;
      const int64_t stored = std::min<int64_t>(used * LANES, s.group_outputs() - p * LANES);
      for (int64_t t = 0; t < count; t++) {
        const int64_t tile = first + t, image = tile / (down * across);
        const int64_t top = tile / across % down * TILE, side = tile % across * TILE;
        float* out = y + ((image * s.height + top) * s.width + side) * s.outputs + channel;
        transform_output<TILE>(products + t * WIDTH, longest * WIDTH, stored, bias + (group * panels + p) * LANES,
                               relu, out, s.width * s.outputs, s.outputs, s.height - top, s.width - side);
      }
    }
  });
}

// Whether `to` is the result of that convolution of `from`; the convolution.
template <typename Dimensions>
std::optional<Shape> shape_of(Dimensions from, Dimensions to, int64_t stride, int64_t groups) {
  if (from.size() != 4 || to.size() != 4 || stride < 1 || groups < 1) return std::nullopt;
  const Shape s{from[0], from[1], from[2], from[3], to[3], stride, groups};
  const bool fits = to[0] == s.images && to[1] == s.rows() && to[2] == s.columns();
  return fits && s.inputs % groups == 0 && s.outputs % groups == 0 ? std::optional(s) : std::nullopt;
}

ffi::Error bad_shapes() { return ffi::Error::InvalidArgument("the shapes do not fit together"); }

ffi::Error bad_packing() {
  return ffi::Error::InvalidArgument("the kernel is packed for another shape or machine");
}

ffi::Error convolve(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::F32> packed,
                    ffi::Buffer<ffi::F32> bias, ffi::ResultBuffer<ffi::F32> y, int64_t stride, int64_t groups,
                    int64_t tile, bool relu) {
  const std::optional<Shape> found = shape_of(x.dimensions(), y->dimensions(), stride, groups);
  if (!found) return bad_shapes();
  const Shape& s = *found;
  const int64_t taps = tile ? (tile + 2) * (tile + 2) : 9, lanes = groups * s.panels() * LANES;
  if (int64_t(packed.element_count()) != taps * s.group_inputs() * lanes || int64_t(bias.element_count()) != lanes)
    return bad_packing();
  const float *in = x.typed_data(), *weights = packed.typed_data(), *start = bias.typed_data();
  if (tile == 0) {
    direct<Floats>(s, in, weights, Ends{start, relu}, 0.0f, y->typed_data(), pool);
    return ffi::Error::Success();
  }
  if (stride != 1) return ffi::Error::InvalidArgument("Winograd needs stride 1");
  if (tile == 2)
    winograd<2>(s, in, weights, start, relu, y->typed_data(), pool);
  else if (tile == 4)
    winograd<4>(s, in, weights, start, relu, y->typed_data(), pool);
  else
    return ffi::Error::InvalidArgument("there are tiles of 2 and 4");
  return ffi::Error::Success();
}

#if defined(__AVX512VNNI__)
// `zero` is the integer that lies around the image: 128 for an int8 image that was shifted to be unsigned.
ffi::Error convolve_bytes(ffi::ThreadPool pool, ffi::Buffer<ffi::U8> x, ffi::Buffer<ffi::S8> packed,
                          ffi::Buffer<ffi::S32> bias, ffi::Buffer<ffi::F32> factor, ffi::Result<ffi::AnyBuffer> y,
                          int64_t stride, int64_t groups, int64_t zero) {
  const std::optional<Shape> found = shape_of(x.dimensions(), y->dimensions(), stride, groups);
  if (!found) return bad_shapes();
  const Shape& s = *found;
  const int64_t inner = (s.group_inputs() + 3) / 4 * 4, lanes = groups * s.panels() * LANES;
  if (groups > 1 && s.group_inputs() % 4) return bad_shapes();
  const bool fits = int64_t(packed.element_count()) == 9 * inner * lanes;
  if (!fits || int64_t(bias.element_count()) != lanes || int64_t(factor.element_count()) != lanes) return bad_packing();
  const IntegerEnds ends{bias.typed_data(), factor.typed_data()};
  const uint8_t* in = x.typed_data();
  if (y->element_type() == ffi::U8)
    direct<Bytes<uint8_t>>(s, in, packed.typed_data(), ends, uint8_t(zero), y->typed_data<uint8_t>(), pool);
  else if (y->element_type() == ffi::S32)
    direct<Bytes<int32_t>>(s, in, packed.typed_data(), ends, uint8_t(zero), y->typed_data<int32_t>(), pool);
  else
    return ffi::Error::InvalidArgument("the result is uint8 or int32");
  return ffi::Error::Success();
}
#endif

}  // namespace

extern "C" int repvgg_lanes() { return LANES; }

// Whether there is `repvgg_conv3x3_int8`.
extern "C" int repvgg_has_int8() {
#if defined(__AVX512VNNI__)
  return 1;
#else
  return 0;
#endif
}

#if defined(__AVX512VNNI__)
XLA_FFI_DEFINE_HANDLER_SYMBOL(repvgg_conv3x3_int8, convolve_bytes,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<ffi::Buffer<ffi::S8>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int64_t>("stride")
                                  .Attr<int64_t>("groups")
                                  .Attr<int64_t>("zero"));
#endif

XLA_FFI_DEFINE_HANDLER_SYMBOL(repvgg_conv3x3, convolve,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("stride")
                                  .Attr<int64_t>("groups")
                                  .Attr<int64_t>("tile")
                                  .Attr<bool>("relu"));
