// Products of matrices of a few bits by counting bits, and the panels that they share with convolutions.
//
// A matrix of b-bit numbers is b planes of bits, each dense along k. With bits x_i, plane i stands for the numbers
// 2 x_i - 1 = +-1, and the matrix for v = sum_i c_i (2 x_i - 1), c_i = +-2^i. Of two planes the product is
// k - 2 popcount(x xor w); every encoding is one of v or (v + o) / 2, with o = sum_i c_i:
//
//   bipolar   v                  c_i = 2^i                         odd numbers, no zero; 1 bit: +-1
//   unsigned  (v + 2^b - 1) / 2  c_i = 2^i
//   twos      (v - 1) / 2        c_i = 2^i, of the top plane -2^i  two's complement
//
// so that one kernel serves all, and sums over rows and columns correct for o.
#pragma once

#include <cstdint>

#include "isa.hpp"

namespace laconic {

enum class Encoding { bipolar = 0, unsigned_codes = 1, twos = 2 };

constexpr int kMaxPlanes = 4;
constexpr std::int64_t kMaxBits = std::int64_t{1} << 21;  // of k: then 30 * 30 * k stays in 31 bits

/// (planes, rows, words of k bits); bit 1 is the larger value, bits past k are zero.
struct BitMatrix {
  const std::uint32_t* words;
  std::int64_t rows;
  int planes;
  Encoding encoding;

  constexpr std::int32_t weight(int plane) const {  // c_i
    return encoding == Encoding::twos && plane == planes - 1 ? -(1 << plane) : 1 << plane;
  }
  constexpr std::int32_t offset() const {  // o
    if (encoding == Encoding::bipolar) return 0;
    return encoding == Encoding::twos ? -1 : (1 << planes) - 1;
  }
  constexpr int halvings() const { return encoding == Encoding::bipolar ? 0 : 1; }
};

struct BitProduct {
  BitMatrix a, b;  // (m, k), (n, k)
  std::int64_t k;
  std::int32_t* exact;  // (m, n) y = a b^T, or null
  float* out;           // (m, n) y * a_scale * b_scale + bias, or null
  const float* a_scale;  // (m), or one number
  const float* b_scale;  // (n), or one number
  const float* bias;     // (n), or null
  bool a_scale_per_row, b_scale_per_row;
};

/// Memory, in 32-bit words, that one call of `bit_product` needs beside its operands; aligned to a cache line.
std::int64_t bit_product_scratch(const BitProduct& job);
void bit_product(const BitProduct& job, std::uint32_t* scratch, int threads, Isa isa);

/// out (rows, words): bit 1 where x >= 0.
void pack_signs(const float* x, std::int64_t rows, std::int64_t k, std::uint32_t* out, int threads, Isa isa);

/// How numbers become codes: min(max(round(x * factor) + offset, low), high), with `factor` one for each row or for all.
struct Coding {
  const float* factor;
  bool per_row;
  bool down;  // round down, and not to the nearest
  float offset, low, high;
};

/// out (planes, rows, words): plane i holds bit i of the code, as two's complement has it.
void pack_planes(const float* x, std::int64_t rows, std::int64_t k, const Coding& coding, int planes,
                 std::uint32_t* out, int threads, Isa isa);
/// The same of codes that are there.
void pack_planes(const std::uint8_t* codes, std::int64_t rows, std::int64_t k, int planes, std::uint32_t* out,
                 int threads);

// --- panels ---

/// Columns that lie side by side: of a panel, word k of column j is at 16 k + j, on every instruction set.
constexpr std::int64_t kPanelColumns = 16;

/// Rows of words times columns of words. What the product of two words is depends on the kernel.
struct Tile {
  const std::uint32_t* a;  // rows, a_stride words apart
  std::int64_t a_stride, rows;
  const std::uint32_t* b;  // panels, b_stride words apart; for `mismatch_rows`: columns
  std::int64_t b_stride, columns;  // of panels: a multiple of kPanelColumns
  std::int64_t words;              // along k
  std::int32_t* out;               // (rows, columns), rows out_stride apart
  std::int64_t out_stride;
};

/// y = (row[m] + column[n] - 2 counts) >> halvings: from counts of unequal bits to the product.
struct BitFinish {
  const std::int32_t* row;     // (m)
  const std::int32_t* column;  // (n), or null
  int halvings;
};

}  // namespace laconic
