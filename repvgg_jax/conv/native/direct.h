// The direct sum, on a zero-padded copy of a few rows of the image or of a few small images at a time.

#pragma once

#include "products.h"
#include "tasks.h"

namespace repvgg {

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
  const int64_t panels = s.panels(), panel = 9 * inner * LANES, threads = thread_count(pool);
  const Blocks blocks(s.images, s.rows(), line, s.stride, 3, BUDGET, threads);
  const int64_t cuts = panel_parts(blocks.count, (panels + PANELS - 1) / PANELS, threads), patch = blocks.patch;
  const bool whole = s.groups == 1;  // then the three pixels of a row are one run
  const Left left{s.stride * pixel, 3, line, whole ? 1 : 3, pixel, whole ? 3 * inner : inner};
  in_parallel(pool, blocks.count * cuts, [&](int64_t task) {
    const auto [image, images, first, count] = blocks[task / cuts];
    Element* patches = scratch<Element>(images * patch);
    for (int64_t n = 0; n < images; n++)
      copy_padded(s, x + (image + n) * s.height * s.width * s.inputs, first, count, pixel, zero, patches + n * patch);
    const Range range = panel_range(panels, task % cuts, cuts);
    for (int64_t group = 0; group < s.groups; group++) {
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

}  // namespace repvgg
