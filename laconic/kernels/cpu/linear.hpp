// A linear layer on packed weights: y = act(x W^T + b) + r.
//
// Two ways to multiply, chosen by the caller: float32 inputs against weights that are looked up on the fly (bound by
// memory for one token and a few), and inputs rounded to 8 bits a token, which go through integer dot products.
#pragma once

#include <cstdint>

#include "kernels.hpp"

namespace laconic {

enum class Act { none = 0, relu = 1, gelu = 2, gelu_tanh = 3, silu = 4 };
enum class Zero { none = 0, packed = 1, real = 2 };

/// Packed weights (rows, k) as the artifact stores them.
struct Matrix {
  const std::uint32_t* words;  // (rows, words_per_row), dense
  const void* scale;           // (rows, groups), or (1, 1) for one scale of the whole matrix
  const void* zero;            // packed: words (ceil(rows*bits/32), groups), dense along rows; real: as scale
  const float* levels;         // 16 levels of a table scheme, else null: integers
  std::int64_t rows, k, words_per_row, groups, group;
  int bits;
  Dtype scale_dtype;
  Zero zero_kind;
  bool one_scale;
};

/// What becomes of a product before it is stored.
struct Epilogue {
  const float* bias;      // (rows), or null
  const float* residual;  // (m, rows) added after the activation, or null
  Act act;
};

struct Linear {
  Matrix w;
  const float* x;  // (m, k), rows x_stride apart
  float* out;      // (m, rows), rows out_stride apart; the residual lies likewise
  std::int64_t m, x_stride, out_stride;
  Epilogue then;
};

/// Codes of one row lie in `lanes` of 32 bits (24 for 3-bit codes) that hold whole codes; 0 for widths where none do.
constexpr int codes_per_lane(int bits) {
  switch (bits) {
    case 1: return 32;
    case 2: return 16;
    case 3:
    case 4: return 8;
    case 8: return 4;
    default: return 0;
  }
}

/// Whether `linear_float` has a path without a float copy of the row.
constexpr bool reads_lanes(const Matrix& w) {
  const int codes = codes_per_lane(w.bits);
  return codes != 0 && (w.groups <= 1 || w.group % codes == 0);
}

/// Memory, in floats, that one call of `linear_float` needs beside its operands.
std::int64_t linear_float_scratch(const Linear& job, int threads, Isa isa);

/// x stays float32 and weights are exact. For few rows of x.
void linear_float(const Linear& job, float* scratch, int threads, Isa isa);

/// Whether `linear_int8` can take the matrix: groups of whole words of four codes, integers.
constexpr bool takes_int8(const Matrix& w) { return w.levels == nullptr && (w.groups <= 1 || w.group % 4 == 0); }

/// Memory, in bytes, that one call of `linear_int8` needs beside its operands.
std::int64_t linear_int8_scratch(const Linear& job, int threads, Isa isa);

/// Each row of x is rounded to 8 bits first (symmetric, one scale a row), and products are exact from there.
void linear_int8(const Linear& job, std::uint8_t* scratch, int threads, Isa isa);

}  // namespace laconic
