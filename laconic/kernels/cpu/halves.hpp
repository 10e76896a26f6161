// float16 and bfloat16 to float32, exactly, and back, to the nearest (of two as near, the even one).
#pragma once

#include <bit>
#include <cstdint>

#include "isa.hpp"

namespace laconic {

LACONIC_INLINE float from_half(std::uint16_t h) {
  const std::uint32_t sign = static_cast<std::uint32_t>(h & 0x8000u) << 16;
  const std::uint32_t exponent = (h >> 10) & 0x1fu;
  const std::uint32_t fraction = h & 0x3ffu;
  if (exponent == 0) {  // zero or subnormal: fraction * 2^-24, exact in float32
    const float magnitude = static_cast<float>(fraction) * 0x1p-24f;
    return std::bit_cast<float>(sign | std::bit_cast<std::uint32_t>(magnitude));
  }
  const std::uint32_t wide = exponent == 0x1fu ? 0xffu : exponent + 112u;
  return std::bit_cast<float>(sign | (wide << 23) | (fraction << 13));
}

LACONIC_INLINE float from_bfloat(std::uint16_t h) { return std::bit_cast<float>(static_cast<std::uint32_t>(h) << 16); }

LACONIC_INLINE std::uint16_t to_half(float x) {
  const auto bits = std::bit_cast<std::uint32_t>(x);
  const std::uint32_t sign = bits >> 16 & 0x8000u, size = bits & 0x7fffffffu;
  std::uint32_t half = 0x7c00u;                     // from 65520 on: infinity
  if (size > 0x7f800000u) half = 0x7e00u;           // not a number
  else if (size < 0x38800000u)                      // below 2^-14 steps are 2^-24, as they are of floats around 0.5
    half = std::bit_cast<std::uint32_t>(std::bit_cast<float>(size) + 0.5f) - 0x3f000000u;
  else if (size < 0x477ff000u)
    half = (size + 0xfffu + (size >> 13 & 1u) - 0x38000000u) >> 13;
  return static_cast<std::uint16_t>(sign | half);
}

LACONIC_INLINE std::uint16_t to_bfloat(float x) {
  const auto bits = std::bit_cast<std::uint32_t>(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0u;
  return static_cast<std::uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

}  // namespace laconic
