// Packed codes to float32 weights: w = (q - z) * s, group by group along the row. Included once for every instruction set.
//
// A block of codes is unpacked into a small buffer that stays in the first-level cache, and turned into floats from
// there. Every operation is rounded as in the PyTorch reference, so that the results are equal bit for bit.

namespace laconic::LACONIC_TARGET {

inline float read_one(const void* base, Dtype dtype, std::int64_t at) {
  switch (dtype) {
    case Dtype::float16: return from_half(static_cast<const std::uint16_t*>(base)[at]);
    case Dtype::bfloat16: return from_bfloat(static_cast<const std::uint16_t*>(base)[at]);
    case Dtype::uint8: return static_cast<float>(static_cast<const std::uint8_t*>(base)[at]);
    default: return static_cast<const float*>(base)[at];
  }
}

LACONIC_INLINE void affine(const std::uint8_t* LACONIC_RESTRICT q, float* LACONIC_RESTRICT w, std::int64_t n,
                           float zero, float scale) {
  using V = Simd;
  const V::F z = V::splat(zero), s = V::splat(scale);
  std::int64_t i = 0;
  for (; i + V::kLanes <= n; i += V::kLanes) V::store(w + i, V::mul(V::sub(V::from_bytes(q + i), z), s));
  for (; i < n; ++i) w[i] = (static_cast<float>(q[i]) - zero) * scale;
}

inline void dequantize_rows(const Dequantize& job, std::int64_t begin, std::int64_t end) {
  constexpr std::int64_t kBlock = 2048;  // codes; a multiple of 32, so that a block starts on a whole word
  alignas(64) std::uint8_t codes[kBlock];
  for (std::int64_t row = begin; row < end; ++row) {
    const std::uint32_t* words = job.words + row * job.words_per_row;
    float* out = job.out + row * job.k;
    const std::int64_t first_group = row * job.groups;
    for (std::int64_t from = 0; from < job.k; from += kBlock) {
      const std::int64_t to = from + kBlock < job.k ? from + kBlock : job.k;
      unpack_row(words + from / 32 * job.bits, job.bits, to - from, codes);
      for (std::int64_t i = from; i < to;) {
        const std::int64_t g = i / job.group;
        const std::int64_t stop = job.group >= to - g * job.group ? to : (g + 1) * job.group;
        const float zero = job.zero_dtype == Dtype::none ? static_cast<float>(1 << (job.bits - 1))
                                                         : read_one(job.zero, job.zero_dtype, first_group + g);
        affine(codes + (i - from), out + i, stop - i, zero, read_one(job.scale, job.scale_dtype, first_group + g));
        i = stop;
      }
    }
  }
}

}  // namespace laconic::LACONIC_TARGET
