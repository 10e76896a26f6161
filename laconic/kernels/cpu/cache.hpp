// Attention of a few queries over a long cache of keys and values, which lie packed or as floats, and packing them.
//
// A packed row of `dim` codes stands for x[i] = low[g] + scale[g] code[i], with g = i / group. Keys may instead have
// their scales by channel, over blocks of kBlock tokens: x[i] = low[block][i] + scale[block][i] code[i].
#pragma once

#include <cstdint>

#include "kernels.hpp"

namespace laconic {

constexpr std::int64_t kBlock = 32;   // tokens that share the scales of a channel
constexpr std::int64_t kTokens = 64;    // tokens whose scores are held at a time
constexpr std::int64_t kSplit = 512;  // tokens of a task: whole tiles; fixed, so that threads do not change a result
constexpr std::int64_t kPad = 16;     // floats: the widest vector

/// Keys or values of a cache, (batch, heads, capacity) rows of `dim` numbers.
struct Tokens {
  const void* data;   // rows of words_for(dim, bits) words, dense; or of floats
  const void* scale;  // (batch, heads, capacity, groups), or (batch, heads, capacity / kBlock, dim); null for floats
  const void* low;    // as scale
  std::int64_t capacity, dim, groups, group;
  int bits;     // 8, 4 or 2; 0: floats
  Dtype dtype;  // of the floats, or of scale and low
  bool by_channel;
};

constexpr std::int64_t row_bytes(const Tokens& x) {
  return x.bits != 0 ? 4 * words_for(x.dim, x.bits) : x.dim * (x.dtype == Dtype::float32 ? 4 : 2);
}

/// A run of tokens: the first `length` rows of every head.
struct Span {
  Tokens keys, values;
  std::int64_t length;
};

enum class Mask { none = 0, added = 1, kept = 2 };  // kept: bytes, nonzero where a token takes part

struct CacheAttention {
  const float* q;  // (batch, heads, q_len, dim of the keys)
  float* out;      // (batch, heads, q_len, dim of the values)
  const void* mask;
  Span spans[2];  // one after the other
  std::int64_t batch, heads, kv_heads, q_len;
  std::int64_t mask_batch, mask_head, mask_query;  // strides of the mask in elements; 0 where it is shared
  Mask mask_kind;
  float scale;
  bool causal;  // the last query sees every token, each one before it one token less
};

/// Queries that share a head of keys and values.
constexpr std::int64_t queries_per_head(const CacheAttention& job) { return job.heads / job.kv_heads * job.q_len; }

/// out = softmax(scale q K^T + mask) V. `scratch` holds decode_scratch(job, threads) floats.
std::int64_t decode_scratch(const CacheAttention& job, int threads);
void decode_attention(const CacheAttention& job, float* scratch, int threads, Isa isa);

/// Writes `count` tokens of x (batch * heads, count, dim) into rows [at, at + count) of packed `to`; by channel, both
/// are multiples of kBlock. low and scale are the least value of a group and its range over 2^bits - 1, rounded to how
/// they are stored; code = round((x - low) / scale) to nearest even, within its bits, and 0 where scale is.
struct CacheAppend {
  Tokens to;  // its memory is written to
  const float* x;
  std::int64_t heads, at, count;
};

std::int64_t append_scratch(const CacheAppend& job, int threads);
void append_tokens(const CacheAppend& job, float* scratch, int threads, Isa isa);

}  // namespace laconic
