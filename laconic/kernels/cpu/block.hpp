// A transformer block as two calls: up to queries, keys and values, and from there to the end.
//
//     post-norm (BERT):  h = norm1(x + o(attention(x)));   y = norm2(h + down(act(up(h))))
//     pre-norm (Llama, GPT-2, ViT):  h = x + o(attention(norm1(x)));   y = h + down(mlp(norm2(h)))
// with mlp(u) = act(up(u)), or act(gate(u)) * up(u) where there is a gate.
#pragma once

#include <cstdint>

#include "attention.hpp"
#include "linear.hpp"

namespace laconic {

/// y = (x - mean) / sqrt(var + eps) * weight + bias, or without centring: x / sqrt(mean(x^2) + eps) * weight.
struct Norm {
  const float *weight, *bias;  // bias may be null
  float eps;
  bool centred;
};

struct Layer {
  Matrix w;
  const float* bias;  // or null
  bool int8;          // inputs are rounded to 8 bits
  float x_scale;      // by this, or by a scale of each token's own where it is 0
};

struct Block {
  Layer q, k, v, o, gate, up, down;  // gate.w.rows == 0 where there is none
  Norm before, after;                // the first and the second norm
  std::int64_t width, heads, kv_heads, dim;
  Act act;
  bool pre_norm;
  float scale;
};

/// Rotary position embedding: pairs (i, i + dim/2) turned by the angles of cos and sin, (tokens, dim).
struct Rotary {
  const float *cos, *sin;  // null where there is none
};

std::int64_t block_scratch(const Block& block, std::int64_t tokens, std::int64_t keys, std::int64_t queries, int threads, Isa isa);

/// q (tokens, heads * dim), k and v (tokens, kv_heads * dim) of x (tokens, width).
void block_begin(const Block& block, const float* x, std::int64_t tokens, Rotary rotary, float* q, float* k, float* v,
                 std::uint8_t* scratch, int threads, Isa isa);

/// out (tokens, width); `attention` has all but `out` set, its queries are those of `block_begin`.
void block_end(const Block& block, const float* x, Attention attention, float* out, std::uint8_t* scratch, int threads,
               Isa isa);

}  // namespace laconic
