// Convolutions of bits and of bytes, without a matrix of columns.
//
// The input is rounded once into a padded map of words, (images, groups, words, height, width): a word holds 32 signs
// or 4 bytes of neighbouring channels at one place. What one tap of the kernel reads for 16 neighbouring places of the
// output is then 16 neighbouring words, so a panel (see bits.hpp) is copied together from the map, tap after tap, into
// memory of this thread that stays in its cache. The rows that meet the panels are the weights as they lie,
// (out, taps, words), and what comes out lies along the places of the output, as the result does.
#pragma once

#include <cstdint>

#include "bits.hpp"
#include "linear.hpp"

namespace laconic {

enum class Conv { bits = 0, bytes = 1 };

struct ConvShape {
  std::int64_t images, groups, channels, out_channels;  // of one group: channels, out_channels
  std::int64_t height, width;
  std::int64_t kernel[2], stride[2], padding[2], dilation[2];

  constexpr std::int64_t taps() const { return kernel[0] * kernel[1]; }
  constexpr std::int64_t padded(int axis) const { return (axis == 0 ? height : width) + 2 * padding[axis]; }
  constexpr std::int64_t out(int axis) const {
    const std::int64_t room = padded(axis) - dilation[axis] * (kernel[axis] - 1) - 1;
    return room < 0 ? 0 : room / stride[axis] + 1;
  }
};

struct ConvJob {
  Conv kind;
  ConvShape shape;
  const float* x;               // (images, groups * channels, height, width)
  const std::uint32_t* weight;  // (groups * out_channels, taps, words)
  float* out;                   // (images, groups * out_channels, out(0), out(1))
  const float* scale;           // (groups * out_channels), times images where per_image
  const float* bias;            // (groups * out_channels), or null
  bool per_image;
  Act act;
  int pad;        // bits: -1, 1, or 0, which takes no part
  Coding coding;  // bytes: how x is rounded; the offset is the byte that stands for zero

  /// Words that hold one group's channels at one place.
  constexpr std::int64_t words() const {
    const std::int64_t in_word = kind == Conv::bits ? 32 : 4;
    return (shape.channels + in_word - 1) / in_word;
  }
};

/// From the sums of a tile (rows: channels of the output, columns: places) to results.
struct ConvFinish {
  std::int32_t times;         // y = (row + column + times * sum) * scale + bias
  const std::int32_t* row;    // (rows)
  const std::int32_t* column; // (columns), or null
  const float* scale;         // (rows)
  const float* bias;          // (rows), or null
  Act act;
  float* out;                 // rows out_stride apart
  std::int64_t out_stride;
};

/// Memory, in 32-bit words, that one call of `conv` needs beside its operands; aligned to a cache line.
std::int64_t conv_scratch(const ConvJob& job, int threads);
void conv(const ConvJob& job, std::uint32_t* scratch, int threads, Isa isa);

}  // namespace laconic
