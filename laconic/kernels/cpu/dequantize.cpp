// Packed codes to float32 weights: w = (q - z) * s, group by group along the row.
//
// A block of codes is unpacked into a small buffer that stays in the first-level cache, and turned into
// floats from there. The build switches off contraction into fused multiply-add: every operation is rounded
// as in the PyTorch reference, so that the results are equal bit for bit.
#include <algorithm>
#include <cstring>

#include "halves.hpp"
#include "kernels.hpp"

namespace laconic {
namespace {

constexpr std::int64_t kBlock = 2048;  // codes; a multiple of 32, so that a block starts on a whole word

float read(const void* base, Dtype dtype, std::int64_t at) {
  const auto* bytes = static_cast<const std::uint8_t*>(base) + at * static_cast<std::int64_t>(size_of(dtype));
  std::uint16_t half = 0;
  float value = 0.0f;
  switch (dtype) {
    case Dtype::float32: std::memcpy(&value, bytes, sizeof value); return value;
    case Dtype::float16: std::memcpy(&half, bytes, sizeof half); return from_half(half);
    case Dtype::bfloat16:
      std::memcpy(&half, bytes, sizeof half);
      return from_bfloat(half);
    case Dtype::uint8: return static_cast<float>(*bytes);
    case Dtype::none: break;
  }
  return value;
}

LACONIC_INLINE void affine(const std::uint8_t* LACONIC_RESTRICT q, float* LACONIC_RESTRICT w, std::int64_t n,
                           float zero, float scale) {
  for (std::int64_t i = 0; i < n; ++i) w[i] = (static_cast<float>(q[i]) - zero) * scale;
}

LACONIC_INLINE void dequantize_row(const Dequantize& job, std::int64_t row, Isa isa) {
  alignas(64) std::uint8_t codes[kBlock];
  const std::uint32_t* words = job.words + row * job.words_per_row;
  float* out = job.out + row * job.k;
  const std::int64_t first = row * job.groups;
  for (std::int64_t begin = 0; begin < job.k; begin += kBlock) {
    const std::int64_t end = std::min(begin + kBlock, job.k);
    unpack_row(words + begin / 32 * job.bits, job.bits, end - begin, codes, isa);
    for (std::int64_t i = begin; i < end;) {
      const std::int64_t g = i / job.group;
      const std::int64_t stop = job.group >= end - g * job.group ? end : (g + 1) * job.group;
      const float zero = job.zero_dtype == Dtype::none ? static_cast<float>(1 << (job.bits - 1))
                                                       : read(job.zero, job.zero_dtype, first + g);
      affine(codes + (i - begin), out + i, stop - i, zero, read(job.scale, job.scale_dtype, first + g));
      i = stop;
    }
  }
}

LACONIC_INLINE void rows(const Dequantize& job, std::int64_t begin, std::int64_t end, Isa isa) {
  for (std::int64_t row = begin; row < end; ++row) dequantize_row(job, row, isa);
}

#if LACONIC_X86
LACONIC_AVX2 void rows_avx2(const Dequantize& job, std::int64_t begin, std::int64_t end) {
  rows(job, begin, end, Isa::avx2);
}
#endif

}  // namespace

void dequantize_rows(const Dequantize& job, std::int64_t row_begin, std::int64_t row_end, Isa isa) {
#if LACONIC_X86
  if (isa >= Isa::avx2) return rows_avx2(job, row_begin, row_end);
#endif
  rows(job, row_begin, row_end, isa);
}

}  // namespace laconic
