// Vectors as plain arrays of four lanes, which any compiler turns into what its target has.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "../halves.hpp"

namespace laconic::portable {

struct Simd {
  static constexpr int kLanes = 4;
  struct F { float at[kLanes]; };
  struct I { std::uint32_t at[kLanes]; };

  static LACONIC_INLINE F zero() { return splat(0.0f); }
  static LACONIC_INLINE F splat(float x) { return {{x, x, x, x}}; }
  static LACONIC_INLINE F load(const float* p) { return read<F>(p, 16); }
  static LACONIC_INLINE F load_first(const float* p, int n) { return read<F>(p, 4 * std::min(n, kLanes)); }
  static LACONIC_INLINE void store(float* p, F x) { std::memcpy(p, x.at, 16); }
  static LACONIC_INLINE void store_first(float* p, F x, int n) { std::memcpy(p, x.at, 4 * static_cast<std::size_t>(std::min(n, kLanes))); }
  static LACONIC_INLINE F add(F a, F b) { return each(a, b, [](float x, float y) { return x + y; }); }
  static LACONIC_INLINE F sub(F a, F b) { return each(a, b, [](float x, float y) { return x - y; }); }
  static LACONIC_INLINE F mul(F a, F b) { return each(a, b, [](float x, float y) { return x * y; }); }
  static LACONIC_INLINE F div(F a, F b) { return each(a, b, [](float x, float y) { return x / y; }); }
  static LACONIC_INLINE F max(F a, F b) { return each(a, b, [](float x, float y) { return x > y ? x : y; }); }
  static LACONIC_INLINE F min(F a, F b) { return each(a, b, [](float x, float y) { return x < y ? x : y; }); }
  static LACONIC_INLINE F fma(F a, F b, F c) { return add(mul(a, b), c); }  // rounded twice: std::fma is a call where there is none
  static LACONIC_INLINE F abs(F a) { return each(a, a, [](float x, float) { return std::fabs(x); }); }
  static LACONIC_INLINE F sqrt(F a) { return each(a, a, [](float x, float) { return std::sqrt(x); }); }
  static LACONIC_INLINE F copy_sign(F size, F sign) { return each(size, sign, [](float x, float y) { return std::copysign(x, y); }); }
  static LACONIC_INLINE F round(F a) { return each(a, a, [](float x, float) { return std::nearbyint(x); }); }
  static LACONIC_INLINE float sum(F a) { return (a.at[0] + a.at[2]) + (a.at[1] + a.at[3]); }
  static LACONIC_INLINE float largest(F a) { return std::max(std::max(a.at[0], a.at[1]), std::max(a.at[2], a.at[3])); }
  static LACONIC_INLINE F scale_by_power(F a, F n) {
    return each(a, n, [](float x, float y) {
      return x * std::bit_cast<float>(static_cast<std::uint32_t>(static_cast<int>(y) + 127) << 23);
    });
  }

  static LACONIC_INLINE I splat_word(std::int32_t x) {
    const auto w = static_cast<std::uint32_t>(x);
    return {{w, w, w, w}};
  }
  static LACONIC_INLINE I load_words(const void* p) { return read<I>(p, 16); }
  static LACONIC_INLINE I load_bytes(const void* p, int n) { return read<I>(p, std::min(n, 16)); }
  static LACONIC_INLINE void store_words(void* p, I x) { std::memcpy(p, x.at, 16); }
  static LACONIC_INLINE I add_words(I a, I b) { return words(a, b, [](std::uint32_t x, std::uint32_t y) { return x + y; }); }
  static LACONIC_INLINE I bit_and(I a, I b) { return words(a, b, [](std::uint32_t x, std::uint32_t y) { return x & y; }); }
  static LACONIC_INLINE I shift_right(I a, int n) { return words(a, a, [n](std::uint32_t x, std::uint32_t) { return x >> n; }); }
  static LACONIC_INLINE F to_float(I a) {
    F r;
    for (int i = 0; i < kLanes; ++i) r.at[i] = static_cast<float>(static_cast<std::int32_t>(a.at[i]));
    return r;
  }
  static LACONIC_INLINE I to_int(F a) {
    I r;
    for (int i = 0; i < kLanes; ++i) r.at[i] = static_cast<std::uint32_t>(static_cast<std::int32_t>(std::nearbyint(a.at[i])));
    return r;
  }
  static LACONIC_INLINE F bits_as_float(I a) { return std::bit_cast<F>(a); }
  static LACONIC_INLINE F pick(F a, I index) {
    F r;
    for (int i = 0; i < kLanes; ++i) r.at[i] = a.at[index.at[i] & (kLanes - 1)];
    return r;
  }
  static LACONIC_INLINE F gather(const float* base, I index) {
    F r;
    for (int i = 0; i < kLanes; ++i) r.at[i] = base[static_cast<std::int32_t>(index.at[i])];
    return r;
  }

  static LACONIC_INLINE F from_half(const std::uint16_t* p) {
    F r;
    for (int i = 0; i < kLanes; ++i) r.at[i] = laconic::from_half(p[i]);
    return r;
  }
  static LACONIC_INLINE F from_bfloat(const std::uint16_t* p) {
    F r;
    for (int i = 0; i < kLanes; ++i) r.at[i] = laconic::from_bfloat(p[i]);
    return r;
  }
  static LACONIC_INLINE void to_half(std::uint16_t* p, F x) {
    for (int i = 0; i < kLanes; ++i) p[i] = laconic::to_half(x.at[i]);
  }
  static LACONIC_INLINE void to_bfloat(std::uint16_t* p, F x) {
    for (int i = 0; i < kLanes; ++i) p[i] = laconic::to_bfloat(x.at[i]);
  }
  static LACONIC_INLINE F from_bytes(const std::uint8_t* p) {
    F r;
    for (int i = 0; i < kLanes; ++i) r.at[i] = static_cast<float>(p[i]);
    return r;
  }
  static LACONIC_INLINE F from_signed_bytes(const std::int8_t* p) {
    F r;
    for (int i = 0; i < kLanes; ++i) r.at[i] = static_cast<float>(p[i]);
    return r;
  }
  static LACONIC_INLINE void to_signed_bytes(std::int8_t* p, I x) {
    for (int i = 0; i < kLanes; ++i) p[i] = static_cast<std::int8_t>(static_cast<std::int32_t>(x.at[i]));
  }
  template <int Distance>
  static LACONIC_INLINE F butterfly(F a) {
    F r;
    for (int i = 0; i < kLanes; ++i) r.at[i] = i & Distance ? a.at[i ^ Distance] - a.at[i] : a.at[i] + a.at[i ^ Distance];
    return r;
  }
  static LACONIC_INLINE F pick_two(F low, F high, I index) {
    F r;
    for (int i = 0; i < kLanes; ++i)
      r.at[i] = (index.at[i] & kLanes ? high : low).at[index.at[i] & (kLanes - 1)];
    return r;
  }
  static LACONIC_INLINE I shift_right_each(I a, I n) {
    return words(a, n, [](std::uint32_t x, std::uint32_t y) { return x >> y; });
  }
  template <int Bits>
  static LACONIC_INLINE std::int64_t unpack(const std::uint8_t*, std::int64_t, std::int64_t, std::uint8_t*) { return 0; }
  static LACONIC_INLINE I signed_byte(I w, int place) {
    I r;
    for (int i = 0; i < kLanes; ++i)
      r.at[i] = static_cast<std::uint32_t>(static_cast<std::int32_t>(w.at[i] << (24 - 8 * place)) >> 24);
    return r;
  }
  template <int Bits>
  static F codes(const std::uint8_t* p) {
    F r;
    for (int i = 0; i < kLanes; ++i)
      r.at[i] = static_cast<float>(p[i * Bits / 8] >> (i * Bits % 8) & ((1 << Bits) - 1));
    return r;
  }
  static void sum_four(F a, F b, F c, F d, float* out) {
    out[0] = sum(a);
    out[1] = sum(b);
    out[2] = sum(c);
    out[3] = sum(d);
  }
  static LACONIC_INLINE I bit_xor(I a, I b) { return words(a, b, [](std::uint32_t x, std::uint32_t y) { return x ^ y; }); }

  static LACONIC_INLINE I spread_three(I bytes) {
    std::uint8_t raw[17] = {};
    std::memcpy(raw, bytes.at, 16);
    I r;
    for (int i = 0; i < kLanes; ++i) r.at[i] = raw[3 * i] | raw[3 * i + 1] << 8 | static_cast<std::uint32_t>(raw[3 * i + 2]) << 16;
    return r;
  }

  template <int Bits>
  static LACONIC_INLINE F level(I words, const float* table16, F, F) {
    F r;
    for (int i = 0; i < kLanes; ++i) r.at[i] = table16[words.at[i] & 15u];  // repeated, so that 4 bits may count
    return r;
  }

  static constexpr bool kUnpacks = false;
  static LACONIC_INLINE void transpose(I* rows) {
    std::uint32_t t[kLanes][kLanes];
    for (int i = 0; i < kLanes; ++i) store_words(t[i], rows[i]);
    for (int i = 0; i < kLanes; ++i) {
      std::uint32_t column[kLanes];
      for (int j = 0; j < kLanes; ++j) column[j] = t[j][i];
      rows[i] = load_words(column);
    }
  }
  static LACONIC_INLINE I narrow(I a, I b, I c, I d) {
    std::int8_t bytes[16];
    for (int i = 0; i < kLanes; ++i) {
      const std::uint32_t from[4] = {a.at[i], b.at[i], c.at[i], d.at[i]};
      for (int j = 0; j < 4; ++j)
        bytes[4 * j + i] = static_cast<std::int8_t>(std::clamp(static_cast<std::int32_t>(from[j]), -128, 127));
    }
    return load_words(bytes);
  }
  static LACONIC_INLINE I dot4(I acc, I u8, I s8) {
    for (int i = 0; i < kLanes; ++i)
      for (int j = 0; j < 32; j += 8)
        acc.at[i] += static_cast<std::uint32_t>(static_cast<std::int32_t>(u8.at[i] >> j & 0xffu) *
                                                static_cast<std::int8_t>(s8.at[i] >> j & 0xffu));
    return acc;
  }

  static I dot4_small(I acc, I u8, I s8) { return dot4(acc, u8, s8); }  // for u8 < 128
  static I add_bytes(I a, I b) {
    return words(a, b, [](std::uint32_t x, std::uint32_t y) {
      return ((x & 0x7f7f7f7fu) + (y & 0x7f7f7f7fu)) ^ ((x ^ y) & 0x80808080u);
    });
  }

  // --- bits ---
  static LACONIC_INLINE F floor(F a) { return each(a, a, [](float x, float) { return std::floor(x); }); }
  static constexpr bool kCounts = false;
  static LACONIC_INLINE I bit_or(I a, I b) { return words(a, b, [](std::uint32_t x, std::uint32_t y) { return x | y; }); }
  static LACONIC_INLINE I shift_left(I a, int n) { return words(a, a, [n](std::uint32_t x, std::uint32_t) { return x << n; }); }
  static LACONIC_INLINE I shift_right_signed(I a, int n) {
    return words(a, a, [n](std::uint32_t x, std::uint32_t) {
      return static_cast<std::uint32_t>(static_cast<std::int32_t>(x) >> n);
    });
  }
  static LACONIC_INLINE I sub_words(I a, I b) { return words(a, b, [](std::uint32_t x, std::uint32_t y) { return x - y; }); }
  static LACONIC_INLINE I mul_words(I a, I b) { return words(a, b, [](std::uint32_t x, std::uint32_t y) { return x * y; }); }
  static std::int32_t sum_words(I a) { return static_cast<std::int32_t>(a.at[0] + a.at[1] + a.at[2] + a.at[3]); }
  static LACONIC_INLINE I count(I acc, I a) {
    return words(acc, a, [](std::uint32_t sum, std::uint32_t x) {  // ones in each 2, 4, 8 bits, then of the bytes
      x -= x >> 1 & 0x55555555u;
      x = (x & 0x33333333u) + (x >> 2 & 0x33333333u);
      return sum + (((x + (x >> 4)) & 0x0f0f0f0fu) * 0x01010101u >> 24);
    });
  }
  static LACONIC_INLINE I not_negative(F x) {
    I r;
    for (int i = 0; i < kLanes; ++i) r.at[i] = x.at[i] >= 0.0f ? ~std::uint32_t{0} : std::uint32_t{0};
    return r;
  }
  static std::uint32_t sign_bits(I a) {
    return a.at[0] >> 31 | a.at[1] >> 31 << 1 | a.at[2] >> 31 << 2 | a.at[3] >> 31 << 3;
  }
  static LACONIC_INLINE void turn4(const std::uint32_t* rows, std::int64_t stride, std::uint32_t* out, std::int64_t out_stride) {
    for (int i = 0; i < 4; ++i)
      for (int j = 0; j < 4; ++j) out[j * out_stride + i] = rows[i * stride + j];
  }

 private:
  template <class T>
  static LACONIC_INLINE T read(const void* p, int n) {
    T r{};
    if (n > 0) std::memcpy(r.at, p, static_cast<std::size_t>(n));
    return r;
  }
  template <class Op>
  static LACONIC_INLINE F each(F a, F b, Op op) {
    F r;
    for (int i = 0; i < kLanes; ++i) r.at[i] = op(a.at[i], b.at[i]);
    return r;
  }
  template <class Op>
  static LACONIC_INLINE I words(I a, I b, Op op) {
    I r;
    for (int i = 0; i < kLanes; ++i) r.at[i] = op(a.at[i], b.at[i]);
    return r;
  }
};

}  // namespace laconic::portable
