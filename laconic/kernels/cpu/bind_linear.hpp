// Packed matrices at the Python edge.
#pragma once

#include <limits>

#include "checks.hpp"
#include "linear.hpp"

namespace laconic::edge {

/// What `Matrix` is made from; every address with the number of elements behind it.
struct Weights {
  Address words;
  Int words_length, rows, words_per_row;
  Address scale;
  Int scale_length, scale_dtype, scale_rows;
  Address zero;
  Int zero_length, zero_kind;
  Address levels;
  Int levels_length, groups, group, bits, k;
  bool base3;
};

/// The matrix, with every bound checked.
Matrix matrix_of(const Weights& w);

/// A scale of inputs: 0, or a positive number.
inline float checked_scale(float x_scale) {
  if (!(x_scale >= 0.0f && x_scale < std::numeric_limits<float>::infinity())) refuse("x_scale is 0, or a positive number");
  return x_scale;
}

}  // namespace laconic::edge
