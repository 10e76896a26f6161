// The parts of a transformer block that are no linear layer. Included once for every instruction set.

namespace laconic::LACONIC_TARGET {

/// Rows [begin, end): out = norm(x), both (rows, width).
inline void norm_rows(const Norm& norm, const float* x, float* out, std::int64_t width, std::int64_t begin, std::int64_t end) {
  using V = Simd;
  const float share = 1.0f / static_cast<float>(width);
  for (std::int64_t row = begin; row < end; ++row) {
    const float* from = x + row * width;
    float* to = out + row * width;
    float mean = 0.0f;
    if (norm.centred) {
      V::F sum = V::zero();
      for (std::int64_t i = 0; i < width; i += V::kLanes)
        sum = V::add(sum, V::load_first(from + i, static_cast<int>(width - i < V::kLanes ? width - i : V::kLanes)));
      mean = V::sum(sum) * share;
    }
    const V::F middle = V::splat(mean);
    V::F squares = V::zero();
    for (std::int64_t i = 0; i < width; i += V::kLanes) {
      const int left = static_cast<int>(width - i < V::kLanes ? width - i : V::kLanes);
      V::F v = V::sub(V::load_first(from + i, left), middle);
      if (left < V::kLanes) {  // lanes beyond the row would count as -mean
        float tail[V::kLanes] = {};
        V::store_first(tail, v, left);
        v = V::load(tail);
      }
      squares = V::fma(v, v, squares);
    }
    const V::F factor = V::splat(1.0f / __builtin_sqrtf(V::sum(squares) * share + norm.eps));
    for (std::int64_t i = 0; i < width; i += V::kLanes) {
      const int left = static_cast<int>(width - i < V::kLanes ? width - i : V::kLanes);
      V::F v = V::mul(V::mul(V::sub(V::load_first(from + i, left), middle), factor), V::load_first(norm.weight + i, left));
      if (norm.bias != nullptr) v = V::add(v, V::load_first(norm.bias + i, left));
      V::store_first(to + i, v, left);
    }
  }
}

/// Rows [begin, end) of x (tokens, heads * dim), each head turned in place.
inline void rotate_rows(const Rotary& rotary, float* x, std::int64_t heads, std::int64_t dim, std::int64_t begin, std::int64_t end) {
  using V = Simd;
  const std::int64_t half = dim / 2;
  for (std::int64_t row = begin; row < end; ++row) {
    const float *cos = rotary.cos + row * dim, *sin = rotary.sin + row * dim;
    for (std::int64_t h = 0; h < heads; ++h) {
      float* a = x + (row * heads + h) * dim;
      float* b = a + half;
      for (std::int64_t i = 0; i < half; i += V::kLanes) {
        const int left = static_cast<int>(half - i < V::kLanes ? half - i : V::kLanes);
        const V::F low = V::load_first(a + i, left), high = V::load_first(b + i, left);
        V::store_first(a + i, V::sub(V::mul(low, V::load_first(cos + i, left)), V::mul(high, V::load_first(sin + i, left))), left);
        V::store_first(b + i, V::fma(high, V::load_first(cos + half + i, left), V::mul(low, V::load_first(sin + half + i, left))), left);
      }
    }
  }
}

/// a <- a * b.
inline void multiply(float* a, const float* b, std::int64_t begin, std::int64_t end) {
  using V = Simd;
  for (std::int64_t i = begin; i < end; i += V::kLanes) {
    const int left = static_cast<int>(end - i < V::kLanes ? end - i : V::kLanes);
    V::store_first(a + i, V::mul(V::load_first(a + i, left), V::load_first(b + i, left)), left);
  }
}

}  // namespace laconic::LACONIC_TARGET
