// LayerNorm and RMSNorm, forwards and backwards. Included once for every instruction set.
//
// A row is read once from memory, and gone over again from the first-level cache: mean, then variance of what is left
// (taken in one go, it would lose digits where the mean is large), then the result.

namespace laconic::LACONIC_TARGET {

struct Moments {
  float root;   // of the mean square
  float inverse;  // r of norm.hpp
};

LACONIC_INLINE float sqrt_of(float x) {
  float all[Simd::kLanes];
  Simd::store(all, Simd::sqrt(Simd::splat(x)));
  return all[0];
}

/// Takes the mean off a row of float32 (if it is to) and gives its moments. `total` is the sum of the row, or of its squares.
LACONIC_INLINE Moments centre(float* row, std::int64_t d, float total, const NormKind& kind) {
  using V = Simd;
  const auto count = static_cast<float>(d);
  if (kind.centred) {
    const V::F mean = V::splat(total / count);
    V::F squares[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
    over(d, [&](std::int64_t i, auto n, int slot) LACONIC_UNROLLED {
      const V::F a = first(V::sub(V::load_first(row + i, n), mean), n);
      V::store_first(row + i, a, n);
      squares[slot] = V::fma(a, a, squares[slot]);
    });
    total = sum_of(squares);
  }
  const float square = total / count, root = sqrt_of(square);
  return {root, 1.0f / (kind.eps_outside ? root + kind.eps : sqrt_of(square + kind.eps))};
}

template <Dtype D, bool Centred, bool Add>
LACONIC_INLINE void norm_row(const NormForward& job, const float* weight, const float* bias, std::int64_t number, float* row) {
  using V = Simd;
  const std::int64_t d = job.d, at = number * d;
  V::F totals[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
  over(d, [&](std::int64_t i, auto n, int slot) LACONIC_UNROLLED {
    V::F s = read<D>(job.x, at + i, n);
    if constexpr (Add) {
      s = rounded<D>(V::add(s, read<D>(job.residual, at + i, n)));
      if (job.sum != nullptr) write<D>(job.sum, at + i, s, n);
    }
    V::store_first(row + i, s, n);
    totals[slot] = Centred ? V::add(totals[slot], s) : V::fma(s, s, totals[slot]);
  });
  const Moments moments = centre(row, d, sum_of(totals), job.kind);
  const V::F inverse = V::splat(moments.inverse);
  const bool quantize = job.codes != nullptr;
  V::F largest[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
  over(d, [&](std::int64_t i, auto n, int slot) LACONIC_UNROLLED {
    V::F y = V::mul(V::load_first(row + i, n), inverse);
    if (weight != nullptr) y = V::mul(y, V::load_first(weight + i, n));
    if (bias != nullptr) y = V::add(y, V::load_first(bias + i, n));
    if (quantize) y = rounded<D>(y);
    if (job.y != nullptr) write<D>(job.y, at + i, y, n);
    if (quantize) {
      V::store_first(row + i, y, n);
      largest[slot] = V::max(largest[slot], V::abs(first(y, n)));
    }
  });
  if (!quantize) return;
  const float top = V::largest(V::max(V::max(largest[0], largest[1]), V::max(largest[2], largest[3])));
  const float scale = top > 0.0f ? 2.0f * top / 255.0f : 1.0f;
  job.scales[number] = scale + (moments.inverse - moments.inverse);  // not a number where the row is none: codes cannot say so
  const V::F step = V::splat(scale), least = V::splat(-128.0f), most = V::splat(127.0f);
  over(d, [&](std::int64_t i, auto n, int) LACONIC_UNROLLED {
    const V::I code = V::to_int(V::min(V::max(V::round(V::div(V::load_first(row + i, n), step)), least), most));
    if (n == V::kLanes) return V::to_signed_bytes(job.codes + at + i, code);
    std::int8_t all[V::kLanes];
    V::to_signed_bytes(all, code);
    for (int j = 0; j < n; ++j) job.codes[at + i + j] = all[j];
  });
}

/// Weight and bias come as float32 here.
inline void norm_forward(const NormForward& job, const float* weight, const float* bias, std::int64_t begin,
                         std::int64_t end, float* scratch) {
  with_dtype(job.dtype, [&](auto type) {
    constexpr Dtype D = decltype(type)::kType;
    for (std::int64_t row = begin; row < end; ++row) {
      if (job.kind.centred)
        job.residual != nullptr ? norm_row<D, true, true>(job, weight, bias, row, scratch)
                                : norm_row<D, true, false>(job, weight, bias, row, scratch);
      else
        job.residual != nullptr ? norm_row<D, false, true>(job, weight, bias, row, scratch)
                                : norm_row<D, false, false>(job, weight, bias, row, scratch);
    }
  });
}

template <Dtype D, bool Centred>
LACONIC_INLINE void norm_row_backward(const NormBackward& job, const float* weight, std::int64_t number, float* dweight,
                                      float* dbias, float* row) {
  using V = Simd;
  const std::int64_t d = job.d, at = number * d;
  V::F totals[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
  over(d, [&](std::int64_t i, auto n, int slot) LACONIC_UNROLLED {
    const V::F s = read<D>(job.x, at + i, n);
    V::store_first(row + i, s, n);
    totals[slot] = Centred ? V::add(totals[slot], s) : V::fma(s, s, totals[slot]);
  });
  const Moments moments = centre(row, d, sum_of(totals), job.kind);
  const V::F inverse = V::splat(moments.inverse);
  V::F sums[4] = {V::zero(), V::zero(), V::zero(), V::zero()}, products[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
  over(d, [&](std::int64_t i, auto n, int slot) LACONIC_UNROLLED {
    const V::F a = V::load_first(row + i, n), dy = read<D>(job.grad, at + i, n);
    if (dweight != nullptr)
      V::store_first(dweight + i, V::fma(dy, V::mul(a, inverse), V::load_first(dweight + i, n)), n);
    if (dbias != nullptr) V::store_first(dbias + i, V::add(V::load_first(dbias + i, n), dy), n);
    const V::F h = weight != nullptr ? V::mul(dy, V::load_first(weight + i, n)) : dy;
    if constexpr (Centred) sums[slot] = V::add(sums[slot], h);
    products[slot] = V::fma(h, a, products[slot]);
  });
  const auto count = static_cast<float>(d);
  const float r = moments.inverse;
  float c = r * r * r;
  if (job.kind.eps_outside) c = moments.root > 0.0f ? r * r / moments.root : 0.0f;
  const V::F mean = V::splat(Centred ? sum_of(sums) / count : 0.0f), pull = V::splat(-c * (sum_of(products) / count));
  over(d, [&](std::int64_t i, auto n, int) LACONIC_UNROLLED {
    V::F h = read<D>(job.grad, at + i, n);
    if (weight != nullptr) h = V::mul(h, V::load_first(weight + i, n));
    if constexpr (Centred) h = V::sub(h, mean);
    V::F dx = V::fma(V::load_first(row + i, n), pull, V::mul(h, inverse));
    if (job.grad_sum != nullptr) dx = V::add(dx, read<D>(job.grad_sum, at + i, n));
    write<D>(job.dx, at + i, dx, n);
  });
}

/// Rows [begin, end); what they add to the gradients of weight and bias goes to dweight and dbias, (d) each, or null.
inline void norm_backward(const NormBackward& job, const float* weight, std::int64_t begin, std::int64_t end,
                          float* dweight, float* dbias, float* scratch) {
  for (float* part : {dweight, dbias})
    if (part != nullptr)
      for (std::int64_t i = 0; i < job.d; ++i) part[i] = 0.0f;
  with_dtype(job.dtype, [&](auto type) {
    constexpr Dtype D = decltype(type)::kType;
    for (std::int64_t row = begin; row < end; ++row)
      job.kind.centred ? norm_row_backward<D, true>(job, weight, row, dweight, dbias, scratch)
                       : norm_row_backward<D, false>(job, weight, row, dweight, dbias, scratch);
  });
}

/// out[i] = sum of parts[p][i] over p, for columns [begin, end).
inline void add_parts(const float* parts, std::int64_t count, std::int64_t d, float* out, std::int64_t begin, std::int64_t end) {
  for (std::int64_t i = begin; i < end; ++i) out[i] = count > 0 ? parts[i] : 0.0f;
  for (std::int64_t p = 1; p < count; ++p)
    for (std::int64_t i = begin; i < end; ++i) out[i] += parts[p * d + i];
}

/// float32 of n elements, plus `offset`.
inline void to_floats(const void* base, Dtype dtype, std::int64_t n, float offset, float* out) {
  with_dtype(dtype, [&](auto type) {
    constexpr Dtype D = decltype(type)::kType;
    over(n, [&](std::int64_t i, auto m, int) LACONIC_UNROLLED {
      Simd::store_first(out + i, Simd::add(read<D>(base, i, m), Simd::splat(offset)), m);
    });
  });
}

}  // namespace laconic::LACONIC_TARGET
