// The kernel gradient of a stride-1 convolution by Winograd's algorithm in reverse.
//
// With Y = A^T [(G k G^T) * (B^T d B)] A, the gradient of k is G^T [sum over tiles of (B^T d B) * (A y A^T)] G. Each
// position of the transformed tiles is one matrix product over the tiles. It takes 2.25 multiplications for m = 4, or 4
// for m = 2, where the direct sum takes 9.

#pragma once

#include "gradients.h"
#include "products.h"
#include "tasks.h"
#include "winograd.h"

namespace repvgg {

// Applies A to a column or row of a gradient's tile.
inline void gradient_pass(const Vec (&y)[2], Vec (&t)[4]) {
  t[0] = y[0];
  t[1] = y[0] + y[1];
  t[2] = y[0] - y[1];
  t[3] = -y[1];
}

inline void gradient_pass(const Vec (&y)[4], Vec (&t)[6]) {
  const Vec even = y[0] + AA * y[2], odd = A * (y[1] + AA * y[3]);
  const Vec even2 = y[0] + BB * y[2], odd2 = B * (y[1] + BB * y[3]);
  t[0] = y[0];
  t[1] = even + odd;
  t[2] = even - odd;
  t[3] = even2 + odd2;
  t[4] = even2 - odd2;
  t[5] = y[3];
}

// Applies G^T to a column or row of the sums.
inline void kernel_pass_back(const Vec (&u)[4], Vec (&k)[3]) {
  k[0] = u[0] + 0.5f * (u[1] + u[2]);
  k[1] = 0.5f * (u[1] - u[2]);
  k[2] = 0.5f * (u[1] + u[2]) + u[3];
}

inline void kernel_pass_back(const Vec (&u)[6], Vec (&k)[3]) {
  const Vec even = AT_A * (u[1] + u[2]), even2 = AT_B * (u[3] + u[4]);
  k[0] = 1 / (AA * BB) * u[0] + even + even2;
  k[1] = AT_A * A * (u[1] - u[2]) + AT_B * B * (u[3] - u[4]);
  k[2] = AA * even + BB * even2 + u[5];
}

// A y A^T of one tile, of which `height` x `width` pixels are inside the image; rows are `line` numbers apart, pixels
// `pixel` numbers.
template <int TILE>
void transform_gradient(const float* y, int64_t line, int64_t pixel, int64_t height, int64_t width, int64_t channels,
                        float* out, int64_t step) {
  constexpr int SIZE = TILE + 2;
  transform<TILE, SIZE>(
      [&](int i, int j) { return i < height && j < width ? load(y + i * line + j * pixel, channels) : Vec{}; },
      [](const auto& d, auto& t) { gradient_pass(d, t); },
      [&](int i, int j, Vec t) { store(out + (i * SIZE + j) * step, t); });
}

// G^T u G.
template <int SIZE>
void transform_sums(const float* sums, int64_t step, int64_t channels, float* to_kernel, int64_t tap) {
  transform<SIZE, 3>([&](int i, int j) { return load(sums + (i * SIZE + j) * step); },
                     [](const auto& u, auto& k) { kernel_pass_back(u, k); },
                     [&](int i, int j, Vec k) { store(to_kernel + (i * 3 + j) * tap, k, channels); });
}

template <int TILE>
void winograd_kernel_gradient(const Shape& s, const float* x, const float* gradient, float* to_kernel,
                              ffi::ThreadPool& pool) {
  constexpr int SIZE = TILE + 2, POSITIONS = SIZE * SIZE;
  constexpr int64_t TOGETHER = 128;  // tiles: enough to fetch the sums rarely, few enough to stay in a cache
  constexpr int64_t SLAB = 4;        // tiles that a task transforms
  const int64_t inner = s.group_inputs(), pairs = (s.panels() + PANELS - 1) / PANELS;
  const int64_t down = (s.height + TILE - 1) / TILE, across = (s.width + TILE - 1) / TILE;
  const int64_t tiles = s.images * down * across, tile_numbers = POSITIONS * (inner + pairs * WIDTH);
  const int64_t blocks = (tiles + TOGETHER - 1) / TOGETHER, longest = (tiles + blocks - 1) / blocks;
  const int64_t sums_of_pair = POSITIONS * inner * WIDTH;
  Borrowed memory(inner + longest * tile_numbers + pairs * sums_of_pair);
  float *zeros = memory.data(), *inputs = zeros + inner, *gradients = inputs + longest * POSITIONS * inner;
  float* sums = gradients + longest * POSITIONS * pairs * WIDTH;
  std::fill(zeros, zeros + inner, 0.0f);
  for (int64_t group = 0; group < s.groups; group++) {
    const int64_t channel = group * s.group_outputs();
    for (int64_t block = 0; block < blocks; block++) {
      const int64_t first = tiles * block / blocks, count = tiles * (block + 1) / blocks - first;
      in_parallel(pool, (count + SLAB - 1) / SLAB, [&](int64_t slab) {
        for (int64_t t = slab * SLAB; t < std::min(count, (slab + 1) * SLAB); t++) {
          const int64_t tile = first + t, image = tile / (down * across);
          const int64_t top = tile / across % down * TILE, side = tile % across * TILE;
          transform_input<TILE>(s, x + image * s.height * s.width * s.inputs + group * inner, top, side, zeros,
                                inputs + t * inner, count * inner, inner);
          const float* y = gradient + ((image * s.height + top) * s.width + side) * s.outputs + channel;
          for (int64_t v = 0; v < s.panels(); v++)
            transform_gradient<TILE>(y + v * LANES, s.width * s.outputs, s.outputs, s.height - top, s.width - side,
                                     s.group_outputs() - v * LANES,
                                     gradients + (v / PANELS * POSITIONS * count + t) * WIDTH + v % PANELS * LANES,
                                     count * WIDTH);
        }
      });
      in_parallel(pool, POSITIONS * pairs, [&](int64_t task) {
        const int64_t position = task % POSITIONS, pair = task / POSITIONS;
        const int64_t used = std::min<int64_t>(PANELS, s.panels() - pair * PANELS);
        float* total = sums + task * inner * WIDTH;
        if (block == 0) std::fill(total, total + inner * WIDTH, 0.0f);
        const Walk walk{1, 0, 0, 1, 0, 0, count, inner};
        in_rows(inner, [&](int64_t c, int64_t height) {
          TABLE<Accumulating>.of[height][used](walk, inputs + position * count * inner + c,
                                               gradients + task * count * WIDTH, total + c * WIDTH, WIDTH, WIDTH);
        });
      });
    }
    in_parallel(pool, inner, [&](int64_t c) {
      for (int64_t v = 0; v < s.panels(); v++)
        transform_sums<SIZE>(sums + v / PANELS * sums_of_pair + c * WIDTH + v % PANELS * LANES, inner * WIDTH,
                             s.group_outputs() - v * LANES, to_kernel + c * s.outputs + channel + v * LANES,
                             inner * s.outputs);
    });
  }
}

}  // namespace repvgg
