// The input of a convolution rounded to words, and the end of one. Included once for every instruction set.

namespace laconic::LACONIC_TARGET {

/// n words, each the signs of up to 32 channels at one place; bit 1 where x >= 0.
inline void map_signs(const float* x, std::int64_t channel_stride, int channels, std::int64_t n, std::uint32_t* out) {
  using V = Simd;
  for (std::int64_t i = 0; i < n; i += V::kLanes) {
    const int left = static_cast<int>(n - i < V::kLanes ? n - i : V::kLanes);
    V::I word = V::splat_word(0);
    for (int c = 0; c < channels; ++c) {
      const V::I sign = V::not_negative(V::load_first(x + c * channel_stride + i, left));
      word = V::bit_or(word, V::bit_and(sign, V::splat_word(static_cast<std::int32_t>(std::uint32_t{1} << c))));
    }
    store_some(out + i, word, left);
  }
}

/// n words, each the bytes of up to 4 channels at one place.
inline void map_bytes(const float* x, std::int64_t channel_stride, int channels, std::int64_t n, const Coding& coding,
                      std::uint32_t* out) {
  using V = Simd;
  const V::F factor = V::splat(coding.factor[0]);
  for (std::int64_t i = 0; i < n; i += V::kLanes) {
    const int left = static_cast<int>(n - i < V::kLanes ? n - i : V::kLanes);
    V::I word = V::splat_word(0);
    for (int c = 0; c < channels; ++c) {
      const V::I code = to_codes(V::load_first(x + c * channel_stride + i, left), factor, coding);
      word = V::bit_or(word, V::shift_left(code, 8 * c));
    }
    store_some(out + i, word, left);
  }
}

/// sums[r][j] -= counts[r] for the columns j of one panel where the mask is all ones.
inline void leave_out(std::int32_t* sums, std::int64_t stride, std::int64_t rows, const std::int32_t* counts,
                      const std::int32_t* mask) {
  using V = Simd;
  for (std::int64_t j = 0; j < kPanelColumns; j += V::kLanes) {
    const V::I some = V::load_words(mask + j);
    for (std::int64_t r = 0; r < rows; ++r) {
      std::int32_t* at = sums + r * stride + j;
      V::store_words(at, V::sub_words(V::load_words(at), V::bit_and(some, V::splat_word(counts[r]))));
    }
  }
}

/// Sum of the signed bytes in n words.
inline std::int32_t sum_bytes(const std::uint32_t* words, std::int64_t n) {
  using V = Simd;
  const V::I ones = V::splat_word(0x01010101);
  V::I sum = V::splat_word(0);
  for (std::int64_t i = 0; i < n; i += V::kLanes) {
    const std::int64_t left = 4 * (n - i);
    sum = V::dot4(sum, ones, V::load_bytes(words + i, static_cast<int>(left < 4 * V::kLanes ? left : 4 * V::kLanes)));
  }
  return V::sum_words(sum);
}

inline void finish_conv(const ConvFinish& f, const std::int32_t* sums, std::int64_t stride, std::int64_t rows,
                        std::int64_t columns) {
  using V = Simd;
  const V::I times = V::splat_word(f.times);
  for (std::int64_t r = 0; r < rows; ++r, sums += stride) {
    const V::I base = V::splat_word(f.row[r]);
    const V::F scale = V::splat(f.scale[r]), bias = V::splat(f.bias != nullptr ? f.bias[r] : 0.0f);
    for (std::int64_t c = 0; c < columns; c += V::kLanes) {
      const int left = static_cast<int>(columns - c < V::kLanes ? columns - c : V::kLanes);
      V::I y = V::add_words(base, V::mul_words(V::load_words(sums + c), times));
      if (f.column != nullptr) y = V::add_words(y, V::load_words(f.column + c));
      const V::F v = activate(V::add(V::mul(V::to_float(y), scale), bias), f.act);
      V::store_first(f.out + r * f.out_stride + c, v, left);
    }
  }
}

}  // namespace laconic::LACONIC_TARGET
