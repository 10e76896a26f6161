// Attention over packed keys and values, and packing them. Included once for every instruction set.
//
// Codes become floats in registers and nowhere else. For scores, q . (low + scale c) = scale (q . c) + low (sum of q),
// so a token with one scale costs a dot product with its bare codes. Scales by channel go into the query instead, once
// for a block of tokens. For the output, a token's scale goes into its weight, and its `low` into one sum for the whole
// row. Where a token has several groups ("Grouped"), codes are scaled in the register, which costs less than to take
// all that apart. Scores of a tile of tokens are held at a time; the sums are scaled down whenever a larger score comes
// (online softmax).

namespace laconic::LACONIC_TARGET {

/// Numbers of a row as floats: a vector from i, or the first n of one with zeros above.
template <int Bits>
struct Packed {
  static Simd::F read(const std::uint8_t* row, std::int64_t i) { return Simd::codes<Bits>(row + i * Bits / 8); }
  static Simd::F read_first(const std::uint8_t* row, std::int64_t i, int n) {
    alignas(64) std::uint8_t padded[64] = {};
    __builtin_memcpy(padded, row + i * Bits / 8, static_cast<std::size_t>((n * Bits + 7) / 8));
    return Simd::codes<Bits>(padded);
  }
};

template <Dtype Type>
struct Floats {
  static constexpr std::int64_t kSize = Type == Dtype::float32 ? 4 : 2;
  static Simd::F read(const std::uint8_t* row, std::int64_t i) {
    if constexpr (Type == Dtype::float32) return Simd::load(reinterpret_cast<const float*>(row) + i);
    else if constexpr (Type == Dtype::float16) return Simd::from_half(reinterpret_cast<const std::uint16_t*>(row) + i);
    else return Simd::from_bfloat(reinterpret_cast<const std::uint16_t*>(row) + i);
  }
  static Simd::F read_first(const std::uint8_t* row, std::int64_t i, int n) {
    alignas(64) std::uint8_t padded[64] = {};
    __builtin_memcpy(padded, row + i * kSize, static_cast<std::size_t>(n * kSize));
    return read(padded, 0);
  }
};

/// Rows of one head.
struct Rows {
  const std::uint8_t* data;
  std::int64_t bytes, dim;
};

/// Scales and lows of a tile of grouped tokens as floats, (n, groups).
struct Groups {
  const float *scale, *low;
  std::int64_t count, width;  // groups of a token, numbers of a group
};

/// out[m][t] = q_m . x_t for n tokens, of bare codes unless Grouped; whole fours are written.
template <class Form, int M, bool Grouped>
void dot_rows(const Rows& x, const Groups& groups, const float* q, std::int64_t q_stride, std::int64_t n, float* out,
              std::int64_t out_stride) {
  using V = Simd;
  const std::int64_t width = Grouped ? groups.width : x.dim, whole = x.dim / V::kLanes * V::kLanes;
  const int left = static_cast<int>(x.dim - whole);
  for (std::int64_t t = 0; t < n; t += 4) {
    const std::uint8_t* row[4];
    const float *scale[4], *low[4];
    for (int r = 0; r < 4; ++r) {
      const std::int64_t at = t + r < n ? t + r : n - 1;
      row[r] = x.data + at * x.bytes;
      if constexpr (Grouped) {
        scale[r] = groups.scale + at * groups.count;
        low[r] = groups.low + at * groups.count;
      }
    }
    V::F total[M][4];
    for (int m = 0; m < M; ++m)
      for (int r = 0; r < 4; ++r) total[m][r] = V::zero();
    for (std::int64_t first = 0; first < whole; first += width) {
      const std::int64_t stop = first + width < whole ? first + width : whole;
      V::F step[4], base[4];
      if constexpr (Grouped)
        for (int r = 0; r < 4; ++r) {
          step[r] = V::splat(*scale[r]++);
          base[r] = V::splat(*low[r]++);
        }
      for (std::int64_t i = first; i < stop; i += V::kLanes) {
        V::F value[4];
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r) {
          value[r] = Form::read(row[r], i);
          if constexpr (Grouped) value[r] = V::fma(value[r], step[r], base[r]);
        }
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) {
          const V::F query = V::load(q + m * q_stride + i);
#pragma GCC unroll 4
          for (int r = 0; r < 4; ++r) total[m][r] = V::fma(value[r], query, total[m][r]);
        }
      }
    }
    if (left != 0)  // never Grouped, whose groups are whole vectors; q is padded with zeros
      for (int r = 0; r < 4; ++r) {
        const V::F value = Form::read_first(row[r], whole, left);
        for (int m = 0; m < M; ++m) total[m][r] = V::fma(value, V::load(q + m * q_stride + whole), total[m][r]);
      }
    for (int m = 0; m < M; ++m)
      V::sum_four(total[m][0], total[m][1], total[m][2], total[m][3], out + m * out_stride + t);
  }
}

constexpr int kQueries = Simd::kLanes >= 16 ? 4 : 2;  // that share a vector of values, as registers allow
constexpr int kSums = Simd::kLanes >= 16 ? 16 : 8;    // registers for sums

template <class Form, bool Grouped>
void score_rows(const Rows& x, const Groups& groups, const float* q, std::int64_t q_stride, std::int64_t queries,
                std::int64_t n, float* out, std::int64_t out_stride) {
  std::int64_t m = 0;
  if constexpr (kQueries == 4)
    for (; m + 4 <= queries; m += 4)
      dot_rows<Form, 4, Grouped>(x, groups, q + m * q_stride, q_stride, n, out + m * out_stride, out_stride);
  for (; m + 2 <= queries; m += 2)
    dot_rows<Form, 2, Grouped>(x, groups, q + m * q_stride, q_stride, n, out + m * out_stride, out_stride);
  if (m < queries)
    dot_rows<Form, 1, Grouped>(x, groups, q + m * q_stride, q_stride, n, out + m * out_stride, out_stride);
}

/// acc[m][i] += sum over n tokens of w[m][t] x[t][i], for I vectors from `first`; Whole is false for the padded last
/// one.
template <class Form, int M, int I, bool Whole, bool Grouped>
void add_rows(const Rows& x, const Groups& groups, std::int64_t first, const float* w, std::int64_t n, float* acc,
              std::int64_t acc_stride) {
  using V = Simd;
  V::F sum[M][I];
  std::int64_t group[I];
  for (int i = 0; i < I; ++i) {
    for (int m = 0; m < M; ++m) sum[m][i] = V::load(acc + m * acc_stride + first + i * V::kLanes);
    if constexpr (Grouped) group[i] = (first + i * V::kLanes) / groups.width;
  }
  const std::uint8_t* row = x.data;
  const float *scale = groups.scale, *low = groups.low;
  const int left = static_cast<int>(x.dim - first);
  for (std::int64_t t = 0; t < n; ++t, row += x.bytes) {
    V::F value[I];
#pragma GCC unroll 8
    for (int i = 0; i < I; ++i) {
      if constexpr (Whole) value[i] = Form::read(row, first + i * V::kLanes);
      else value[i] = Form::read_first(row, first, left);
      if constexpr (Grouped) value[i] = V::fma(value[i], V::splat(scale[group[i]]), V::splat(low[group[i]]));
    }
    if constexpr (Grouped) {
      scale += groups.count;
      low += groups.count;
    }
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      const V::F weight = V::splat(w[m * kTokens + t]);
#pragma GCC unroll 8
      for (int i = 0; i < I; ++i) sum[m][i] = V::fma(value[i], weight, sum[m][i]);
    }
  }
  for (int m = 0; m < M; ++m)
    for (int i = 0; i < I; ++i) V::store(acc + m * acc_stride + first + i * V::kLanes, sum[m][i]);
}

template <class Form, int M, bool Grouped>
void add_columns(const Rows& x, const Groups& groups, const float* w, std::int64_t n, float* acc,
                 std::int64_t acc_stride) {
  constexpr std::int64_t kLanes = Simd::kLanes;
  constexpr int kMany = kSums / M < 8 ? kSums / M : 8;
  std::int64_t i = 0;
  for (; i + kMany * kLanes <= x.dim; i += kMany * kLanes)
    add_rows<Form, M, kMany, true, Grouped>(x, groups, i, w, n, acc, acc_stride);
  for (; i + 2 * kLanes <= x.dim; i += 2 * kLanes)
    add_rows<Form, M, 2, true, Grouped>(x, groups, i, w, n, acc, acc_stride);
  for (; i + kLanes <= x.dim; i += kLanes) add_rows<Form, M, 1, true, Grouped>(x, groups, i, w, n, acc, acc_stride);
  if constexpr (!Grouped)
    if (i < x.dim) add_rows<Form, M, 1, false, false>(x, groups, i, w, n, acc, acc_stride);
}

/// acc[m] += sum of w[m][t] x[t] over n tokens; weights lie (queries, kTokens).
template <class Form, bool Grouped>
void weigh_rows(const Rows& x, const Groups& groups, const float* w, std::int64_t queries, std::int64_t n, float* acc,
                std::int64_t acc_stride) {
  std::int64_t m = 0;
  if constexpr (kQueries == 4)
    for (; m + 4 <= queries; m += 4)
      add_columns<Form, 4, Grouped>(x, groups, w + m * kTokens, n, acc + m * acc_stride, acc_stride);
  for (; m + 2 <= queries; m += 2)
    add_columns<Form, 2, Grouped>(x, groups, w + m * kTokens, n, acc + m * acc_stride, acc_stride);
  if (m < queries) add_columns<Form, 1, Grouped>(x, groups, w + m * kTokens, n, acc + m * acc_stride, acc_stride);
}

/// f(Form) for how these tokens lie.
template <class F>
void with_form(const Tokens& x, const F& f) {
  if (x.bits == 8) f(Packed<8>{});
  else if (x.bits == 4) f(Packed<4>{});
  else if (x.bits == 2) f(Packed<2>{});
  else if (x.dtype == Dtype::float16) f(Floats<Dtype::float16>{});
  else if (x.dtype == Dtype::bfloat16) f(Floats<Dtype::bfloat16>{});
  else f(Floats<Dtype::float32>{});
}

inline bool is_grouped(const Tokens& x) { return x.bits != 0 && !x.by_channel && x.groups > 1; }

inline Rows rows_of(const Tokens& x, std::int64_t head, std::int64_t token) {
  const std::int64_t bytes = row_bytes(x);
  return {static_cast<const std::uint8_t*>(x.data) + (head * x.capacity + token) * bytes, bytes, x.dim};
}

/// Scales and lows by token, of n tokens, as floats.
inline Groups groups_of(const Tokens& x, std::int64_t head, std::int64_t token, std::int64_t n, float* scale,
                        float* low) {
  const std::int64_t first = (head * x.capacity + token) * x.groups;
  read_floats(x.scale, x.dtype, first, n * x.groups, scale);
  read_floats(x.low, x.dtype, first, n * x.groups, low);
  return {scale, low, x.groups, x.group};
}

inline float dot(const float* a, const float* b, std::int64_t n) {
  Simd::F sum = Simd::zero();
  for (std::int64_t i = 0; i < n; i += Simd::kLanes) {
    const int left = static_cast<int>(n - i < Simd::kLanes ? n - i : Simd::kLanes);
    sum = Simd::fma(Simd::load_first(a + i, left), Simd::load_first(b + i, left), sum);
  }
  return Simd::sum(sum);
}

/// y[0..n) += a x[0..n), in whole vectors.
inline void add_scaled(float* y, const float* x, float a, std::int64_t n) {
  for (std::int64_t i = 0; i < n; i += Simd::kLanes)
    Simd::store(y + i, Simd::fma(Simd::load(x + i), Simd::splat(a), Simd::load(y + i)));
}

struct CacheScratch {
  float *q, *channel, *sums, *lows, *scores, *weights, *scale, *low;
};

/// Scores of a tile of keys: scores[m][t], t in [0, n).
inline void score_tile(const CacheSizes& s, const Tokens& keys, std::int64_t head,
                       std::int64_t token, std::int64_t n, const CacheScratch& own) {
  using V = Simd;
  const Rows rows = rows_of(keys, head, token);
  const std::int64_t queries = s.rows;
  if (keys.bits != 0 && keys.by_channel) {
    for (std::int64_t at = 0; at < n; at += kBlock) {
      const std::int64_t count = n - at < kBlock ? n - at : kBlock;
      const std::int64_t block = (head * (keys.capacity / kBlock) + (token + at) / kBlock) * keys.dim;
      read_floats(keys.scale, keys.dtype, block, keys.dim, own.scale);
      read_floats(keys.low, keys.dtype, block, keys.dim, own.low);
      for (std::int64_t m = 0; m < queries; ++m) {
        const float* q = own.q + m * s.key_width;
        float* scaled = own.channel + m * s.key_width;
        for (std::int64_t i = 0; i < keys.dim; ++i) scaled[i] = q[i] * own.scale[i];
        for (std::int64_t i = keys.dim; i < s.key_width; ++i) scaled[i] = 0.0f;
        own.sums[m] = dot(q, own.low, keys.dim);
      }
      const Rows part{rows.data + at * rows.bytes, rows.bytes, rows.dim};
      with_form(keys, [&](auto form) {
        score_rows<decltype(form), false>(part, {}, own.channel, s.key_width, queries, count, own.scores + at, kTokens);
      });
      for (std::int64_t m = 0; m < queries; ++m) {
        const V::F base = V::splat(own.sums[m]);
        float* score = own.scores + m * kTokens + at;  // whole vectors: kBlock is a multiple of kPad
        for (std::int64_t t = 0; t < count; t += V::kLanes) V::store(score + t, V::add(V::load(score + t), base));
      }
    }
    return;
  }
  const Groups groups = keys.bits != 0 ? groups_of(keys, head, token, n, own.scale, own.low) : Groups{};
  const bool grouped = is_grouped(keys);
  with_form(keys, [&](auto form) {
    if (grouped) score_rows<decltype(form), true>(rows, groups, own.q, s.key_width, queries, n, own.scores, kTokens);
    else score_rows<decltype(form), false>(rows, groups, own.q, s.key_width, queries, n, own.scores, kTokens);
  });
  if (keys.bits == 0 || grouped) return;
  for (std::int64_t m = 0; m < queries; ++m) {
    float* score = own.scores + m * kTokens;
    const V::F sum = V::splat(own.sums[m]);
    for (std::int64_t t = 0; t < n; t += V::kLanes)
      V::store(score + t, V::fma(V::load(own.low + t), sum, V::mul(V::load(score + t), V::load(own.scale + t))));
  }
}

/// Adds the mask to n scores of query m, hides what is to come, and fills the last vector with -infinity.
inline void mask_scores(const CacheAttention& job, std::int64_t batch, std::int64_t head, std::int64_t query,
                        std::int64_t token, std::int64_t n, float* score) {
  constexpr float kNever = -__builtin_inff();
  const std::int64_t at = batch * job.mask_batch + head * job.mask_head + query * job.mask_query + token;
  if (job.mask_kind == Mask::added) {
    const float* mask = static_cast<const float*>(job.mask) + at;
    for (std::int64_t t = 0; t < n; ++t) score[t] += mask[t];
  } else if (job.mask_kind == Mask::kept) {
    const auto* mask = static_cast<const std::uint8_t*>(job.mask) + at;
    for (std::int64_t t = 0; t < n; ++t) score[t] = mask[t] != 0 ? score[t] : kNever;
  }
  std::int64_t seen = n;
  if (job.causal) {
    seen = job.spans[0].length + job.spans[1].length - job.q_len + query + 1 - token;
    seen = seen < 0 ? 0 : seen < n ? seen : n;
  }
  for (std::int64_t t = seen; t < n || t % Simd::kLanes != 0; ++t) score[t] = kNever;
}

/// Weights e^(score - max) of n scores in place, for a running maximum and sum; returns what earlier sums are worth
/// now.
inline float soften(float* score, std::int64_t n, float& most, float& sum) {
  using V = Simd;
  V::F top = V::load(score);
  for (std::int64_t t = V::kLanes; t < n; t += V::kLanes) top = V::max(V::load(score + t), top);
  const float largest = V::largest(top), before = most;
  if (largest > most) most = largest;
  const float never = -__builtin_inff();
  // Where nothing has been seen yet the maximum is -infinity, and so is every score: subtract something finite.
  const V::F least = V::splat(most == never ? 0.0f : most);
  V::F total = V::zero();
  for (std::int64_t t = 0; t < n; t += V::kLanes) {
    const V::F x = V::sub(V::load(score + t), least);
    // exp saturates at e^-87: bring it to an exact zero below. Constants come first, so that a nan stays one.
    const V::F fade = V::min(V::splat(1.0f), V::max(V::splat(0.0f), V::add(x, V::splat(88.0f))));
    const V::F weight = V::mul(exp(x), fade);
    V::store(score + t, weight);
    total = V::add(total, weight);
  }
  alignas(64) float kept[V::kLanes];
  V::store(kept, exp(V::splat(before == never || before == most ? 0.0f : before - most)));
  const float worth = before == never ? 0.0f : kept[0];
  sum = sum * worth + V::sum(total);
  return worth;
}

/// acc[m] += weights of a tile times its values. Scores hold the weights.
inline void weigh_tile(const CacheSizes& s, const Tokens& values, std::int64_t head, std::int64_t token, std::int64_t n,
                       const CacheScratch& own, float* acc) {
  using V = Simd;
  const Rows rows = rows_of(values, head, token);
  const Groups groups = values.bits != 0 ? groups_of(values, head, token, n, own.scale, own.low) : Groups{};
  const bool grouped = is_grouped(values);
  const float* weights = own.scores;
  if (values.bits != 0 && !grouped) {
    for (std::int64_t m = 0; m < s.rows; ++m) {
      const float* score = own.scores + m * kTokens;
      for (std::int64_t t = 0; t < n; t += V::kLanes)
        V::store(own.weights + m * kTokens + t, V::mul(V::load(score + t), V::load(own.scale + t)));
      own.lows[m] += dot(score, own.low, n);
    }
    weights = own.weights;
  }
  with_form(values, [&](auto form) {
    if (grouped) weigh_rows<decltype(form), true>(rows, groups, weights, s.rows, n, acc, s.partial);
    else weigh_rows<decltype(form), false>(rows, groups, weights, s.rows, n, acc, s.partial);
  });
}

/// One head and one range of tokens: its largest scores, sums of weights and weighted sums of values go to `partials`.
inline void attend_cache(const CacheAttention& job, const CacheSizes& s, std::int64_t task, float* partials,
                         float* scratch) {
  using V = Simd;
  const std::int64_t head = task / s.splits, split = task % s.splits, second = split - s.first_splits;
  const Span& span = job.spans[second < 0 ? 0 : 1];
  const std::int64_t begin = (second < 0 ? split : second) * kSplit;
  const std::int64_t end = begin + kSplit < span.length ? begin + kSplit : span.length;
  const std::int64_t before = second < 0 ? 0 : job.spans[0].length;
  const std::int64_t batch = head / job.kv_heads, shared = job.heads / job.kv_heads, queries = s.rows;
  CacheScratch own{};
  float* free = scratch;
  const auto take = [&](std::int64_t n) {
    float* taken = free;
    free += n;
    return taken;
  };
  own.q = take(queries * s.key_width);
  own.channel = take(queries * s.key_width);
  own.sums = take(queries);
  own.lows = take(queries);
  own.scores = take(queries * kTokens);
  own.weights = take(queries * kTokens);
  own.scale = take(s.scales);
  own.low = take(s.scales);

  const Tokens &keys = span.keys, &values = span.values;
  const float* q = job.q + head * queries * keys.dim;
  for (std::int64_t m = 0; m < queries; ++m, q += keys.dim) {
    float* to = own.q + m * s.key_width;
    for (std::int64_t i = 0; i < keys.dim; ++i) to[i] = q[i] * job.scale;
    for (std::int64_t i = keys.dim; i < s.key_width; ++i) to[i] = 0.0f;
    V::F sum = V::zero();
    for (std::int64_t i = 0; i < s.key_width; i += V::kLanes) sum = V::add(sum, V::load(to + i));
    own.sums[m] = V::sum(sum);
    own.lows[m] = 0.0f;
  }
  float* acc = partials + task * queries * s.partial;
  for (std::int64_t m = 0; m < queries; ++m) {
    float* row = acc + m * s.partial;
    for (std::int64_t i = 0; i < s.value_width; ++i) row[i] = 0.0f;
    row[s.value_width] = -__builtin_inff();  // the largest score, then the sum of weights
    row[s.value_width + 1] = 0.0f;
  }
  for (std::int64_t token = begin; token < end; token += kTokens) {
    const std::int64_t n = end - token < kTokens ? end - token : kTokens;
    score_tile(s, keys, head, token, n, own);
    for (std::int64_t m = 0; m < queries; ++m) {
      float *score = own.scores + m * kTokens, *row = acc + m * s.partial;
      mask_scores(job, batch, head % job.kv_heads * shared + m / job.q_len, m % job.q_len, before + token, n, score);
      const float worth = soften(score, n, row[s.value_width], row[s.value_width + 1]);
      if (worth == 1.0f) continue;
      for (std::int64_t i = 0; i < s.value_width; i += V::kLanes)
        V::store(row + i, V::mul(V::load(row + i), V::splat(worth)));
      own.lows[m] *= worth;
    }
    weigh_tile(s, values, head, token, n, own, acc);
  }
  for (std::int64_t m = 0; m < queries; ++m)
    for (std::int64_t i = 0; i < values.dim; ++i) acc[m * s.partial + i] += own.lows[m];
}

/// Output rows [begin, end) of batch * kv_heads * rows: the ranges of tokens put together, in order.
inline void join_cache(const CacheAttention& job, const CacheSizes& s, float* partials, std::int64_t begin,
                       std::int64_t end) {
  using V = Simd;
  const float never = -__builtin_inff();
  const std::int64_t dim = s.value_dim, width = s.value_width;
  for (std::int64_t at = begin; at < end; ++at) {
    float* first = partials + (at / s.rows * s.splits * s.rows + at % s.rows) * s.partial;
    const std::int64_t step = s.rows * s.partial;
    float most = never, sum = 0.0f;
    for (std::int64_t k = 0; k < s.splits; ++k) {
      const float top = first[k * step + width];
      most = top > most ? top : most;
    }
    float* out = job.out + at * dim;
    if (s.splits == 0) {
      for (std::int64_t i = 0; i < dim; ++i) out[i] = 0.0f;
      continue;
    }
    for (std::int64_t k = 0; k < s.splits; ++k) {
      float* part = first + k * step;
      const float top = part[width];
      alignas(64) float worth[V::kLanes];
      V::store(worth, exp(V::splat(top == never ? 0.0f : top - most)));
      // A range without a token to see has no weights, unless they are nan, which must not be lost.
      const float w = top == never && part[width + 1] == 0.0f ? 0.0f : top == most ? 1.0f : worth[0];
      sum += w * part[width + 1];
      if (k == 0)
        for (std::int64_t i = 0; i < width; i += V::kLanes) V::store(part + i, V::mul(V::load(part + i), V::splat(w)));
      else
        add_scaled(first, part, w, width);
    }
    const float norm = sum == 0.0f ? 0.0f : 1.0f / sum;  // no token to see: zeros
    for (std::int64_t i = 0; i < dim; ++i) out[i] = first[i] * norm;
  }
}

/// As stored, and back to a float, in place.
inline float stored(float x, Dtype dtype, void* base, std::int64_t at) {
  if (dtype == Dtype::float32) return static_cast<float*>(base)[at] = x;
  auto* to = static_cast<std::uint16_t*>(base) + at;
  if (dtype == Dtype::bfloat16) return laconic::from_bfloat(*to = laconic::to_bfloat(x));
  x = x > 65504.0f ? 65504.0f : x < -65504.0f ? -65504.0f : x;  // saturate: an infinite scale would lose every code
  return laconic::from_half(*to = laconic::to_half(x));
}

/// Codes of `n` numbers with a low and a scale each, as words.
inline void write_codes(const float* x, const float* low, const float* scale, std::int64_t n, int bits, float* codes,
                        std::uint32_t* words) {
  using V = Simd;
  const V::F top = V::splat(static_cast<float>((1 << bits) - 1));
  auto* whole = reinterpret_cast<std::uint32_t*>(codes);
  for (std::int64_t i = 0; i < n; i += V::kLanes) {
    const int left = static_cast<int>(n - i < V::kLanes ? n - i : V::kLanes);
    const V::F above = V::sub(V::load_first(x + i, left), V::load_first(low + i, left));
    const V::F value = V::div(above, V::load_first(scale + i, left));
    V::store_words(whole + i, V::to_int(V::round(V::min(V::max(value, V::zero()), top))));  // a nan becomes 0
  }
  const int each = 32 / bits;
  for (std::int64_t i = 0, word = 0; i < n; i += each, ++word) {
    std::uint32_t packed = 0;
    for (int j = 0; j < each && i + j < n; ++j) packed |= whole[i + j] << (j * bits);
    words[word] = packed;
  }
}

/// Least value and step of `n` numbers, as stored at `at`; a step of 0 is worked with as infinity, which gives codes 0.
inline void span_of(const float* x, std::int64_t n, const Tokens& to, std::int64_t at, float* low, float* scale) {
  using V = Simd;
  float least = x[0], most = x[0];
  std::int64_t i = 0;
  if (n >= V::kLanes) {
    V::F a = V::load(x), b = a;
    for (i = V::kLanes; i + V::kLanes <= n; i += V::kLanes) {
      a = V::min(V::load(x + i), a);
      b = V::max(V::load(x + i), b);
    }
    least = 0.0f - V::largest(V::sub(V::zero(), a));
    most = V::largest(b);
  }
  for (; i < n; ++i) {
    least = x[i] < least ? x[i] : least;
    most = x[i] > most ? x[i] : most;
  }
  *low = stored(least, to.dtype, const_cast<void*>(to.low), at);
  *scale = stored((most - least) / static_cast<float>((1 << to.bits) - 1), to.dtype, const_cast<void*>(to.scale), at);
  if (*scale == 0.0f) *scale = __builtin_inff();
}

/// Tokens [begin, end) of heads * count.
inline void append_cache(const CacheAppend& job, std::int64_t begin, std::int64_t end, float* scratch) {
  using V = Simd;
  const Tokens& to = job.to;
  const std::int64_t dim = to.dim, words = words_for(dim, to.bits);
  float *low = scratch, *scale = low + dim + kPad, *codes = scale + dim + kPad;
  auto* data = static_cast<std::uint32_t*>(const_cast<void*>(to.data));
  for (std::int64_t at = begin; at < end; ++at) {
    const std::int64_t head = at / job.count, token = job.at + at % job.count;
    const float* x = job.x + at * dim;
    if (!to.by_channel) {
      const std::int64_t first = (head * to.capacity + token) * to.groups;
      for (std::int64_t g = 0; g < to.groups; ++g) {
        const std::int64_t from = g * to.group, n = dim - from < to.group ? dim - from : to.group;
        span_of(x + from, n, to, first + g, low + from, scale + from);
        for (std::int64_t i = 1; i < n; ++i) {
          low[from + i] = low[from];
          scale[from + i] = scale[from];
        }
      }
    } else if (token % kBlock == 0) {
      const std::int64_t first = (head * (to.capacity / kBlock) + token / kBlock) * dim;
      for (std::int64_t i = 0; i < dim; i += V::kLanes) {
        const int left = static_cast<int>(dim - i < V::kLanes ? dim - i : V::kLanes);
        V::F a = V::load_first(x + i, left), b = a;
        for (std::int64_t t = 1; t < kBlock; ++t) {
          const V::F next = V::load_first(x + t * dim + i, left);
          a = V::min(next, a);
          b = V::max(next, b);
        }
        V::store(low + i, a);
        V::store(scale + i, b);
      }
      for (std::int64_t i = 0; i < dim; ++i) {
        const float step = (scale[i] - low[i]) / static_cast<float>((1 << to.bits) - 1);
        low[i] = stored(low[i], to.dtype, const_cast<void*>(to.low), first + i);
        scale[i] = stored(step, to.dtype, const_cast<void*>(to.scale), first + i);
        if (scale[i] == 0.0f) scale[i] = __builtin_inff();
      }
    }
    write_codes(x, low, scale, dim, to.bits, codes, data + (head * to.capacity + token) * words);
  }
}

}  // namespace laconic::LACONIC_TARGET
