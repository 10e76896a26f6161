// The Python edge of linear layers on packed weights.
#include <nanobind/nanobind.h>

#include <cstdint>
#include <memory>

#include "bind_linear.hpp"

namespace nb = nanobind;

namespace laconic::edge {

Matrix matrix_of(const Weights& w) {
  if (!w.base3) {
    check_codes(w.bits, w.k, w.words_per_row);
  } else if (w.k < 0 || w.bits != 2 || w.words_per_row != (w.k + 19) / 20) {
    refuse("words: " + std::to_string(w.words_per_row) + " per row do not hold " + std::to_string(w.k) + " ternary codes");
  }
  check_block("words", w.words, w.words_length, w.rows, w.words_per_row, 4);
  if (w.group < 1) refuse("group is " + std::to_string(w.group) + ", must be at least 1");
  const Int need = w.k == 0 ? 1 : (w.k - 1) / w.group + 1;
  if (w.groups != need)
    refuse("scale: " + std::to_string(w.groups) + " groups per row, but " + std::to_string(w.k) +
           " codes in groups of " + std::to_string(w.group) + " make " + std::to_string(need));
  if (w.scale_rows != w.rows && w.scale_rows != 1)
    refuse("scale has " + std::to_string(w.scale_rows) + " rows, words have " + std::to_string(w.rows));
  const bool one = w.scale_rows != w.rows;
  if (one && w.groups != 1) refuse("one scale for the whole matrix has one group");
  const Dtype dtype = dtype_of("scale", w.scale_dtype, true);
  const auto size = static_cast<Int>(size_of(dtype));
  check_block("scale", w.scale, w.scale_length, w.scale_rows, w.groups, size);
  if (w.zero_kind < 0 || w.zero_kind > 2) refuse("zero: there is no kind number " + std::to_string(w.zero_kind));
  const auto kind = static_cast<Zero>(w.zero_kind);
  if (kind == Zero::packed)
    check_block("zero", w.zero, w.zero_length, words_for(w.scale_rows, static_cast<int>(w.bits)), w.groups, 4);
  if (kind == Zero::real) check_block("zero", w.zero, w.zero_length, w.scale_rows, w.groups, size);
  if (w.levels != 0) {
    if (w.bits > 4) refuse("levels: a table has at most 16 entries, so bits is at most 4");
    if (kind != Zero::none) refuse("levels: a table has no zero point");
    if (w.base3) refuse("levels: ternary codes have none");
    check_block("levels", w.levels, w.levels_length, 1, Int{1} << w.bits, 4);
  }
  return {
      .dense = nullptr,
      .words = reinterpret_cast<const std::uint32_t*>(w.words),
      .scale = reinterpret_cast<const void*>(w.scale),
      .zero = reinterpret_cast<const void*>(w.zero),
      .levels = reinterpret_cast<const float*>(w.levels),
      .rows = w.rows,
      .k = w.k,
      .words_per_row = w.words_per_row,
      .groups = w.groups,
      .group = w.group,
      .bits = static_cast<int>(w.bits),
      .middle = w.base3 ? 1.0f : static_cast<float>(1 << (w.bits - 1)),
      .base3 = w.base3,
      .scale_dtype = dtype,
      .zero_kind = kind,
      .one_scale = one,
  };
}

namespace {

Epilogue epilogue_of(Address bias, Int bias_length, Address residual, Int residual_length, Int act, Int m, Int rows) {
  if (bias != 0) check_block("bias", bias, bias_length, 1, rows, 4);
  if (residual != 0) check_block("residual", residual, residual_length, m, rows, 4);
  if (act < 0 || act > static_cast<Int>(Act::silu)) refuse("act: there is no activation number " + std::to_string(act));
  return {
      .bias = reinterpret_cast<const float*>(bias),
      .residual = reinterpret_cast<const float*>(residual),
      .act = static_cast<Act>(act),
  };
}

void linear(const Weights& weights, Address x, Int x_length, Int m, Address out, Int out_length, Address bias,
            Int bias_length, Address residual, Int residual_length, Int act, bool int8, float x_scale, Int threads, Int isa) {
  Linear job{.w = matrix_of(weights), .x = nullptr, .out = nullptr, .m = m, .x_stride = weights.k,
             .out_stride = weights.rows, .then = {}};
  check_block("x", x, x_length, m, weights.k, 4);
  check_block("out", out, out_length, m, weights.rows, 4);
  job.x = reinterpret_cast<const float*>(x);
  job.out = reinterpret_cast<float*>(out);
  job.then = epilogue_of(bias, bias_length, residual, residual_length, act, m, weights.rows);
  job.x_scale = checked_scale(x_scale);
  const int many = threads_of(threads);
  const Isa use = isa_of(isa);
  if (int8) {
    if (!takes_int8(job.w)) refuse("inputs of 8 bits need integer weights in groups of a multiple of 4");
    const auto bytes = std::make_unique_for_overwrite<std::uint8_t[]>(
        static_cast<std::size_t>(linear_int8_scratch(job, many, use)));
    return linear_int8(job, bytes.get(), many, use);
  }
  const auto scratch = std::make_unique_for_overwrite<float[]>(
      static_cast<std::size_t>(linear_float_scratch(job, many, use)));
  linear_float(job, scratch.get(), many, use);
}

}  // namespace

void bind_linear(nb::module_& m) {
  using unlocked = nb::call_guard<nb::gil_scoped_release>;
  nb::class_<Weights>(m, "Weights", "Addresses and sizes of a packed matrix; its owner keeps the tensors alive.")
      .def("__init__",
           [](Weights* self, Address words, Int words_length, Int rows, Int words_per_row, Address scale,
              Int scale_length, Int scale_dtype, Int scale_rows, Address zero, Int zero_length, Int zero_kind,
              Address levels, Int levels_length, Int groups, Int group, Int bits, Int k, bool base3) {
             new (self) Weights{words, words_length, rows, words_per_row, scale, scale_length, scale_dtype, scale_rows,
                                zero, zero_length, zero_kind, levels, levels_length, groups, group, bits, k, base3};
             static_cast<void>(matrix_of(*self));  // refuse now, and not at the first use
           },
           nb::arg("words"), nb::arg("words_length"), nb::arg("rows"), nb::arg("words_per_row"), nb::arg("scale"),
           nb::arg("scale_length"), nb::arg("scale_dtype"), nb::arg("scale_rows"), nb::arg("zero"),
           nb::arg("zero_length"), nb::arg("zero_kind"), nb::arg("levels"), nb::arg("levels_length"),
           nb::arg("groups"), nb::arg("group"), nb::arg("bits"), nb::arg("k"), nb::arg("base3"));
  m.def("linear", &linear, nb::arg("weights"), nb::arg("x"), nb::arg("x_length"), nb::arg("m"), nb::arg("out"),
        nb::arg("out_length"), nb::arg("bias"), nb::arg("bias_length"), nb::arg("residual"),
        nb::arg("residual_length"), nb::arg("act"), nb::arg("int8"), nb::arg("x_scale"), nb::arg("threads"), nb::arg("isa") = -1, unlocked());
}

}  // namespace laconic::edge
