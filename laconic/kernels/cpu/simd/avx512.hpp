// Vectors of AVX-512 (F, BW, DQ, VL, VNNI, VBMI): 16 floats, 16 words of 32 bits, 64 bytes.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace laconic::avx512 {

struct Simd {
  static constexpr int kLanes = 16;
  using F = __m512;   // 16 floats
  using I = __m512i;  // 16 words of 32 bits, or 64 bytes

  static F zero() { return _mm512_setzero_ps(); }
  static F splat(float x) { return _mm512_set1_ps(x); }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static F load_first(const float* p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }
  static void store(float* p, F x) { _mm512_storeu_ps(p, x); }
  static void store_first(float* p, F x, int n) { _mm512_mask_storeu_ps(p, first(n), x); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F div(F a, F b) { return _mm512_div_ps(a, b); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static F min(F a, F b) { return _mm512_min_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }  // a b + c
  static F abs(F a) { return _mm512_abs_ps(a); }
  static F sqrt(F a) { return _mm512_sqrt_ps(a); }
  static F copy_sign(F size, F sign) {
    const F mask = _mm512_castsi512_ps(_mm512_set1_epi32(INT32_MIN));
    return _mm512_or_ps(_mm512_and_ps(mask, sign), _mm512_andnot_ps(mask, size));
  }
  static F round(F a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static float sum(F a) { return _mm512_reduce_add_ps(a); }
  static float largest(F a) { return _mm512_reduce_max_ps(a); }
  static F scale_by_power(F a, F n) { return _mm512_scalef_ps(a, n); }  // a 2^n, n whole

  static I splat_word(std::int32_t x) { return _mm512_set1_epi32(x); }
  static I load_words(const void* p) { return _mm512_loadu_si512(p); }
  /// `n` bytes from p, zero above.
  static I load_bytes(const void* p, int n) {
    return _mm512_maskz_loadu_epi8(n >= 64 ? ~__mmask64{0} : (__mmask64{1} << n) - 1, p);
  }
  static void store_words(void* p, I x) { _mm512_storeu_si512(p, x); }
  static I add_words(I a, I b) { return _mm512_add_epi32(a, b); }
  static I bit_and(I a, I b) { return _mm512_and_si512(a, b); }
  static I shift_right(I a, int n) { return _mm512_srli_epi32(a, static_cast<unsigned>(n)); }
  static F to_float(I a) { return _mm512_cvtepi32_ps(a); }
  static I to_int(F a) { return _mm512_cvtps_epi32(a); }  // to nearest even
  static F bits_as_float(I a) { return _mm512_castsi512_ps(a); }
  /// Element a[index] for each lane; index in 0..15.
  static F pick(F a, I index) { return _mm512_permutexvar_ps(index, a); }
  static F gather(const float* base, I index) { return _mm512_i32gather_ps(index, base, 4); }
  static F from_half(const std::uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static F from_bfloat(const std::uint16_t* p) {
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
  }
  /// Rounded to nearest even; what is not a number stays so.
  static void to_half(std::uint16_t* p, F x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
  }
  static void to_bfloat(std::uint16_t* p, F x) {
    const I bits = _mm512_castps_si512(x), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const I near = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    const I all = _mm512_mask_mov_epi32(near, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(all));
  }
  static F from_bytes(const std::uint8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  static F from_signed_bytes(const std::int8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  /// The low byte of each word, which holds a number of -128 to 127.
  static void to_signed_bytes(std::int8_t* p, I x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(x));
  }
  /// (a + b, a - b) of each pair of lanes `Distance` apart.
  template <int Distance>
  static F butterfly(F a) {
    F other;
    if constexpr (Distance == 1) other = _mm512_permute_ps(a, 0xb1);
    else if constexpr (Distance == 2) other = _mm512_permute_ps(a, 0x4e);
    else if constexpr (Distance == 4) other = _mm512_shuffle_f32x4(a, a, 0xb1);
    else other = _mm512_shuffle_f32x4(a, a, 0x4e);
    constexpr auto upper = static_cast<__mmask16>(Distance == 1 ? 0xaaaa : Distance == 2 ? 0xcccc : Distance == 4 ? 0xf0f0 : 0xff00);
    return _mm512_mask_sub_ps(_mm512_add_ps(a, other), upper, other, a);
  }
  /// Element index of low and high, one after the other, for each lane; index in 0..31, bits above may hold anything.
  static F pick_two(F low, F high, I index) { return _mm512_permutex2var_ps(low, index, high); }
  static I shift_right_each(I a, I n) { return _mm512_srlv_epi32(a, n); }
  /// The first of k codes of Bits bits, one to a byte, as far as whole vectors go; how many that are. `size` bytes may
  /// be read, and k bytes written.
  template <int Bits>
  static std::int64_t unpack(const std::uint8_t* from, std::int64_t size, std::int64_t k, std::uint8_t* codes) {
    std::int64_t i = 0;
    for (std::int64_t at = 0; i + 64 <= k; i += 64, at += 8 * Bits)
      store_words(codes + i, unpack64<Bits>(load_bytes(from + at, static_cast<int>(size - at < 64 ? size - at : 64))));
    return i;
  }
  /// Byte `place` of each word, as a signed number.
  static I signed_byte(I words, int place) {
    return _mm512_srai_epi32(_mm512_slli_epi32(words, static_cast<unsigned>(24 - 8 * place)), 24);
  }
  /// 16 codes of Bits bits from p, in order, as numbers from 0.
  template <int Bits>
  static F codes(const std::uint8_t* p) {
    if constexpr (Bits == 8) {
      return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
    } else if constexpr (Bits == 4) {  // each word's low 4 bits index the table
      std::int64_t raw;
      std::memcpy(&raw, p, 8);
      const I shifts = _mm512_set_epi64(0x3c00000038, 0x3400000030, 0x2c00000028, 0x2400000020,  //
                                        0x1c00000018, 0x1400000010, 0x0c00000008, 0x0400000000);
      return _mm512_permutexvar_ps(_mm512_multishift_epi64_epi8(shifts, _mm512_set1_epi64(raw)), counting<16>());
    } else {
      std::int32_t raw;
      std::memcpy(&raw, p, 4);
      const I shifts = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
      return _mm512_permutexvar_ps(_mm512_srlv_epi32(_mm512_set1_epi32(raw), shifts), counting<4>());
    }
  }
  /// The sums of four vectors, in order.
  static void sum_four(F a, F b, F c, F d, float* out) {
    const F ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const F cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    const F four = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(four), _mm512_extractf32x8_ps(four, 1));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
  }
  static I bit_xor(I a, I b) { return _mm512_xor_si512(a, b); }

  /// Lane j: the three bytes from 3j of 48 bytes, in the low 24 bits.
  static I spread_three(I bytes) {
    alignas(64) static constexpr auto order = [] {
      struct { std::uint8_t at[64]{}; } t;
      for (int i = 0; i < 64; ++i) t.at[i] = static_cast<std::uint8_t>(i / 4 * 3 + i % 4);
      return t;
    }();
    return _mm512_permutexvar_epi8(_mm512_load_si512(order.at), bytes);
  }

  /// The level of each lane's code, which lies in its low Bits bits; the bits above it may hold anything.
  template <int Bits>
  static F level(I words, const float* table16, F low, F) {
    static_cast<void>(table16);
    return _mm512_permutexvar_ps(words, low);  // the table is repeated, and only 4 bits of the index count
  }

  // --- bytes ---
  /// 64 codes of Bits bits, one a byte, in order, from 8*Bits bytes.
  template <int Bits>
  static I unpack64(I raw) {
    if constexpr (Bits == 8) return raw;
    alignas(64) static constexpr auto order = [] {
      struct { std::uint8_t at[64]{}, shift[64]{}; } t;
      for (int i = 0; i < 64; ++i) {
        t.at[i] = static_cast<std::uint8_t>(i / 8 * Bits + i % 8);
        t.shift[i] = static_cast<std::uint8_t>(i % 8 * Bits);
      }
      return t;
    }();
    const I spread = _mm512_permutexvar_epi8(_mm512_load_si512(order.at), raw);
    const I codes = _mm512_multishift_epi64_epi8(_mm512_load_si512(order.shift), spread);
    return _mm512_and_si512(codes, _mm512_set1_epi8(static_cast<char>((1 << Bits) - 1)));
  }
  static constexpr bool kUnpacks = true;  // unpack64 is there for every width
  /// Words of kLanes vectors, transposed in place.
  static void transpose(I* rows) {
    I t[16];
    for (int i = 0; i < 16; i += 4) {
      const I a = _mm512_unpacklo_epi32(rows[i], rows[i + 1]), b = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
      const I c = _mm512_unpacklo_epi32(rows[i + 2], rows[i + 3]), d = _mm512_unpackhi_epi32(rows[i + 2], rows[i + 3]);
      t[i] = _mm512_unpacklo_epi64(a, c), t[i + 1] = _mm512_unpackhi_epi64(a, c);
      t[i + 2] = _mm512_unpacklo_epi64(b, d), t[i + 3] = _mm512_unpackhi_epi64(b, d);
    }
    // t[4 q + j] holds words j, j + 4, j + 8, j + 12 of rows 4 q .. 4 q + 3, a quarter each.
    for (int j = 0; j < 4; ++j) {
      const I a = _mm512_shuffle_i32x4(t[j], t[4 + j], 0x88), b = _mm512_shuffle_i32x4(t[j], t[4 + j], 0xdd);
      const I c = _mm512_shuffle_i32x4(t[8 + j], t[12 + j], 0x88), d = _mm512_shuffle_i32x4(t[8 + j], t[12 + j], 0xdd);
      rows[j] = _mm512_shuffle_i32x4(a, c, 0x88), rows[8 + j] = _mm512_shuffle_i32x4(a, c, 0xdd);
      rows[4 + j] = _mm512_shuffle_i32x4(b, d, 0x88), rows[12 + j] = _mm512_shuffle_i32x4(b, d, 0xdd);
    }
  }
  /// The low byte of each of four vectors of words, as 64 bytes in order, with signed saturation.
  static I narrow(I a, I b, I c, I d) {
    const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm512_cvtsepi32_epi8(a)), _mm512_cvtsepi32_epi8(b), 1);
    const __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm512_cvtsepi32_epi8(c)), _mm512_cvtsepi32_epi8(d), 1);
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
  }
  /// acc + sum of 4 products u8 * s8 in each 32-bit lane.
  static I dot4(I acc, I u8, I s8) { return _mm512_dpbusd_epi32(acc, u8, s8); }

  static I dot4_small(I acc, I u8, I s8) { return dot4(acc, u8, s8); }  // for u8 < 128
  static I add_bytes(I a, I b) { return _mm512_add_epi8(a, b); }

  // --- bits ---
  static F floor(F a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
  static constexpr bool kCounts = true;  // `count` is cheap
  static I bit_or(I a, I b) { return _mm512_or_si512(a, b); }
  static I shift_left(I a, int n) { return _mm512_slli_epi32(a, static_cast<unsigned>(n)); }
  static I shift_right_signed(I a, int n) { return _mm512_srai_epi32(a, static_cast<unsigned>(n)); }
  static I sub_words(I a, I b) { return _mm512_sub_epi32(a, b); }
  static I mul_words(I a, I b) { return _mm512_mullo_epi32(a, b); }
  static std::int32_t sum_words(I a) { return _mm512_reduce_add_epi32(a); }
  /// acc + the number of ones in each 32-bit lane of x.
  static I count(I acc, I x) { return _mm512_add_epi32(acc, _mm512_popcnt_epi32(x)); }
  /// All ones in the lanes where x >= 0 (so in -0.0, and not in a nan).
  static I not_negative(F x) { return _mm512_movm_epi32(_mm512_cmp_ps_mask(x, zero(), _CMP_GE_OQ)); }
  /// Bit j: the top bit of lane j.
  static std::uint32_t sign_bits(I a) { return _mm512_movepi32_mask(a); }
  /// 4 rows of 4 words, turned: out[j * out_stride + i] = rows[i * stride + j].
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
  /// 0 to N - 1, over and over.
  template <int N>
  static F counting() {
    alignas(64) static constexpr auto table = [] {
      struct { float at[16]{}; } t;
      for (int i = 0; i < 16; ++i) t.at[i] = static_cast<float>(i % N);
      return t;
    }();
    return _mm512_load_ps(table.at);
  }
  static __mmask16 first(int n) { return static_cast<__mmask16>(n >= 16 ? 0xffff : (1u << n) - 1u); }
};

}  // namespace laconic::avx512
