// Vectors of AVX2 with FMA: 8 floats, 8 words of 32 bits, 32 bytes.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace laconic::avx2 {

struct Simd {
  static constexpr int kLanes = 8;
  using F = __m256;
  using I = __m256i;

  static F zero() { return _mm256_setzero_ps(); }
  static F splat(float x) { return _mm256_set1_ps(x); }
  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static F load_first(const float* p, int n) { return n >= 8 ? load(p) : _mm256_maskload_ps(p, first(n)); }
  static void store(float* p, F x) { _mm256_storeu_ps(p, x); }
  static void store_first(float* p, F x, int n) {
    if (n >= 8) return store(p, x);
    _mm256_maskstore_ps(p, first(n), x);
  }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F div(F a, F b) { return _mm256_div_ps(a, b); }
  static F max(F a, F b) { return _mm256_max_ps(a, b); }
  static F min(F a, F b) { return _mm256_min_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F abs(F a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
  static F sqrt(F a) { return _mm256_sqrt_ps(a); }
  static F copy_sign(F size, F sign) {
    const F mask = _mm256_set1_ps(-0.0f);
    return _mm256_or_ps(_mm256_and_ps(mask, sign), _mm256_andnot_ps(mask, size));
  }
  static F round(F a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static float sum(F a) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
  }
  static float largest(F a) {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
  }
  static F scale_by_power(F a, F n) {
    const I whole = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_mul_ps(a, _mm256_castsi256_ps(whole));
  }

  static I splat_word(std::int32_t x) { return _mm256_set1_epi32(x); }
  static I load_words(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static I load_bytes(const void* p, int n) {
    if (n >= 32) return load_words(p);
    alignas(32) std::uint8_t padded[32] = {};
    std::memcpy(padded, p, static_cast<std::size_t>(n));
    return load_words(padded);
  }
  static void store_words(void* p, I x) { _mm256_storeu_si256(static_cast<__m256i*>(p), x); }
  static I add_words(I a, I b) { return _mm256_add_epi32(a, b); }
  static I bit_and(I a, I b) { return _mm256_and_si256(a, b); }
  static I shift_right(I a, int n) { return _mm256_srli_epi32(a, n); }
  static F to_float(I a) { return _mm256_cvtepi32_ps(a); }
  static I to_int(F a) { return _mm256_cvtps_epi32(a); }
  static F bits_as_float(I a) { return _mm256_castsi256_ps(a); }
  static F pick(F a, I index) { return _mm256_permutevar8x32_ps(a, index); }
  static F gather(const float* base, I index) { return _mm256_i32gather_ps(base, index, 4); }
  static F from_half(const std::uint16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static F from_bfloat(const std::uint16_t* p) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
  }
  static void to_half(std::uint16_t* p, F x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
  }
  static void to_bfloat(std::uint16_t* p, F x) {
    const I bits = _mm256_castps_si256(x), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const I near = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    const I none = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    const I all = _mm256_blendv_epi8(near, _mm256_set1_epi32(0x7fc0), none);
    const __m128i low = _mm256_castsi256_si128(all), high = _mm256_extracti128_si256(all, 1);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packus_epi32(low, high));
  }
  static F from_bytes(const std::uint8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }
  static F from_signed_bytes(const std::int8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }
  static void to_signed_bytes(std::int8_t* p, I x) {
    const __m128i shorts = _mm_packs_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(shorts, shorts));
  }
  template <int Distance>
  static F butterfly(F a) {
    constexpr auto sign = [](int lane) { return lane & Distance ? INT32_MIN : 0; };
    const I minus = _mm256_setr_epi32(sign(0), sign(1), sign(2), sign(3), sign(4), sign(5), sign(6), sign(7));
    F other;
    if constexpr (Distance == 1) other = _mm256_permute_ps(a, 0xb1);
    else if constexpr (Distance == 2) other = _mm256_permute_ps(a, 0x4e);
    else other = _mm256_permute2f128_ps(a, a, 1);
    return _mm256_add_ps(other, _mm256_xor_ps(a, _mm256_castsi256_ps(minus)));
  }
  static F pick_two(F low, F high, I index) {
    const F a = _mm256_permutevar8x32_ps(low, index), b = _mm256_permutevar8x32_ps(high, index);
    return _mm256_blendv_ps(a, b, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
  }
  static I shift_right_each(I a, I n) { return _mm256_srlv_epi32(a, n); }

  /// 16 codes from 2 * Bits bytes, twice a step: a byte shuffle puts the two bytes that can hold code j into 16-bit
  /// lane j, a multiplication by 2^(8 - shift) lifts the code to bit 8 (there is no shift by a count of its own for
  /// each 16-bit lane), and one shift and one mask bring it down.
  template <int Bits>
  static std::int64_t unpack(const std::uint8_t* from, std::int64_t size, std::int64_t k, std::uint8_t* codes) {
    alignas(32) static constexpr auto table = [] {
      struct { std::uint8_t bytes[32]{}; std::uint16_t lift[16]{}; } t;
      for (int j = 0; j < 16; ++j) {
        const int byte = j * Bits >> 3;
        t.bytes[2 * j] = static_cast<std::uint8_t>(byte);
        t.bytes[2 * j + 1] = static_cast<std::uint8_t>(byte + 1 < 16 ? byte + 1 : 0x80);  // 0x80 gives zero
        t.lift[j] = static_cast<std::uint16_t>(1u << (8 - (j * Bits & 7)));
      }
      return t;
    }();
    const I shuffle = load_words(table.bytes), lift = load_words(table.lift);
    const I mask = _mm256_set1_epi16((1 << Bits) - 1);
    const auto sixteen = [&](std::int64_t at) __attribute__((always_inline)) {
      const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + at));
      const I pairs = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(raw), shuffle);
      return _mm256_and_si256(_mm256_srli_epi16(_mm256_mullo_epi16(pairs, lift), 8), mask);
    };
    std::int64_t i = 0;
    // The second load of a step reads 16 bytes from its 2 * Bits: it must stay inside the row.
    for (std::int64_t at = 0; i + 32 <= k && at + 2 * Bits + 16 <= size; i += 32, at += 4 * Bits) {
      const I packed = _mm256_packus_epi16(sixteen(at), sixteen(at + 2 * Bits));
      // packus interleaves the 128-bit lanes of its operands: put the quarters back in order.
      store_words(codes + i, _mm256_permute4x64_epi64(packed, 0b11011000));
    }
    return i;
  }
  static I signed_byte(I words, int place) {
    return _mm256_srai_epi32(_mm256_slli_epi32(words, 24 - 8 * place), 24);
  }
  template <int Bits>
  static F codes(const std::uint8_t* p) {
    if constexpr (Bits == 8) {
      return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
    } else {
      std::int32_t raw = 0;
      std::memcpy(&raw, p, Bits);
      const I steps = _mm256_setr_epi32(0, Bits, 2 * Bits, 3 * Bits, 4 * Bits, 5 * Bits, 6 * Bits, 7 * Bits);
      const I shifted = _mm256_srlv_epi32(_mm256_set1_epi32(raw), steps);
      return _mm256_cvtepi32_ps(_mm256_and_si256(shifted, _mm256_set1_epi32((1 << Bits) - 1)));
    }
  }
  static void sum_four(F a, F b, F c, F d, float* out) {
    const F four = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(four), _mm256_extractf128_ps(four, 1)));
  }
  static I bit_xor(I a, I b) { return _mm256_xor_si256(a, b); }

  static I spread_three(I bytes) {
    // 12 of the 24 bytes into each half, then three bytes into each lane.
    const I halves = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 1, 2, 2, 3, 4, 5, 5));
    const I order = _mm256_setr_epi8(0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1,  //
                                     0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1);
    return _mm256_shuffle_epi8(halves, order);
  }

  template <int Bits>
  static F level(I words, const float*, F low, F high) {
    const F first_eight = _mm256_permutevar8x32_ps(low, words);  // 3 bits of the index count
    if constexpr (Bits < 4) return first_eight;
    const F last_eight = _mm256_permutevar8x32_ps(high, words);
    return _mm256_blendv_ps(first_eight, last_eight, _mm256_castsi256_ps(_mm256_slli_epi32(words, 28)));
  }

  static constexpr bool kUnpacks = false;
  static void transpose(I* rows) {
    I t[8];
    for (int i = 0; i < 8; i += 4) {
      const I a = _mm256_unpacklo_epi32(rows[i], rows[i + 1]), b = _mm256_unpackhi_epi32(rows[i], rows[i + 1]);
      const I c = _mm256_unpacklo_epi32(rows[i + 2], rows[i + 3]), d = _mm256_unpackhi_epi32(rows[i + 2], rows[i + 3]);
      t[i] = _mm256_unpacklo_epi64(a, c), t[i + 1] = _mm256_unpackhi_epi64(a, c);
      t[i + 2] = _mm256_unpacklo_epi64(b, d), t[i + 3] = _mm256_unpackhi_epi64(b, d);
    }
    for (int j = 0; j < 4; ++j) {
      rows[j] = _mm256_permute2x128_si256(t[j], t[4 + j], 0x20);
      rows[4 + j] = _mm256_permute2x128_si256(t[j], t[4 + j], 0x31);
    }
  }
  static I narrow(I a, I b, I c, I d) {
    const I pairs = _mm256_packs_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
    return _mm256_permutevar8x32_epi32(pairs, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  }
  /// acc + sum of 4 products u8 * s8 in each 32-bit lane, by way of 16 bits, since vpmaddubsw would saturate.
  static I dot4(I acc, I u8, I s8) {
    const I even = _mm256_madd_epi16(_mm256_and_si256(u8, _mm256_set1_epi16(0xff)),
                                     _mm256_srai_epi16(_mm256_slli_epi16(s8, 8), 8));
    const I odd = _mm256_madd_epi16(_mm256_srli_epi16(u8, 8), _mm256_srai_epi16(s8, 8));
    return _mm256_add_epi32(acc, _mm256_add_epi32(even, odd));
  }

  static I dot4_small(I acc, I u8, I s8) {  // for u8 < 128: no pair of products overflows 16 bits
    return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(u8, s8), _mm256_set1_epi16(1)));
  }
  static I add_bytes(I a, I b) { return _mm256_add_epi8(a, b); }

  // --- bits ---
  static F floor(F a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
  static constexpr bool kCounts = false;
  static I bit_or(I a, I b) { return _mm256_or_si256(a, b); }
  static I shift_left(I a, int n) { return _mm256_slli_epi32(a, n); }
  static I shift_right_signed(I a, int n) { return _mm256_srai_epi32(a, n); }
  static I sub_words(I a, I b) { return _mm256_sub_epi32(a, b); }
  static I mul_words(I a, I b) { return _mm256_mullo_epi32(a, b); }
  static std::int32_t sum_words(I a) {
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
  }
  /// Each half of a byte is looked up, then four bytes are added into their lane.
  static I count(I acc, I x) {
    const I table = _mm256_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4,  //
                                     0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4);
    const I low = _mm256_set1_epi8(15);
    const I bytes = _mm256_add_epi8(_mm256_shuffle_epi8(table, _mm256_and_si256(x, low)),
                                    _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(x, 4), low)));
    const I pairs = _mm256_maddubs_epi16(bytes, _mm256_set1_epi8(1));
    return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  static I not_negative(F x) { return _mm256_castps_si256(_mm256_cmp_ps(x, zero(), _CMP_GE_OQ)); }
  static std::uint32_t sign_bits(I a) { return static_cast<std::uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(a))); }
  static void turn4(const std::uint32_t* rows, std::int64_t stride, std::uint32_t* out, std::int64_t out_stride) {
    const auto row = [&](int i) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows + i * stride)); };
    const __m128i a = _mm_unpacklo_epi32(row(0), row(1)), b = _mm_unpacklo_epi32(row(2), row(3));
    const __m128i c = _mm_unpackhi_epi32(row(0), row(1)), d = _mm_unpackhi_epi32(row(2), row(3));
    const auto put = [&](int j, __m128i x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(out + j * out_stride), x); };
    put(0, _mm_unpacklo_epi64(a, b));
    put(1, _mm_unpackhi_epi64(a, b));
    put(2, _mm_unpacklo_epi64(c, d));
    put(3, _mm_unpackhi_epi64(c, d));
  }

 private:
  static I first(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
};

}  // namespace laconic::avx2
