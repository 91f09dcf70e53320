// Winograd F(m x m, 3x3): each block of tiles is transformed, multiplied and transformed back in turn. Transforms are
// float32, products float32 or bfloat16.

#pragma once

#include "halves.h"
#include "tasks.h"

namespace repvgg {

// `input_pass` applies B^T to a column or row of a tile, `output_pass` applies A^T. For m = 4 the interpolation points
// are 0, +-A, +-B and infinity: with A = 5/8 and B = 3/2, which are exact in binary, the rounding error is half of that
// with the usual 1 and 2.
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

// Applies a pass to the columns of a tile, then to the rows of the result: FROM x FROM vectors become TO x TO.
template <int FROM, int TO, typename Load, typename Pass, typename Store>
inline void transform(const Load& load_at, const Pass& pass, const Store& store_at) {
  Vec passed[TO][FROM];
#pragma GCC unroll 6
  for (int j = 0; j < FROM; j++) {
    Vec column[FROM], t[TO];
#pragma GCC unroll 6
    for (int i = 0; i < FROM; i++) column[i] = load_at(i, j);
    pass(column, t);
#pragma GCC unroll 6
    for (int i = 0; i < TO; i++) passed[i][j] = t[i];
  }
#pragma GCC unroll 6
  for (int i = 0; i < TO; i++) {
    Vec t[TO];
    pass(passed[i], t);
#pragma GCC unroll 6
    for (int j = 0; j < TO; j++) store_at(i, j, t[j]);
  }
}

// B^T d B of the tile whose outputs start at (top, side), for a group whose first channel is at `image`. Position p of
// channel c is written to `out[p * step + c]`, with zeros up to channel `padded`. Pixels outside the image come from
// `zeros`.
template <int TILE, typename Element>
void transform_input(const Shape& s, const Element* image, int64_t top, int64_t side, const Element* zeros,
                     Element* out, int64_t step, int64_t padded) {
  constexpr int SIZE = TILE + 2;
  const Element* pixels[SIZE * SIZE];
  for (int i = 0; i < SIZE; i++)
    for (int j = 0; j < SIZE; j++) {
      const int64_t r = top + i - 1, c = side + j - 1;
      const bool inside = r >= 0 && r < s.height && c >= 0 && c < s.width;
      pixels[i * SIZE + j] = inside ? image + (r * s.width + c) * s.inputs : zeros;
    }
  const int64_t channels = s.group_inputs();
  for (int64_t c = 0; c < channels; c += LANES)
    transform<SIZE, SIZE>([&](int i, int j) { return load(pixels[i * SIZE + j] + c, channels - c); },
                          [](const auto& d, auto& t) { input_pass(d, t); },
                          [&](int i, int j, Vec t) { store(out + (i * SIZE + j) * step + c, t, padded - c); });
}

// A^T m A of one tile for `channels` channels, plus bias; the part inside the image is `height` x `width`.
template <int TILE, typename Element>
void transform_output(const float* products, int64_t step, int64_t channels, FloatEnds ends, Element* y, int64_t line,
                      int64_t pixel, int64_t height, int64_t width) {
  constexpr int SIZE = TILE + 2;
  for (; channels > 0; channels -= LANES, products += LANES, ends = ends.from(LANES), y += LANES) {
    const Vec start = ends.bias ? load(ends.bias) : Vec{};
    transform<SIZE, TILE>([&](int i, int j) { return load(products + (i * SIZE + j) * step); },
                          [](const auto& m, auto& t) { output_pass(m, t); },
                          [&](int i, int j, Vec t) {
                            if (i >= height || j >= width) return;
                            const Vec found = t + start;
                            store(y + i * line + j * pixel, ends.relu ? positive(found) : found, channels);
                          });
  }
}

template <int TILE, typename Kind>
void winograd(const Shape& s, const typename Kind::Element* x, const typename Kind::Weight* packed,
              const FloatEnds& ends, typename Kind::Element* y, ffi::ThreadPool& pool) {
  using Element = typename Kind::Element;
  constexpr int SIZE = TILE + 2, POSITIONS = SIZE * SIZE;
  const int64_t inner = up_to(s.group_inputs(), Kind::RUN), panels = s.panels(), panel = POSITIONS * inner * LANES;
  const int64_t down = (s.height + TILE - 1) / TILE, across = (s.width + TILE - 1) / TILE;
  const int64_t tiles = s.images * down * across, threads = thread_count(pool);
  // A block holds as many tiles as fill whole products. Blocks have nearly equal size, and each thread gets as many.
  const int64_t fit = CACHE / int64_t(sizeof(Element)) / (POSITIONS * inner);
  const int64_t most = std::max<int64_t>(1, std::min<int64_t>(fit / MAX_ROWS, 8)) * MAX_ROWS;
  const int64_t least = (tiles + most - 1) / most, even = up_to(least, threads);
  const int64_t blocks = even * MAX_ROWS <= tiles ? even : least, longest = (tiles + blocks - 1) / blocks;
  const int64_t cuts = panel_parts(blocks * s.groups, (panels + PANELS - 1) / PANELS, threads);
  const Left left{inner, 1, 0, 1, 0, inner};
  const int64_t step = longest * inner;
  in_parallel(pool, blocks * s.groups * cuts, [&](int64_t task) {
    const int64_t cut = task % cuts, group = task / cuts % s.groups, block = task / cuts / s.groups;
    const int64_t first = tiles * block / blocks, count = tiles * (block + 1) / blocks - first;
    const int64_t multiplied = POSITIONS * longest * WIDTH;
    float* products = scratch<float>(multiplied + inner + POSITIONS * step);
    auto* zeros = reinterpret_cast<Element*>(products + multiplied);
    Element* transformed = zeros + inner;
    std::memset(zeros, 0, inner * sizeof(Element));
    for (int64_t t = 0; t < count; t++) {
      const int64_t tile = first + t, image = tile / (down * across);
      const int64_t top = tile / across % down * TILE, side = tile % across * TILE;
      transform_input<TILE>(s, x + image * s.height * s.width * s.inputs + group * s.group_inputs(), top, side, zeros,
                            transformed + t * inner, step, inner);
    }
    const Range range = panel_range(panels, cut, cuts);
    for (int64_t p = range.first; p < range.end; p += PANELS) {
      const int64_t used = std::min<int64_t>(PANELS, range.end - p);
      const auto* weights = packed + (group * panels + p) * panel;
      for (int64_t position = 0; position < POSITIONS; position++)
        in_rows(count, [&](int64_t t, int64_t height) {
          TABLE<Kind>.of[height][used](left, transformed + position * step + t * inner,
                                       weights + position * inner * LANES, panel, FloatEnds{nullptr, false},
                                       products + (position * longest + t) * WIDTH, WIDTH, WIDTH);
        });
      const int64_t channel = group * s.group_outputs() + p * LANES;
      const int64_t stored = std::min<int64_t>(used * LANES, s.group_outputs() - p * LANES);
      for (int64_t t = 0; t < count; t++) {
        const int64_t tile = first + t, image = tile / (down * across);
        const int64_t top = tile / across % down * TILE, side = tile % across * TILE;
        Element* out = y + ((image * s.height + top) * s.width + side) * s.outputs + channel;
        transform_output<TILE>(products + t * WIDTH, longest * WIDTH, stored, ends.from((group * panels + p) * LANES),
                               out, s.width * s.outputs, s.outputs, s.height - top, s.width - side);
      }
    }
  });
}

}  // namespace repvgg
