// A linear layer on sparse weights: y = act(x W^T + b), W as two of every four elements or as blocks.
//
// Few rows of x: each row of W is multiplied as it lies; x is picked from registers (2:4) or read where the block says.
// Many rows: x is laid out with a column's elements side by side, so that one weight meets a vector of rows of x, and no
// element of x is moved for any row of W.
#pragma once

#include <cstdint>

#include "kernels.hpp"
#include "linear.hpp"

namespace laconic {

/// A sparse matrix (rows, k) as `laconic.numerics.sparse` stores it.
///
/// 2:4 (starts is null): values (rows, k/2), index the dense 2-bit positions (rows, words_per_row).
/// Blocks of r x c: values (n, r, c), index the block column of each, starts (rows/r + 1) the first block of a block row.
struct Sparse {
  const void* values;  // float32, bfloat16 or int8
  const std::uint32_t* index;
  const std::int32_t* starts;
  const float* scale;  // (rows) of int8 values, else null
  Dtype dtype;
  std::int64_t rows, k, r, c, words_per_row;
};

struct SparseLinear {
  Sparse w;
  const float* x;     // (m, k)
  float* out;         // (m, rows)
  const float* bias;  // (rows), or null
  std::int64_t m;
  Act act;
};

/// Some rows of x, laid out for the kernels of many: x[m0 + i][k] at columns[k * width + i], zero beyond the last row.
struct Columns {
  float* columns;  // (k, width)
  float* sums;     // (rows, width)
  std::int32_t* next;  // (rows / r): the first block of a block row that is not added up yet
  std::int64_t m0;
  int vectors;  // width / lanes: 1, 2 or 4
};

/// Memory, in floats, that one call needs beside its operands.
std::int64_t sparse_linear_scratch(const SparseLinear& job, Isa isa);

void sparse_linear(const SparseLinear& job, float* scratch, int threads, Isa isa);

}  // namespace laconic
