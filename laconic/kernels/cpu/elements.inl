// Rows of float32, float16 or bfloat16 as vectors of float32. Included once for every instruction set.

namespace laconic::LACONIC_TARGET {

/// How many elements of a vector are meant, where all are: known when compiled, so that nothing is masked.
struct Whole {
  constexpr operator int() const { return Simd::kLanes; }
};

/// f(i, n, slot) for the vectors of a row, n elements from i; slot counts 0 to 3, for sums that do not wait for each other.
template <class F>
LACONIC_INLINE void over(std::int64_t d, const F& f) {
  constexpr int kLanes = Simd::kLanes;
  std::int64_t i = 0;
  for (; i + 4 * kLanes <= d; i += 4 * kLanes) {
    f(i, Whole{}, 0);
    f(i + kLanes, Whole{}, 1);
    f(i + 2 * kLanes, Whole{}, 2);
    f(i + 3 * kLanes, Whole{}, 3);
  }
  for (; i + kLanes <= d; i += kLanes) f(i, Whole{}, 0);
  if (i < d) f(i, static_cast<int>(d - i), 1);
}

LACONIC_INLINE float sum_of(const Simd::F (&slots)[4]) {
  return Simd::sum(Simd::add(Simd::add(slots[0], slots[1]), Simd::add(slots[2], slots[3])));
}

/// Zero beyond the first n elements.
LACONIC_INLINE Simd::F first(Simd::F x, Whole) { return x; }
LACONIC_INLINE Simd::F first(Simd::F x, int n) {
  float all[Simd::kLanes];
  Simd::store(all, x);
  return Simd::load_first(all, n);
}

template <Dtype D>
LACONIC_INLINE Simd::F widen(const std::uint16_t* p) {
  if constexpr (D == Dtype::float16) return Simd::from_half(p);
  else return Simd::from_bfloat(p);
}

template <Dtype D>
LACONIC_INLINE void narrow(std::uint16_t* p, Simd::F x) {
  if constexpr (D == Dtype::float16) Simd::to_half(p, x);
  else Simd::to_bfloat(p, x);
}

/// n elements of type D from number `at` on, zero beyond.
template <Dtype D, class N>
LACONIC_INLINE Simd::F read(const void* base, std::int64_t at, N n) {
  if constexpr (D == Dtype::float32) {
    return Simd::load_first(static_cast<const float*>(base) + at, n);
  } else {
    const auto* from = static_cast<const std::uint16_t*>(base) + at;
    if (n == Simd::kLanes) return widen<D>(from);
    std::uint16_t all[Simd::kLanes] = {};
    for (int i = 0; i < n; ++i) all[i] = from[i];
    return widen<D>(all);
  }
}

template <Dtype D, class N>
LACONIC_INLINE void write(void* base, std::int64_t at, Simd::F x, N n) {
  if constexpr (D == Dtype::float32) {
    Simd::store_first(static_cast<float*>(base) + at, x, n);
  } else {
    auto* to = static_cast<std::uint16_t*>(base) + at;
    if (n == Simd::kLanes) return narrow<D>(to, x);
    std::uint16_t all[Simd::kLanes];
    narrow<D>(all, x);
    for (int i = 0; i < n; ++i) to[i] = all[i];
  }
}

/// To type D and back.
template <Dtype D>
LACONIC_INLINE Simd::F rounded(Simd::F x) {
  if constexpr (D == Dtype::float32) return x;
  std::uint16_t all[Simd::kLanes];
  narrow<D>(all, x);
  return widen<D>(all);
}

template <Dtype D>
struct Type {
  static constexpr Dtype kType = D;
};

/// f(Type<D>) with the type of a row known when compiled.
template <class F>
LACONIC_INLINE void with_dtype(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::float16: return f(Type<Dtype::float16>{});
    case Dtype::bfloat16: return f(Type<Dtype::bfloat16>{});
    default: return f(Type<Dtype::float32>{});
  }
}

}  // namespace laconic::LACONIC_TARGET
