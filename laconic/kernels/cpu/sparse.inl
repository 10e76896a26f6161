// y = x W^T with sparse weights. Included once for every instruction set.

namespace laconic::LACONIC_TARGET {

/// n values from number `at` on, as float32.
template <Dtype D, class N>
LACONIC_INLINE Simd::F values_at(const void* base, std::int64_t at, N n) {
  if constexpr (D == Dtype::int8) {
    const auto* from = static_cast<const std::int8_t*>(base) + at;
    if (n == Simd::kLanes) return Simd::from_signed_bytes(from);
    std::int8_t all[Simd::kLanes] = {};
    for (int i = 0; i < n; ++i) all[i] = from[i];
    return Simd::from_signed_bytes(all);
  } else {
    return read<D>(base, at, n);
  }
}

template <Dtype D>
LACONIC_INLINE Simd::F one_value(const void* base, std::int64_t at) {
  if constexpr (D == Dtype::float32) return Simd::splat(static_cast<const float*>(base)[at]);
  else if constexpr (D == Dtype::int8) return Simd::splat(static_cast<float>(static_cast<const std::int8_t*>(base)[at]));
  else return Simd::splat(from_bfloat(static_cast<const std::uint16_t*>(base)[at]));
}

template <Dtype D>
LACONIC_INLINE const void* past(const void* base, std::int64_t at) {
  return static_cast<const std::uint8_t*>(base) + at * static_cast<std::int64_t>(D == Dtype::float32 ? 4 : D == Dtype::int8 ? 1 : 2);
}

template <class F>
LACONIC_INLINE void with_values(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::int8: return f(Type<Dtype::int8>{});
    case Dtype::bfloat16: return f(Type<Dtype::bfloat16>{});
    default: return f(Type<Dtype::float32>{});
  }
}

/// Asks for n values from number `at` on: hardware looks ahead too little where one row of blocks comes after another.
template <Dtype D>
LACONIC_INLINE void ask_for(const void* base, std::int64_t at, std::int64_t n) {
  constexpr std::int64_t kLine = D == Dtype::float32 ? 16 : D == Dtype::int8 ? 64 : 32;
  for (std::int64_t i = 0; i < n; i += kLine) __builtin_prefetch(past<D>(base, at + i));
}

constexpr std::int64_t kAhead = 1024;  // values

LACONIC_INLINE float scale_of(const Sparse& w, std::int64_t row) { return w.scale != nullptr ? w.scale[row] : 1.0f; }

// --- few rows of x ---

/// R rows of W from row n against M rows of x from row m0. A vector of values belongs to two vectors of x, from which
/// their positions pick.
template <Dtype D, int M, int R>
void pairs_few(const SparseLinear& job, std::int64_t m0, std::int64_t n) {
  using V = Simd;
  const Sparse& w = job.w;
  const std::int64_t half = w.k / 2;
  alignas(64) std::int32_t places[V::kLanes], shifts[V::kLanes];
  for (int j = 0; j < V::kLanes; ++j) places[j] = j / 2 * 4, shifts[j] = 2 * j;
  const V::I place = V::load_words(places), shift = V::load_words(shifts), three = V::splat_word(3);
  V::F sums[M][R];
  unroll<M>([&](auto m) LACONIC_UNROLLED { unroll<R>([&](auto r) LACONIC_UNROLLED { sums[m][r] = V::zero(); }); });
  const auto step = [&](std::int64_t i, auto count) LACONIC_UNROLLED {
    V::F low[M], high[M];
    unroll<M>([&](auto m) LACONIC_UNROLLED {
      const float* x = job.x + (m0 + m) * w.k + 2 * i;
      const int left = 2 * count - V::kLanes;
      low[m] = V::load_first(x, left >= 0 ? V::kLanes : 2 * count);
      high[m] = left > 0 ? V::load_first(x + V::kLanes, left) : V::zero();
    });
    unroll<R>([&](auto r) LACONIC_UNROLLED {
      std::uint32_t word = 0;
      __builtin_memcpy(&word, reinterpret_cast<const std::uint8_t*>(w.index + (n + r) * w.words_per_row) + i / 4, V::kLanes / 4);
      const V::I own = V::shift_right_each(V::splat_word(static_cast<std::int32_t>(word)), shift);
      const V::I at = V::bit_or(place, V::bit_and(own, three));
      const V::F value = values_at<D>(w.values, (n + r) * half + i, count);
      unroll<M>([&](auto m) LACONIC_UNROLLED { sums[m][r] = V::fma(value, V::pick_two(low[m], high[m], at), sums[m][r]); });
    });
  };
  std::int64_t i = 0;
  for (; i + V::kLanes <= half; i += V::kLanes) step(i, Whole{});
  if (i < half) step(i, static_cast<int>(half - i));
  unroll<M>([&](auto m) LACONIC_UNROLLED {
    unroll<R>([&](auto r) LACONIC_UNROLLED {
      job.out[(m0 + m) * w.rows + n + r] = V::sum(sums[m][r]) * scale_of(w, n + r);
    });
  });
}

/// R rows of W from row i of block row b: vectors lie along the columns of a block.
template <Dtype D, int M, int R, bool Even>
void blocks_few(const SparseLinear& job, std::int64_t m0, std::int64_t b, std::int64_t i) {
  using V = Simd;
  const Sparse& w = job.w;
  V::F sums[M][R];
  unroll<M>([&](auto m) LACONIC_UNROLLED { unroll<R>([&](auto r) LACONIC_UNROLLED { sums[m][r] = V::zero(); }); });
  for (std::int64_t n = w.starts[b]; n < w.starts[b + 1]; ++n) {
    const float* x = job.x + m0 * w.k + static_cast<std::int64_t>(w.index[n]) * w.c;
    const std::int64_t first = (n * w.r + i) * w.c;
    ask_for<D>(w.values, first + kAhead, R * w.c);
    const auto step = [&](std::int64_t j, auto count) LACONIC_UNROLLED {
      V::F some[M];
      unroll<M>([&](auto m) LACONIC_UNROLLED { some[m] = V::load_first(x + m * w.k + j, count); });
      unroll<R>([&](auto r) LACONIC_UNROLLED {
        const V::F value = values_at<D>(w.values, first + r * w.c + j, count);
        unroll<M>([&](auto m) LACONIC_UNROLLED { sums[m][r] = V::fma(value, some[m], sums[m][r]); });
      });
    };
    std::int64_t j = 0;
    for (; j + V::kLanes <= w.c; j += V::kLanes) step(j, Whole{});
    if constexpr (!Even)
      if (j < w.c) step(j, static_cast<int>(w.c - j));
  }
  unroll<M>([&](auto m) LACONIC_UNROLLED {
    unroll<R>([&](auto r) LACONIC_UNROLLED {
      const std::int64_t row = b * w.r + i + r;
      job.out[(m0 + m) * w.rows + row] = V::sum(sums[m][r]) * scale_of(w, row);
    });
  });
}

/// R vectors of every block of block row b from vector v on, where whole rows of a block fit in one: x is repeated.
template <Dtype D, int M, int R>
void narrow_blocks_few(const SparseLinear& job, std::int64_t m0, std::int64_t b, std::int64_t v) {
  using V = Simd;
  const Sparse& w = job.w;
  const std::int64_t size = w.r * w.c;
  const int c = static_cast<int>(w.c);
  alignas(64) std::int32_t places[V::kLanes];
  for (int j = 0; j < V::kLanes; ++j) places[j] = j & (c - 1);
  const V::I place = V::load_words(places);
  V::F sums[M][R];
  unroll<M>([&](auto m) LACONIC_UNROLLED { unroll<R>([&](auto r) LACONIC_UNROLLED { sums[m][r] = V::zero(); }); });
  for (std::int64_t n = w.starts[b]; n < w.starts[b + 1]; ++n) {
    const float* x = job.x + m0 * w.k + static_cast<std::int64_t>(w.index[n]) * c;
    ask_for<D>(w.values, n * size + v * V::kLanes + kAhead, R * V::kLanes);
    V::F some[M];
    unroll<M>([&](auto m) LACONIC_UNROLLED { some[m] = V::pick(V::load_first(x + m * w.k, c), place); });
    unroll<R>([&](auto r) LACONIC_UNROLLED {
      const V::F value = values_at<D>(w.values, n * size + (v + r) * V::kLanes, Whole{});
      unroll<M>([&](auto m) LACONIC_UNROLLED { sums[m][r] = V::fma(value, some[m], sums[m][r]); });
    });
  }
  unroll<M>([&](auto m) LACONIC_UNROLLED {
    unroll<R>([&](auto r) LACONIC_UNROLLED {
      float lanes[V::kLanes];
      V::store(lanes, sums[m][r]);
      for (int j = 0; j < V::kLanes; j += c) {
        const std::int64_t row = b * w.r + ((v + r) * V::kLanes + j) / c;
        float sum = lanes[j];
        for (int i = 1; i < c; ++i) sum += lanes[j + i];
        job.out[(m0 + m) * w.rows + row] = sum * scale_of(w, row);
      }
    });
  });
}

template <Dtype D, int M>
void sparse_few_of(const SparseLinear& job, std::int64_t m0, std::int64_t begin, std::int64_t end) {
  using V = Simd;
  constexpr int kRows = V::kLanes >= 16 ? kMostRows : 2;  // as many sums as registers hold
  const Sparse& w = job.w;
  if (w.starts == nullptr) {
    std::int64_t n = begin;
    for (; n + kRows <= end; n += kRows) pairs_few<D, M, kRows>(job, m0, n);
    for (; n < end; ++n) pairs_few<D, M, 1>(job, m0, n);
    return;
  }
  const bool even = w.c % V::kLanes == 0;
  const bool narrow = w.c < V::kLanes && V::kLanes % w.c == 0 && w.r * w.c % V::kLanes == 0;
  for (std::int64_t b = begin; b < end; ++b) {
    if (narrow) {
      const std::int64_t vectors = w.r * w.c / V::kLanes;
      std::int64_t v = 0;
      for (; v + kRows <= vectors; v += kRows) narrow_blocks_few<D, M, kRows>(job, m0, b, v);
      for (; v < vectors; ++v) narrow_blocks_few<D, M, 1>(job, m0, b, v);
      continue;
    }
    std::int64_t i = 0;
    for (; i + kRows <= w.r; i += kRows)
      even ? blocks_few<D, M, kRows, true>(job, m0, b, i) : blocks_few<D, M, kRows, false>(job, m0, b, i);
    for (; i < w.r; ++i) even ? blocks_few<D, M, 1, true>(job, m0, b, i) : blocks_few<D, M, 1, false>(job, m0, b, i);
  }
}

inline void end_sparse(const SparseLinear& job, std::int64_t m_begin, std::int64_t m_end, std::int64_t begin, std::int64_t end) {
  for (std::int64_t m = m_begin; m < m_end; ++m)
    finish(job.out + m * job.w.rows + begin, job.bias == nullptr ? nullptr : job.bias + begin, nullptr, job.act, end - begin);
}

/// Block rows [begin, end) (rows of 2:4) for all rows of x.
inline void sparse_few(const SparseLinear& job, std::int64_t begin, std::int64_t end) {
  with_values(job.w.dtype, [&](auto type) {
    constexpr Dtype D = decltype(type)::kType;
    std::int64_t m = 0;
    if constexpr (kMostRows == 4)
      for (; m + 4 <= job.m; m += 4) sparse_few_of<D, 4>(job, m, begin, end);
    for (; m + 2 <= job.m; m += 2) sparse_few_of<D, 2>(job, m, begin, end);
    for (; m < job.m; ++m) sparse_few_of<D, 1>(job, m, begin, end);
  });
  end_sparse(job, 0, job.m, begin * job.w.r, end * job.w.r);
}

// --- many rows of x ---

/// Columns [begin, end) of x, `begin` a multiple of kLanes.
inline void lay_columns(const SparseLinear& job, const Columns& to, std::int64_t begin, std::int64_t end) {
  using V = Simd;
  const std::int64_t width = to.vectors * V::kLanes;
  for (std::int64_t k = begin; k < end; k += V::kLanes) {
    const int count = static_cast<int>(end - k < V::kLanes ? end - k : V::kLanes);
    for (int t = 0; t < to.vectors; ++t) {
      V::I rows[V::kLanes];
      for (int i = 0; i < V::kLanes; ++i) {
        const std::int64_t m = to.m0 + t * V::kLanes + i;
        rows[i] = m < job.m ? V::load_bytes(job.x + m * job.w.k + k, 4 * count) : V::splat_word(0);
      }
      V::transpose(rows);
      for (int i = 0; i < count; ++i) V::store_words(to.columns + (k + i) * width + t * V::kLanes, rows[i]);
    }
  }
}

constexpr std::int64_t kSpan = 128;  // columns that stay in the first-level cache while all rows of W pass by

/// Sums of rows [begin, end) of a 2:4 matrix over columns [from, from + kSpan). Two sums for each output, for a sum
/// waits for itself.
template <Dtype D, int T>
void pairs_many(const SparseLinear& job, const Columns& in, std::int64_t from, std::int64_t begin, std::int64_t end) {
  using V = Simd;
  const Sparse& w = job.w;
  constexpr std::int64_t kWidth = T * V::kLanes;
  const std::int64_t half = w.k / 2, stop = from + kSpan < w.k ? (from + kSpan) / 2 : half;
  for (std::int64_t n = begin; n < end; ++n) {
    float* sums = in.sums + n * kWidth;
    V::F sum[2][T];
    unroll<T>([&](auto t) LACONIC_UNROLLED {
      sum[0][t] = from == 0 ? V::zero() : V::load(sums + t * V::kLanes);
      sum[1][t] = V::zero();
    });
    const void* values = past<D>(w.values, n * half);
    ask_for<D>(values, 4 * half + from / 2, kSpan / 2);
    const auto add = [&](std::int64_t i, std::uint32_t word, auto j) LACONIC_UNROLLED {
      const float* x = in.columns + (2 * i + j / 2 * 4 + (word >> 2 * j & 3u)) * kWidth;
      const V::F value = one_value<D>(values, i + j);
      unroll<T>([&](auto t) LACONIC_UNROLLED { sum[j & 1][t] = V::fma(value, V::load(x + t * V::kLanes), sum[j & 1][t]); });
    };
    for (std::int64_t i = from / 2; i < stop; i += 16) {
      const std::uint32_t word = w.index[n * w.words_per_row + i / 16];
      if (i + 16 <= stop)
        unroll<8>([&](auto pair) LACONIC_UNROLLED {
          add(i, word, Number<2 * pair>{});
          add(i, word, Number<2 * pair + 1>{});
        });
      else
        for (std::int64_t j = 0; i + j < stop; j += 2) {
          add(i + j, word >> 2 * j, Number<0>{});
          add(i + j, word >> 2 * j, Number<1>{});
        }
    }
    unroll<T>([&](auto t) LACONIC_UNROLLED { V::store(sums + t * V::kLanes, V::add(sum[0][t], sum[1][t])); });
  }
}

/// Sums of R rows from row i of block row b over blocks [first, last).
template <Dtype D, int T, int R>
LACONIC_INLINE void blocks_sum(const Sparse& w, const Columns& in, std::int64_t b, std::int64_t i, std::int64_t first, std::int64_t last) {
  using V = Simd;
  constexpr int kWidth = T * V::kLanes, kWays = R == 1 ? 2 : 1;
  float* sums = in.sums + (b * w.r + i) * kWidth;
  V::F sum[kWays][R][T];
  unroll<R>([&](auto r) LACONIC_UNROLLED {
    unroll<T>([&](auto t) LACONIC_UNROLLED {
      sum[0][r][t] = V::load(sums + r * kWidth + t * V::kLanes);
      if constexpr (kWays > 1) sum[1][r][t] = V::zero();
    });
  });
  for (std::int64_t n = first; n < last; ++n) {
    const float* x = in.columns + static_cast<std::int64_t>(w.index[n]) * w.c * kWidth;
    const void* values = past<D>(w.values, (n * w.r + i) * w.c);
    const auto add = [&](std::int64_t j, auto way) LACONIC_UNROLLED {
      V::F some[T];
      unroll<T>([&](auto t) LACONIC_UNROLLED { some[t] = V::load(x + j * kWidth + t * V::kLanes); });
      unroll<R>([&](auto r) LACONIC_UNROLLED {
        const V::F value = one_value<D>(values, r * w.c + j);
        unroll<T>([&](auto t) LACONIC_UNROLLED { sum[way][r][t] = V::fma(value, some[t], sum[way][r][t]); });
      });
    };
    std::int64_t j = 0;
    for (; j + kWays <= w.c; j += kWays) unroll<kWays>([&](auto way) LACONIC_UNROLLED { add(j + way, way); });
    for (; j < w.c; ++j) add(j, Number<0>{});
  }
  unroll<R>([&](auto r) LACONIC_UNROLLED {
    unroll<T>([&](auto t) LACONIC_UNROLLED {
      V::F all = sum[0][r][t];
      if constexpr (kWays > 1) all = V::add(all, sum[1][r][t]);
      V::store(sums + r * kWidth + t * V::kLanes, all);
    });
  });
}

/// Sums of block rows [begin, end) over the blocks that begin before column `to`, and are not added yet.
template <Dtype D, int T>
void blocks_many(const SparseLinear& job, const Columns& in, std::int64_t to, std::int64_t begin, std::int64_t end) {
  constexpr int kRows = Simd::kLanes >= 16 || T < 4 ? kMostRows : 2;
  const Sparse& w = job.w;
  for (std::int64_t b = begin; b < end; ++b) {
    const std::int64_t first = in.next[b];
    std::int64_t last = first;
    while (last < w.starts[b + 1] && static_cast<std::int64_t>(w.index[last]) * w.c < to) ++last;
    if (b + 1 < end) ask_for<D>(w.values, static_cast<std::int64_t>(in.next[b + 1]) * w.r * w.c, (last - first) * w.r * w.c);
    if (first == last) continue;
    std::int64_t i = 0;
    for (; i + kRows <= w.r; i += kRows) blocks_sum<D, T, kRows>(w, in, b, i, first, last);
    for (; i + 2 <= w.r; i += 2) blocks_sum<D, T, 2>(w, in, b, i, first, last);
    for (; i < w.r; ++i) blocks_sum<D, T, 1>(w, in, b, i, first, last);
    in.next[b] = static_cast<std::int32_t>(last);
  }
}

/// Rows [begin, end) of the sums, turned to rows of the output.
inline void take_sums(const SparseLinear& job, const Columns& in, std::int64_t begin, std::int64_t end) {
  using V = Simd;
  const std::int64_t width = in.vectors * V::kLanes, rows = job.w.rows;
  for (std::int64_t n = begin; n < end; n += V::kLanes) {
    const int count = static_cast<int>(end - n < V::kLanes ? end - n : V::kLanes);
    const V::F scale = job.w.scale != nullptr ? V::load_first(job.w.scale + n, count) : V::splat(1.0f);
    for (int t = 0; t < in.vectors; ++t) {
      const std::int64_t m = in.m0 + t * V::kLanes, left = job.m - m;
      V::I part[V::kLanes];
      for (int i = 0; i < V::kLanes; ++i)
        part[i] = i < count ? V::load_words(in.sums + (n + i) * width + t * V::kLanes) : V::splat_word(0);
      V::transpose(part);
      for (int i = 0; i < V::kLanes && i < left; ++i)
        V::store_first(job.out + (m + i) * rows + n, V::mul(V::bits_as_float(part[i]), scale), count);
    }
  }
}

/// Block rows [begin, end) (rows of 2:4) for the rows of x that `in` holds.
inline void sparse_many(const SparseLinear& job, const Columns& in, std::int64_t begin, std::int64_t end) {
  const Sparse& w = job.w;
  const std::int64_t width = in.vectors * Simd::kLanes;
  for (std::int64_t i = begin * w.r * width; i < end * w.r * width; ++i) in.sums[i] = 0.0f;
  if (w.starts != nullptr)
    for (std::int64_t b = begin; b < end; ++b) in.next[b] = w.starts[b];
  with_values(w.dtype, [&](auto type) {
    constexpr Dtype D = decltype(type)::kType;
    const auto spans = [&](auto vectors) {
      for (std::int64_t k = 0; k < w.k; k += kSpan)
        w.starts == nullptr ? pairs_many<D, vectors>(job, in, k, begin, end)
                            : blocks_many<D, vectors>(job, in, k + kSpan, begin, end);
    };
    in.vectors == 4 ? spans(Number<4>{}) : in.vectors == 2 ? spans(Number<2>{}) : spans(Number<1>{});
  });
  take_sums(job, in, begin * w.r, end * w.r);
  end_sparse(job, in.m0, in.m0 + width < job.m ? in.m0 + width : job.m, begin * w.r, end * w.r);
}

}  // namespace laconic::LACONIC_TARGET
