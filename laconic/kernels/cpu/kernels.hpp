// The kernels, as plain C++ on raw memory: no Python, no torch. Callers have checked every bound.
//
// Codes lie densely, least significant bit first, along a row of 32-bit words; a row is padded to whole
// words. Code i of width b is the b bits from bit i*b of the row, and may straddle two words.
#pragma once

#include <cstddef>
#include <cstdint>

#include "isa.hpp"

namespace laconic {

/// How an array of numbers is stored.
enum class Dtype { none = 0, float32 = 1, float16 = 2, bfloat16 = 3, uint8 = 4, int8 = 5 };

inline std::size_t size_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::float32: return 4;
    case Dtype::float16:
    case Dtype::bfloat16: return 2;
    case Dtype::uint8:
    case Dtype::int8: return 1;
    case Dtype::none: break;
  }
  return 0;
}

/// Scratch memory from the next cache line on (16 floats more are needed): a vector across two lines is read twice.
inline float* aligned(float* scratch) {
  return reinterpret_cast<float*>((reinterpret_cast<std::uintptr_t>(scratch) + 63) / 64 * 64);
}

/// Whole 32-bit words that hold k codes.
constexpr std::int64_t words_for(std::int64_t k, int bits) { return (k * bits + 31) / 32; }

/// codes[i] = code i, for i in [0, k), out of one row of `words_for(k, bits)` words.
void unpack_row(const std::uint32_t* words, int bits, std::int64_t k, std::uint8_t* codes, Isa isa);

struct Dequantize {
  const std::uint32_t* words;  // (rows, words_per_row)
  const void* scale;           // (rows, groups), of scale_dtype
  const void* zero;            // (rows, groups), of zero_dtype; unread where that is none
  float* out;                  // (rows, k)
  Dtype scale_dtype;
  Dtype zero_dtype;
  std::int64_t words_per_row, groups, group, k;
  int bits;
};

/// out[r][i] = (code[r][i] - zero[r][i / group]) * scale[r][i / group] in float32, each operation rounded,
/// for rows [row_begin, row_end). Without zero points the zero is 2^(bits-1).
void dequantize(const Dequantize& job, std::int64_t row_begin, std::int64_t row_end, int threads, Isa isa);

struct Hadamard {
  void* x;  // (rows, n), of dtype
  Dtype dtype;
  std::int64_t rows, n;
  float scale;
};

/// x <- scale * H x for each row, H the Walsh-Hadamard matrix of order n (a power of two) in natural order:
/// butterflies (a + b, a - b) at distance 1, 2, 4, ... n/2, then one multiplication; halves are rounded at the end alone.
void hadamard(const Hadamard& job, float* scratch, int threads, Isa isa);

/// Memory, in floats, that a transform needs beside its rows.
std::int64_t hadamard_scratch(const Hadamard& job, int threads);

}  // namespace laconic
