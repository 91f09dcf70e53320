// The direct sum, on a zero-padded copy of a few rows of an image, or of a few small images, at a time.

#pragma once

#include "products.h"
#include "tasks.h"
#include "tiles.h"

namespace repvgg {

// Copies the input rows that output rows `first` ... `first + count - 1` read, padded with `zero` on all sides. Each
// pixel takes `pixel` elements, the surplus filled with zeros.
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

constexpr int64_t COLOURS = 3;  // channels of a photograph

// Layout of the numbers that an output pixel is computed from in a task's copy of the image, and of their weights in a
// panel: runs of adjacent numbers.
template <typename Kind>
struct Runs {
  bool gathered;  // each output pixel has its own copy of all its 3 x 3 pixels: one run
  // There are `rows` times `count` runs of `length` numbers; a pixel has `pixel` numbers, of which a group's are `inner`.
  int64_t inner, pixel, rows, count, length;

  explicit Runs(const Shape& s) {
    // A run of three pixels would be mostly padding here.
    gathered = Kind::STEP > 1 && s.groups == 1 && s.inputs == COLOURS;
    inner = up_to(s.group_inputs(), Kind::STEP);
    pixel = s.groups * inner;
    rows = gathered ? 1 : 3;
    count = s.groups == 1 ? 1 : 3;  // with one group, the three pixels of a row are contiguous
    length = gathered ? up_to(9 * COLOURS, Kind::RUN) : 3 / count * inner;
  }
  int64_t panel() const { return rows * count * up_to(length, Kind::RUN) * LANES; }
  int64_t packed(const Shape& s) const { return s.groups * s.panels() * panel(); }
};

// Copies the 3 x 3 pixels of each of output rows `first` ... `first + count - 1` side by side: `length` elements per
// output pixel. `lines` has room for three padded rows.
template <typename Element>
void gather(const Shape& s, const Element* image, int64_t first, int64_t count, int64_t length, Element zero,
            Element* lines, Element* to) {
  constexpr int64_t THREE = 3 * COLOURS;
  const int64_t line = ((s.columns() - 1) * s.stride + 3) * COLOURS;
  for (int64_t row = first; row < first + count; row++) {
    copy_padded(s, image, row, 1, COLOURS, zero, lines);
    for (int64_t c = 0; c < s.columns(); c++, to += length) {
      const Element* from = lines + c * s.stride * COLOURS;
      for (int64_t r = 0; r < 3; r++) std::memcpy(to + r * THREE, from + r * line, THREE * sizeof(Element));
      // The surplus has weights of zero: any byte will do, but of bfloat16 not NaN.
      if (sizeof(Element) > 1) std::fill(to + 3 * THREE, to + length, Element(0));
    }
  }
}

template <typename Kind>
void direct(const Shape& s, const typename Kind::Element* x, const typename Kind::Weight* packed,
            const typename Kind::Ends& ends, typename Kind::Element zero, typename Kind::Out* y,
            ffi::ThreadPool& pool) {
  using Element = typename Kind::Element;
  constexpr int64_t BUDGET = CACHE / sizeof(Element);
  const Runs<Kind> runs(s);
  const int64_t inner = runs.inner, pixel = runs.pixel;
  const int64_t width = (s.columns() - 1) * s.stride + 3, line = width * pixel;
  const int64_t panels = s.panels(), panel = runs.panel(), threads = thread_count(pool);
  // A task's copy of the image: the length of a row, and how many rows further the next output row is.
  const int64_t copied = runs.gathered ? s.columns() * runs.length : line, step = runs.gathered ? 1 : s.stride;
  const Blocks blocks(s.images, s.rows(), copied, step, runs.rows, BUDGET, threads);
  const int64_t cuts = panel_parts(blocks.count, (panels + PANELS - 1) / PANELS, threads), patch = blocks.patch;
  const Left left{runs.gathered ? runs.length : s.stride * pixel, runs.rows, line, runs.count, pixel, runs.length};
  in_parallel(pool, blocks.count * cuts, [&](int64_t task) {
    // Not a structured binding: older versions of Clang cannot capture those.
    const Blocks::Block block = blocks[task / cuts];
    const int64_t image = block.image, images = block.images, first = block.row, count = block.rows;
    [[maybe_unused]] const typename Kind::Session session{};
    Element* patches = scratch<Element>(images * patch + Kind::RUN + (runs.gathered ? 3 * line : 0));
    Element* after = patches + images * patch;
    std::fill_n(after, Kind::RUN, Element(0));  // the last run may read this padding
    for (int64_t n = 0; n < images; n++) {
      const Element* from = x + (image + n) * s.height * s.width * s.inputs;
      if (runs.gathered)
        gather(s, from, first, count, runs.length, zero, after + Kind::RUN, patches + n * patch);
      else
        copy_padded(s, from, first, count, pixel, zero, patches + n * patch);
    }
    const Range range = panel_range(panels, task % cuts, cuts);
    for (int64_t group = 0; group < s.groups; group++) {
      for (int64_t p = range.first; p < range.end; p += PANELS) {
        const int64_t used = std::min<int64_t>(PANELS, range.end - p), channel = group * s.group_outputs() + p * LANES;
        const int64_t stored = std::min<int64_t>(used * LANES, s.group_outputs() - p * LANES);
        const auto* weights = packed + (group * panels + p) * panel;
        const auto own = ends.from((group * panels + p) * LANES);
        // Rows of all images in the block, in sequence.
        const auto from = [&](int64_t row) {
          return patches + row / count * patch + row % count * step * copied + group * inner;
        };
        const auto to = [&](int64_t row) {
          return y + ((image + row / count) * s.rows() + first + row % count) * s.columns() * s.outputs + channel;
        };
        if constexpr (Kind::TILED) {
          const auto at = [&](int64_t row, int64_t column) {
            return Chunk<Kind>{from(row) + column * left.row, to(row) + column * s.outputs};
          };
          in_tiles<Kind>(images * count, s.columns(), at, used, left, weights, panel, own, s.outputs, stored);
        } else
          for (int64_t row = 0; row < images * count; row++)
            in_rows(s.columns(), [&](int64_t c, int64_t height) {
              TABLE<Kind>.of[height][used](left, from(row) + c * left.row, weights, panel, own,
                                           to(row) + c * s.outputs, s.outputs, stored);
            });
      }
    }
  });
}

}  // namespace repvgg
