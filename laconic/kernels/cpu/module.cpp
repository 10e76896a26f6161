// The Python edge: addresses and sizes come in as integers, every bound is checked here, and the work runs
// without the interpreter's lock. Nothing of torch is included or linked, so that one build serves any torch.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <memory>
#include <string>

#include "checks.hpp"
#include "kernels.hpp"

namespace nb = nanobind;

namespace {

using namespace laconic::edge;

void unpack(Address words, Int words_length, Int rows, Int words_per_row, Int bits, Int k, Address out,
            Int out_length, Int row_begin, Int row_end, Int isa) {
  check_codes(bits, k, words_per_row);
  check_block("words", words, words_length, rows, words_per_row, 4);
  check_block("out", out, out_length, rows, k, 1);
  check_rows(rows, row_begin, row_end);
  const Isa use = isa_of(isa);
  const auto* from = reinterpret_cast<const std::uint32_t*>(words);
  auto* to = reinterpret_cast<std::uint8_t*>(out);
  for (Int row = row_begin; row < row_end; ++row)
    laconic::unpack_row(from + row * words_per_row, static_cast<int>(bits), k, to + row * k, use);
}

void dequantize(Address words, Int words_length, Int rows, Int words_per_row, Address scale, Int scale_length,
                Int scale_dtype, Address zero, Int zero_length, Int zero_dtype, Int groups, Int group, Int bits, Int k,
                Address out, Int out_length, Int row_begin, Int row_end, Int threads, Int isa) {
  check_codes(bits, k, words_per_row);
  check_block("words", words, words_length, rows, words_per_row, 4);
  check_block("out", out, out_length, rows, k, 4);
  check_rows(rows, row_begin, row_end);
  if (group < 1) refuse("group is " + std::to_string(group) + ", must be at least 1");
  const Int need = k == 0 ? 0 : (k - 1) / group + 1;
  if (groups < need || (k > 0 && groups != need))
    refuse("scale: " + std::to_string(groups) + " groups per row, but " + std::to_string(k) + " codes in groups of " +
           std::to_string(group) + " make " + std::to_string(need));
  const Dtype scale_as = dtype_of("scale", scale_dtype, true);
  check_block("scale", scale, scale_length, rows, groups, static_cast<Int>(laconic::size_of(scale_as)));
  const Dtype zero_as = dtype_of("zero", zero_dtype, false);
  if (zero_as != Dtype::none)
    check_block("zero", zero, zero_length, rows, groups, static_cast<Int>(laconic::size_of(zero_as)));
  const laconic::Dequantize job{
      .words = reinterpret_cast<const std::uint32_t*>(words),
      .scale = reinterpret_cast<const void*>(scale),
      .zero = reinterpret_cast<const void*>(zero),
      .out = reinterpret_cast<float*>(out),
      .scale_dtype = scale_as,
      .zero_dtype = zero_as,
      .words_per_row = words_per_row,
      .groups = groups,
      .group = group,
      .k = k,
      .bits = static_cast<int>(bits),
  };
  laconic::dequantize(job, row_begin, row_end, threads_of(threads), isa_of(isa));
}

void hadamard(Address x, Int length, Int dtype, Int rows, Int n, float scale, Int threads, Int isa) {
  if (n < 1 || (n & (n - 1)) != 0) refuse("n is " + std::to_string(n) + ", must be a power of two");
  const Dtype as = dtype_of("x", dtype, true);
  check_block("x", x, length, rows, n, static_cast<Int>(laconic::size_of(as)));
  const laconic::Hadamard job{.x = reinterpret_cast<void*>(x), .dtype = as, .rows = rows, .n = n, .scale = scale};
  const int many = threads_of(threads);
  const Isa use = isa_of(isa);
  const auto scratch = std::make_unique_for_overwrite<float[]>(static_cast<std::size_t>(hadamard_scratch(job, many)));
  laconic::hadamard(job, scratch.get(), many, use);
}

}  // namespace

NB_MODULE(_cpu, m) {
  using unlocked = nb::call_guard<nb::gil_scoped_release>;
  m.doc() = "C++ kernels on raw addresses; use laconic.kernels.native, which takes tensors.";
  m.attr("FLOAT32") = static_cast<int>(Dtype::float32);
  m.attr("FLOAT16") = static_cast<int>(Dtype::float16);
  m.attr("BFLOAT16") = static_cast<int>(Dtype::bfloat16);
  m.attr("UINT8") = static_cast<int>(Dtype::uint8);
  m.attr("NONE") = static_cast<int>(Dtype::none);
  m.attr("compiler") = LACONIC_COMPILER;
  m.def("isa", [](Int number) { return std::string(laconic::name(isa_of(number))); }, nb::arg("number") = -1,
        "Name of an instruction set by its number; -1, the default, is the best on this CPU.");
  m.def("best_isa", [] { return static_cast<int>(laconic::best_isa()); }, "Number of the best instruction set.");
  m.def("unpack", &unpack, nb::arg("words"), nb::arg("words_length"), nb::arg("rows"), nb::arg("words_per_row"),
        nb::arg("bits"), nb::arg("k"), nb::arg("out"), nb::arg("out_length"), nb::arg("row_begin"),
        nb::arg("row_end"), nb::arg("isa") = -1, unlocked());
  m.def("dequantize", &dequantize, nb::arg("words"), nb::arg("words_length"), nb::arg("rows"),
        nb::arg("words_per_row"), nb::arg("scale"), nb::arg("scale_length"), nb::arg("scale_dtype"), nb::arg("zero"),
        nb::arg("zero_length"), nb::arg("zero_dtype"), nb::arg("groups"), nb::arg("group"), nb::arg("bits"),
        nb::arg("k"), nb::arg("out"), nb::arg("out_length"), nb::arg("row_begin"), nb::arg("row_end"),
        nb::arg("threads"), nb::arg("isa") = -1, unlocked());
  m.def("hadamard", &hadamard, nb::arg("x"), nb::arg("length"), nb::arg("dtype"), nb::arg("rows"), nb::arg("n"),
        nb::arg("scale"), nb::arg("threads"), nb::arg("isa") = -1, unlocked());
  bind_linear(m);
  bind_block(m);
  bind_bits(m);
  bind_norm(m);
  bind_sparse(m);
  bind_cache(m);
}
