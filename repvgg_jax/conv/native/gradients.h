// Additions for training: packing of the kernel inside the call, and the convolution's two gradients.

#pragma once

#include <cmath>

#include "direct.h"
#include "products.h"
#include "tasks.h"
#include "winograd.h"

namespace repvgg {

// The convolution that a kernel is packed for.
enum class Use {
  FORWARD,
  BACKWARD,  // the input gradient with stride 1: the kernel rotated by 180 degrees
  SPREAD,    // the input gradient with stride 2: the taps sorted by the input pixels that they reach (`spread`)
};

// Taps that reach the input pixels in even rows and columns; even rows, odd columns; odd rows, even columns; odd rows
// and columns. Within each group they belong to the output pixel at half the coordinates, then to its neighbours to the
// right, below, and below to the right.
constexpr int SPREAD_TAPS[9] = {4, 5, 3, 7, 1, 8, 6, 2, 0};
constexpr int SPREAD_FIRST[4] = {0, 1, 3, 5};

inline int tap_for(Use use, int position) {
  return use == Use::FORWARD ? position : use == Use::BACKWARD ? 8 - position : SPREAD_TAPS[position];
}

constexpr float AT_A = 1 / (2 * AA * (AA - BB)), AT_B = 1 / (2 * BB * (BB - AA));

// Applies G of a tile (see `winograd.py`) to a column or row of a kernel.
inline void kernel_pass(const Vec (&g)[3], Vec (&t)[4]) {
  const Vec even = 0.5f * (g[0] + g[2]), odd = 0.5f * g[1];
  t[0] = g[0];
  t[1] = even + odd;
  t[2] = even - odd;
  t[3] = g[2];
}

inline void kernel_pass(const Vec (&g)[3], Vec (&t)[6]) {
  const Vec even = AT_A * (g[0] + AA * g[2]), odd = AT_A * A * g[1];
  const Vec even2 = AT_B * (g[0] + BB * g[2]), odd2 = AT_B * B * g[1];
  t[0] = 1 / (AA * BB) * g[0];
  t[1] = even + odd;
  t[2] = even - odd;
  t[3] = even2 + odd2;
  t[4] = even2 - odd2;
  t[5] = g[2];
}

template <int SIZE>
void transform_kernel(const Vec (&taps)[9], float* out, int64_t step) {
  transform<3, SIZE>([&](int i, int j) { return taps[i * 3 + j]; }, [](const auto& g, auto& t) { kernel_pass(g, t); },
                     [&](int i, int j, Vec t) { store(out + (i * SIZE + j) * step, t); });
}

inline int64_t positions(int64_t tile) { return tile ? (tile + 2) * (tile + 2) : 9; }

// A kernel [3, 3, inputs / groups, outputs] of the convolution `s`, or its Winograd transform, packed for the given use
// in the layout of `native.pack_kernel`.
class Packed {
 public:
  Packed(const Shape& s, const float* kernel, Use use, int64_t tile, ffi::ThreadPool& pool)
      : Packed(s, use == Use::FORWARD ? s : s.turned(), kernel, use, tile, pool) {}
  const float* data() const { return memory_.data(); }

 private:
  // `own` is the shape of the convolution that the kernel is packed for.
  Packed(const Shape& s, const Shape& own, const float* kernel, Use use, int64_t tile, ffi::ThreadPool& pool)
      : memory_(own.groups * own.panels() * LANES * positions(tile) * own.group_inputs()) {
    const bool forward = use == Use::FORWARD;
    const int64_t inputs = s.group_inputs(), outputs = s.group_outputs();
    const int64_t inner = own.group_inputs(), columns = own.group_outputs();
    const int64_t panels = own.panels(), step = inner * LANES;
    in_parallel(pool, s.groups * panels, [&](int64_t task) {
      const int64_t group = task / panels, first = task % panels * LANES;
      const int64_t count = std::min<int64_t>(LANES, columns - first);
      float* out = memory_.data() + task * positions(tile) * step;
      for (int64_t k = 0; k < inner; k++, out += LANES) {
        Vec taps[9];
        for (int p = 0; p < 9; p++) {
          const float* matrix = kernel + tap_for(use, p) * inputs * s.outputs + group * outputs;
          if (forward) {
            taps[p] = load(matrix + k * s.outputs + first, count);
          } else {
            taps[p] = Vec{};
            for (int64_t v = 0; v < count; v++) taps[p][v] = matrix[(first + v) * s.outputs + k];
          }
        }
        if (tile == 2)
          transform_kernel<4>(taps, out, step);
        else if (tile == 4)
          transform_kernel<6>(taps, out, step);
        else
          for (int p = 0; p < 9; p++) store(out + p * step, taps[p]);
      }
    });
  }

  Borrowed memory_;
};

// Computes the input gradient of a stride-2 convolution with shape `s` from its output gradient. Each input pixel was
// read by one, two or four taps, depending on whether its row and column are odd. So the result interleaves four
// convolutions of the output gradient.
inline void spread(const Shape& s, const float* gradient, const float* packed, float* to_input, ffi::ThreadPool& pool) {
  const int64_t inner = s.group_outputs(), panels = s.turned().panels(), panel = 9 * inner * LANES;
  const int64_t line = (s.columns() + 1) * s.outputs;
  const Blocks blocks(s.images, s.rows(), line, 1, 2, CACHE / int64_t(sizeof(float)), thread_count(pool));
  const int64_t cuts = panel_parts(blocks.count, (panels + PANELS - 1) / PANELS, thread_count(pool));
  in_parallel(pool, blocks.count * cuts, [&](int64_t task) {
    const Blocks::Block block = blocks[task / cuts];
    float* patches = scratch<float>(block.images * blocks.patch);
    for (int64_t n = 0; n < block.images; n++) {
      float* to = patches + n * blocks.patch;
      for (int64_t r = block.row; r <= block.row + block.rows; r++, to += line) {
        const int64_t copied = r < s.rows() ? line - s.outputs : 0;
        const float* from = gradient + ((block.image + n) * s.rows() + r) * s.columns() * s.outputs;
        std::copy(from, from + copied, to);
        std::fill(to + copied, to + line, 0.0f);
      }
    }
    const Range range = panel_range(panels, task % cuts, cuts);
    for (int64_t group = 0; group < s.groups; group++)
      for (int64_t p = range.first; p < range.end; p += PANELS) {
        const int64_t used = std::min<int64_t>(PANELS, range.end - p);
        const int64_t channel = group * s.group_inputs() + p * LANES;
        const int64_t stored = std::min<int64_t>(used * LANES, s.group_inputs() - p * LANES);
        for (int parity = 0; parity < 4; parity++) {
          const int64_t down = parity / 2, right = parity % 2, columns = (s.width - right + 1) / 2;
          const Left left{s.outputs, 1 + down, line, 1 + right, s.outputs, inner};
          const float* weights = packed + (group * panels + p) * panel + SPREAD_FIRST[parity] * inner * LANES;
          for (int64_t n = 0; n < block.images; n++)
            for (int64_t r = 0; r < block.rows; r++) {
              const int64_t row = 2 * (block.row + r) + down;
              if (row >= s.height) continue;
              const float* a = patches + n * blocks.patch + r * line + group * inner;
              float* out = to_input + (((block.image + n) * s.height + row) * s.width + right) * s.inputs + channel;
              in_rows(columns, [&](int64_t c, int64_t height) {
                TABLE<Floats>.of[height][used](left, a + c * s.outputs, weights, panel, FloatEnds{nullptr, false},
                                               out + 2 * c * s.inputs, 2 * s.inputs, stored);
              });
            }
        }
      }
  });
}

// The pixels that a product of the kernel gradient iterates over: some images, row by row. The left matrix is read in
// place from the convolution's input; the rows of the right one are contiguous.
struct Walk {
  int64_t images, image_step, image_pixels, rows, row_step, row_pixels, columns, column_step;
};

// Adds the product of the transposed left matrix and the right one to ROWS x (COUNT * LANES) sums.
template <int ROWS, int COUNT>
void accumulate(const Walk& walk, const float* a, const float* b, float* out, int64_t out_row, int64_t width) {
  Vec sums[ROWS][COUNT];
#pragma GCC unroll 16
  for (int m = 0; m < ROWS; m++)
#pragma GCC unroll 2
    for (int v = 0; v < COUNT; v++) sums[m][v] = load(out + m * out_row + v * LANES, width - v * LANES);
  for (int64_t n = 0; n < walk.images; n++)
    for (int64_t r = 0; r < walk.rows; r++) {
      const float* x = a + n * walk.image_step + r * walk.row_step;
      const float* g = b + (n * walk.image_pixels + r * walk.row_pixels) * WIDTH;
      for (int64_t c = 0; c < walk.columns; c++, x += walk.column_step, g += WIDTH) {
        Vec w[COUNT];
#pragma GCC unroll 2
        for (int v = 0; v < COUNT; v++) w[v] = load(g + v * LANES);
#pragma GCC unroll 16
        for (int m = 0; m < ROWS; m++)
#pragma GCC unroll 2
          for (int v = 0; v < COUNT; v++) sums[m][v] += x[m] * w[v];
      }
    }
#pragma GCC unroll 16
  for (int m = 0; m < ROWS; m++)
#pragma GCC unroll 2
    for (int v = 0; v < COUNT; v++) store(out + m * out_row + v * LANES, sums[m][v], width - v * LANES);
}

struct Accumulating {
  template <int ROWS, int COUNT>
  static constexpr auto product = accumulate<ROWS, COUNT>;
};

// The sums omit products with the zero padding. These matter where a gradient is not finite: there the products are
// NaN, as in XLA, and so is the gradient of the kernel's tap.
inline void keep_what_is_not_finite(const Shape& s, const float* gradient, float* to_kernel) {
  const int64_t size = s.group_inputs() * s.outputs;
  const auto outside = [&](int64_t place, int64_t tap, int64_t length) {
    const int64_t read = place * s.stride + tap - 1;
    return read < 0 || read >= length;
  };
  const auto at_border = [&](int64_t place, int64_t length) {
    return outside(place, 0, length) || outside(place, 2, length);
  };
  for (int64_t n = 0; n < s.images; n++)
    for (int64_t r = 0; r < s.rows(); r++)
      for (int64_t c = 0; c < s.columns(); c++) {
        if (!at_border(r, s.height) && !at_border(c, s.width)) {
          c = std::max(c, s.columns() - 2);  // the only other column that can be at the border is the last
          continue;
        }
        const float* g = gradient + ((n * s.rows() + r) * s.columns() + c) * s.outputs;
        Vec zeros{};
        for (int64_t o = 0; o < s.outputs; o += LANES) zeros += 0.0f * load(g + o, s.outputs - o);
        bool finite = true;
        for (int v = 0; v < LANES; v++) finite &= zeros[v] == 0.0f;
        if (finite) continue;
        for (int tap = 0; tap < 9; tap++) {
          if (!outside(r, tap / 3, s.height) && !outside(c, tap % 3, s.width)) continue;
          for (int64_t k = 0; k < size; k++)
            if (g[k % s.outputs] * 0.0f != 0.0f) to_kernel[tap * size + k] = NAN;
        }
      }
}

// The kernel gradient, [3, 3, inputs / groups, outputs]. The partition of the sum depends only on the shape, so the
// result is identical for any number of threads.
inline void kernel_gradient(const Shape& s, const float* x, const float* gradient, float* to_kernel,
                            ffi::ThreadPool& pool) {
  constexpr int64_t TASKS = 16;
  const int64_t inner = s.group_inputs(), pairs = (s.panels() + PANELS - 1) / PANELS, size = 9 * inner * s.outputs;
  const int64_t pixels = s.rows() * s.columns();
  // Number of pixels whose inputs and gradients fit in the cache: some rows of an image, or some images.
  const int64_t fit = CACHE / int64_t(sizeof(float)) / (s.stride * s.stride * s.inputs + WIDTH);
  const int64_t rows = std::max<int64_t>(1, std::min(s.rows(), fit / s.columns()));
  const int64_t parts = (s.rows() + rows - 1) / rows, together = std::max<int64_t>(1, parts > 1 ? 1 : fit / pixels);
  const int64_t blocks = parts * ((s.images + together - 1) / together);
  const int64_t tasks = 3 * s.groups * pairs;
  const int64_t chunks = std::max<int64_t>(1, std::min((TASKS + tasks - 1) / tasks, blocks));
  Borrowed others((chunks - 1) * size);
  std::fill(others.data(), others.data() + (chunks - 1) * size, 0.0f);
  std::fill(to_kernel, to_kernel + size, 0.0f);
  in_parallel(pool, chunks * tasks, [&](int64_t task) {
    const int64_t pair = task % pairs, group = task / pairs % s.groups, i = task / pairs / s.groups % 3;
    const int64_t chunk = task / tasks;
    float* total = (chunk ? others.data() + (chunk - 1) * size : to_kernel) + i * 3 * inner * s.outputs;
    const int64_t channel = group * s.group_outputs() + pair * WIDTH;
    const int64_t used = std::min<int64_t>(PANELS, s.panels() - pair * PANELS);
    const int64_t width = std::min<int64_t>(WIDTH, s.group_outputs() - pair * WIDTH);
    for (int64_t block = blocks * chunk / chunks; block < blocks * (chunk + 1) / chunks; block++) {
      const int64_t image = block / parts * together, images = std::min(together, s.images - image);
      // Output rows whose tap `i` is inside the image.
      int64_t first = block % parts * rows, end = std::min(s.rows(), first + rows);
      while (first < end && first * s.stride + i - 1 < 0) first++;
      while (first < end && (end - 1) * s.stride + i - 1 >= s.height) end--;
      if (first == end) continue;
      const int64_t count = end - first, run = count * s.columns();
      float* right = scratch<float>(images * run * WIDTH);
      for (int64_t n = 0; n < images; n++) {
        const float* from = gradient + ((image + n) * pixels + first * s.columns()) * s.outputs + channel;
        for (int64_t k = 0; k < run; k++)
          for (int v = 0; v < used; v++)
            store(right + (n * run + k) * WIDTH + v * LANES, load(from + k * s.outputs + v * LANES, width - v * LANES));
      }
      for (int64_t j = 0; j < 3; j++) {
        const int64_t start = j == 0 ? 1 : 0, stop = s.width < j ? 0 : std::min(s.columns(), (s.width - j) / s.stride + 1);
        if (start >= stop) continue;
        const Walk walk{images,       s.height * s.width * s.inputs, run,          count, s.stride * s.width * s.inputs,
                        s.columns(), stop - start,                   s.stride * s.inputs};
        const float* a = x + ((image * s.height + first * s.stride + i - 1) * s.width + start * s.stride + j - 1) *
                                 s.inputs + group * inner;
        in_rows(inner, [&](int64_t c, int64_t height) {
          TABLE<Accumulating>.of[height][used](walk, a + c, right + start * WIDTH,
                                               total + (j * inner + c) * s.outputs + channel, s.outputs, width);
        });
      }
    }
  });
  for (int64_t chunk = 1; chunk < chunks; chunk++)
    for (int64_t k = 0; k < size; k++) to_kernel[k] += others.data()[(chunk - 1) * size + k];
  keep_what_is_not_finite(s, gradient, to_kernel);
}

}  // namespace repvgg
