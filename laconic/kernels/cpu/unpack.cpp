// Dense codes to one byte each.
//
// The vector path takes 16 codes from their 2*bits bytes whatever the width: a byte shuffle puts the two
// bytes that can hold code j into 16-bit lane j, a multiplication by 2^(8-shift) lifts the code to bit 8
// (AVX2 has no shift by a different count per 16-bit lane), and one shift and one mask bring it down.
#include <array>
#include <bit>
#include <cstring>
#include <utility>

#include "kernels.hpp"

#if LACONIC_X86
#include <immintrin.h>
#endif

namespace laconic {
namespace {

template <int Bits>
LACONIC_INLINE void unpack_plain(const std::uint32_t* words, std::int64_t begin, std::int64_t end,
                                 std::uint8_t* codes) {
  constexpr std::uint32_t mask = (1u << Bits) - 1u;
  for (std::int64_t i = begin; i < end; ++i) {
    const std::int64_t bit = i * Bits;
    const auto shift = static_cast<int>(bit & 31);
    std::uint32_t code = words[bit >> 5] >> shift;
    if constexpr (32 % Bits != 0) {  // only such widths ever straddle
      if (shift + Bits > 32) code |= words[(bit >> 5) + 1] << (32 - shift);
    }
    codes[i] = static_cast<std::uint8_t>(code & mask);
  }
}

#if LACONIC_X86
struct Shuffle {
  std::array<std::uint8_t, 32> bytes{};   // per 16-bit lane: which two of the 16 loaded bytes
  std::array<std::uint16_t, 16> lift{};   // per 16-bit lane: 2^(8 - shift)
};

template <int Bits>
constexpr Shuffle shuffle_for() {
  Shuffle s;
  for (int j = 0; j < 16; ++j) {
    const int bit = j * Bits;
    const int byte = bit >> 3;
    s.bytes[2 * j] = static_cast<std::uint8_t>(byte);
    s.bytes[2 * j + 1] = static_cast<std::uint8_t>(byte + 1 < 16 ? byte + 1 : 0x80);  // 0x80 gives zero
    s.lift[j] = static_cast<std::uint16_t>(1u << (8 - (bit & 7)));
  }
  return s;
}

template <int Bits>
LACONIC_AVX2 void unpack_avx2(const std::uint32_t* words, std::int64_t k, std::uint8_t* codes) {
  static constexpr Shuffle table = shuffle_for<Bits>();
  const auto* bytes = reinterpret_cast<const std::uint8_t*>(words);
  const std::int64_t size = 4 * words_for(k, Bits);
  const __m256i shuffle = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(table.bytes.data()));
  const __m256i lift = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(table.lift.data()));
  const __m256i mask = _mm256_set1_epi16((1 << Bits) - 1);
  const auto sixteen = [&](std::int64_t at) LACONIC_AVX2 {
    const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes + at));
    const __m256i pairs = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(raw), shuffle);
    return _mm256_and_si256(_mm256_srli_epi16(_mm256_mullo_epi16(pairs, lift), 8), mask);
  };
  std::int64_t i = 0;
  // The second load of a step reads 16 bytes from its 2*Bits: it must stay inside the row.
  for (std::int64_t at = 0; i + 32 <= k && at + 2 * Bits + 16 <= size; i += 32, at += 4 * Bits) {
    const __m256i packed = _mm256_packus_epi16(sixteen(at), sixteen(at + 2 * Bits));
    // packus interleaves the 128-bit lanes of its operands: put the quarters back in order.
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + i), _mm256_permute4x64_epi64(packed, 0b11011000));
  }
  unpack_plain<Bits>(words, i, k, codes);
}
#endif

template <int Bits>
void unpack_width(const std::uint32_t* words, std::int64_t k, std::uint8_t* codes, [[maybe_unused]] Isa isa) {
  if constexpr (Bits == 8 && std::endian::native == std::endian::little) {
    if (k > 0) std::memcpy(codes, words, static_cast<std::size_t>(k));
    return;
  }
#if LACONIC_X86
  if (isa >= Isa::avx2) return unpack_avx2<Bits>(words, k, codes);
#endif
  unpack_plain<Bits>(words, 0, k, codes);
}

}  // namespace

void unpack_row(const std::uint32_t* words, int bits, std::int64_t k, std::uint8_t* codes, Isa isa) {
  using Width = void (*)(const std::uint32_t*, std::int64_t, std::uint8_t*, Isa);
  static constexpr auto widths = []<int... B>(std::integer_sequence<int, B...>) {
    return std::array<Width, sizeof...(B)>{unpack_width<B + 1>...};
  }(std::make_integer_sequence<int, 8>{});
  widths[static_cast<std::size_t>(bits - 1)](words, k, codes, isa);
}

}  // namespace laconic
