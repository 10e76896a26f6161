// The parts of a transformer block that are no linear layer. Included once for every instruction set.

namespace laconic::LACONIC_TARGET {

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
