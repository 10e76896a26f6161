// The kernels of one instruction set. Every file of targets/ fills one table.
#pragma once

#include <cstdint>

#include "attention.hpp"
#include "block.hpp"
#include "bits.hpp"
#include "conv.hpp"
#include "cache.hpp"
#include "linear.hpp"
#include "norm.hpp"
#include "sparse.hpp"

namespace laconic {

/// Inputs and index tables laid out for the lanes of one instruction set; see weight_only.inl.
struct Planes {
  float* x;             // (m, chunks, codes per lane, lanes)
  float* second;        // likewise, where `splits_lanes`; else null
  float* sums;          // (m, groups padded): of x over each group
  std::int32_t* index;  // (chunks, lanes): group of each lane, less the chunk's first
  std::int64_t chunks, x_stride, sums_stride;
};

/// Rows of x, whole tiles of them, that one panel of W meets before the next: their codes stay in the cache.
constexpr std::int64_t kInputRows = 192;

/// The same for few rows, laid out as codes come from the weights; see integer_rows.inl.
struct RoundedRows {
  std::int8_t* codes;   // (m, k_padded)
  std::int8_t* second;  // likewise: codes of x in the group that begins within a lane; null where none does
  float* scale;         // (m)
  float* sums;          // (m, sums_stride): of codes over each group of the weights
  std::int32_t* index;  // (chunks, lanes): group of each lane, less the chunk's first
  std::int64_t chunks, k_padded, sums_stride;
};

/// Memory of these, in bytes, and what describes them.
struct RowsSizes {
  std::int64_t codes, scale, sums, index, thread, natural;
  std::int64_t chunks, k_padded, sums_stride;
  bool split;
};

/// How attention over a cache is cut into tasks, and how much memory they need; see cache.inl.
struct CacheSizes {
  std::int64_t heads, rows;  // of keys and values over the batch; queries of each
  std::int64_t first_splits, splits;  // ranges of tokens: of the first span, of both
  std::int64_t key_width, value_width, value_dim;  // widths are padded to whole vectors
  std::int64_t partial;   // floats that a range of tokens leaves for one query
  std::int64_t scales;    // floats: the scales of a tile, or of a block by channel
  std::int64_t partials, thread;  // floats: of all ranges, and each thread's own

  explicit CacheSizes(const CacheAttention& job);
};

struct Table {
  int lanes;
  void (*lay_planes)(const Linear&, const Planes&);
  void (*linear_planes)(const Linear&, const Planes&, std::int64_t begin, std::int64_t end, float* scratch);
  void (*linear_rows)(const Linear&, std::int64_t begin, std::int64_t end, float* scratch, Isa isa);
  int panel;  // rows of W that linear_int8 takes at a time
  int tile;   // rows of x that stay together
  void (*round_inputs)(const Linear&, const Rounded&, std::int64_t begin, std::int64_t end, std::int8_t* scratch);
  void (*sum_inputs)(const Linear&, const Rounded&, std::int64_t begin, std::int64_t end);
  void (*linear_int8)(const Linear&, const Rounded&, std::int64_t panel, std::int64_t m_begin, std::int64_t m_end,
                      std::uint8_t* scratch, Isa isa);
  RowsSizes (*rows_sizes)(const Linear&);
  void (*lay_rows)(const Linear&, const RoundedRows&, std::int8_t* natural);
  void (*linear_int8_rows)(const Linear&, const RoundedRows&, std::int64_t begin, std::int64_t end, std::uint8_t* scratch, Isa isa);
  std::int64_t (*dense_scratch)(const Matrix&);
  void (*linear_dense)(const Linear&, std::int64_t panel, std::int64_t m_begin, std::int64_t m_end, float* scratch, Isa isa);
  void (*dense_rows)(const Linear&, std::int64_t begin, std::int64_t end);
  void (*attend)(const Attention&, std::int64_t begin, std::int64_t end, float* scratch);
  void (*rotate_rows)(const Rotary&, float* x, std::int64_t heads, std::int64_t dim, std::int64_t begin, std::int64_t end);
  void (*multiply)(float* a, const float* b, std::int64_t begin, std::int64_t end);

  void (*mismatch_panels)(const Tile&);
  void (*mismatch_rows)(const Tile&);
  void (*byte_panels)(const Tile&);
  void (*lay_panel)(const std::uint32_t* rows, std::int64_t stride, std::int64_t count, std::int64_t words, std::uint32_t* panel);
  void (*add_counts)(std::int32_t* total, const std::int32_t* counts, std::int32_t weight, std::int64_t n);
  void (*finish_bits)(const BitProduct&, const BitFinish&, const std::int32_t* counts, std::int64_t stride, std::int64_t m,
                      std::int64_t rows, std::int64_t n, std::int64_t columns);
  void (*sign_row)(const float* x, std::int64_t k, std::uint32_t* out);
  void (*plane_row)(const float* x, std::int64_t k, float factor, const Coding&, int planes, std::uint32_t* out,
                    std::int64_t plane_stride);
  void (*map_signs)(const float* x, std::int64_t channel_stride, int channels, std::int64_t n, std::uint32_t* out);
  void (*map_bytes)(const float* x, std::int64_t channel_stride, int channels, std::int64_t n, const Coding&, std::uint32_t* out);
  void (*leave_out)(std::int32_t* sums, std::int64_t stride, std::int64_t rows, const std::int32_t* counts, const std::int32_t* mask);
  std::int32_t (*sum_bytes)(const std::uint32_t* words, std::int64_t n);
  void (*finish_conv)(const ConvFinish&, const std::int32_t* sums, std::int64_t stride, std::int64_t rows, std::int64_t columns);
  void (*unpack_row)(const std::uint32_t* words, int bits, std::int64_t k, std::uint8_t* codes);
  void (*dequantize_rows)(const Dequantize&, std::int64_t begin, std::int64_t end);
  void (*hadamard_rows)(const Hadamard&, std::int64_t begin, std::int64_t end, float* scratch);
  void (*norm_forward)(const NormForward&, const float* weight, const float* bias, std::int64_t begin, std::int64_t end,
                       float* scratch);
  void (*norm_backward)(const NormBackward&, const float* weight, std::int64_t begin, std::int64_t end, float* dweight,
                        float* dbias, float* scratch);
  void (*add_parts)(const float* parts, std::int64_t count, std::int64_t d, float* out, std::int64_t begin, std::int64_t end);
  void (*to_floats)(const void* base, Dtype dtype, std::int64_t n, float offset, float* out);
  void (*sparse_few)(const SparseLinear&, std::int64_t begin, std::int64_t end);
  void (*lay_columns)(const SparseLinear&, const Columns&, std::int64_t begin, std::int64_t end);
  void (*sparse_many)(const SparseLinear&, const Columns&, std::int64_t begin, std::int64_t end);
  void (*attend_cache)(const CacheAttention&, const CacheSizes&, std::int64_t task, float* partials, float* scratch);
  void (*join_cache)(const CacheAttention&, const CacheSizes&, float* partials, std::int64_t begin, std::int64_t end);
  void (*append_cache)(const CacheAppend&, std::int64_t begin, std::int64_t end, float* scratch);
};

const Table& portable_table();
#if LACONIC_X86
const Table& avx2_table();
const Table& avx512_table();
#endif
#if LACONIC_ARM
const Table& neon_table();
#endif

inline const Table& table(Isa isa) {
#if LACONIC_X86
  if (isa == Isa::avx512) return avx512_table();
  if (isa == Isa::avx2) return avx2_table();
#endif
#if LACONIC_ARM
  if (isa == Isa::neon) return neon_table();
#endif
  static_cast<void>(isa);
  return portable_table();
}

}  // namespace laconic
