// The Python edge of LayerNorm and RMSNorm.
#include <nanobind/nanobind.h>
#include <nanobind/stl/tuple.h>

#include <cstdint>
#include <memory>
#include <tuple>

#include "checks.hpp"
#include "norm.hpp"

namespace nb = nanobind;

namespace laconic::edge {
namespace {

/// A tensor of (rows, d) or (d) elements: address (0 is one that is not there), length and dtype number.
using Operand = std::tuple<Address, Int, Int>;

void* rows_of(const char* what, const Operand& operand, Dtype dtype, Int rows, Int d, bool optional) {
  const auto [address, length, number] = operand;
  if (optional && address == 0) return nullptr;
  check_block(what, address, length, rows, d, static_cast<Int>(size_of(dtype)));
  if (dtype_of(what, number, true) != dtype)
    refuse(std::string(what) + ": dtype number " + std::to_string(number) + ", must be " +
           std::to_string(static_cast<Int>(dtype)));
  return reinterpret_cast<void*>(address);
}

const void* vector_of(const char* what, const Operand& operand, Int d, Dtype& dtype) {
  dtype = Dtype::float32;
  const auto [address, length, number] = operand;
  if (address == 0) return nullptr;
  dtype = dtype_of(what, number, true);
  check_block(what, address, length, 1, d, static_cast<Int>(size_of(dtype)));
  return reinterpret_cast<const void*>(address);
}

/// eps, centred, eps_outside, unit_offset.
using Kind = std::tuple<float, bool, bool, bool>;

NormKind kind_of(const Kind& kind) {
  const auto [eps, centred, eps_outside, unit_offset] = kind;
  return {.eps = eps, .centred = centred, .eps_outside = eps_outside, .unit_offset = unit_offset};
}

void check_shape(Int rows, Int d) {
  if (d < 1 || d > Int{1} << 40) refuse("d is " + std::to_string(d) + ", out of range");
  if (rows < 0) refuse("rows is " + std::to_string(rows) + ", must not be negative");
}

void norm(const Operand& x, const Operand& residual, const Operand& weight, const Operand& bias, const Operand& y,
          const Operand& sum, Address codes, Int codes_length, Address scales, Int scales_length, Int rows, Int d,
          const Kind& kind, Int threads, Int isa) {
  check_shape(rows, d);
  NormForward job{};
  job.kind = kind_of(kind);
  job.rows = rows;
  job.d = d;
  job.dtype = dtype_of("x", std::get<2>(x), true);
  job.x = rows_of("x", x, job.dtype, rows, d, false);
  job.residual = rows_of("residual", residual, job.dtype, rows, d, true);
  job.weight = vector_of("weight", weight, d, job.weight_dtype);
  job.bias = vector_of("bias", bias, d, job.bias_dtype);
  job.y = rows_of("y", y, job.dtype, rows, d, true);
  job.sum = rows_of("sum", sum, job.dtype, rows, d, true);
  if (codes != 0) {
    check_block("codes", codes, codes_length, rows, d, 1);
    check_block("scales", scales, scales_length, 1, rows, 4);
    job.codes = reinterpret_cast<std::int8_t*>(codes);
    job.scales = reinterpret_cast<float*>(scales);
  }
  const int many = threads_of(threads);
  const Isa use = isa_of(isa);
  const auto scratch = std::make_unique_for_overwrite<float[]>(static_cast<std::size_t>(norm_scratch(job, many)));
  laconic::norm(job, scratch.get(), many, use);
}

void norm_backward(const Operand& grad, const Operand& x, const Operand& grad_sum, const Operand& weight,
                   const Operand& dx, const Operand& dweight, const Operand& dbias, Int rows, Int d,
                   const Kind& kind, Int threads, Int isa) {
  check_shape(rows, d);
  NormBackward job{};
  job.kind = kind_of(kind);
  job.rows = rows;
  job.d = d;
  job.dtype = dtype_of("x", std::get<2>(x), true);
  job.grad = rows_of("grad", grad, job.dtype, rows, d, false);
  job.x = rows_of("x", x, job.dtype, rows, d, false);
  job.grad_sum = rows_of("grad_sum", grad_sum, job.dtype, rows, d, true);
  job.weight = vector_of("weight", weight, d, job.weight_dtype);
  job.dx = rows_of("dx", dx, job.dtype, rows, d, false);
  job.dweight = static_cast<float*>(rows_of("dweight", dweight, Dtype::float32, 1, d, true));
  job.dbias = static_cast<float*>(rows_of("dbias", dbias, Dtype::float32, 1, d, true));
  const int many = threads_of(threads);
  const Isa use = isa_of(isa);
  const auto scratch = std::make_unique_for_overwrite<float[]>(static_cast<std::size_t>(norm_scratch(job, many)));
  laconic::norm_backward(job, scratch.get(), many, use);
}

}  // namespace

void bind_norm(nb::module_& m) {
  using unlocked = nb::call_guard<nb::gil_scoped_release>;
  m.def("norm", &norm, nb::arg("x"), nb::arg("residual"), nb::arg("weight"), nb::arg("bias"), nb::arg("y"),
        nb::arg("sum"), nb::arg("codes"), nb::arg("codes_length"), nb::arg("scales"), nb::arg("scales_length"),
        nb::arg("rows"), nb::arg("d"), nb::arg("kind"), nb::arg("threads"), nb::arg("isa") = -1, unlocked(),
        "An operand is (address, length, dtype number); address 0 is one that is not there. `kind` is (eps, centred, "
        "eps_outside, unit_offset).");
  m.def("norm_backward", &norm_backward, nb::arg("grad"), nb::arg("x"), nb::arg("grad_sum"), nb::arg("weight"),
        nb::arg("dx"), nb::arg("dweight"), nb::arg("dbias"), nb::arg("rows"), nb::arg("d"), nb::arg("kind"),
        nb::arg("threads"), nb::arg("isa") = -1, unlocked(), "Operands as those of `norm`.");
}

}  // namespace laconic::edge
