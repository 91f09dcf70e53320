// `resizing FIRST COUNT`: run `resize.cc` on random images, boxes and sizes, and compare it with its own two passes in
// plain loops over the whole image (the tests compare it with PIL). Prints `case N` before each, and failures as
// `FAILED …`.

#include <cstdio>
#include <random>
#include <thread>

#include "guarded.h"
#include "resize.cc"

namespace {

void attack(int64_t seed, int& failures) {
  std::mt19937_64 engine(seed);
  const auto below = [&](int64_t end) { return int64_t(engine() % end); };
  const auto side = [&] { return int(below(6) ? 1 + below(60) : below(4) ? 1 + below(500) : 1 + below(3)); };
  const int height = side(), width = side(), channels = below(4) ? 3 : 1, size = side();
  const bool mirrored = below(2), first = below(2);
  double box[4];
  for (int axis = 0; axis < 2; axis++) {
    const double length = axis ? height : width, part = (1 + below(1000)) / 1000.0;
    double extent = below(4) ? length * part : below(2) ? length : 1 + below(int(length));
    if (!below(8)) extent = std::min(length, 1e-3 * (1 + below(1000)));
    const double space = length - extent;
    box[axis] = below(4) ? space * below(1001) / 1000 : below(2) ? space : 0;
    box[2 + axis] = extent;
  }
  const int64_t stride = int64_t(width) * channels + (below(2) ? 0 : below(200));
  const int64_t bytes = stride * (height - 1) + int64_t(width) * channels;  // the last row has no padding
  Guarded<uint8_t> pixels(bytes, first), out(int64_t(size) * size * channels, first);
  for (int64_t i = 0; i < bytes; i++) pixels[i] = below(256);
  // In a new thread, whose reused memory no other case has enlarged.
  std::thread([&] {
    repvgg_resize(pixels.data(), stride, height, width, channels, box, size, mirrored, out.data());
  }).join();

  const Weights across(width, box[0], box[2], size, mirrored), down(height, box[1], box[3], size, false);
  std::vector<uint8_t> rows(int64_t(height) * size * channels);
  for (int y = 0; y < height; y++)
    for (int x = 0; x < size; x++)
      for (int c = 0; c < channels; c++) {
        int32_t sum = HALF;
        for (int t = 0; t < across.taps; t++)
          sum += pixels[y * stride + (across.first[x] + t) * channels + c] * across.of[x * across.taps + t];
        rows[(int64_t(y) * size + x) * channels + c] = rounded(sum);
      }
  for (int64_t i = 0; i < out.size(); i++) {
    const int64_t line = int64_t(size) * channels, y = i / line;
    int32_t sum = HALF;
    for (int t = 0; t < down.taps; t++) sum += rows[(down.first[y] + t) * line + i % line] * down.of[y * down.taps + t];
    if (out[i] == rounded(sum)) continue;
    std::printf("FAILED case %ld: wrong at %ld: height %d width %d channels %d size %d mirrored %d box %g %g %g %g\n",
                long(seed), long(i), height, width, channels, size, mirrored, box[0], box[1], box[2], box[3]);
    failures++;
    return;
  }
}

}  // namespace

int main(int, char** argv) {
  const int64_t first = std::atoll(argv[1]), count = std::atoll(argv[2]);
  int failures = 0;
  for (int64_t i = first; i < first + count; i++) {
    std::printf("case %ld\n", long(i));
    std::fflush(stdout);
    attack(i, failures);
  }
  return failures ? 1 : 0;
}
