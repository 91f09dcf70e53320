// 3x3 convolutions for CPUs, called by XLA through its foreign function interface.
//
// Two algorithms for NHWC images with padding 1, each with bias and optional ReLU:
//
// - direct: rows of output pixels times panels of output channels, read from a zero-padded copy of a few input rows;
//   stride 1 and 2; in float32, in bfloat16 with float32 sums (AVX-512 BF16, AMX), or with uint8 images, int8 kernels
//   and int32 sums (AVX-512 VNNI, AMX).
// - Winograd F(m x m, 3x3), m = 2 or 4 (Lavin and Gray, arXiv 1509.09308), float32, stride 1: a block of tiles is
//   transformed, multiplied and transformed back before the next one, so only the result leaves the core's cache. It
//   takes 2.25 multiplications for m = 4, or 4 for m = 2, where the direct sum takes 9.
//
// Both use the same product: up to MAX_ROWS rows of the left matrix, each number broadcast, times two vectors of output
// channels, with all accumulators in registers. The kernel is packed in panels of one vector of channels
// (`native.pack_kernel`), and the last vector is padded with zeros. The caller and `Helpers`, or XLA's threads if those
// work for another caller, take tasks from a counter, so that busy threads make a call slower but never block it.
//
// The operations before and after a net's convolutions are here, too (`ends.h`).
//
// The calls for training pack the kernel inside the call, since it changes at every step, and include both gradients
// (`gradients.h`, `winograd_gradient.h`), in float32.

#include <algorithm>
#include <cstdint>
#include <optional>

#include "direct.h"
#include "ends.h"
#include "gradients.h"
#include "products.h"
#include "tasks.h"
#include "winograd.h"
#include "winograd_gradient.h"
#include "xla/ffi/api/ffi.h"

namespace repvgg {

// The shape of the convolution from `from` to `to`; none if `to` does not fit.
template <typename Dimensions>
std::optional<Shape> shape_of(Dimensions from, Dimensions to, int64_t stride, int64_t groups) {
  if (from.size() != 4 || to.size() != 4 || stride < 1 || groups < 1) return std::nullopt;
  const Shape s{from[0], from[1], from[2], from[3], to[3], stride, groups};
  if (s.inputs < 1 || s.inputs % groups || s.outputs < 1 || s.outputs % groups) return std::nullopt;
  const bool fits = to[0] == s.images && to[1] == s.rows() && to[2] == s.columns();
  return fits ? std::optional(s) : std::nullopt;
}

inline ffi::Error bad_shapes() { return ffi::Error::InvalidArgument("the shapes do not fit together"); }

inline ffi::Error bad_packing() {
  return ffi::Error::InvalidArgument("the kernel is packed for another shape or machine");
}

// Convolves with a packed kernel.
void convolve(const Shape& s, int64_t tile, const float* x, const float* packed, const FloatEnds& ends, float* y,
              ffi::ThreadPool& pool) {
  if (s.empty()) return;
  if (tile == 0)
    direct<Floats>(s, x, packed, ends, 0.0f, y, pool);
  else if (tile == 2)
    winograd<2, Floats>(s, x, packed, ends, y, pool);
  else
    winograd<4, Floats>(s, x, packed, ends, y, pool);
}

inline std::optional<ffi::Error> bad_tile(int64_t tile, int64_t stride) {
  if (tile != 0 && tile != 2 && tile != 4) return ffi::Error::InvalidArgument("there are tiles of 2 and 4");
  if (tile != 0 && stride != 1) return ffi::Error::InvalidArgument("Winograd needs stride 1");
  return std::nullopt;
}

ffi::Error convolve_packed(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::F32> packed,
                           ffi::Buffer<ffi::F32> bias, ffi::ResultBuffer<ffi::F32> y, int64_t stride, int64_t groups,
                           int64_t tile, bool relu) {
  const std::optional<Shape> s = shape_of(x.dimensions(), y->dimensions(), stride, groups);
  if (!s) return bad_shapes();
  if (const auto error = bad_tile(tile, stride)) return *error;
  const int64_t lanes = groups * s->panels() * LANES;
  if (int64_t(packed.element_count()) != positions(tile) * s->group_inputs() * lanes) return bad_packing();
  if (int64_t(bias.element_count()) != lanes) return bad_packing();
  const FloatEnds ends{bias.typed_data(), relu};
  convolve(*s, tile, x.typed_data(), packed.typed_data(), ends, y->typed_data(), pool);
  return ffi::Error::Success();
}

#if defined(__AVX512BF16__)
template <typename Kind>
ffi::Error convolve_halves(const Shape& s, int64_t tile, ffi::Buffer<ffi::BF16> x, ffi::Buffer<ffi::BF16> packed,
                           const FloatEnds& ends, ffi::ResultBuffer<ffi::BF16> y, ffi::ThreadPool& pool) {
  const auto* in = reinterpret_cast<const Half*>(x.typed_data());
  const auto* weights = reinterpret_cast<const Half*>(packed.typed_data());
  auto* out = reinterpret_cast<Half*>(y->typed_data());
  const int64_t transformed = positions(tile) * up_to(s.group_inputs(), Halves<float>::RUN) * LANES;
  const int64_t expected = tile ? s.groups * s.panels() * transformed : Runs<Kind>(s).packed(s);
  if (int64_t(packed.element_count()) != expected) return bad_packing();
  if (s.empty()) return ffi::Error::Success();
  if (tile == 0)
    direct<Kind>(s, in, weights, ends, Half(0), out, pool);
  else
    winograd<2, Halves<float>>(s, in, weights, ends, out, pool);
  return ffi::Error::Success();
}

ffi::Error convolve_bf16(ffi::ThreadPool pool, ffi::Buffer<ffi::BF16> x, ffi::Buffer<ffi::BF16> packed,
                         ffi::Buffer<ffi::F32> bias, ffi::ResultBuffer<ffi::BF16> y, int64_t stride, int64_t groups,
                         int64_t tile, bool relu) {
  const std::optional<Shape> s = shape_of(x.dimensions(), y->dimensions(), stride, groups);
  if (!s || (groups > 1 && s->group_inputs() % 2 && tile == 0)) return bad_shapes();
  if (tile != 0 && (tile != 2 || stride != 1)) return ffi::Error::InvalidArgument("there are tiles of 2, for stride 1");
  if (int64_t(bias.element_count()) != groups * s->panels() * LANES) return bad_packing();
  const FloatEnds ends{bias.typed_data(), relu};
#if defined(REPVGG_TILES)
  if (tiles_allowed()) return convolve_halves<TiledHalves>(*s, tile, x, packed, ends, y, pool);
#endif
  return convolve_halves<Halves<Half>>(*s, tile, x, packed, ends, y, pool);
}
#endif

#if defined(__AVX512VNNI__)
template <template <typename> typename Kind>
ffi::Error convolve_bytes(const Shape& s, const uint8_t* x, ffi::Buffer<ffi::S8> packed, const IntegerEnds& ends,
                          uint8_t zero, ffi::Result<ffi::AnyBuffer> y, ffi::ThreadPool& pool) {
  if (int64_t(packed.element_count()) != Runs<Kind<uint8_t>>(s).packed(s)) return bad_packing();
  if (s.empty()) return ffi::Error::Success();
  if (y->element_type() == ffi::U8)
    direct<Kind<uint8_t>>(s, x, packed.typed_data(), ends, zero, y->typed_data<uint8_t>(), pool);
  else if (y->element_type() == ffi::S32)
    direct<Kind<int32_t>>(s, x, packed.typed_data(), ends, zero, y->typed_data<int32_t>(), pool);
  else
    return ffi::Error::InvalidArgument("the result is uint8 or int32");
  return ffi::Error::Success();
}

// `zero` is the integer used as padding: 128 for an int8 image that was shifted to be unsigned.
ffi::Error convolve_int8(ffi::ThreadPool pool, ffi::Buffer<ffi::U8> x, ffi::Buffer<ffi::S8> packed,
                         ffi::Buffer<ffi::S32> bias, ffi::Buffer<ffi::F32> factor, ffi::Result<ffi::AnyBuffer> y,
                         int64_t stride, int64_t groups, int64_t zero) {
  const std::optional<Shape> s = shape_of(x.dimensions(), y->dimensions(), stride, groups);
  if (!s || (groups > 1 && s->group_inputs() % 4)) return bad_shapes();
  const int64_t lanes = groups * s->panels() * LANES;
  if (int64_t(bias.element_count()) != lanes || int64_t(factor.element_count()) != lanes) return bad_packing();
  const IntegerEnds ends{bias.typed_data(), factor.typed_data()};
#if defined(REPVGG_TILES)
  if (tiles_allowed()) return convolve_bytes<TiledBytes>(*s, x.typed_data(), packed, ends, uint8_t(zero), y, pool);
#endif
  return convolve_bytes<Bytes>(*s, x.typed_data(), packed, ends, uint8_t(zero), y, pool);
}
#endif

// Averages over height and width; each sum is multiplied by `factor`.
ffi::Error average(ffi::ThreadPool threads, ffi::AnyBuffer x, ffi::Buffer<ffi::F32> factor,
                   ffi::ResultBuffer<ffi::F32> y) {
  const auto from = x.dimensions(), to = y->dimensions();
  if (from.size() != 4 || to.size() != 2 || from[0] != to[0] || from[3] != to[1] || factor.element_count() != 1)
    return bad_shapes();
  if (!y->element_count()) return ffi::Error::Success();
  const auto run = [&](const auto* pixels) {
    pool(from[0], from[1] * from[2], from[3], pixels, *factor.typed_data(), y->typed_data(), threads);
    return ffi::Error::Success();
  };
  if (x.element_type() == ffi::F32) return run(x.typed_data<float>());
#if defined(__AVX512BF16__)
  if (x.element_type() == ffi::BF16) return run(reinterpret_cast<const Half*>(x.untyped_data()));
#endif
#if defined(__AVX512VNNI__)
  if (x.element_type() == ffi::U8) return run(x.typed_data<uint8_t>());
#endif
  return ffi::Error::InvalidArgument("no processor instructions for pixels of this type");
}

// The error in a classifier's arguments, if there is one; `run` inputs are multiplied at a time.
template <typename Dimensions>
std::optional<ffi::Error> bad_classifier(Dimensions from, Dimensions to, size_t packed, size_t lanes, int64_t run) {
  if (from.size() != 2 || to.size() != 2 || from[0] != to[0] || from[1] % run) return bad_shapes();
  const int64_t padded = up_to(to[1], LANES);
  if (int64_t(packed) != from[1] * padded || int64_t(lanes) != padded) return bad_packing();
  return std::nullopt;
}

ffi::Error classify_floats(ffi::ThreadPool threads, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::F32> packed,
                           ffi::Buffer<ffi::F32> bias, ffi::ResultBuffer<ffi::F32> y) {
  const auto from = x.dimensions(), to = y->dimensions();
  if (const auto error = bad_classifier(from, to, packed.element_count(), bias.element_count(), Floats::RUN))
    return *error;
  classify<Floats>(from[0], from[1], to[1], x.typed_data(), packed.typed_data(), {bias.typed_data(), false},
                   y->typed_data(), threads);
  return ffi::Error::Success();
}

#if defined(__AVX512VNNI__)
ffi::Error classify_int8(ffi::ThreadPool threads, ffi::Buffer<ffi::U8> x, ffi::Buffer<ffi::S8> packed,
                         ffi::Buffer<ffi::S32> bias, ffi::Buffer<ffi::F32> factor, ffi::ResultBuffer<ffi::F32> y) {
  const auto from = x.dimensions(), to = y->dimensions();
  if (const auto error = bad_classifier(from, to, packed.element_count(), bias.element_count(), Bytes<float>::RUN))
    return *error;
  if (factor.element_count() != bias.element_count()) return bad_packing();
  classify<Bytes<float>>(from[0], from[1], to[1], x.typed_data(), packed.typed_data(),
                         {bias.typed_data(), factor.typed_data()}, y->typed_data(), threads);
  return ffi::Error::Success();
}

ffi::Error to_bytes(ffi::ThreadPool threads, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::F32> factor,
                    ffi::ResultBuffer<ffi::U8> y, int64_t zero) {
  if (x.element_count() != y->element_count() || factor.element_count() != 1) return bad_shapes();
  if (zero < 0 || zero > 255) return ffi::Error::InvalidArgument("zero is an integer of uint8");
  round_to_bytes(x.element_count(), x.typed_data(), *factor.typed_data(), zero, y->typed_data(), threads);
  return ffi::Error::Success();
}
#endif

// The error in a training call's arguments, if there is one.
inline std::optional<ffi::Error> bad_training(const std::optional<Shape>& s, size_t kernel, int64_t tile) {
  if (!s || int64_t(kernel) != 9 * s->group_inputs() * s->outputs) return bad_shapes();
  return bad_tile(tile, s->stride);
}

// Convolves in training: packs a kernel `[3, 3, inputs / groups, outputs]` inside the call.
ffi::Error train(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::F32> kernel,
                 ffi::ResultBuffer<ffi::F32> y, int64_t stride, int64_t groups, int64_t tile) {
  const std::optional<Shape> s = shape_of(x.dimensions(), y->dimensions(), stride, groups);
  if (const auto error = bad_training(s, kernel.element_count(), tile)) return *error;
  const Packed packed(*s, kernel.typed_data(), Use::FORWARD, tile, pool);
  convolve(*s, tile, x.typed_data(), packed.data(), FloatEnds{nullptr, false}, y->typed_data(), pool);
  return ffi::Error::Success();
}

ffi::Error to_input(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> gradient, ffi::Buffer<ffi::F32> kernel,
                    ffi::ResultBuffer<ffi::F32> x, int64_t stride, int64_t groups, int64_t tile) {
  const std::optional<Shape> s = shape_of(x->dimensions(), gradient.dimensions(), stride, groups);
  if (stride > 2) return bad_shapes();
  if (const auto error = bad_training(s, kernel.element_count(), tile)) return *error;
  if (s->empty()) return ffi::Error::Success();
  const Packed packed(*s, kernel.typed_data(), stride == 1 ? Use::BACKWARD : Use::SPREAD, tile, pool);
  if (stride == 2) {
    spread(*s, gradient.typed_data(), packed.data(), x->typed_data(), pool);
    return ffi::Error::Success();
  }
  convolve(s->turned(), tile, gradient.typed_data(), packed.data(), FloatEnds{nullptr, false}, x->typed_data(), pool);
  return ffi::Error::Success();
}

ffi::Error to_kernel(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::F32> gradient,
                     ffi::ResultBuffer<ffi::F32> kernel, int64_t stride, int64_t groups, int64_t tile) {
  const std::optional<Shape> s = shape_of(x.dimensions(), gradient.dimensions(), stride, groups);
  if (const auto error = bad_training(s, kernel->element_count(), tile)) return *error;
  if (s->empty()) {  // a sum over no pixels
    std::fill(kernel->typed_data(), kernel->typed_data() + kernel->element_count(), 0.0f);
    return ffi::Error::Success();
  }
  const auto way = tile == 4   ? winograd_kernel_gradient<4>
                   : tile == 2 ? winograd_kernel_gradient<2>
                               : kernel_gradient;
  way(*s, x.typed_data(), gradient.typed_data(), kernel->typed_data(), pool);
  return ffi::Error::Success();
}

}  // namespace repvgg

extern "C" int repvgg_lanes() { return repvgg::LANES; }

// Runs of packed weights are padded with zeros to a multiple of this many elements; 0 if there is no such function.
extern "C" int repvgg_bf16_run() {
#if defined(REPVGG_TILES)
  if (repvgg::tiles_allowed()) return repvgg::TiledHalves::RUN;
#endif
#if defined(__AVX512BF16__)
  return repvgg::Halves<repvgg::Half>::RUN;
#else
  return 0;
#endif
}

extern "C" int repvgg_bf16_in_tiles() {
#if defined(REPVGG_TILES)
  return repvgg::tiles_allowed();
#else
  return 0;
#endif
}

extern "C" int repvgg_int8_run() {
#if defined(REPVGG_TILES)
  if (repvgg::tiles_allowed()) return repvgg::TiledBytes<uint8_t>::RUN;
#endif
#if defined(__AVX512VNNI__)
  return repvgg::Bytes<uint8_t>::RUN;
#else
  return 0;
#endif
}

#if defined(__AVX512VNNI__)
XLA_FFI_DEFINE_HANDLER_SYMBOL(repvgg_conv3x3_int8, repvgg::convolve_int8,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::U8>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S8>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Attr<int64_t>("stride")
                                  .Attr<int64_t>("groups")
                                  .Attr<int64_t>("zero"));
#endif

#if defined(__AVX512BF16__)
XLA_FFI_DEFINE_HANDLER_SYMBOL(repvgg_conv3x3_bf16, repvgg::convolve_bf16,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::BF16>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::BF16>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::BF16>>()
                                  .Attr<int64_t>("stride")
                                  .Attr<int64_t>("groups")
                                  .Attr<int64_t>("tile")
                                  .Attr<bool>("relu"));
#endif

XLA_FFI_DEFINE_HANDLER_SYMBOL(repvgg_conv3x3, repvgg::convolve_packed,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Attr<int64_t>("stride")
                                  .Attr<int64_t>("groups")
                                  .Attr<int64_t>("tile")
                                  .Attr<bool>("relu"));

#if defined(__AVX512VNNI__)
XLA_FFI_DEFINE_HANDLER_SYMBOL(repvgg_classify_int8, repvgg::classify_int8,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::U8>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S8>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(repvgg_to_bytes, repvgg::to_bytes,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::U8>>()
                                  .Attr<int64_t>("zero"));
#endif

XLA_FFI_DEFINE_HANDLER_SYMBOL(repvgg_pool, repvgg::average,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(repvgg_classify, repvgg::classify_floats,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>());

// Binding with two arrays and one result.
#define BILINEAR                           \
  xla::ffi::Ffi::Bind()                    \
      .Ctx<xla::ffi::ThreadPool>()         \
      .Arg<xla::ffi::Buffer<xla::ffi::F32>>() \
      .Arg<xla::ffi::Buffer<xla::ffi::F32>>() \
      .Ret<xla::ffi::Buffer<xla::ffi::F32>>() \
      .Attr<int64_t>("stride")             \
      .Attr<int64_t>("groups")             \
      .Attr<int64_t>("tile")

XLA_FFI_DEFINE_HANDLER_SYMBOL(repvgg_training_conv3x3, repvgg::train, BILINEAR);
XLA_FFI_DEFINE_HANDLER_SYMBOL(repvgg_input_gradient, repvgg::to_input, BILINEAR);
XLA_FFI_DEFINE_HANDLER_SYMBOL(repvgg_kernel_gradient, repvgg::to_kernel, BILINEAR);
