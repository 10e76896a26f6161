// Packed matrices at the Python edge.
#pragma once

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

}  // namespace laconic::edge
