// `convolutions FIRST COUNT MODE`: run the handlers of `conv3x3.cc` on random shapes, groups, strides and tiles, and
// compare each result with the definition in float64. MODE `alone`: each case has its own threads, and runs again on
// one thread, which must not change a bit; `together`: four callers share a pool. Prints `case N` before each, and
// failures as `FAILED …`.

#include <atomic>
#include <cmath>
#include <cstdio>
#include <limits>
#include <random>
#include <string>

#define private public  // drops the memory that calls reuse between cases, so that sizes are exact
#include "tasks.h"
#undef private

#include "conv3x3.cc"
#include "guarded.h"

namespace {

namespace ffi = xla::ffi;
using repvgg::LANES;
using repvgg::Shape;

std::atomic<int> failures{0};
std::mutex printing;

struct Random {
  std::mt19937_64 engine;
  int64_t below(int64_t end) { return engine() % end; }
  int64_t between(int64_t least, int64_t most) { return least + below(most - least + 1); }
  bool one_in(int64_t n) { return below(n) == 0; }
  float number() { return std::normal_distribution<float>()(engine); }
};

struct Case {
  int64_t seed;
  Shape shape;
  int64_t tile;
  Random random;

  void failed(const std::string& what) const {
    const std::lock_guard<std::mutex> lock(printing);
    failures++;
    std::printf(
        "FAILED case %ld %s: images %ld height %ld width %ld inputs %ld outputs %ld stride %ld groups %ld tile %ld\n",
        long(seed), what.c_str(), long(shape.images), long(shape.height), long(shape.width), long(shape.inputs),
        long(shape.outputs), long(shape.stride), long(shape.groups), long(tile));
  }
};

// Most are small; some are wide, deep or numerous enough to be split into blocks and panels; some are empty.
Case make_case(int64_t seed, int64_t most_work) {
  Case c{seed, {}, 0, {std::mt19937_64(seed)}};
  Random& r = c.random;
  const auto some = [&](int64_t usual, int64_t rare) { return r.one_in(8) ? r.between(1, rare) : r.between(1, usual); };
  Shape& s = c.shape;
  do {
    s.groups = r.one_in(3) ? r.between(2, 5) : r.one_in(12) ? r.between(6, 40) : 1;
    const int64_t inner = s.groups > 5 ? r.between(1, 3) : some(40, 600),
                  outer = s.groups > 5 ? r.between(1, 3) : some(40, 200);
    s.images = some(3, 40), s.height = some(16, 120), s.width = some(16, 120);
    const bool photograph = s.groups == 1 && r.one_in(6);  // whose layout is special
    s.inputs = photograph ? 3 : s.groups * inner, s.outputs = s.groups * outer;
    s.stride = r.one_in(3) ? 2 : r.one_in(20) ? 3 : 1;
  } while (s.images * s.rows() * s.columns() * s.group_inputs() * s.outputs * 9 > most_work);
  c.tile = s.stride == 1 ? 2 * r.below(3) : 0;
  if (r.one_in(25)) s.images = 0;
  if (r.one_in(60)) s.height = 0;
  if (r.one_in(60)) s.width = 0;
  return c;
}

int64_t rows_of(const Shape& s) { return (s.height + s.stride - 1) / s.stride; }
int64_t columns_of(const Shape& s) { return (s.width + s.stride - 1) / s.stride; }

// Calls `act(out, in, kernel)` for each product of the convolution, with indices into the result, the image and the
// kernel [3, 3, inputs / groups, outputs].
template <typename Act>
void each_product(const Shape& s, Act act) {
  const int64_t rows = rows_of(s), columns = columns_of(s), inner = s.inputs / s.groups, outer = s.outputs / s.groups;
  for (int64_t n = 0; n < s.images; n++)
    for (int64_t r = 0; r < rows; r++)
      for (int64_t c = 0; c < columns; c++)
        for (int i = 0; i < 3; i++)
          for (int j = 0; j < 3; j++) {
            const int64_t row = r * s.stride + i - 1, column = c * s.stride + j - 1;
            if (row < 0 || row >= s.height || column < 0 || column >= s.width) continue;
            const int64_t out = ((n * rows + r) * columns + c) * s.outputs,
                          in = ((n * s.height + row) * s.width + column) * s.inputs;
            for (int64_t g = 0; g < s.groups; g++)
              for (int64_t k = 0; k < inner; k++)
                for (int64_t o = 0; o < outer; o++)
                  act(out + g * outer + o, in + g * inner + k, ((i * 3 + j) * inner + k) * s.outputs + g * outer + o);
          }
}

struct Sums {
  std::vector<double> value, size;  // sum of the terms' absolute values
  explicit Sums(int64_t count) : value(count), size(count) {}
  void add(int64_t at, double term) { value[at] += term, size[at] += std::abs(term); }
};

void compare(const Case& c, const char* what, const Sums& expected, Guarded<float>& found, bool relu = false) {
  double scale = 0;
  for (double size : expected.size) scale = std::max(scale, size);
  for (int64_t i = 0; i < found.size(); i++) {
    const double value = relu ? std::max(expected.value[i], 0.0) : expected.value[i];
    if (!(std::abs(value - found[i]) <= 2e-5 * scale))
      return c.failed(std::string(what) + " is wrong at " + std::to_string(i) + ": " + std::to_string(found[i]) +
                      " for " + std::to_string(value));
  }
}

template <typename T>
void same_bits(const Case& c, const char* what, Guarded<T>& a, Guarded<T>& b) {
  if (a.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)))
    c.failed(std::string(what) + " depends on the threads");
}

void succeeded(const Case& c, const char* what, const ffi::Error& error) {
  if (!error.success()) c.failed(std::string(what) + ": " + error.message());
}

// Unless the pool is shared, gives a case its own caller threads, and drops the memory that they kept.
struct Threads {
  int pool_size;
  ffi::ThreadPool* shared;
  template <typename Call>
  void operator()(Call call) const {
    if (shared) return call(*shared);
    ffi::ThreadPool pool(pool_size);
    std::thread([&] { call(pool); }).join();
    std::vector<std::vector<float>>().swap(repvgg::Borrowed::free_ones());
  }
};

void attack_floats(Case& c, const std::vector<Threads>& ways) {
  Random& r = c.random;
  const Shape& s = c.shape;
  const int64_t lanes = s.groups * s.panels() * LANES,
                packed_size = repvgg::positions(c.tile) * s.group_inputs() * lanes;
  const std::vector<int64_t> in{s.images, s.height, s.width, s.inputs},
      out{s.images, rows_of(s), columns_of(s), s.outputs};
  const std::vector<int64_t> taps{3, 3, s.group_inputs(), s.outputs};
  const int64_t in_size = in[0] * in[1] * in[2] * in[3], out_size = out[0] * out[1] * out[2] * out[3];
  const bool first = r.one_in(2), relu = r.one_in(2);
  Guarded<float> x(in_size, first), kernel(9 * taps[2] * taps[3], first), g(out_size, first),
      packed(packed_size, first), bias(lanes, first);
  for (int64_t i = 0; i < x.size(); i++) x[i] = r.number();
  for (int64_t i = 0; i < kernel.size(); i++) kernel[i] = r.number();
  for (int64_t i = 0; i < g.size(); i++) g[i] = r.number();
  Sums y_sums(out_size), x_sums(in_size), k_sums(kernel.size());
  each_product(s, [&](int64_t o, int64_t i, int64_t k) {
    y_sums.add(o, double(x[i]) * kernel[k]);
    x_sums.add(i, double(g[o]) * kernel[k]);
    k_sums.add(k, double(x[i]) * g[o]);
  });
  Sums biased = y_sums;
  std::memset(bias.data(), 0, lanes * sizeof(float));
  for (int64_t o = 0; o < s.outputs; o++)
    bias[o / s.group_outputs() * s.panels() * LANES + o % s.group_outputs()] = r.number();
  for (int64_t i = 0; i < out_size; i++) {
    const int64_t o = i % s.outputs;
    biased.add(i, bias[o / s.group_outputs() * s.panels() * LANES + o % s.group_outputs()]);
  }
  using Floats = ffi::Buffer<ffi::F32>;
  std::vector<std::unique_ptr<Guarded<float>>> results;
  for (const Threads& way : ways) {
    const auto result = [&](int64_t size) -> Guarded<float>& {
      results.push_back(std::make_unique<Guarded<float>>(size, first));
      return *results.back();
    };
    Guarded<float>&y = result(out_size), &trained = result(out_size), &to_x = result(in_size),
    &to_kernel = result(kernel.size());
    const Floats x_buffer(x.data(), in), kernel_buffer(kernel.data(), taps), g_buffer(g.data(), out);
    way([&](ffi::ThreadPool& pool) {
      {
        const repvgg::Packed ours(s, kernel.data(), repvgg::Use::FORWARD, c.tile, pool);
        if (&way == &ways[0] && packed_size) std::memcpy(packed.data(), ours.data(), packed_size * sizeof(float));
      }
      succeeded(
          c, "packed",
          repvgg::convolve_packed(pool, x_buffer, Floats(packed.data(), {packed_size}), Floats(bias.data(), {lanes}),
                                  Floats(y.data(), out), s.stride, s.groups, c.tile, relu));
    });
    way([&](ffi::ThreadPool& pool) {
      succeeded(c, "train",
                repvgg::train(pool, x_buffer, kernel_buffer, Floats(trained.data(), out), s.stride, s.groups, c.tile));
    });
    if (s.stride <= 2)
      way([&](ffi::ThreadPool& pool) {
        succeeded(c, "to input",
                  repvgg::to_input(pool, g_buffer, kernel_buffer, Floats(to_x.data(), in), s.stride, s.groups, c.tile));
      });
    way([&](ffi::ThreadPool& pool) {
      succeeded(
          c, "to kernel",
          repvgg::to_kernel(pool, x_buffer, g_buffer, Floats(to_kernel.data(), taps), s.stride, s.groups, c.tile));
    });
    compare(c, "packed", biased, y, relu);
    compare(c, "train", y_sums, trained);
    if (s.stride <= 2) compare(c, "to input", x_sums, to_x);
    compare(c, "to kernel", k_sums, to_kernel);
  }
  for (size_t i = 4; i < results.size(); i++) {
    static const char* const names[] = {"packed", "train", "to input", "to kernel"};
    if (i % 4 != 2 || s.stride <= 2) same_bits(c, names[i % 4], *results[i], *results[i % 4]);
  }
}

// Arguments that do not fit together must be refused before any memory is accessed.
void attack_arguments(Case& c, ffi::ThreadPool& pool) {
  Random& r = c.random;
  const Shape& s = c.shape;
  const int64_t lanes = s.groups * s.panels() * LANES,
                packed_size = repvgg::positions(c.tile) * s.group_inputs() * lanes;
  std::vector<int64_t> in{s.images, s.height, s.width, s.inputs}, out{s.images, rows_of(s), columns_of(s), s.outputs};
  std::vector<int64_t> taps{3, 3, s.group_inputs(), s.outputs};
  int64_t stride = s.stride, groups = s.groups, tile = c.tile, packed = packed_size, bias = lanes;
  constexpr int64_t LEAST = std::numeric_limits<int64_t>::min(), MOST = std::numeric_limits<int64_t>::max();
  const int64_t odd[] = {LEAST, -1, 0, 7, MOST};
  switch (r.below(7)) {
    case 0:
      in.pop_back();
      break;
    case 1:
      out[r.below(3)] += 1;
      break;
    case 2:
      stride = odd[r.below(3)];
      break;
    case 3:
      groups = odd[r.below(3)];
      break;
    case 4:
      tile = odd[r.below(2)];
      break;
    case 5:
      packed += 1, taps[2] += 1;
      break;
    case 6:
      groups = MOST;
      break;
  }
  using Floats = ffi::Buffer<ffi::F32>;
  Guarded<float> none(0);
  const Floats x(none.data(), in), y(none.data(), out), kernel(none.data(), taps);
  const bool refused[] = {
      !repvgg::convolve_packed(pool, x, Floats(none.data(), {packed}), Floats(none.data(), {bias}), y, stride, groups,
                               tile, true)
           .success(),
      !repvgg::train(pool, x, kernel, y, stride, groups, tile).success(),
      !repvgg::to_input(pool, y, kernel, x, stride, groups, tile).success(),
      !repvgg::to_kernel(pool, x, y, kernel, stride, groups, tile).success(),
  };
  for (bool one : refused)
    if (!one) c.failed("arguments that do not fit are accepted");
}

// Position of a weight packed in runs padded to a multiple of `run`, with `together` input channels side by side, and
// the number of packed elements.
struct Packing {
  const Shape& s;
  int64_t together, run;
  bool photograph() const { return s.groups == 1 && s.inputs == 3; }  // all 9 pixels in one run
  int64_t inner() const { return photograph() ? 3 : (s.group_inputs() + together - 1) / together * together; }
  int64_t runs() const { return photograph() ? 1 : s.groups == 1 ? 3 : 9; }
  int64_t length() const { return (9 / runs() * inner() + run - 1) / run * run; }
  int64_t size() const { return s.groups * s.panels() * runs() * length() * LANES; }
  int64_t at(int64_t lane, int64_t tap, int64_t k) const {
    const int64_t of_run = 9 / runs(), place = tap % of_run * inner() + k;
    const int64_t vector = ((lane / LANES * runs() + tap / of_run) * length() + place) / together;
    return (vector * LANES + lane % LANES) * together + place % together;
  }
};

#if defined(__AVX512BF16__)
uint16_t rounded(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

float number(uint16_t half) {
  const uint32_t bits = uint32_t(half) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

void attack_halves(Case& c, const std::vector<Threads>& ways) {
  Random& r = c.random;
  const Shape& s = c.shape;
  const Packing packing{s, 2, repvgg_bf16_run()};
  const int64_t tile = c.tile ? 2 : 0, lanes = s.groups * s.panels() * LANES;
  const int64_t pairs = (s.group_inputs() + 1) / 2, packed_size = tile ? 16 * 2 * pairs * lanes : packing.size();
  const std::vector<int64_t> in{s.images, s.height, s.width, s.inputs},
      out{s.images, rows_of(s), columns_of(s), s.outputs};
  const int64_t in_size = in[0] * in[1] * in[2] * in[3], out_size = out[0] * out[1] * out[2] * out[3];
  const bool first = r.one_in(2), relu = r.one_in(2);
  Guarded<uint16_t> x(in_size, first), kernel(9 * s.group_inputs() * s.outputs), packed(packed_size, first, 0);
  Guarded<float> bias(lanes, first, 0);
  // Winograd's transforms of these small integers are exact in bfloat16.
  for (int64_t i = 0; i < x.size(); i++) x[i] = rounded(tile ? r.between(-4, 4) : r.number());
  for (int64_t i = 0; i < kernel.size(); i++) kernel[i] = rounded(tile ? 4 * r.between(-1, 1) : r.number());
  const auto lane = [&](int64_t o) { return o / s.group_outputs() * s.panels() * LANES + o % s.group_outputs(); };
  Sums sums(out_size);
  for (int64_t o = 0; o < s.outputs; o++) {
    bias[lane(o)] = r.number();
    for (int64_t tap = 0; tap < 9 && !tile; tap++)
      for (int64_t k = 0; k < s.group_inputs(); k++)
        packed[packing.at(lane(o), tap, k)] = kernel[(tap * s.group_inputs() + k) * s.outputs + o];
  }
  if (tile) {
    std::vector<float> taps(kernel.size());
    for (int64_t i = 0; i < kernel.size(); i++) taps[i] = number(kernel[i]);
    ffi::ThreadPool pool(1);
    const repvgg::Packed matrices(s, taps.data(), repvgg::Use::FORWARD, tile, pool);
    const float* from = matrices.data();
    for (int64_t matrix = 0; matrix < s.groups * s.panels() * 16; matrix++)
      for (int64_t k = 0; k < s.group_inputs(); k++)
        for (int64_t v = 0; v < LANES; v++)
          packed[((matrix * pairs + k / 2) * LANES + v) * 2 + k % 2] = rounded(*from++);
  }
  for (int64_t i = 0; i < out_size; i++) sums.add(i, bias[lane(i % s.outputs)]);
  each_product(s, [&](int64_t o, int64_t i, int64_t k) { sums.add(o, double(number(x[i])) * number(kernel[k])); });
  for (const Threads& way : ways) {
    Guarded<uint16_t> y(out_size, first);
    way([&](ffi::ThreadPool& pool) {
      using Halves = ffi::Buffer<ffi::BF16>;
      const ffi::Error error = repvgg::convolve_bf16(pool, Halves(x.data(), in), Halves(packed.data(), {packed.size()}),
                                                     ffi::Buffer<ffi::F32>(bias.data(), {lanes}),
                                                     Halves(y.data(), out), s.stride, s.groups, tile, relu);
      if (s.groups > 1 && s.group_inputs() % 2 && !tile) {
        if (error.success()) c.failed("groups of odd size are accepted");
        return;
      }
      succeeded(c, "halves", error);
      for (int64_t i = 0; i < out_size; i++) {
        const double expected = relu ? std::max(sums.value[i], 0.0) : sums.value[i];
        if (!(std::abs(expected - number(y[i])) <= std::abs(expected) / 250 + 2e-5 * sums.size[i]))
          return c.failed("halves are wrong at " + std::to_string(i));
      }
    });
  }
}
#endif

#if defined(__AVX512VNNI__)
template <typename Out, ffi::DataType TYPE>
void attack_bytes(Case& c, const std::vector<Threads>& ways) {
  Random& r = c.random;
  const Shape& s = c.shape;
  const Packing packing{s, 4, repvgg_int8_run()};
  const int64_t lanes = s.groups * s.panels() * LANES;
  const std::vector<int64_t> in{s.images, s.height, s.width, s.inputs},
      out{s.images, rows_of(s), columns_of(s), s.outputs};
  const int64_t in_size = in[0] * in[1] * in[2] * in[3], out_size = out[0] * out[1] * out[2] * out[3];
  const bool first = r.one_in(2);
  Guarded<uint8_t> x(in_size, first);
  Guarded<int8_t> kernel(9 * s.group_inputs() * s.outputs), packed(packing.size(), first, 0);
  Guarded<int32_t> bias(lanes, first, 0);
  Guarded<float> factor(lanes, first, 0);
  const uint8_t zero = r.one_in(2) ? 0 : 128;
  for (int64_t i = 0; i < x.size(); i++) x[i] = r.below(256);
  for (int64_t i = 0; i < kernel.size(); i++) kernel[i] = r.below(255) - 127;
  const auto lane = [&](int64_t o) { return o / s.group_outputs() * s.panels() * LANES + o % s.group_outputs(); };
  for (int64_t o = 0; o < s.outputs; o++) {
    bias[lane(o)] = r.below(100001) - 50000;
    factor[lane(o)] = std::exp(r.number() - 6);
    for (int64_t tap = 0; tap < 9; tap++)
      for (int64_t k = 0; k < s.group_inputs(); k++)
        packed[packing.at(lane(o), tap, k)] = kernel[(tap * s.group_inputs() + k) * s.outputs + o];
  }
  std::vector<int32_t> sums(out_size);
  for (int64_t i = 0; i < out_size; i++) {
    sums[i] = bias[lane(i % s.outputs)];
    // The image is padded with `zero`: add that for every tap, then correct the taps inside the image below.
    for (int64_t k = 0; zero && k < 9 * s.group_inputs(); k++) sums[i] += zero * kernel[k * s.outputs + i % s.outputs];
  }
  each_product(s, [&](int64_t o, int64_t i, int64_t k) { sums[o] += (x[i] - zero) * kernel[k]; });
  std::vector<std::unique_ptr<Guarded<Out>>> results;
  for (const Threads& way : ways) {
    results.push_back(std::make_unique<Guarded<Out>>(out_size, first));
    Guarded<Out>& y = *results.back();
    way([&](ffi::ThreadPool& pool) {
      const ffi::Error error = repvgg::convolve_int8(
          pool, ffi::Buffer<ffi::U8>(x.data(), in), ffi::Buffer<ffi::S8>(packed.data(), {packed.size()}),
          ffi::Buffer<ffi::S32>(bias.data(), {lanes}), ffi::Buffer<ffi::F32>(factor.data(), {lanes}),
          ffi::Result<ffi::AnyBuffer>(ffi::AnyBuffer(TYPE, y.data(), out)), s.stride, s.groups, zero);
      if (s.groups > 1 && s.group_inputs() % 4) {
        if (error.success()) c.failed("groups whose size is not a multiple of four are accepted");
        return;
      }
      succeeded(c, "bytes", error);
      for (int64_t i = 0; i < out_size; i++) {
        const float real = std::min(std::max(float(sums[i]) * factor[lane(i % s.outputs)], 0.0f), 255.0f);
        const Out expected = TYPE == ffi::S32 ? Out(sums[i]) : Out(std::nearbyintf(real));
        if (y[i] != expected) return c.failed("bytes are wrong at " + std::to_string(i));
      }
    });
  }
}
#endif

// The operations before and after the convolutions: the case's image is pooled, and `outputs` are the classes.
void attack_ends(Case& c, const std::vector<Threads>& ways) {
  Random& r = c.random;
  const Shape& s = c.shape;
  const bool first = r.one_in(2);
  const int64_t pixels = s.height * s.width, inputs = s.inputs, classes = s.outputs;
  const int64_t lanes = repvgg::up_to(classes, LANES);
  using Floats = ffi::Buffer<ffi::F32>;
  using Sizes = std::vector<int64_t>;
  Guarded<float> x(s.images * pixels * inputs, first), kernel(inputs * lanes, first, 0), bias(lanes, first, 0),
      factor(1, first);
  for (int64_t i = 0; i < x.size(); i++) x[i] = r.number();
  factor[0] = std::exp(r.number());
  for (int64_t o = 0; o < classes; o++) {
    bias[o] = r.number();
    for (int64_t k = 0; k < inputs; k++) kernel[(o / LANES * inputs + k) * LANES + o % LANES] = r.number();
  }
  const Sizes image{s.images, s.height, s.width, inputs}, features{s.images, inputs}, logits{s.images, classes};
  Sums means(s.images * inputs), products(s.images * classes);
  for (int64_t i = 0; i < x.size(); i++)
    means.add(i / (pixels * inputs) * inputs + i % inputs, double(x[i]) * factor[0]);
  for (const Threads& way : ways) {
    Guarded<float> pooled(s.images * inputs, first), y(s.images * classes, first);
    way([&](ffi::ThreadPool& pool) {
      succeeded(c, "pool",
                repvgg::average(pool, ffi::AnyBuffer(ffi::F32, x.data(), image), Floats(factor.data(), {1}),
                                Floats(pooled.data(), features)));
    });
    compare(c, "pool", means, pooled);
    products = Sums(s.images * classes);
    for (int64_t i = 0; i < y.size(); i++) {
      products.add(i, bias[i % classes]);
      for (int64_t k = 0; k < inputs; k++)
        products.add(i, double(pooled[i / classes * inputs + k]) *
                            kernel[(i % classes / LANES * inputs + k) * LANES + i % classes % LANES]);
    }
    way([&](ffi::ThreadPool& pool) {
      succeeded(c, "classify",
                repvgg::classify_floats(pool, Floats(pooled.data(), features), Floats(kernel.data(), {kernel.size()}),
                                        Floats(bias.data(), {lanes}), Floats(y.data(), logits)));
    });
    compare(c, "classify", products, y);
  }
#if defined(__AVX512VNNI__)
  const uint8_t zero = r.one_in(2) ? 0 : 128;
  const int64_t fours = repvgg::up_to(inputs, 4);
  Guarded<int8_t> weights(fours * lanes, first, 0);
  Guarded<int32_t> start(lanes, first, 0);
  Guarded<float> factors(lanes, first, 0);
  Guarded<uint8_t> bytes(x.size(), first), rows(s.images * fours, first);
  for (int64_t o = 0; o < classes; o++) {
    start[o] = r.below(100001) - 50000, factors[o] = std::exp(r.number() - 6);
    for (int64_t k = 0; k < fours; k++)
      weights[((o / LANES * fours + k) / 4 * LANES + o % LANES) * 4 + k % 4] = r.below(255) - 127;
  }
  for (int64_t i = 0; i < rows.size(); i++) rows[i] = r.below(256);
  for (const Threads& way : ways) {
    way([&](ffi::ThreadPool& pool) {
      succeeded(c, "to bytes",
                repvgg::to_bytes(pool, Floats(x.data(), image), Floats(factor.data(), {1}),
                                 ffi::Buffer<ffi::U8>(bytes.data(), image), zero));
    });
    for (int64_t i = 0; i < x.size(); i++) {
      const float real = std::min(std::max(x[i] * factor[0], float(-zero)), float(255 - zero));
      if (bytes[i] != std::nearbyintf(real) + zero) return c.failed("bytes are wrong at " + std::to_string(i));
    }
    Guarded<float> sums(s.images * inputs, first), y(s.images * classes, first);
    factor[0] = 1;
    way([&](ffi::ThreadPool& pool) {
      succeeded(c, "pool of bytes",
                repvgg::average(pool, ffi::AnyBuffer(ffi::U8, bytes.data(), image), Floats(factor.data(), {1}),
                                Floats(sums.data(), features)));
      succeeded(c, "classify bytes",
                repvgg::classify_int8(pool, ffi::Buffer<ffi::U8>(rows.data(), {s.images, fours}),
                                      ffi::Buffer<ffi::S8>(weights.data(), {weights.size()}),
                                      ffi::Buffer<ffi::S32>(start.data(), {lanes}), Floats(factors.data(), {lanes}),
                                      Floats(y.data(), logits)));
    });
    std::vector<int64_t> exact(sums.size());
    for (int64_t i = 0; i < bytes.size(); i++) exact[i / (pixels * inputs) * inputs + i % inputs] += bytes[i];
    for (int64_t i = 0; i < sums.size(); i++)
      if (sums[i] != float(exact[i])) return c.failed("sums of bytes are wrong at " + std::to_string(i));
    for (int64_t i = 0; i < y.size(); i++) {
      const int64_t o = i % classes;
      int32_t sum = start[o];
      for (int64_t k = 0; k < fours; k++)
        sum += rows[i / classes * fours + k] *
               weights[((o / LANES * fours + k) / 4 * LANES + o % LANES) * 4 + k % 4];
      if (y[i] != float(sum) * factors[o]) return c.failed("classes of bytes are wrong at " + std::to_string(i));
    }
  }
#endif
}

void attack(int64_t seed, int64_t most_work, ffi::ThreadPool* shared) {
  {
    const std::lock_guard<std::mutex> lock(printing);
    std::printf("case %ld\n", long(seed));
    std::fflush(stdout);
  }
  Case c = make_case(seed, most_work);
  std::vector<Threads> ways{{int(c.random.between(1, 4)), shared}};
  if (!shared) ways.push_back({0, nullptr});
  switch (c.random.below(9)) {
    case 8:
      attack_ends(c, ways);
      break;
    case 0: {
      ffi::ThreadPool pool(1);
      attack_arguments(c, pool);
      break;
    }
#if defined(__AVX512VNNI__)
    case 1:
      attack_bytes<uint8_t, ffi::U8>(c, ways);
      break;
    case 2:
      attack_bytes<int32_t, ffi::S32>(c, ways);
      break;
#endif
#if defined(__AVX512BF16__)
    case 3:
    case 4:
      attack_halves(c, ways);
      break;
#endif
    default:
      attack_floats(c, ways);
  }
}

}  // namespace

int main(int, char** argv) {
  const int64_t first = std::atoll(argv[1]), count = std::atoll(argv[2]), most_work = std::atoll(argv[4]);
  if (std::string(argv[3]) == "alone") {
    for (int64_t i = first; i < first + count; i++) attack(i, most_work, nullptr);
  } else {
    ffi::ThreadPool pool(3);
    std::atomic<int64_t> next{first};
    std::vector<std::thread> callers;
    for (int k = 0; k < 4; k++)
      callers.emplace_back([&] {
        for (int64_t i; (i = next++) < first + count;) attack(i, most_work, &pool);
      });
    for (std::thread& caller : callers) caller.join();
  }
  return failures ? 1 : 0;
}
