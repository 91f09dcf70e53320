// What a net does before and after its convolutions: rounding the image to integers, pooling, and the classifier. XLA
// would run them on its own threads, which look for more work for a while, and would delay those of the convolutions.

#pragma once

#include <algorithm>
#include <cstdint>

#include "halves.h"
#include "products.h"
#include "tasks.h"

namespace repvgg {

inline Vec as_floats(Vec v) { return v; }

#if defined(__AVX512VNNI__)
inline Vec as_floats(Ints v) { return Vec(_mm512_cvtepi32_ps(__m512i(v))); }

// Loads `count` numbers, followed by zeros.
inline Ints load(const uint8_t* p, int64_t count) {
  return Ints(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(first_lanes(count), p)));
}
#endif

// Averages `[images, pixels, channels]` over the pixels: sums, integers exactly, times `factor`.
template <typename Element>
void pool(int64_t images, int64_t pixels, int64_t channels, const Element* x, float factor, float* y,
          ffi::ThreadPool& threads) {
  constexpr int64_t VECTORS = 8;  // independent sums, so that additions need not wait for each other
  const int64_t parts = (channels + VECTORS * LANES - 1) / (VECTORS * LANES);
  in_parallel(threads, images * parts, [&](int64_t task) {
    const int64_t image = task / parts, first = task % parts * VECTORS * LANES;
    const int64_t count = std::min(VECTORS * LANES, channels - first);
    decltype(load(x, 0)) sums[VECTORS] = {};
    for (int64_t pixel = 0; pixel < pixels; pixel++) {
      const Element* from = x + (image * pixels + pixel) * channels + first;
#pragma GCC unroll 8
      for (int64_t v = 0; v < VECTORS; v++)
        if (v * LANES < count) sums[v] += load(from + v * LANES, count - v * LANES);
    }
    for (int64_t v = 0; v * LANES < count; v++)
      store(y + image * channels + first + v * LANES, as_floats(sums[v]) * factor, count - v * LANES);
  });
}

// Multiplies `[images, inputs]` by packed `[inputs, classes]`.
template <typename Kind>
void classify(int64_t images, int64_t inputs, int64_t classes, const typename Kind::Element* x,
              const typename Kind::Weight* packed, const typename Kind::Ends& ends, typename Kind::Out* y,
              ffi::ThreadPool& threads) {
  const int64_t panels = (classes + LANES - 1) / LANES, panel = inputs * LANES;
  const Left left{inputs, 1, 0, 1, 0, inputs};
  in_parallel(threads, (panels + PANELS - 1) / PANELS, [&](int64_t pair) {
    const int64_t p = pair * PANELS, used = std::min<int64_t>(PANELS, panels - p), channel = p * LANES;
    in_rows(images, [&](int64_t image, int64_t height) {
      TABLE<Kind>.of[height][used](left, x + image * inputs, packed + p * panel, panel, ends.from(channel),
                                   y + image * classes + channel, classes, classes - channel);
    });
  });
}

#if defined(__AVX512VNNI__)
// Multiplies by `factor`, rounds to nearest, ties to even, adds `zero` and saturates to uint8; NaN becomes `zero`.
inline void round_to_bytes(int64_t count, const float* x, float factor, int zero, uint8_t* y,
                           ffi::ThreadPool& threads) {
  constexpr int64_t SLICE = 1 << 14;
  const __m512 least = _mm512_set1_ps(-zero), most = _mm512_set1_ps(255 - zero), factors = _mm512_set1_ps(factor);
  in_parallel(threads, (count + SLICE - 1) / SLICE, [&](int64_t slice) {
    const int64_t end = std::min(count, (slice + 1) * SLICE);
    for (int64_t i = slice * SLICE; i < end; i += LANES) {
      const __mmask16 mask = first_lanes(end - i);
      const __m512 real = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, x + i), factors);
      const __mmask16 numbers = _mm512_cmp_ps_mask(real, real, _CMP_ORD_Q);
      const __m512i rounded = _mm512_maskz_cvtps_epi32(numbers, _mm512_min_ps(_mm512_max_ps(real, least), most));
      _mm512_mask_cvtepi32_storeu_epi8(y + i, mask, _mm512_add_epi32(rounded, _mm512_set1_epi32(zero)));
    }
  });
}
#endif

}  // namespace repvgg
