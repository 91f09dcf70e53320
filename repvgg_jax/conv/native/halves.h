// Products in bfloat16 with float32 sums (AVX-512 BF16).

#pragma once

#include "products.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>

namespace repvgg {

typedef uint16_t Half;  // the bits of a bfloat16

// Applies ReLU if requested, rounds to nearest, and stores the lanes in the mask.
inline void finish(__m512 sum, bool relu, Half* out, __mmask16 stored) {
  if (relu) sum = _mm512_max_ps(_mm512_setzero_ps(), sum);  // in this order, NaN stays NaN
  _mm256_mask_storeu_epi16(out, stored, (__m256i)_mm512_cvtneps_pbh(sum));
}

// `multiply` for bfloat16, two channels at a time.
template <int ROWS, int COUNT>
void multiply_halves(const Left& left, const Half* a, const Half* b, int64_t panel, const FloatEnds& ends, Half* out,
                     int64_t out_row, int64_t width) {
  Vec sums[ROWS][COUNT];
#pragma GCC unroll 16
  for (int m = 0; m < ROWS; m++)
#pragma GCC unroll 2
    for (int v = 0; v < COUNT; v++) sums[m][v] = load(ends.bias + v * LANES);
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

struct Halves {
  using Element = Half;
  using Weight = Half;
  using Out = Half;
  using Ends = FloatEnds;
  static constexpr bool TILED = false;
  static constexpr int STEP = 2, RUN = 2;
  struct Session {};
  template <int ROWS, int COUNT>
  static constexpr auto product = multiply_halves<ROWS, COUNT>;
};

}  // namespace repvgg
#endif
