// What the Python edge checks before any kernel runs: addresses and sizes come in as integers from another language.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>

#include "kernels.hpp"

namespace laconic::edge {

using laconic::Dtype;
using laconic::Isa;
using Int = std::int64_t;
using Address = std::uintptr_t;

[[noreturn]] inline void refuse(const std::string& what) { throw std::invalid_argument(what); }

inline std::string shape(Int a, Int b) {
  std::string text(1, '(');
  return text.append(std::to_string(a)).append(", ").append(std::to_string(b)).append(1, ')');
}

/// A block of (rows, columns) elements of `size` bytes at `address`, of which `length` elements are the caller's.
inline void check_block(const char* what, Address address, Int length, Int rows, Int columns, Int size) {
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

inline void check_rows(Int rows, Int begin, Int end) {
  if (begin < 0 || end < begin || end > rows)
    refuse("rows " + std::to_string(begin) + " to " + std::to_string(end) + " do not lie within 0 to " +
           std::to_string(rows));
}

inline void check_codes(Int bits, Int k, Int words_per_row) {
  if (bits < 1 || bits > 8) refuse("bits is " + std::to_string(bits) + ", must be 1 to 8");
  if (k < 0 || k > std::numeric_limits<Int>::max() / 64) refuse("k is " + std::to_string(k) + ", out of range");
  const Int need = laconic::words_for(k, static_cast<int>(bits));
  if (words_per_row != need)
    refuse("words: " + std::to_string(words_per_row) + " per row, but " + std::to_string(k) + " codes of " +
           std::to_string(bits) + " bits fill " + std::to_string(need));
}

inline Dtype dtype_of(const char* what, Int number, bool scale) {
  const auto last = static_cast<Int>(scale ? Dtype::bfloat16 : Dtype::uint8);
  if (number < (scale ? 1 : 0) || number > last)
    refuse(std::string(what) + ": there is no dtype number " + std::to_string(number));
  return static_cast<Dtype>(number);
}

/// -1 means the best; a test may ask for a plainer one, nobody for one that the CPU lacks.
inline Isa isa_of(Int number) {
  const auto best = static_cast<Int>(laconic::best_isa());
  if (number < -1 || number > best)
    refuse("isa is " + std::to_string(number) + ", this CPU has 0 to " + std::to_string(best) + " (or -1: the best)");
  return static_cast<Isa>(number == -1 ? best : number);
}

inline int threads_of(Int threads) {
  if (threads < 1 || threads > 4096) refuse("threads is " + std::to_string(threads) + ", must be 1 to 4096");
  return static_cast<int>(threads);
}

// Each file bind_*.cpp adds its functions to the module.
void bind_linear(nanobind::module_& m);
void bind_block(nanobind::module_& m);
void bind_bits(nanobind::module_& m);
void bind_norm(nanobind::module_& m);
void bind_sparse(nanobind::module_& m);
void bind_cache(nanobind::module_& m);

}  // namespace laconic::edge
