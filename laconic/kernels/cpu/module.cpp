// The Python edge: addresses and sizes come in as integers, every bound is checked here, and the work runs
// without the interpreter's lock. Nothing of torch is included or linked, so that one build serves any torch.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>

#include "kernels.hpp"

namespace nb = nanobind;

namespace {

using laconic::Dtype;
using laconic::Isa;
using Int = std::int64_t;
using Address = std::uintptr_t;

[[noreturn]] void refuse(const std::string& what) { throw std::invalid_argument(what); }

std::string shape(Int a, Int b) {
  std::string text(1, '(');
  return text.append(std::to_string(a)).append(", ").append(std::to_string(b)).append(1, ')');
}

/// A block of (rows, columns) elements of `size` bytes at `address`, of which `length` elements are the caller's.
void check_block(const char* what, Address address, Int length, Int rows, Int columns, Int size) {
  if (rows < 0 || columns < 0) refuse(std::string(what) + ": the shape " + shape(rows, columns) + " is negative");
  if (columns != 0 && rows > std::numeric_limits<Int>::max() / 8 / columns)
    refuse(std::string(what) + ": the shape " + shape(rows, columns) + " is too large to address");
  if (length < rows * columns)
    refuse(std::string(what) + ": " + std::to_string(length) + " elements given, the shape " +
           shape(rows, columns) + " needs " + std::to_string(rows * columns));
  if (rows * columns == 0) return;
  if (address == 0) refuse(std::string(what) + ": the address is null");
  if (address % static_cast<Address>(size) != 0)
    refuse(std::string(what) + ": the address is not aligned to " + std::to_string(size) + " bytes");
}

void check_rows(Int rows, Int begin, Int end) {
  if (begin < 0 || end < begin || end > rows)
    refuse("rows " + std::to_string(begin) + " to " + std::to_string(end) + " do not lie within 0 to " +
           std::to_string(rows));
}

void check_codes(Int bits, Int k, Int words_per_row) {
  if (bits < 1 || bits > 8) refuse("bits is " + std::to_string(bits) + ", must be 1 to 8");
  if (k < 0 || k > std::numeric_limits<Int>::max() / 64) refuse("k is " + std::to_string(k) + ", out of range");
  const Int need = laconic::words_for(k, static_cast<int>(bits));
  if (words_per_row != need)
    refuse("words: " + std::to_string(words_per_row) + " per row, but " + std::to_string(k) + " codes of " +
           std::to_string(bits) + " bits fill " + std::to_string(need));
}

Dtype dtype_of(const char* what, Int number, bool scale) {
  const auto last = static_cast<Int>(scale ? Dtype::bfloat16 : Dtype::uint8);
  if (number < (scale ? 1 : 0) || number > last)
    refuse(std::string(what) + ": there is no dtype number " + std::to_string(number));
  return static_cast<Dtype>(number);
}

/// -1 means the best; a test may ask for a plainer one, nobody for one that the CPU lacks.
Isa isa_of(Int number) {
  const auto best = static_cast<Int>(laconic::best_isa());
  if (number < -1 || number > best)
    refuse("isa is " + std::to_string(number) + ", this CPU has 0 to " + std::to_string(best) + " (or -1: the best)");
  return static_cast<Isa>(number == -1 ? best : number);
}

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
                Address out, Int out_length, Int row_begin, Int row_end, Int isa) {
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
  laconic::dequantize_rows(job, row_begin, row_end, isa_of(isa));
}

void hadamard(Address x, Int length, Int rows, Int n, float scale, Int row_begin, Int row_end, Int isa) {
  if (n < 1 || (n & (n - 1)) != 0) refuse("n is " + std::to_string(n) + ", must be a power of two");
  check_block("x", x, length, rows, n, 4);
  check_rows(rows, row_begin, row_end);
  laconic::hadamard_rows(reinterpret_cast<float*>(x), n, scale, row_begin, row_end, isa_of(isa));
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
        nb::arg("isa") = -1, unlocked());
  m.def("hadamard", &hadamard, nb::arg("x"), nb::arg("length"), nb::arg("rows"), nb::arg("n"), nb::arg("scale"),
        nb::arg("row_begin"), nb::arg("row_end"), nb::arg("isa") = -1, unlocked());
}
