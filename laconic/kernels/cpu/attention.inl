// Attention on float32 keys and values. Included once for every instruction set.
//
// Many queries: keys are turned once, so that a vector holds the scores of neighbouring keys. Few queries: a score is a
// dot product along the head, since turning the keys would cost more than it saves.

namespace laconic::LACONIC_TARGET {

/// p <- softmax(p) over n numbers; p is padded to whole vectors. All masked: zeros.
inline void softmax(float* p, std::int64_t n) {
  using V = Simd;
  const float none = -__builtin_inff();
  V::F top = V::splat(none);
  for (std::int64_t i = 0; i < n; i += V::kLanes) {
    if (n - i < V::kLanes)
      for (std::int64_t j = n; j < i + V::kLanes; ++j) p[j] = none;
    top = V::max(V::load(p + i), top);
  }
  const float largest = V::largest(top);
  if (largest == none) {
    for (std::int64_t i = 0; i < n; ++i) p[i] = 0.0f;
    return;
  }
  const V::F high = V::splat(largest);
  V::F sum = V::zero();
  for (std::int64_t i = 0; i < n; i += V::kLanes) {
    const V::F e = exp(V::sub(V::load(p + i), high));
    V::store(p + i, e);
    if (n - i >= V::kLanes) sum = V::add(sum, e);
    else
      for (std::int64_t j = i; j < n; ++j) sum = V::add(sum, V::load_first(p + j, 1));
  }
  const V::F factor = V::splat(1.0f / V::sum(sum));
  for (std::int64_t i = 0; i < n; i += V::kLanes) V::store(p + i, V::mul(V::load(p + i), factor));
}

/// Scores of R queries against all keys, turned: kt (dim, stride).
template <int R>
void scores_turned(const float* const* q, const float* kt, std::int64_t stride, std::int64_t dim, std::int64_t keys, float scale, float* out) {
  using V = Simd;
  for (std::int64_t j = 0; j < keys; j += V::kLanes) {
    V::F sum[R];
    unroll<R>([&](auto r) LACONIC_UNROLLED { sum[r] = V::zero(); });
    for (std::int64_t d = 0; d < dim; ++d) {
      const V::F key = V::load(kt + d * stride + j);
      unroll<R>([&](auto r) LACONIC_UNROLLED { sum[r] = V::fma(V::splat(q[r][d]), key, sum[r]); });
    }
    unroll<R>([&](auto r) LACONIC_UNROLLED { V::store(out + r * stride + j, V::mul(sum[r], V::splat(scale))); });
  }
}

/// out[r] = sum_j p[r][j] v[j] for R queries.
template <int R>
void mix_values(const float* p, std::int64_t stride, const float* v, std::int64_t v_token, std::int64_t dim, std::int64_t keys, float* const* out) {
  using V = Simd;
  for (std::int64_t d = 0; d < dim; d += V::kLanes) {
    const int left = static_cast<int>(dim - d < V::kLanes ? dim - d : V::kLanes);
    V::F sum[R];
    unroll<R>([&](auto r) LACONIC_UNROLLED { sum[r] = V::zero(); });
    for (std::int64_t j = 0; j < keys; ++j) {
      const V::F value = left == V::kLanes ? V::load(v + j * v_token + d) : V::load_first(v + j * v_token + d, left);
      unroll<R>([&](auto r) LACONIC_UNROLLED { sum[r] = V::fma(V::splat(p[r * stride + j]), value, sum[r]); });
    }
    unroll<R>([&](auto r) LACONIC_UNROLLED { V::store_first(out[r] + d, sum[r], left); });
  }
}

template <int R>
void attend_rows(const Attention& a, const float* kt, std::int64_t stride, std::int64_t b, std::int64_t h, std::int64_t i0, float* scores) {
  using V = Simd;
  const std::int64_t shared = h * a.kv_heads / a.heads;
  const float* k = a.k + b * a.k_at.batch + shared * a.k_at.head;
  const float* v = a.v + b * a.v_at.batch + shared * a.v_at.head;
  const float* q[R];
  float* out[R];
  for (int r = 0; r < R; ++r) {
    q[r] = a.q + b * a.q_at.batch + (i0 + r) * a.q_at.token + h * a.q_at.head;
    out[r] = a.out + b * a.out_at.batch + (i0 + r) * a.out_at.token + h * a.out_at.head;
  }
  const std::int64_t seen = a.causal ? a.keys - a.queries + i0 + R : a.keys;  // of the last of the R queries
  if (kt != nullptr) {
    scores_turned<R>(q, kt, stride, a.dim, seen, a.scale, scores);
  } else {
    for (std::int64_t j = 0; j < seen; ++j)
      for (int r = 0; r < R; ++r) {
        V::F sum = V::zero();
        for (std::int64_t d = 0; d < a.dim; d += V::kLanes) {
          const int left = static_cast<int>(a.dim - d < V::kLanes ? a.dim - d : V::kLanes);
          sum = V::fma(V::load_first(q[r] + d, left), V::load_first(k + j * a.k_at.token + d, left), sum);
        }
        scores[r * stride + j] = V::sum(sum) * a.scale;
      }
  }
  for (int r = 0; r < R; ++r) {
    float* p = scores + r * stride;
    if (a.mask != nullptr) {
      const float* mask = a.mask + b * a.mask_batch + (i0 + r) * a.mask_query;
      for (std::int64_t j = 0; j < seen; ++j) p[j] += mask[j];
    }
    const std::int64_t own = a.causal ? seen - (R - 1 - r) : seen;
    softmax(p, own);
    for (std::int64_t j = own; j < seen; ++j) p[j] = 0.0f;
  }
  mix_values<R>(scores, stride, v, a.v_at.token, a.dim, seen, out);
}

/// Heads [begin, end) of all batch * heads.
inline void attend(const Attention& a, std::int64_t begin, std::int64_t end, float* scratch) {
  constexpr std::int64_t kFew = 6;
  const std::int64_t stride = (a.keys + 15) / 16 * 16 + 16;
  float* scores = scratch;
  float* kt = a.queries > kFew ? scratch + 4 * stride : nullptr;
  std::int64_t turned = -1;
  for (std::int64_t task = begin; task < end; ++task) {
    const std::int64_t b = task / a.heads, h = task % a.heads;
    const std::int64_t kv = b * a.kv_heads + h * a.kv_heads / a.heads;
    if (kt != nullptr && kv != turned) {
      const float* k = a.k + b * a.k_at.batch + (kv - b * a.kv_heads) * a.k_at.head;
      for (std::int64_t j = 0; j < a.keys; ++j)
        for (std::int64_t d = 0; d < a.dim; ++d) kt[d * stride + j] = k[j * a.k_at.token + d];
      turned = kv;
    }
    std::int64_t i = 0;
    for (; i + 4 <= a.queries; i += 4) attend_rows<4>(a, kt, stride, b, h, i, scores);
    for (; i < a.queries; ++i) attend_rows<1>(a, kt, stride, b, h, i, scores);
  }
}

}  // namespace laconic::LACONIC_TARGET
