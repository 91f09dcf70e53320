// The matrix product at the core of every convolution: rows of pixels or tiles, each number broadcast, times vectors of
// output channels, with all sums in registers.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX512VNNI__)
#include <immintrin.h>
#endif

namespace repvgg {

#if defined(__AVX512F__)
constexpr int LANES = 16, MAX_ROWS = 14;  // 28 accumulators, 2 panels and a broadcast in 32 registers
#elif defined(__AVX__)
constexpr int LANES = 8, MAX_ROWS = 6;  // 12 + 2 + 1 of 16 registers
#else
constexpr int LANES = 4, MAX_ROWS = 12;  // 24 + 2 + 1 of 32 registers (Arm)
#endif
constexpr int PANELS = 2;             // vectors of output channels in one product
constexpr int WIDTH = PANELS * LANES;
constexpr int64_t AHEAD = 6144;       // numbers: prefetch distance of the kernel, which rarely fits in the cache
constexpr int64_t CACHE = 1 << 19;    // bytes of a core's cache that a task's inputs may use

typedef float Vec __attribute__((vector_size(LANES * sizeof(float))));

constexpr int64_t up_to(int64_t count, int64_t multiple) {
  return (count + multiple - 1) / multiple * multiple;
}

inline Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

// Loads `count` numbers, followed by zeros.
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

// ReLU; NaN stays NaN.
inline Vec positive(Vec v) { return v < 0.0f ? Vec{} : v; }

struct Shape {
  int64_t images, height, width, inputs, outputs, stride, groups;
  int64_t rows() const { return height ? (height - 1) / stride + 1 : 0; }
  int64_t columns() const { return width ? (width - 1) / stride + 1 : 0; }
  bool empty() const { return !images || !height || !width; }
  int64_t group_inputs() const { return inputs / groups; }
  int64_t group_outputs() const { return outputs / groups; }
  int64_t panels() const { return (group_outputs() + LANES - 1) / LANES; }  // of a group
  // The shape with inputs and outputs swapped, as in the convolution that computes the input gradient.
  Shape turned() const { return {images, height, width, outputs, inputs, stride, groups}; }
};

// The left matrix of a product: its rows are `row` numbers apart and consist of `outer` x `inner` runs of `length`
// numbers.
struct Left {
  int64_t row, outer, outer_step, inner, inner_step, length;
};

// Initial value (bias) and final operation (ReLU) of a float product, starting at one channel.
struct FloatEnds {
  const float* bias;  // none if null
  bool relu;
  FloatEnds from(int64_t channel) const { return {bias ? bias + channel : nullptr, relu}; }
};

// Computes ROWS x (COUNT * LANES) numbers of a product and stores `width` columns.
template <int ROWS, int COUNT>
void multiply(const Left& left, const float* a, const float* b, int64_t panel, const FloatEnds& ends,
              float* out, int64_t out_row, int64_t width) {
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

// A kind of product, used as a template argument: `STEP` elements are multiplied at a time, and each run of weights is
// padded with zeros to a multiple of `RUN`. A `Session` lives as long as a task.
//
// This one is float32, one number at a time.
struct Floats {
  using Element = float;
  using Weight = float;
  using Out = float;
  using Ends = FloatEnds;
  struct Session {};
  static constexpr bool TILED = false;
  static constexpr int STEP = 1, RUN = 1;
  template <int ROWS, int COUNT>
  static constexpr auto product = multiply<ROWS, COUNT>;
};

#if defined(__AVX512VNNI__)
// The compiler keeps arrays of these in registers, unlike arrays of __m512i, whose pointers may alias anything.
typedef int32_t Ints __attribute__((vector_size(LANES * sizeof(int32_t))));

// Initial value of an integer product (an int32 bias), and the factor that converts a sum to uint8 or float32.
struct IntegerEnds {
  const int32_t* bias;
  const float* factor;
  IntegerEnds from(int64_t channel) const { return {bias + channel, factor + channel}; }
};

inline __mmask16 first_lanes(int64_t count) {
  return (1u << std::min<int64_t>(std::max<int64_t>(count, 0), LANES)) - 1;
}

inline void finish(__m512i sum, __m512, int32_t* out, __mmask16 mask) {
  _mm512_mask_storeu_epi32(out, mask, sum);
}

inline void finish(__m512i sum, __m512 factor, float* out, __mmask16 mask) {
  _mm512_mask_storeu_ps(out, mask, _mm512_mul_ps(_mm512_cvtepi32_ps(sum), factor));
}

// Rounds to nearest, ties to even, and saturates, like `QuantizedNet`.
inline void finish(__m512i sum, __m512 factor, uint8_t* out, __mmask16 mask) {
  const __m512 real = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), factor);
  // A number too large for int32 becomes 2^31, which saturates like others above 255.
  const __m512i integers = _mm512_cvtps_epi32(_mm512_max_ps(real, _mm512_setzero_ps()));
  _mm512_mask_cvtusepi32_storeu_epi8(out, mask, integers);
}

// `multiply` for bytes, four channels at a time; `left.length` counts bytes.
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
      const __mmask16 mask = first_lanes(width - v * LANES);
      finish(__m512i(sums[m][v]), _mm512_loadu_ps(ends.factor + v * LANES), out + m * out_row + v * LANES, mask);
    }
}

// uint8 times int8, with int32 results, or results multiplied by a factor: float32, or rounded to uint8.
template <typename Result>
struct Bytes {
  using Element = uint8_t;
  using Weight = int8_t;
  using Out = Result;
  using Ends = IntegerEnds;
  struct Session {};
  static constexpr bool TILED = false;
  static constexpr int STEP = 4, RUN = 4;
  template <int ROWS, int COUNT>
  static constexpr auto product = multiply_bytes<Result, ROWS, COUNT>;
};
#endif

// The products of one kind, indexed by rows and panels.
template <typename Kind>
struct Table {
  using Multiply = std::decay_t<decltype(Kind::template product<1, 1>)>;
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

// Splits `count` rows into products of nearly equal height and calls `act(first, height)` for each.
template <typename Act>
void in_rows(int64_t count, Act act) {
  const int64_t parts = (count + MAX_ROWS - 1) / MAX_ROWS;
  for (int64_t part = 0; part < parts; part++) {
    const int64_t first = count * part / parts, end = count * (part + 1) / parts;
    act(first, end - first);
  }
}

}  // namespace repvgg
