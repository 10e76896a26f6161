// The Python edge of products of bits, of packing for them, and of convolutions of bits and bytes.
#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>

#include <array>
#include <cstdint>
#include <limits>
#include <memory>
#include <new>
#include <string>
#include <utility>

#include "bind_linear.hpp"
#include "bits.hpp"
#include "checks.hpp"
#include "conv.hpp"

namespace nb = nanobind;

namespace laconic::edge {
namespace {

constexpr std::align_val_t kLine{64};

struct Free {
  void operator()(std::uint32_t* p) const { ::operator delete(p, kLine); }
};

/// Memory for n words, aligned to a cache line.
std::unique_ptr<std::uint32_t, Free> words_of(Int n) {
  return std::unique_ptr<std::uint32_t, Free>(
      static_cast<std::uint32_t*>(::operator new(static_cast<std::size_t>(n) * 4 + 4, kLine)));
}

const float* floats(Address address) { return reinterpret_cast<const float*>(address); }

void check_planes(const char* what, Int planes) {
  if (planes < 1 || planes > kMaxPlanes)
    refuse(std::string(what) + ": " + std::to_string(planes) + " bits, must be 1 to " + std::to_string(kMaxPlanes));
}

void check_bits(Int k) {
  if (k < 0 || k > kMaxBits) refuse("k is " + std::to_string(k) + ", must be 0 to " + std::to_string(kMaxBits));
}

BitMatrix bits_of(const char* what, Address words, Int length, Int rows, Int planes, Int encoding, Int k) {
  check_planes(what, planes);
  check_block(what, words, length, rows, words_for(k, 1) * planes, 4);
  if (encoding < 0 || encoding > static_cast<Int>(Encoding::twos))
    refuse(std::string(what) + ": there is no encoding number " + std::to_string(encoding));
  return {reinterpret_cast<const std::uint32_t*>(words), rows, static_cast<int>(planes), static_cast<Encoding>(encoding)};
}

/// One number for all rows, or one for each.
bool per_row(const char* what, Address address, Int length, Int rows) {
  if (length != 1 && length != rows)
    refuse(std::string(what) + ": " + std::to_string(length) + " numbers, must be 1 or " + std::to_string(rows));
  check_block(what, address, length, 1, length, 4);
  return length == rows;
}

void bit_product(Address a, Int a_length, Int m, Int a_planes, Int a_encoding, Address b, Int b_length, Int n, Int b_planes,
                 Int b_encoding, Int k, Address exact, Int exact_length, Address out, Int out_length, Address a_scale,
                 Int a_scale_length, Address b_scale, Int b_scale_length, Address bias, Int bias_length, Int threads,
                 Int isa) {
  check_bits(k);
  BitProduct job{};
  job.a = bits_of("a", a, a_length, m, a_planes, a_encoding, k);
  job.b = bits_of("b", b, b_length, n, b_planes, b_encoding, k);
  job.k = k;
  if (exact != 0) {
    check_block("exact", exact, exact_length, m, n, 4);
    job.exact = reinterpret_cast<std::int32_t*>(exact);
  }
  if (out != 0) {
    check_block("out", out, out_length, m, n, 4);
    job.a_scale_per_row = per_row("a_scale", a_scale, a_scale_length, m);
    job.b_scale_per_row = per_row("b_scale", b_scale, b_scale_length, n);
    if (bias != 0) check_block("bias", bias, bias_length, 1, n, 4);
    job.out = reinterpret_cast<float*>(out);
    job.a_scale = floats(a_scale);
    job.b_scale = floats(b_scale);
    job.bias = floats(bias);
  }
  const int many = threads_of(threads);
  const Isa use = isa_of(isa);
  laconic::bit_product(job, words_of(bit_product_scratch(job)).get(), many, use);
}

void pack_signs(Address x, Int x_length, Int rows, Int k, Address out, Int out_length, Int threads, Int isa) {
  check_bits(k);
  check_block("x", x, x_length, rows, k, 4);
  check_block("out", out, out_length, rows, words_for(k, 1), 4);
  laconic::pack_signs(floats(x), rows, k, reinterpret_cast<std::uint32_t*>(out), threads_of(threads), isa_of(isa));
}

void pack_planes(Address x, Int x_length, Int rows, Int k, Address factor, Int factor_length, bool down, float offset,
                 float low, float high, Int planes, Address out, Int out_length, Int threads, Int isa) {
  check_bits(k);
  check_planes("out", planes);
  check_block("x", x, x_length, rows, k, 4);
  check_block("out", out, out_length, rows, words_for(k, 1) * planes, 4);
  const bool each = per_row("factor", factor, factor_length, rows);
  const Coding coding{.factor = floats(factor), .per_row = each, .down = down, .offset = offset, .low = low, .high = high};
  laconic::pack_planes(floats(x), rows, k, coding, static_cast<int>(planes), reinterpret_cast<std::uint32_t*>(out),
                       threads_of(threads), isa_of(isa));
}

void pack_code_planes(Address codes, Int length, Int rows, Int k, Int planes, Address out, Int out_length, Int threads) {
  check_bits(k);
  check_planes("out", planes);
  check_block("codes", codes, length, rows, k, 1);
  check_block("out", out, out_length, rows, words_for(k, 1) * planes, 4);
  laconic::pack_planes(reinterpret_cast<const std::uint8_t*>(codes), rows, k, static_cast<int>(planes),
                       reinterpret_cast<std::uint32_t*>(out), threads_of(threads));
}

using Pair = std::array<Int, 2>;

void check_range(const char* what, Int value, Int least, Int most) {
  if (value < least || value > most)
    refuse(std::string(what) + " is " + std::to_string(value) + ", must be " + std::to_string(least) + " to " +
           std::to_string(most));
}

ConvShape shape_of(Int images, Int channels, Int height, Int width, Int out_channels, Int groups, Pair kernel, Pair stride,
                   Pair padding, Pair dilation) {
  constexpr Int kMost = Int{1} << 20;  // of any one number, so that products of two can be formed
  check_range("groups", groups, 1, kMost);
  for (const auto& [what, value] : {std::pair{"images", images}, {"channels", channels}, {"height", height}, {"width", width},
                                    {"out_channels", out_channels}})
    check_range(what, value, 0, kMost);
  if (channels % groups != 0 || out_channels % groups != 0)
    refuse("groups is " + std::to_string(groups) + ", must divide " + std::to_string(channels) + " channels and " +
           std::to_string(out_channels) + " of the output");
  for (int axis = 0; axis < 2; ++axis) {
    check_range("kernel", kernel[axis], 1, 1 << 12);
    check_range("stride", stride[axis], 1, kMost);
    check_range("padding", padding[axis], 0, 1 << 16);
    check_range("dilation", dilation[axis], 1, 1 << 16);
  }
  return {images, groups, channels / groups, out_channels / groups, height, width, {kernel[0], kernel[1]},
          {stride[0], stride[1]}, {padding[0], padding[1]}, {dilation[0], dilation[1]}};
}

/// Rows of a block that would be too large to address are refused by check_block, one product at a time.
Int area(Int a, Int b) {
  if (b != 0 && a > std::numeric_limits<Int>::max() / 64 / b) refuse("the shape is too large to address");
  return a * b;
}

void conv(Int kind, Address x, Int x_length, Int images, Int channels, Int height, Int width, Address weight,
          Int weight_length, Int out_channels, Int groups, Pair kernel, Pair stride, Pair padding, Pair dilation,
          Address out, Int out_length, Address scale, Int scale_length, Address bias, Int bias_length, Int act, Int pad,
          Address factor, Int factor_length, Int zero, Int threads, Int isa) {
  check_range("kind", kind, 0, 1);
  check_range("act", act, 0, static_cast<Int>(Act::silu));
  check_range("pad", pad, -1, 1);
  check_range("zero", zero, 0, 255);
  ConvJob job{};
  job.kind = static_cast<Conv>(kind);
  job.shape = shape_of(images, channels, height, width, out_channels, groups, kernel, stride, padding, dilation);
  const ConvShape& s = job.shape;
  const Int taps = s.taps(), depth = area(taps, s.channels), places = area(s.out(0), s.out(1));
  // Sums of bytes must stay in 31 bits: 255 * 128 each, and as much again for the zero point.
  check_range("channels times taps", depth, 0, job.kind == Conv::bits ? kMaxBits : Int{1} << 15);
  area(area(area(s.padded(0), s.padded(1)), images), area(groups, job.words()));
  check_block("x", x, x_length, area(images, channels), area(height, width), 4);
  check_block("weight", weight, weight_length, out_channels, area(taps, job.words()), 4);
  check_block("out", out, out_length, area(images, out_channels), places, 4);
  if (scale_length != out_channels && scale_length != images * out_channels)
    refuse("scale: " + std::to_string(scale_length) + " numbers, must be " + std::to_string(out_channels) + ", or as many for each image");
  check_block("scale", scale, scale_length, 1, scale_length, 4);
  if (bias != 0) check_block("bias", bias, bias_length, 1, out_channels, 4);
  if (job.kind == Conv::bytes) check_block("factor", factor, factor_length, 1, 1, 4);
  job.x = floats(x);
  job.weight = reinterpret_cast<const std::uint32_t*>(weight);
  job.out = reinterpret_cast<float*>(out);
  job.scale = floats(scale);
  job.bias = floats(bias);
  job.per_image = scale_length != out_channels;
  job.act = static_cast<Act>(act);
  job.pad = static_cast<int>(pad);
  job.coding = {.factor = floats(factor), .per_row = false, .down = false, .offset = static_cast<float>(zero), .low = 0.0f, .high = 255.0f};
  const int many = threads_of(threads);
  const Isa use = isa_of(isa);
  laconic::conv(job, words_of(conv_scratch(job, many)).get(), many, use);
}

}  // namespace

void bind_bits(nb::module_& m) {
  using unlocked = nb::call_guard<nb::gil_scoped_release>;
  m.def("bit_product", &bit_product, nb::arg("a"), nb::arg("a_length"), nb::arg("m"), nb::arg("a_planes"),
        nb::arg("a_encoding"), nb::arg("b"), nb::arg("b_length"), nb::arg("n"), nb::arg("b_planes"),
        nb::arg("b_encoding"), nb::arg("k"), nb::arg("exact"), nb::arg("exact_length"), nb::arg("out"),
        nb::arg("out_length"), nb::arg("a_scale"), nb::arg("a_scale_length"), nb::arg("b_scale"),
        nb::arg("b_scale_length"), nb::arg("bias"), nb::arg("bias_length"), nb::arg("threads"), nb::arg("isa") = -1,
        unlocked());
  m.def("pack_signs", &pack_signs, nb::arg("x"), nb::arg("x_length"), nb::arg("rows"), nb::arg("k"), nb::arg("out"),
        nb::arg("out_length"), nb::arg("threads"), nb::arg("isa") = -1, unlocked());
  m.def("pack_planes", &pack_planes, nb::arg("x"), nb::arg("x_length"), nb::arg("rows"), nb::arg("k"), nb::arg("factor"),
        nb::arg("factor_length"), nb::arg("down"), nb::arg("offset"), nb::arg("low"), nb::arg("high"), nb::arg("planes"), nb::arg("out"),
        nb::arg("out_length"), nb::arg("threads"), nb::arg("isa") = -1, unlocked());
  m.def("pack_code_planes", &pack_code_planes, nb::arg("codes"), nb::arg("length"), nb::arg("rows"), nb::arg("k"),
        nb::arg("planes"), nb::arg("out"), nb::arg("out_length"), nb::arg("threads"), unlocked());
  m.def("conv", &conv, nb::arg("kind"), nb::arg("x"), nb::arg("x_length"), nb::arg("images"), nb::arg("channels"),
        nb::arg("height"), nb::arg("width"), nb::arg("weight"), nb::arg("weight_length"), nb::arg("out_channels"),
        nb::arg("groups"), nb::arg("kernel"), nb::arg("stride"), nb::arg("padding"), nb::arg("dilation"), nb::arg("out"),
        nb::arg("out_length"), nb::arg("scale"), nb::arg("scale_length"), nb::arg("bias"), nb::arg("bias_length"),
        nb::arg("act"), nb::arg("pad"), nb::arg("factor"), nb::arg("factor_length"), nb::arg("zero"), nb::arg("threads"),
        nb::arg("isa") = -1, unlocked());
}

}  // namespace laconic::edge
