// LayerNorm and RMSNorm over the last axis, with what stands around them: the sum before, the rounding to 8 bits after.
//
//     s = x + residual, rounded to the type of x                      a_i = s_i - mean(s), or s_i for RMSNorm
//     r = 1 / sqrt(mean(a^2) + eps), or 1 / (sqrt(mean(a^2)) + eps)   y = a r w + b
//     code_i = round(y_i / scale) in -128..127, scale = 2 max |y| / 255 (1 where y is 0), as inputs of 8 bits a token are
//
// All in float32; y is rounded to the type of x, and codes are those of what was rounded.
#pragma once

#include <cstdint>

#include "kernels.hpp"

namespace laconic {

/// What a norm is, apart from its operands. Weight and bias may be of another type than the rows.
struct NormKind {
  float eps;
  bool centred;      // LayerNorm: without the mean
  bool eps_outside;  // eps is added to the root
  bool unit_offset;  // multiply by 1 + w
};

struct NormForward {
  NormKind kind;
  std::int64_t rows, d;
  Dtype dtype, weight_dtype, bias_dtype;
  const void* x;         // (rows, d)
  const void* residual;  // (rows, d), or null
  const void* weight;    // (d), or null
  const void* bias;      // (d), or null
  void* y;               // (rows, d), or null where only codes are wanted
  void* sum;             // (rows, d): s, or null; may be x or residual itself
  std::int8_t* codes;    // (rows, d), or null
  float* scales;         // (rows), with codes
};

/// With h = w dy (or dy, or (1 + w) dy) and mean over a row:
///
///     LayerNorm:  dx = r (h - mean(h)) - r^3 a mean(h a)       dw = sum over rows of dy a r
///     RMSNorm:    dx = r h - c a mean(h a)                     db = sum over rows of dy
///
/// c = r^3, or r^2 / sqrt(mean(a^2)) where eps stands outside of the root (0 where a is 0).
struct NormBackward {
  NormKind kind;
  std::int64_t rows, d;
  Dtype dtype, weight_dtype;
  const void* grad;      // (rows, d): dy
  const void* x;         // (rows, d): s
  const void* grad_sum;  // (rows, d), added to dx: the gradient that s has from elsewhere; or null
  const void* weight;    // (d), or null
  void* dx;              // (rows, d)
  float* dweight;        // (d), or null
  float* dbias;          // (d), or null
};

/// Memory, in floats, that a call needs beside its operands.
std::int64_t norm_scratch(const NormForward& job, int threads);
std::int64_t norm_scratch(const NormBackward& job, int threads);

void norm(const NormForward& job, float* scratch, int threads, Isa isa);
void norm_backward(const NormBackward& job, float* scratch, int threads, Isa isa);

}  // namespace laconic
