// The fast Walsh-Hadamard transform, in place: n log2(n) additions. Included once for every instruction set.
//
// Distances 1, 2, 4 ... come in this order whatever the vector, so results are the same bits everywhere. A pass over
// memory does up to three distances, in registers.

namespace laconic::LACONIC_TARGET {

/// The butterflies of vectors 1, 2 ... apart among `Vectors` of them.
template <int Vectors>
LACONIC_INLINE void among(Simd::F (&v)[Vectors]) {
  unroll<3>([&](auto power) LACONIC_UNROLLED {
    constexpr int kStep = 1 << power;
    unroll<Vectors>([&](auto i) LACONIC_UNROLLED {
      if constexpr (kStep < Vectors && (i & kStep) == 0) {
        const Simd::F a = v[i], b = v[i + kStep];
        v[i] = Simd::add(a, b);
        v[i + kStep] = Simd::sub(a, b);
      }
    });
  });
}

/// All distances below `Vectors` vectors: within each, then among `Vectors` neighbours.
template <int Vectors>
LACONIC_INLINE void neighbours(float* x, std::int64_t n, Simd::F scale) {
  using V = Simd;
  for (std::int64_t i = 0; i < n; i += Vectors * V::kLanes) {
    V::F v[Vectors];
    unroll<Vectors>([&](auto r) LACONIC_UNROLLED {
      v[r] = V::template butterfly<2>(V::template butterfly<1>(V::load(x + i + r * V::kLanes)));
      if constexpr (V::kLanes >= 8) v[r] = V::template butterfly<4>(v[r]);
      if constexpr (V::kLanes >= 16) v[r] = V::template butterfly<8>(v[r]);
    });
    among(v);
    unroll<Vectors>([&](auto r) LACONIC_UNROLLED { V::store(x + i + r * V::kLanes, V::mul(v[r], scale)); });
  }
}

/// Distances `distance`, 2 `distance` ... below `Vectors` times it.
template <int Vectors>
LACONIC_INLINE void across(float* x, std::int64_t n, std::int64_t distance, Simd::F scale) {
  using V = Simd;
  for (std::int64_t i = 0; i < n; i += Vectors * distance)
    for (std::int64_t j = i; j < i + distance; j += V::kLanes) {
      V::F v[Vectors];
      unroll<Vectors>([&](auto r) LACONIC_UNROLLED { v[r] = V::load(x + j + r * distance); });
      among(v);
      unroll<Vectors>([&](auto r) LACONIC_UNROLLED { V::store(x + j + r * distance, V::mul(v[r], scale)); });
    }
}

/// The distances from `distance` to n/2, and the scale at the end.
LACONIC_INLINE void across_all(float* x, std::int64_t n, std::int64_t distance, float scale) {
  for (; distance < n;) {
    const std::int64_t left = n / distance;
    const Simd::F last = Simd::splat(left <= 8 ? scale : 1.0f);
    if (left >= 8) across<8>(x, n, distance, last);
    else if (left == 4) across<4>(x, n, distance, last);
    else across<2>(x, n, distance, last);
    distance *= left >= 8 ? 8 : left;
  }
}

inline void transform(float* x, std::int64_t n, float scale) {
  constexpr std::int64_t kInCache = 4096;  // 16 KiB of floats: such blocks are finished first
  constexpr std::int64_t kLanes = Simd::kLanes;
  if (n < kLanes) {
    for (std::int64_t distance = 1; distance < n; distance *= 2)
      for (std::int64_t i = 0; i < n; ++i)
        if ((i & distance) == 0) {
          const float a = x[i], b = x[i + distance];
          x[i] = a + b;
          x[i + distance] = a - b;
        }
    for (std::int64_t i = 0; i < n; ++i) x[i] *= scale;
    return;
  }
  const std::int64_t vectors = n / kLanes;
  const Simd::F last = Simd::splat(vectors <= 8 ? scale : 1.0f);
  if (vectors == 1) return neighbours<1>(x, n, last);
  if (vectors == 2) return neighbours<2>(x, n, last);
  if (vectors == 4) return neighbours<4>(x, n, last);
  const std::int64_t block = n < kInCache ? n : kInCache;
  for (std::int64_t i = 0; i < n; i += block) {
    neighbours<8>(x + i, block, last);
    across_all(x + i, block, 8 * kLanes, block == n ? scale : 1.0f);
  }
  across_all(x, n, block, scale);
}

inline void hadamard_rows(const Hadamard& job, std::int64_t begin, std::int64_t end, float* scratch) {
  with_dtype(job.dtype, [&](auto type) {
    constexpr Dtype D = decltype(type)::kType;
    for (std::int64_t row = begin; row < end; ++row) {
      const std::int64_t at = row * job.n;
      if constexpr (D == Dtype::float32) {
        transform(static_cast<float*>(job.x) + at, job.n, job.scale);
      } else {
        over(job.n, [&](std::int64_t i, auto n, int) LACONIC_UNROLLED { Simd::store_first(scratch + i, read<D>(job.x, at + i, n), n); });
        transform(scratch, job.n, job.scale);
        over(job.n, [&](std::int64_t i, auto n, int) LACONIC_UNROLLED { write<D>(job.x, at + i, Simd::load_first(scratch + i, n), n); });
      }
    }
  });
}

}  // namespace laconic::LACONIC_TARGET
