// Activations and the end of a linear layer, on vectors. Included once for every instruction set.

namespace laconic::LACONIC_TARGET {

/// e^x to about 1e-7, relative; saturates where float32 would overflow.
inline Simd::F exp(Simd::F x) {
  using V = Simd;
  x = V::min(V::max(x, V::splat(-87.0f)), V::splat(88.0f));
  const V::F n = V::round(V::mul(x, V::splat(1.44269504f)));
  V::F r = V::fma(n, V::splat(-0.693145752f), x);  // ln 2 in two parts
  r = V::fma(n, V::splat(-1.42860677e-6f), r);
  V::F p = V::splat(1.0f / 5040.0f);  // Taylor: |r| <= ln(2)/2, so the next term is below 1e-8
  for (const float c : {1.0f / 720.0f, 1.0f / 120.0f, 1.0f / 24.0f, 1.0f / 6.0f, 0.5f, 1.0f, 1.0f})
    p = V::fma(p, r, V::splat(c));
  return V::scale_by_power(p, n);
}

/// erf to 1.5e-7, absolute (Abramowitz and Stegun 7.1.26).
inline Simd::F erf(Simd::F x) {
  using V = Simd;
  const V::F a = V::abs(x);
  const V::F t = V::div(V::splat(1.0f), V::fma(a, V::splat(0.3275911f), V::splat(1.0f)));
  V::F p = V::splat(1.061405429f);
  for (const float c : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f}) p = V::fma(p, t, V::splat(c));
  const V::F tail = V::mul(V::mul(p, t), exp(V::sub(V::zero(), V::mul(a, a))));
  return V::copy_sign(V::sub(V::splat(1.0f), tail), x);
}

inline Simd::F sigmoid(Simd::F x) {
  using V = Simd;
  return V::div(V::splat(1.0f), V::add(V::splat(1.0f), exp(V::sub(V::zero(), x))));
}

inline Simd::F activate(Simd::F x, Act act) {
  using V = Simd;
  switch (act) {
    case Act::none: return x;
    case Act::relu: return V::max(V::zero(), x);  // in this order a nan stays one
    case Act::gelu: return V::mul(V::mul(x, V::splat(0.5f)), V::add(V::splat(1.0f), erf(V::mul(x, V::splat(0.707106781f)))));
    case Act::gelu_tanh: {  // tanh(u) = 2 sigmoid(2u) - 1
      const V::F u = V::mul(V::mul(x, V::splat(1.59576912f)), V::fma(V::mul(x, x), V::splat(0.044715f), V::splat(1.0f)));
      return V::mul(x, sigmoid(u));
    }
    case Act::silu: return V::mul(x, sigmoid(x));
  }
  return x;
}

/// y <- act(y + bias) + residual, for n neighbours.
inline void finish(float* y, const float* bias, const float* residual, Act act, std::int64_t n) {
  using V = Simd;
  if (bias == nullptr && residual == nullptr && act == Act::none) return;
  for (std::int64_t i = 0; i < n; i += V::kLanes) {
    const int left = static_cast<int>(n - i < V::kLanes ? n - i : V::kLanes);
    V::F v = V::load_first(y + i, left);
    if (bias != nullptr) v = V::add(v, V::load_first(bias + i, left));
    v = activate(v, act);
    if (residual != nullptr) v = V::add(v, V::load_first(residual + i, left));
    V::store_first(y + i, v, left);
  }
}

}  // namespace laconic::LACONIC_TARGET
