// Products in bfloat16 with float32 sums (AVX-512 BF16).

#pragma once

#include "products.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>

namespace repvgg {

typedef uint16_t Half;  // the bits of a bfloat16

// Loads `count` numbers, followed by zeros.
inline Vec load(const Half* p, int64_t count) {
  const __m512i bits = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first_lanes(count), p));
  return Vec(_mm512_castsi512_ps(_mm512_slli_epi32(bits, 16)));
}

// Rounds to nearest.
inline void store(Half* p, Vec v, int64_t count) {
  _mm256_mask_storeu_epi16(p, first_lanes(count), (__m256i)_mm512_cvtneps_pbh(__m512(v)));
}

// Applies ReLU if requested, rounds to nearest, and stores the lanes in the mask.
inline void finish(__m512 sum, bool relu, Half* out, __mmask16 stored) {
  if (relu) sum = _mm512_max_ps(_mm512_setzero_ps(), sum);  // in this order, NaN stays NaN
  _mm256_mask_storeu_epi16(out, stored, (__m256i)_mm512_cvtneps_pbh(sum));
}

// A product inside Winograd's algorithm, which applies ReLU later.
inline void finish(__m512 sum, bool, float* out, __mmask16 stored) { _mm512_mask_storeu_ps(out, stored, sum); }

// `multiply` for bfloat16, two channels at a time.
template <typename Out, int ROWS, int COUNT>
void multiply_halves(const Left& left, const Half* a, const Half* b, int64_t panel, const FloatEnds& ends, Out* out,
                     int64_t out_row, int64_t width) {
  Vec sums[ROWS][COUNT];
#pragma GCC unroll 16
  for (int m = 0; m < ROWS; m++)
#pragma GCC unroll 2
    for (int v = 0; v < COUNT; v++) sums[m][v] = ends.bias ? load(ends.bias + v * LANES) : Vec{};
  for (int64_t i = 0; i < left.outer; i++)
    for (int64_t j = 0; j < left.inner; j++) {
      const Half* x = a + i * left.outer_step + j * left.inner_step;
      for (int64_t k = 0; k < left.length; k += 2, b += 2 * LANES) {
        Ints w[COUNT];
#pragma GCC unroll 2
        for (int v = 0; v < COUNT; v++) {
          std::memcpy(&w[v], b + v * panel, sizeof(Ints));
          __builtin_prefetch(b + v * panel + AHEAD);
        }
#pragma GCC unroll 16
        for (int m = 0; m < ROWS; m++) {
          int32_t two;
          std::memcpy(&two, x + m * left.row + k, 4);
          const Ints pixels = two - Ints{};
#pragma GCC unroll 2
          for (int v = 0; v < COUNT; v++)
            sums[m][v] = Vec(_mm512_dpbf16_ps(__m512(sums[m][v]), (__m512bh)pixels, (__m512bh)w[v]));
        }
      }
    }
#pragma GCC unroll 16
  for (int m = 0; m < ROWS; m++)
#pragma GCC unroll 2
    for (int v = 0; v < COUNT; v++)
      finish(__m512(sums[m][v]), ends.relu, out + m * out_row + v * LANES, first_lanes(width - v * LANES));
}

template <typename Result>
struct Halves {
  using Element = Half;
  using Weight = Half;
  using Out = Result;
  using Ends = FloatEnds;
  static constexpr bool TILED = false;
  static constexpr int STEP = 2, RUN = 2;
  struct Session {};
  template <int ROWS, int COUNT>
  static constexpr auto product = multiply_halves<Result, ROWS, COUNT>;
};

}  // namespace repvgg
#endif
