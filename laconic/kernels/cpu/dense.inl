// y = x W^T with float32 inputs for many rows of x. Included once for every instruction set.
//
// A panel of rows of W becomes float32 in the cache, turned so that the rows lie side by side, some hundred columns at a
// time; it meets every row of x before the next columns do. Weights are unpacked once for all rows of x.

namespace laconic::LACONIC_TARGET {

/// Columns [begin, begin + depth) of row n as float32; `codes` holds as many bytes.
inline void float_row(const Matrix& w, std::int64_t n, std::int64_t begin, std::int64_t depth, const float* scales,
                      const float* zeros, std::uint8_t* codes, float* out, Isa isa) {
  if (w.dense != nullptr) {
    const float* from = w.dense + n * w.k + begin;
    for (std::int64_t i = 0; i < depth; ++i) out[i] = from[i];
    return;
  }
  unpack_codes(w, n, begin, depth, codes, isa);
  const float middle = w.middle;
  for (std::int64_t i = 0; i < depth;) {
    const std::int64_t g = (begin + i) / w.group, end = (g + 1) * w.group - begin, stop = end < depth ? end : depth;
    const float scale = scales[g], zero = middle + (w.zero_kind == Zero::none ? 0.0f : zeros[g]);
    if (w.levels != nullptr)
      for (; i < stop; ++i) out[i] = w.levels[codes[i]] * scale;
    else
      for (; i < stop; ++i) out[i] = (static_cast<float>(codes[i]) - zero) * scale;
  }
}

constexpr std::int64_t kDepth = 512;  // columns of a panel, a multiple of 32: 64 KiB of floats with the widest vectors

/// M rows of x against a panel (depth, kPanel); sums go on where the columns before left them in `out`.
template <int M>
void dense_block(const Linear& job, const float* panel, std::int64_t m0, std::int64_t first, std::int64_t begin, std::int64_t depth) {
  using V = Simd;
  using F = V::F;
  const float* x = job.x + m0 * job.x_stride + begin;
  F acc[2 * M];
  unroll<2 * M>([&](auto i) LACONIC_UNROLLED { acc[i] = V::zero(); });
  for (std::int64_t i = 0; i < depth; ++i, panel += kPanel) {
    const F a = V::load(panel), b = V::load(panel + V::kLanes);
    unroll<M>([&](auto m) LACONIC_UNROLLED {
      const F value = V::splat(x[m * job.x_stride + i]);
      acc[2 * m] = V::fma(a, value, acc[2 * m]);
      acc[2 * m + 1] = V::fma(b, value, acc[2 * m + 1]);
    });
  }
  const bool last = begin + depth == job.w.k;
  unroll<2>([&](auto h) LACONIC_UNROLLED {
    const std::int64_t n = first + h * V::kLanes;
    if (n >= job.w.rows) return;
    const int left = static_cast<int>(job.w.rows - n < V::kLanes ? job.w.rows - n : V::kLanes);
    unroll<M>([&](auto m) LACONIC_UNROLLED {
      const std::int64_t at = (m0 + m) * job.out_stride + n;
      F y = acc[2 * m + h];
      if (begin > 0) y = V::add(y, V::load_first(job.out + at, left));
      if (last) {
        if (job.then.bias != nullptr) y = V::add(y, V::load_first(job.then.bias + n, left));
        y = activate(y, job.then.act);
        if (job.then.residual != nullptr) y = V::add(y, V::load_first(job.then.residual + at, left));
      }
      V::store_first(job.out + at, y, left);
    });
  });
}

template <int M>
void dense_inputs(const Linear& job, const float* panel, std::int64_t m, std::int64_t m_end, std::int64_t first, std::int64_t begin, std::int64_t depth) {
  for (; m + M <= m_end; m += M) dense_block<M>(job, panel, m, first, begin, depth);
  if constexpr (M > 1) {
    if (m < m_end) dense_inputs<(M > 4 ? 4 : M / 2)>(job, panel, m, m_end, first, begin, depth);
  }
}

/// Floats of scratch of one thread: the panel, its rows before they are turned, their scales and zeros, and codes.
constexpr std::int64_t dense_scratch(const Matrix& w) {
  return kDepth * kPanel + Simd::kLanes * kDepth + 2 * kPanel * (w.groups + Simd::kLanes) + kDepth;
}

/// One panel of W against rows [m_begin, m_end) of x.
inline void linear_dense(const Linear& job, std::int64_t number, std::int64_t m_begin, std::int64_t m_end, float* scratch, Isa isa) {
  using V = Simd;
  const Matrix& w = job.w;
  const std::int64_t first = number * kPanel, padded = w.groups + V::kLanes;
  float* panel = scratch;
  float* rows = panel + kDepth * kPanel;
  float* scales = rows + V::kLanes * kDepth;
  float* zeros = scales + kPanel * padded;
  auto* codes = reinterpret_cast<std::uint8_t*>(zeros + kPanel * padded);
  if (w.dense == nullptr)
    for (int r = 0; r < kPanel && first + r < w.rows; ++r) {
      read_floats(w.scale, w.scale_dtype, w.one_scale ? 0 : (first + r) * w.groups, w.groups, scales + r * padded);
      if (w.zero_kind != Zero::none) read_zeros(w, first + r, zeros + r * padded);
    }
  for (std::int64_t begin = 0; begin < w.k; begin += kDepth) {
    const std::int64_t depth = w.k - begin < kDepth ? w.k - begin : kDepth;
    for (int half = 0; half < 2; ++half) {
      for (int r = 0; r < V::kLanes; ++r) {
        const int at = half * V::kLanes + r;
        float* row = rows + r * kDepth;
        if (first + at < w.rows)
          float_row(w, first + at, begin, depth, scales + at * padded, zeros + at * padded, codes, row, isa);
        else
          for (std::int64_t i = 0; i < depth; ++i) row[i] = 0.0f;
      }
      for (std::int64_t i = 0; i < depth; i += V::kLanes) {
        typename V::I block[V::kLanes];
        for (int r = 0; r < V::kLanes; ++r) block[r] = V::load_words(rows + r * kDepth + i);
        V::transpose(block);
        for (int r = 0; r < V::kLanes && i + r < depth; ++r) V::store_words(panel + (i + r) * kPanel + half * V::kLanes, block[r]);
      }
    }
    dense_inputs<kTile>(job, panel, m_begin, m_end, first, begin, depth);
  }
}

/// Few rows of x against float32 weights: a dot product for each.
inline void dense_rows(const Linear& job, std::int64_t begin, std::int64_t end) {
  using V = Simd;
  for (std::int64_t n = begin; n < end; ++n) {
    const float* row = job.w.dense + n * job.w.k;
    for (std::int64_t m = 0; m < job.m; ++m) {
      const float* x = job.x + m * job.x_stride;
      V::F a = V::zero(), b = V::zero();
      std::int64_t i = 0;
      for (; i + 2 * V::kLanes <= job.w.k; i += 2 * V::kLanes) {
        a = V::fma(V::load(x + i), V::load(row + i), a);
        b = V::fma(V::load(x + i + V::kLanes), V::load(row + i + V::kLanes), b);
      }
      for (; i < job.w.k; i += V::kLanes) {
        const int left = static_cast<int>(job.w.k - i < V::kLanes ? job.w.k - i : V::kLanes);
        a = V::fma(V::load_first(x + i, left), V::load_first(row + i, left), a);
      }
      job.out[m * job.out_stride + n] = V::sum(V::add(a, b));
    }
  }
  end_rows(job, begin, end);
}

}  // namespace laconic::LACONIC_TARGET
