// The fast Walsh-Hadamard transform, in place: n log2(n) additions.
#include "kernels.hpp"

namespace laconic {
namespace {

constexpr std::int64_t kInCache = 4096;  // 16 KiB of floats: below this, sweep; above, halve first

/// The butterflies at distance 1, 2 and 4 of eight neighbours, in registers.
LACONIC_INLINE void eight(float* x) {
  float a[8], b[8];
  for (int i = 0; i < 8; i += 2) a[i] = x[i] + x[i + 1], a[i + 1] = x[i] - x[i + 1];
  for (int i = 0; i < 8; i += 4)
    for (int j = i; j < i + 2; ++j) b[j] = a[j] + a[j + 2], b[j + 2] = a[j] - a[j + 2];
  for (int j = 0; j < 4; ++j) x[j] = b[j] + b[j + 4], x[j + 4] = b[j] - b[j + 4];
}

LACONIC_INLINE void sweep(float* x, std::int64_t n, std::int64_t distance) {
  for (std::int64_t i = 0; i < n; i += 2 * distance) {
    float* LACONIC_RESTRICT low = x + i;
    float* LACONIC_RESTRICT high = x + i + distance;
    for (std::int64_t j = 0; j < distance; ++j) {
      const float a = low[j], b = high[j];
      low[j] = a + b;
      high[j] = a - b;
    }
  }
}

LACONIC_INLINE void in_cache(float* x, std::int64_t n) {
  std::int64_t distance = 1;
  if (n >= 8) {
    for (std::int64_t i = 0; i < n; i += 8) eight(x + i);
    distance = 8;
  }
  for (; distance < n; distance *= 2) sweep(x, n, distance);
}

LACONIC_INLINE void transform(float* x, std::int64_t n) {
  const std::int64_t block = n < kInCache ? n : kInCache;
  for (std::int64_t i = 0; i < n; i += block) in_cache(x + i, block);
  for (std::int64_t distance = block; distance < n; distance *= 2) sweep(x, n, distance);
}

LACONIC_INLINE void rows(float* x, std::int64_t n, float scale, std::int64_t begin, std::int64_t end) {
  for (std::int64_t row = begin; row < end; ++row) {
    float* at = x + row * n;
    transform(at, n);
    if (scale != 1.0f)
      for (std::int64_t i = 0; i < n; ++i) at[i] *= scale;
  }
}

#if LACONIC_X86
LACONIC_AVX2 void rows_avx2(float* x, std::int64_t n, float scale, std::int64_t begin, std::int64_t end) {
  rows(x, n, scale, begin, end);
}
#endif

}  // namespace

void hadamard_rows(float* x, std::int64_t n, float scale, std::int64_t row_begin, std::int64_t row_end,
                   [[maybe_unused]] Isa isa) {
#if LACONIC_X86
  if (isa >= Isa::avx2) return rows_avx2(x, n, scale, row_begin, row_end);
#endif
  rows(x, n, scale, row_begin, row_end);
}

}  // namespace laconic
