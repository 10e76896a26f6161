// Attention on float32 keys and values: softmax(q k^T scale + mask) v, for each head by itself.
#pragma once

#include <cstdint>

namespace laconic {

/// Where element (batch, token, head, 0) of a tensor lies; the head's numbers are neighbours.
struct Strides {
  std::int64_t batch, token, head;
};

struct Attention {
  const float *q, *k, *v;
  float* out;
  Strides q_at, k_at, v_at, out_at;
  const float* mask;  // added to scores at (batch, query, key), or null
  std::int64_t mask_batch, mask_query;
  std::int64_t batch, heads, kv_heads, queries, keys, dim;
  float scale;
  bool causal;  // query i sees keys up to keys - queries + i
};

/// Floats of scratch that one thread needs.
constexpr std::int64_t attention_scratch(const Attention& a) {
  const std::int64_t keys = (a.keys + 15) / 16 * 16 + 16;
  return keys * (a.dim + 4) + 64;
}

}  // namespace laconic
