// The Python edge of linear layers on sparse weights.
#include <nanobind/nanobind.h>
#include <nanobind/stl/tuple.h>

#include <cstdint>
#include <memory>
#include <tuple>

#include "checks.hpp"
#include "sparse.hpp"

namespace nb = nanobind;

namespace laconic::edge {
namespace {

using Operand = std::tuple<Address, Int>;  // address and number of elements; address 0 is one that is not there

template <class T>
const T* operand(const char* what, const Operand& given, Int rows, Int columns, bool optional = false) {
  const auto [address, length] = given;
  if (optional && address == 0) return nullptr;
  check_block(what, address, length, rows, columns, sizeof(T));
  return reinterpret_cast<const T*>(address);
}

/// Blocks are counted by `starts`, and every block column lies within the matrix: what tensors say is not believed.
void check_blocks(const Sparse& w, Int blocks) {
  const Int block_rows = w.rows / w.r;
  if (w.starts[0] != 0 || w.starts[block_rows] != blocks)
    refuse("starts run from " + std::to_string(w.starts[0]) + " to " + std::to_string(w.starts[block_rows]) +
           ", must from 0 to " + std::to_string(blocks));
  for (Int b = 0; b < block_rows; ++b)
    if (w.starts[b + 1] < w.starts[b]) refuse("starts fall at block row " + std::to_string(b));
  std::uint32_t largest = 0;
  for (Int n = 0; n < blocks; ++n) largest = w.index[n] > largest ? w.index[n] : largest;
  if (blocks > 0 && largest >= static_cast<std::uint64_t>(w.k / w.c))
    refuse("columns: one is outside of 0 to " + std::to_string(w.k / w.c - 1));
}

void sparse_linear(const Operand& values, Int dtype, const Operand& index, const Operand& starts, const Operand& scale,
                   Int rows, Int k, Int r, Int c, const Operand& x, Int m, const Operand& out, const Operand& bias,
                   Int act, Int threads, Int isa) {
  if (dtype != static_cast<Int>(Dtype::float32) && dtype != static_cast<Int>(Dtype::bfloat16) && dtype != static_cast<Int>(Dtype::int8))
    refuse("values: there is no dtype number " + std::to_string(dtype));
  if (rows < 0 || k < 0 || m < 0 || r < 1 || c < 1) refuse("a size is negative, or a block has none");
  if (act < 0 || act > static_cast<Int>(Act::silu)) refuse("act: there is no activation number " + std::to_string(act));
  SparseLinear job{};
  Sparse& w = job.w;
  w.dtype = static_cast<Dtype>(dtype);
  const Int size = w.dtype == Dtype::float32 ? 4 : w.dtype == Dtype::int8 ? 1 : 2;
  w.rows = rows;
  w.k = k;
  w.r = r;
  w.c = c;
  const auto [address, length] = values;
  if (std::get<0>(starts) == 0) {
    if (k % 4 != 0 || r != 1 || c != 1) refuse("2:4: k is " + std::to_string(k) + ", must be a multiple of 4");
    check_block("values", address, length, rows, k / 2, size);
    w.words_per_row = words_for(k / 2, 2);
    w.index = operand<std::uint32_t>("positions", index, rows, w.words_per_row);
  } else {
    if (rows % r != 0 || k % c != 0) refuse("blocks of " + shape(r, c) + " do not divide a matrix of " + shape(rows, k));
    const Int blocks = std::get<1>(index);
    if (blocks < 0 || blocks > std::numeric_limits<std::int32_t>::max()) refuse("columns: there are " + std::to_string(blocks));
    check_block("values", address, length, blocks, r * c, size);
    w.index = operand<std::uint32_t>("columns", index, 1, blocks);
    w.starts = operand<std::int32_t>("starts", starts, 1, rows / r + 1);
    check_blocks(w, blocks);
  }
  w.values = reinterpret_cast<const void*>(address);
  w.scale = operand<float>("scale", scale, rows, 1, true);
  if ((w.scale != nullptr) != (w.dtype == Dtype::int8) && rows > 0) refuse("scale: int8 values have one, others none");
  job.m = m;
  job.x = operand<float>("x", x, m, k);
  job.out = const_cast<float*>(operand<float>("out", out, m, rows));
  job.bias = operand<float>("bias", bias, 1, rows, true);
  job.act = static_cast<Act>(act);
  const int many = threads_of(threads);
  const Isa use = isa_of(isa);
  const auto scratch = std::make_unique_for_overwrite<float[]>(static_cast<std::size_t>(sparse_linear_scratch(job, use)));
  laconic::sparse_linear(job, scratch.get(), many, use);
}

}  // namespace

void bind_sparse(nb::module_& m) {
  using unlocked = nb::call_guard<nb::gil_scoped_release>;
  m.attr("INT8") = static_cast<int>(Dtype::int8);
  m.def("sparse_linear", &sparse_linear, nb::arg("values"), nb::arg("dtype"), nb::arg("index"), nb::arg("starts"),
        nb::arg("scale"), nb::arg("rows"), nb::arg("k"), nb::arg("r"), nb::arg("c"), nb::arg("x"), nb::arg("m"),
        nb::arg("out"), nb::arg("bias"), nb::arg("act"), nb::arg("threads"), nb::arg("isa") = -1, unlocked(),
        "An operand is (address, length); address 0 is one that is not there. Without starts the matrix is 2:4.");
}

}  // namespace laconic::edge
