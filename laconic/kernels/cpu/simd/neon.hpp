// Vectors of AArch64 NEON: 4 floats, 4 words of 32 bits, 16 bytes.
#pragma once

#include <arm_neon.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace laconic::neon {

struct Simd {
  static constexpr int kLanes = 4;
  using F = float32x4_t;
  using I = uint32x4_t;

  static F zero() { return vdupq_n_f32(0.0f); }
  static F splat(float x) { return vdupq_n_f32(x); }
  static F load(const float* p) { return vld1q_f32(p); }
  static F load_first(const float* p, int n) {
    float padded[4] = {};
    std::memcpy(padded, p, 4 * static_cast<std::size_t>(std::min(n, 4)));
    return vld1q_f32(padded);
  }
  static void store(float* p, F x) { vst1q_f32(p, x); }
  static void store_first(float* p, F x, int n) {
    float all[4];
    vst1q_f32(all, x);
    std::memcpy(p, all, 4 * static_cast<std::size_t>(std::min(n, 4)));
  }
  static F add(F a, F b) { return vaddq_f32(a, b); }
  static F sub(F a, F b) { return vsubq_f32(a, b); }
  static F mul(F a, F b) { return vmulq_f32(a, b); }
  static F div(F a, F b) { return vdivq_f32(a, b); }
  static F max(F a, F b) { return vmaxq_f32(a, b); }
  static F min(F a, F b) { return vminq_f32(a, b); }
  static F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
  static F abs(F a) { return vabsq_f32(a); }
  static F sqrt(F a) { return vsqrtq_f32(a); }
  static F copy_sign(F size, F sign) { return vbslq_f32(vdupq_n_u32(0x80000000u), sign, size); }
  static F round(F a) { return vrndnq_f32(a); }
  static float sum(F a) { return vaddvq_f32(a); }
  static float largest(F a) { return vmaxvq_f32(a); }
  static F scale_by_power(F a, F n) {
    const int32x4_t whole = vshlq_n_s32(vaddq_s32(vcvtnq_s32_f32(n), vdupq_n_s32(127)), 23);
    return vmulq_f32(a, vreinterpretq_f32_s32(whole));
  }

  static I splat_word(std::int32_t x) { return vdupq_n_u32(static_cast<std::uint32_t>(x)); }
  static I load_words(const void* p) { return vreinterpretq_u32_u8(vld1q_u8(static_cast<const std::uint8_t*>(p))); }
  static I load_bytes(const void* p, int n) {
    if (n >= 16) return load_words(p);
    std::uint8_t padded[16] = {};
    if (n > 0) std::memcpy(padded, p, static_cast<std::size_t>(n));
    return load_words(padded);
  }
  static void store_words(void* p, I x) { vst1q_u8(static_cast<std::uint8_t*>(p), vreinterpretq_u8_u32(x)); }
  static I add_words(I a, I b) { return vaddq_u32(a, b); }
  static I bit_and(I a, I b) { return vandq_u32(a, b); }
  static I shift_right(I a, int n) { return vshlq_u32(a, vdupq_n_s32(-n)); }
  static F to_float(I a) { return vcvtq_f32_s32(vreinterpretq_s32_u32(a)); }
  static I to_int(F a) { return vreinterpretq_u32_s32(vcvtnq_s32_f32(a)); }
  static F bits_as_float(I a) { return vreinterpretq_f32_u32(a); }
  static F pick(F a, I index) {
    const uint32x4_t at = vmlaq_u32(vdupq_n_u32(0x03020100u), index, vdupq_n_u32(0x04040404u));
    return vreinterpretq_f32_u8(vqtbl1q_u8(vreinterpretq_u8_f32(a), vreinterpretq_u8_u32(at)));
  }
  static F gather(const float* base, I index) {
    std::uint32_t at[4];
    vst1q_u32(at, index);
    const float found[4] = {base[at[0]], base[at[1]], base[at[2]], base[at[3]]};
    return vld1q_f32(found);
  }

  static F from_half(const std::uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
  static F from_bfloat(const std::uint16_t* p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }
  static void to_half(std::uint16_t* p, F x) { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(x))); }
  static void to_bfloat(std::uint16_t* p, F x) {
    const I bits = vreinterpretq_u32_f32(x), odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const I near = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
    vst1_u16(p, vshrn_n_u32(vbslq_u32(vceqq_f32(x, x), near, vdupq_n_u32(0x7fc00000u)), 16));
  }
  static F from_bytes(const std::uint8_t* p) {
    std::uint8_t padded[8] = {};
    std::memcpy(padded, p, 4);
    return vcvtq_f32_u32(vmovl_u16(vget_low_u16(vmovl_u8(vld1_u8(padded)))));
  }
  static F from_signed_bytes(const std::int8_t* p) {
    std::int8_t padded[8] = {};
    std::memcpy(padded, p, 4);
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vld1_s8(padded)))));
  }
  static void to_signed_bytes(std::int8_t* p, I x) {
    const int16x4_t shorts = vqmovn_s32(vreinterpretq_s32_u32(x));
    std::int8_t all[8];
    vst1_s8(all, vqmovn_s16(vcombine_s16(shorts, shorts)));
    std::memcpy(p, all, 4);
  }
  template <int Distance>
  static F butterfly(F a) {
    static constexpr std::uint32_t minus[4] = {0, Distance & 1 ? 0x80000000u : 0, Distance & 2 ? 0x80000000u : 0, 0x80000000u};
    F other;
    if constexpr (Distance == 1) other = vrev64q_f32(a);
    else other = vextq_f32(a, a, 2);
    return vaddq_f32(other, vreinterpretq_f32_u32(veorq_u32(vreinterpretq_u32_f32(a), vld1q_u32(minus))));
  }
  static F pick_two(F low, F high, I index) {
    const uint8x16x2_t table = {{vreinterpretq_u8_f32(low), vreinterpretq_u8_f32(high)}};
    const uint32x4_t at = vmlaq_u32(vdupq_n_u32(0x03020100u), vandq_u32(index, vdupq_n_u32(7u)), vdupq_n_u32(0x04040404u));
    return vreinterpretq_f32_u8(vqtbl2q_u8(table, vreinterpretq_u8_u32(at)));
  }
  static I shift_right_each(I a, I n) { return vshlq_u32(a, vnegq_s32(vreinterpretq_s32_u32(n))); }
  template <int Bits>
  static std::int64_t unpack(const std::uint8_t*, std::int64_t, std::int64_t, std::uint8_t*) { return 0; }
  static I signed_byte(I words, int place) {
    const int32x4_t up = vreinterpretq_s32_u32(vshlq_u32(words, vdupq_n_s32(24 - 8 * place)));
    return vreinterpretq_u32_s32(vshrq_n_s32(up, 24));
  }
  template <int Bits>
  static F codes(const std::uint8_t* p) {
    std::uint32_t raw = 0;
    std::memcpy(&raw, p, Bits / 2);
    static constexpr std::int32_t steps[4] = {0, -Bits, -2 * Bits, -3 * Bits};
    const I shifted = vshlq_u32(vdupq_n_u32(raw), vld1q_s32(steps));
    return vcvtq_f32_u32(vandq_u32(shifted, vdupq_n_u32((1u << Bits) - 1u)));
  }
  static void sum_four(F a, F b, F c, F d, float* out) {
    vst1q_f32(out, vpaddq_f32(vpaddq_f32(a, b), vpaddq_f32(c, d)));
  }
  static I bit_xor(I a, I b) { return veorq_u32(a, b); }

  static I spread_three(I bytes) {
    static constexpr std::uint8_t order[16] = {0, 1, 2, 255, 3, 4, 5, 255, 6, 7, 8, 255, 9, 10, 11, 255};
    return vreinterpretq_u32_u8(vqtbl1q_u8(vreinterpretq_u8_u32(bytes), vld1q_u8(order)));
  }

  template <int Bits>
  static F level(I words, const float* table16, F, F) {
    const uint8x16x4_t table = vld1q_u8_x4(reinterpret_cast<const std::uint8_t*>(table16));
    const uint32x4_t index = vandq_u32(words, vdupq_n_u32(15u));
    const uint32x4_t at = vmlaq_u32(vdupq_n_u32(0x03020100u), index, vdupq_n_u32(0x04040404u));
    return vreinterpretq_f32_u8(vqtbl4q_u8(table, vreinterpretq_u8_u32(at)));
  }

  static constexpr bool kUnpacks = false;
  static void transpose(I* rows) {
    std::uint32_t t[kLanes][kLanes];
    for (int i = 0; i < kLanes; ++i) store_words(t[i], rows[i]);
    for (int i = 0; i < kLanes; ++i) {
      std::uint32_t column[kLanes];
      for (int j = 0; j < kLanes; ++j) column[j] = t[j][i];
      rows[i] = load_words(column);
    }
  }
  static I narrow(I a, I b, I c, I d) {
    const auto half = [](I low, I high) {
      return vcombine_s16(vqmovn_s32(vreinterpretq_s32_u32(low)), vqmovn_s32(vreinterpretq_s32_u32(high)));
    };
    return vreinterpretq_u32_s8(vcombine_s8(vqmovn_s16(half(a, b)), vqmovn_s16(half(c, d))));
  }
  /// acc + sum of 4 products u8 * s8 in each 32-bit lane, by way of 16 bits, which every AArch64 has.
  static I dot4(I acc, I u8, I s8) {
    const uint8x16_t u = vreinterpretq_u8_u32(u8);
    const int8x16_t s = vreinterpretq_s8_u32(s8);
    const int16x8_t ul = vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(u)));
    const int16x8_t uh = vreinterpretq_s16_u16(vmovl_u8(vget_high_u8(u)));
    const int16x8_t sl = vmovl_s8(vget_low_s8(s)), sh = vmovl_s8(vget_high_s8(s));
    const int32x4_t a = vmull_s16(vget_low_s16(ul), vget_low_s16(sl));
    const int32x4_t b = vmull_s16(vget_high_s16(ul), vget_high_s16(sl));
    const int32x4_t c = vmull_s16(vget_low_s16(uh), vget_low_s16(sh));
    const int32x4_t d = vmull_s16(vget_high_s16(uh), vget_high_s16(sh));
    const int32x4_t sums = vpaddq_s32(vpaddq_s32(a, b), vpaddq_s32(c, d));
    return vaddq_u32(acc, vreinterpretq_u32_s32(sums));
  }

  static I dot4_small(I acc, I u8, I s8) { return dot4(acc, u8, s8); }  // for u8 < 128
  static I add_bytes(I a, I b) { return vreinterpretq_u32_u8(vaddq_u8(vreinterpretq_u8_u32(a), vreinterpretq_u8_u32(b))); }

  // --- bits ---
  static F floor(F a) { return vrndmq_f32(a); }
  static constexpr bool kCounts = true;
  static I bit_or(I a, I b) { return vorrq_u32(a, b); }
  static I shift_left(I a, int n) { return vshlq_u32(a, vdupq_n_s32(n)); }
  static I shift_right_signed(I a, int n) {
    return vreinterpretq_u32_s32(vshlq_s32(vreinterpretq_s32_u32(a), vdupq_n_s32(-n)));
  }
  static I sub_words(I a, I b) { return vsubq_u32(a, b); }
  static I mul_words(I a, I b) { return vmulq_u32(a, b); }
  static std::int32_t sum_words(I a) { return static_cast<std::int32_t>(vaddvq_u32(a)); }
  static I count(I acc, I x) { return vpadalq_u16(acc, vpaddlq_u8(vcntq_u8(vreinterpretq_u8_u32(x)))); }
  static I not_negative(F x) { return vcgezq_f32(x); }
  static std::uint32_t sign_bits(I a) {
    static constexpr std::int32_t place[4] = {0, 1, 2, 3};
    return vaddvq_u32(vshlq_u32(vshrq_n_u32(a, 31), vld1q_s32(place)));
  }
  static void turn4(const std::uint32_t* rows, std::int64_t stride, std::uint32_t* out, std::int64_t out_stride) {
    const uint32x4x2_t a = vtrnq_u32(vld1q_u32(rows), vld1q_u32(rows + stride));
    const uint32x4x2_t b = vtrnq_u32(vld1q_u32(rows + 2 * stride), vld1q_u32(rows + 3 * stride));
    vst1q_u32(out, vcombine_u32(vget_low_u32(a.val[0]), vget_low_u32(b.val[0])));
    vst1q_u32(out + out_stride, vcombine_u32(vget_low_u32(a.val[1]), vget_low_u32(b.val[1])));
    vst1q_u32(out + 2 * out_stride, vcombine_u32(vget_high_u32(a.val[0]), vget_high_u32(b.val[0])));
    vst1q_u32(out + 3 * out_stride, vcombine_u32(vget_high_u32(a.val[1]), vget_high_u32(b.val[1])));
  }
};

}  // namespace laconic::neon
