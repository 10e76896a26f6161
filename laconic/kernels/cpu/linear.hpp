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

/// Weights (rows, k): packed as the artifact stores them, or float32.
struct Matrix {
  const float* dense;          // float32 weights, else null: all that follows but rows and k is for packed ones
  const std::uint32_t* words;  // (rows, words_per_row), dense
  const void* scale;           // (rows, groups), or (1, 1) for one scale of the whole matrix
  const void* zero;            // packed: words (ceil(rows*bits/32), groups), dense along rows; real: as scale
  const float* levels;         // 16 levels of a table scheme, else null: integers
  std::int64_t rows, k, words_per_row, groups, group;
  int bits;      // of a code; 2 for base3
  float middle;  // the code of zero where there is no zero point
  bool base3;    // five codes 0..2 in a byte, see laconic/numerics/base3.py; else dense
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

/// Inputs rounded to 8 bits: x ~ scale * codes.
struct Rounded {
  std::int8_t* codes;   // (m, k_padded) in tiles, zero beyond k; see integer.inl
  float* scale;         // (m)
  std::int32_t* sums;   // (m, groups): of codes over each group of the weights
  std::int64_t k_padded;
};

struct Linear {
  Matrix w;
  const float* x;  // (m, k), rows x_stride apart
  float* out;      // (m, rows), rows out_stride apart; the residual lies likewise
  std::int64_t m, x_stride, out_stride;
  Epilogue then;
  float x_scale = 0.0f;  // of inputs rounded to 8 bits: one that is known before, or 0 where each row has its own
  // Where results are the inputs of a layer whose scale is known before: they are stored rounded by it, and not in `out`.
  const Rounded* next = nullptr;
  float next_scale = 0.0f;
};

/// Codes of one row lie in `lanes` of 32 bits (24 for 3-bit codes) that hold whole codes; 0 for widths where none do.
constexpr int codes_per_lane(const Matrix& w) {
  if (w.base3) return 20;
  switch (w.bits) {
    case 1: return 32;
    case 2: return 16;
    case 3:
    case 4: return 8;
    case 8: return 4;
    default: return 0;
  }
}

/// Whether groups end within lanes of ternary codes. Kernels then take x in two parts: the second holds what lies in the
/// group that begins within a lane, and zeros. (Groups of 32 and more: a vector of lanes must not see more groups than it
/// has lanes.)
constexpr bool splits_lanes(const Matrix& w) { return w.base3 && w.groups > 1 && w.group >= 32 && w.group % 20 != 0; }

/// Whether `linear_float` has a path without a float copy of the row.
constexpr bool reads_lanes(const Matrix& w) {
  const int codes = codes_per_lane(w);
  return codes != 0 && (w.groups <= 1 || w.group % codes == 0 || splits_lanes(w));
}

/// Codes [begin, begin + n) of a row, one a byte; `begin` is a multiple of 32.
inline void unpack_codes(const Matrix& w, std::int64_t row, std::int64_t begin, std::int64_t n, std::uint8_t* codes, Isa isa) {
  const std::uint32_t* words = w.words + row * w.words_per_row;
  if (!w.base3) return unpack_row(words + begin / 32 * w.bits, w.bits, n, codes, isa);
  const auto* bytes = reinterpret_cast<const std::uint8_t*>(words);
  std::int64_t i = 0;
  for (std::int64_t at = begin / 5; i < n; ++at) {
    std::uint32_t rest = bytes[at];
    for (std::int64_t digit = at * 5; digit < at * 5 + 5 && i < n; ++digit) {
      rest *= 3;  // a fraction of 8 bits: what rises above it is the next digit
      if (digit >= begin) codes[i++] = static_cast<std::uint8_t>(rest >> 8);
      rest &= 0xffu;
    }
  }
}

/// Memory, in floats, that one call of `linear_float` needs beside its operands.
std::int64_t linear_float_scratch(const Linear& job, int threads, Isa isa);

/// x stays float32 and weights are exact. Few rows of x meet codes that are looked up as they come; many meet panels of
/// float32 that are unpacked once for all of them.
void linear_float(const Linear& job, float* scratch, int threads, Isa isa);

/// Codes q of evenly spaced levels stand for step (q - middle).
struct Steps {
  float step, middle;
};

inline Steps steps_of(const Matrix& w) {
  if (w.levels == nullptr) return {1.0f, w.middle};
  const float step = w.levels[1] - w.levels[0];  // a table of two levels: binary weights
  return {step, -w.levels[0] / step};
}

/// Whether `linear_int8` can take the matrix: groups of whole words of four codes, evenly spaced levels.
constexpr bool takes_int8(const Matrix& w) {
  return (w.levels == nullptr || w.bits == 1) && (w.groups <= 1 || w.group % 4 == 0);
}

/// Memory, in bytes, that one call of `linear_int8` needs beside its operands.
std::int64_t linear_int8_scratch(const Linear& job, int threads, Isa isa);

/// x is rounded to 8 bits first (symmetric, one scale a row or `x_scale`), and products are exact from there.
void linear_int8(const Linear& job, std::uint8_t* scratch, int threads, Isa isa);

// The same in its steps, so that layers that read the same x round it once, and a layer may round for the next one.

/// Whether x has few rows: they meet codes as they come, and `linear_int8` goes another way than the steps below.
bool has_few_rows(const Linear& job);

/// Memory, in bytes, of the rounded inputs, and where they lie in it.
std::int64_t rounded_bytes(const Linear& job, Isa isa);
Rounded rounded_at(const Linear& job, std::uint8_t* memory, Isa isa);

/// Rounds rows of x. `scratch`: `rounding_bytes` for each thread.
std::int64_t rounding_bytes(const Linear& job);
void round_inputs(const Linear& job, const Rounded& to, std::uint8_t* scratch, int threads, Isa isa);

/// Sums (and scales, where one is known) of codes that another layer has stored, or that were summed over other groups.
void sum_inputs(const Linear& job, const Rounded& of, int threads, Isa isa);

/// Zeros beyond the last column, where the layer that stores codes does not come.
void clear_beyond(const Linear& job, const Rounded& of, Isa isa);

/// The products. `scratch`: `products_bytes`.
std::int64_t products_bytes(const Linear& job, int threads, Isa isa);
void multiply_rounded(const Linear& job, const Rounded& in, std::uint8_t* scratch, int threads, Isa isa);

}  // namespace laconic
