// Dense codes to one byte each. Included once for every instruction set.

namespace laconic::LACONIC_TARGET {

template <int Bits>
void unpack_width(const std::uint32_t* words, std::int64_t k, std::uint8_t* codes) {
  constexpr std::uint32_t mask = (1u << Bits) - 1u;
  const auto* bytes = reinterpret_cast<const std::uint8_t*>(words);
  for (std::int64_t i = Simd::unpack<Bits>(bytes, 4 * words_for(k, Bits), k, codes); i < k; ++i) {
    const std::int64_t bit = i * Bits;
    const auto shift = static_cast<int>(bit & 31);
    std::uint32_t code = words[bit >> 5] >> shift;
    if constexpr (32 % Bits != 0) {  // only such widths ever straddle
      if (shift + Bits > 32) code |= words[(bit >> 5) + 1] << (32 - shift);
    }
    codes[i] = static_cast<std::uint8_t>(code & mask);
  }
}

inline void unpack_row(const std::uint32_t* words, int bits, std::int64_t k, std::uint8_t* codes) {
  switch (bits) {
    case 1: return unpack_width<1>(words, k, codes);
    case 2: return unpack_width<2>(words, k, codes);
    case 3: return unpack_width<3>(words, k, codes);
    case 4: return unpack_width<4>(words, k, codes);
    case 5: return unpack_width<5>(words, k, codes);
    case 6: return unpack_width<6>(words, k, codes);
    case 7: return unpack_width<7>(words, k, codes);
    default: return unpack_width<8>(words, k, codes);
  }
}

}  // namespace laconic::LACONIC_TARGET
