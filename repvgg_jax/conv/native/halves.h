// Products of bfloat16 with float32 sums (AVX-512 BF16).

#pragma once

#include "products.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>

namespace repvgg {

typedef uint16_t Half;  // the bits of a bfloat16

// Bias and ReLU, rounded to the nearest; the first `count` numbers.
inline void finish(__m512 sum, const FloatEnds& ends, int64_t channel, Half* out, int64_t count) {
  Vec v;
  if (ends.bias) sum = _mm512_add_ps(sum, _mm512_loadu_ps(ends.bias + channel));
  std::memcpy(&v, &sum, sizeof v);
  if (ends.relu) v = positive(v);
  std::memcpy(&sum, &v, sizeof v);
  _mm256_mask_storeu_epi16(out, first_lanes(count), (__m256i)_mm512_cvtneps_pbh(sum));
}

// `multiply` of bfloat16, two channels at a time.
template <int ROWS, int COUNT>
void multiply_halves(const Left& left, const Half* a, const Half* b, int64_t panel, const FloatEnds& ends, Half* out,
                     int64_t out_row, int64_t width) {
  Vec sums[ROWS][COUNT];
#pragma GCC unroll 16
  for (int m = 0; m < ROWS; m++)
#pragma GCC unroll 2
    for (int v = 0; v < COUNT; v++) sums[m][v] = Vec{};
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
      finish(__m512(sums[m][v]), ends, v * LANES, out + m * out_row + v * LANES, width - v * LANES);
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
