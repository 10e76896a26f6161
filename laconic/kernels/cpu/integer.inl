// y = x W^T with inputs rounded to 8 bits a token, on integer dot products. Included once for every instruction set.
//
// With q the unsigned codes of W, z their zero points, c the signed codes of x and t their scale:
//     y[m, n] = t[m] sum_g s[n, g] (sum_{i in g} q[n, i] c[m, i] - z[n, g] sum_{i in g} c[m, i])
// A panel of rows of W is unpacked once into bytes, four neighbours of a row in a word and the rows side by side, and
// multiplied with every row of x. A word of x meets all rows of the panel, so that sums need no adding up at the end.

namespace laconic::LACONIC_TARGET {

constexpr int kPanel = 2 * Simd::kLanes;
constexpr bool kWide = Simd::kLanes == 16;  // 32 registers, else 16
constexpr int kTile = kWide && kMostRows > 2 ? 6 : 2;  // rows of x whose sums, twice two vectors each, stay in registers

/// c = clamp(round(x / s), -128, 127) of a vector.
inline Simd::I round_to_codes(Simd::F x, Simd::F step) {
  using V = Simd;
  return V::to_int(V::min(V::max(V::round(V::div(x, step)), V::splat(-128.0f)), V::splat(127.0f)));
}

/// 2 max|x| / 255 (1 if all are zero): `Int(8)` a token, symmetric.
inline float scale_of_row(const float* x, std::int64_t k) {
  using V = Simd;
  V::F top = V::zero();
  for (std::int64_t i = 0; i < k; i += V::kLanes)
    top = V::max(top, V::abs(V::load_first(x + i, static_cast<int>(k - i < V::kLanes ? k - i : V::kLanes))));
  const float largest = V::largest(top);
  return largest > 0.0f ? 2.0f * largest / 255.0f : 1.0f;
}

/// Codes of a row by a scale that is known, or by its own where that is 0. Returns the scale; codes beyond k are zero.
inline float round_row(const float* x, std::int64_t k, std::int64_t k_padded, float known, std::int8_t* codes) {
  using V = Simd;
  const float scale = known > 0.0f ? known : scale_of_row(x, k);
  const V::F step = V::splat(scale);
  for (std::int64_t i = 0; i < k_padded; i += 4 * V::kLanes) {
    V::I part[4];
    for (int j = 0; j < 4; ++j) {
      const std::int64_t at = i + j * V::kLanes, left = k - at;
      const V::F v = left >= V::kLanes ? V::load(x + at) : left > 0 ? V::load_first(x + at, static_cast<int>(left)) : V::zero();
      part[j] = round_to_codes(v, step);
    }
    V::store_words(codes + i, V::narrow(part[0], part[1], part[2], part[3]));
  }
  return scale;
}

/// The sum of codes [begin, end).
inline std::int32_t sum_codes(const std::int8_t* codes, std::int64_t begin, std::int64_t end) {
  using V = Simd;
  V::I sum = V::splat_word(0);
  std::int64_t i = begin;
  for (; i + 4 * V::kLanes <= end; i += 4 * V::kLanes) sum = V::dot4(sum, V::splat_word(0x01010101), V::load_words(codes + i));
  std::int32_t total = V::sum_words(sum);
  for (; i < end; ++i) total += codes[i];
  return total;
}

/// Codes go to tiles of kTile rows with the words of the rows side by side, so that one pointer walks over all of them.
inline void round_inputs(const Linear& job, const Rounded& to, std::int64_t begin, std::int64_t end, std::int8_t* codes) {
  const std::int64_t k = job.w.k, group = job.w.group;
  for (std::int64_t m = begin; m < end; ++m) {
    to.scale[m] = round_row(job.x + m * job.x_stride, k, to.k_padded, job.x_scale, codes);
    for (std::int64_t g = 0; g < job.w.groups; ++g)
      to.sums[m * job.w.groups + g] = sum_codes(codes, g * group, (g + 1) * group < k ? (g + 1) * group : k);
    std::int8_t* tile = to.codes + m / kTile * kTile * to.k_padded + m % kTile * 4;
    for (std::int64_t i = 0; i < to.k_padded; i += 4) __builtin_memcpy(tile + i * kTile, codes + i, 4);
  }
}

/// Sums, and scales where one is known, of rows [begin, end), begin a whole tile, from their codes. Three vectors hold whole words of all rows
/// of a tile, whatever kTile is (6 or 2), so that lane l of vector v belongs to row (v kLanes + l) mod kTile.
inline void sum_inputs(const Linear& job, const Rounded& of, std::int64_t begin, std::int64_t end) {
  using V = Simd;
  constexpr int kVectors = 3, kWords = kVectors * V::kLanes / kTile;
  static_assert(kVectors * V::kLanes % kTile == 0);
  const std::int64_t groups = job.w.groups, group = groups > 1 ? job.w.group : of.k_padded;
  const V::I ones = V::splat_word(0x01010101);
  for (std::int64_t first = begin; first < end; first += kTile) {
    const int rows = static_cast<int>(end - first < kTile ? end - first : kTile);
    const std::int8_t* tile = of.codes + first * of.k_padded;
    for (int m = 0; m < rows && job.x_scale > 0.0f; ++m) of.scale[first + m] = job.x_scale;
    for (std::int64_t g = 0; g < groups; ++g) {
      std::int64_t word = g * group / 4;
      const std::int64_t stop = g + 1 < groups ? word + group / 4 : of.k_padded / 4;
      V::I sum[kVectors];
      for (V::I& one : sum) one = V::splat_word(0);
      for (; word + kWords <= stop; word += kWords)
        for (int v = 0; v < kVectors; ++v)
          sum[v] = V::dot4(sum[v], ones, V::load_words(tile + 4 * (word * kTile + v * V::kLanes)));
      alignas(64) std::int32_t lanes[kVectors * V::kLanes];
      for (int v = 0; v < kVectors; ++v) V::store_words(lanes + v * V::kLanes, sum[v]);
      for (int m = 0; m < rows; ++m) {
        std::int32_t total = 0;
        for (int i = m; i < kVectors * V::kLanes; i += kTile) total += lanes[i];
        for (std::int64_t w = word; w < stop; ++w)
          for (int byte = 0; byte < 4; ++byte) total += tile[4 * (w * kTile + m) + byte];
        of.sums[(first + m) * groups + g] = total;
      }
    }
  }
}

/// Results of a row and a panel as inputs of the next layer: two vectors, from column `first` on.
inline void store_codes(const Rounded& next, Simd::F step, Simd::F low, Simd::F high, std::int64_t m, std::int64_t first) {
  using V = Simd;
  alignas(64) std::int8_t codes[4 * V::kLanes];
  const V::I none = V::splat_word(0);
  V::store_words(codes, V::narrow(round_to_codes(low, step), round_to_codes(high, step), none, none));
  std::int8_t* tile = next.codes + m / kTile * kTile * next.k_padded + m % kTile * 4;
  for (int i = 0; i < kPanel; i += 4) __builtin_memcpy(tile + (first + i) * kTile, codes + i, 4);
}

/// Bytes of scratch: the panel (k_padded / 4, kPanel words), its scales and scaled zero points (groups, kPanel), sums of
/// kInputRows rows of x and, where codes are not unpacked in registers, kLanes rows of them.
struct Panel {
  std::uint8_t* codes;
  float* scales;
  float* zeros;
  float* sums;
  std::uint8_t* rows;
};

inline Panel panel_of(const Linear& job, std::int64_t k_padded, std::uint8_t* scratch) {
  const std::int64_t codes = k_padded * kPanel, floats = job.w.groups * kPanel;
  auto* scales = reinterpret_cast<float*>(scratch + codes);
  float* sums = scales + 2 * floats;
  return {scratch, scales, scales + floats, sums, reinterpret_cast<std::uint8_t*>(sums + kInputRows * kPanel)};
}

template <int Bits, bool InRegisters = Simd::kUnpacks, class V = Simd>  // a parameter, so that what V lacks is not looked up
void fill_codes(const Matrix& w, const Panel& to, std::int64_t first, std::int64_t k_padded, Isa isa) {
  constexpr int kCodes = 4 * V::kLanes;  // in a vector
  const std::int64_t row_bytes = 4 * w.words_per_row;
  for (int half = 0; half < 2; ++half) {
    const std::int64_t n = first + half * V::kLanes;
    if constexpr (!InRegisters) {
      for (int r = 0; r < V::kLanes; ++r) {
        std::uint8_t* row = to.rows + r * k_padded;
        if (n + r < w.rows) unpack_codes(w, n + r, 0, w.k, row, isa);
        for (std::int64_t i = n + r < w.rows ? w.k : 0; i < k_padded; ++i) row[i] = 0;
      }
    }
    for (std::int64_t at = 0; at < k_padded; at += kCodes) {
      typename V::I block[V::kLanes];
      for (int r = 0; r < V::kLanes; ++r) {
        if constexpr (InRegisters) {
          // Bits beyond the row are zero only up to its last word, and inputs are zero there: any code will do.
          const std::int64_t byte = at / 8 * Bits, left = n + r < w.rows ? row_bytes - byte : 0;
          const auto* row = reinterpret_cast<const std::uint8_t*>(w.words) + (n + r) * row_bytes + byte;
          const typename V::I raw = left >= 64 ? V::load_words(row) : left > 0 ? V::load_bytes(row, static_cast<int>(left)) : V::splat_word(0);
          block[r] = V::template unpack64<Bits>(raw);
        } else {
          block[r] = V::load_words(to.rows + r * k_padded + at);
        }
      }
      V::transpose(block);
      std::uint8_t* out = to.codes + (at * kPanel) + half * 4 * V::kLanes;
      for (int r = 0; r < V::kLanes; ++r) V::store_words(out + r * 4 * kPanel, block[r]);
    }
  }
}

/// Scales, and scales times zero points, with the rows of the panel side by side; zero for rows beyond the last.
inline void fill_scales(const Matrix& w, const Panel& to, std::int64_t first, float* row) {
  const auto [step, middle] = steps_of(w);
  float* zeros = row + w.groups + Simd::kLanes;
  for (int r = 0; r < kPanel; ++r) {
    const std::int64_t n = first + r;
    if (n < w.rows) {
      read_floats(w.scale, w.scale_dtype, w.one_scale ? 0 : n * w.groups, w.groups, row);
      if (w.zero_kind != Zero::none) read_zeros(w, n, zeros);
    }
    for (std::int64_t g = 0; g < w.groups; ++g) {
      const float scale = n < w.rows ? row[g] * step : 0.0f;
      to.scales[g * kPanel + r] = scale;
      to.zeros[g * kPanel + r] = n < w.rows ? scale * (middle + (w.zero_kind == Zero::none ? 0.0f : zeros[g])) : 0.0f;
    }
  }
}

/// Columns of W that a panel is multiplied by before the next ones: it stays in the first-level cache meanwhile.
constexpr std::int64_t kSpanBytes = 16384;

/// A range of columns: whole groups, or words where there is one group. What a tile of x has summed up is kept from one
/// range to the next in `sums` (rows of x, kPanel), as float32 where there are groups and as integers where there is one.
struct ColumnRange {
  std::int64_t begin, end;  // of columns
  bool first, last;
  float* sums;
  std::int64_t m_begin;  // the row of x that `sums` begins with
};

/// M rows of x against a span of the panel.
template <int M, bool Grouped>
void panel_block(const Linear& job, const Rounded& in, const Panel& panel, const ColumnRange& span, std::int64_t m0, std::int64_t first) {
  using V = Simd;
  using F = V::F;
  const Matrix& w = job.w;
  const std::int8_t* x = in.codes + m0 / kTile * kTile * in.k_padded + m0 % kTile * 4;
  float* kept = span.sums + (m0 - span.m_begin) * kPanel;
  F total[2 * M];
  if constexpr (Grouped)
    unroll<2 * M>([&](auto i) LACONIC_UNROLLED { total[i] = span.first ? V::zero() : V::load(kept + i * V::kLanes); });
  const std::int64_t g_end = !Grouped ? 1 : span.last ? w.groups : span.end / w.group;
  for (std::int64_t g = Grouped ? span.begin / w.group : 0; g < g_end; ++g) {
    const std::int64_t begin = Grouped ? g * w.group : span.begin;
    const std::int64_t end = !Grouped ? span.end : begin + w.group < in.k_padded ? begin + w.group : in.k_padded;
    typename V::I acc[2 * M];
    unroll<2 * M>([&](auto i) LACONIC_UNROLLED {
      acc[i] = Grouped || span.first ? V::splat_word(0) : V::load_words(kept + i * V::kLanes);
    });
    const std::uint8_t* codes = panel.codes + begin * kPanel;
    const std::int8_t* words = x + begin * kTile;
    for (std::int64_t i = begin; i < end; i += 4, codes += 4 * kPanel, words += 4 * kTile) {
      const typename V::I a = V::load_words(codes), b = V::load_words(codes + 4 * V::kLanes);
      unroll<M>([&](auto m) LACONIC_UNROLLED {
        std::int32_t word;
        __builtin_memcpy(&word, words + 4 * m, 4);
        const typename V::I value = V::splat_word(word);
        acc[2 * m] = V::dot4(acc[2 * m], a, value);
        acc[2 * m + 1] = V::dot4(acc[2 * m + 1], b, value);
      });
    }
    if (!Grouped && !span.last) {
      unroll<2 * M>([&](auto i) LACONIC_UNROLLED { V::store_words(kept + i * V::kLanes, acc[i]); });
      return;
    }
    const F scale[2] = {V::load(panel.scales + g * kPanel), V::load(panel.scales + g * kPanel + V::kLanes)};
    const F zero[2] = {V::load(panel.zeros + g * kPanel), V::load(panel.zeros + g * kPanel + V::kLanes)};
    unroll<M>([&](auto m) LACONIC_UNROLLED {
      const F sum = V::splat(-static_cast<float>(in.sums[(m0 + m) * w.groups + g]));
      unroll<2>([&](auto h) LACONIC_UNROLLED {
        const F product = V::to_float(acc[2 * m + h]);
        const F scaled = Grouped ? V::fma(product, scale[h], total[2 * m + h]) : V::mul(product, scale[h]);
        total[2 * m + h] = V::fma(zero[h], sum, scaled);
      });
    });
  }
  if (!span.last) {
    unroll<2 * M>([&](auto i) LACONIC_UNROLLED { V::store(kept + i * V::kLanes, total[i]); });
    return;
  }
  if (job.next != nullptr) {
    F bias[2];
    unroll<2>([&](auto h) LACONIC_UNROLLED {
      const std::int64_t left = w.rows - first - h * V::kLanes;
      bias[h] = job.then.bias == nullptr || left <= 0 ? V::zero()
                : V::load_first(job.then.bias + first + h * V::kLanes, static_cast<int>(left < V::kLanes ? left : V::kLanes));
    });
    const F step = V::splat(job.next_scale);
    unroll<M>([&](auto m) LACONIC_UNROLLED {
      const F scale = V::splat(in.scale[m0 + m]);
      store_codes(*job.next, step, activate(V::fma(total[2 * m], scale, bias[0]), job.then.act),
                  activate(V::fma(total[2 * m + 1], scale, bias[1]), job.then.act), m0 + m, first);
    });
    return;
  }
  unroll<2>([&](auto h) LACONIC_UNROLLED {
    const std::int64_t n = first + h * V::kLanes;
    if (n >= w.rows) return;
    const int left = static_cast<int>(w.rows - n < V::kLanes ? w.rows - n : V::kLanes);
    const F bias = job.then.bias == nullptr ? V::zero() : V::load_first(job.then.bias + n, left);
    unroll<M>([&](auto m) LACONIC_UNROLLED {
      const std::int64_t at = (m0 + m) * job.out_stride + n;
      F y = activate(V::fma(total[2 * m + h], V::splat(in.scale[m0 + m]), bias), job.then.act);
      if (job.then.residual != nullptr) y = V::add(y, V::load_first(job.then.residual + at, left));
      V::store_first(job.out + at, y, left);
    });
  });
}

template <int M, bool Grouped>
void panel_inputs(const Linear& job, const Rounded& in, const Panel& panel, const ColumnRange& span, std::int64_t m,
                  std::int64_t m_end, std::int64_t first) {
  for (; m + M <= m_end; m += M) panel_block<M, Grouped>(job, in, panel, span, m, first);
  if constexpr (M > 1) {
    if (m < m_end) panel_inputs<(M > 4 ? 4 : M / 2), Grouped>(job, in, panel, span, m, m_end, first);
  }
}

template <bool Grouped>
void panel_spans(const Linear& job, const Rounded& in, const Panel& panel, std::int64_t m_begin, std::int64_t m_end, std::int64_t first) {
  const std::int64_t whole = Grouped ? job.w.group : 4 * Simd::kLanes, some = kSpanBytes / kPanel / whole;
  const std::int64_t step = some > 0 ? some * whole : whole;
  for (std::int64_t k = 0; k < in.k_padded; k += step) {
    const std::int64_t end = k + step < in.k_padded ? k + step : in.k_padded;
    const ColumnRange span{.begin = k, .end = end, .first = k == 0, .last = end == in.k_padded, .sums = panel.sums, .m_begin = m_begin};
    panel_inputs<kTile, Grouped>(job, in, panel, span, m_begin, m_end, first);
  }
}

/// One panel of W against rows [m_begin, m_end) of x.
inline void linear_int8(const Linear& job, const Rounded& in, std::int64_t number, std::int64_t m_begin,
                        std::int64_t m_end, std::uint8_t* scratch, Isa isa) {
  const std::int64_t first = number * kPanel;
  const Panel panel = panel_of(job, in.k_padded, scratch);
  if (job.w.base3) fill_codes<2, false>(job.w, panel, first, in.k_padded, isa);
  else switch (job.w.bits) {
    case 1: fill_codes<1>(job.w, panel, first, in.k_padded, isa); break;
    case 2: fill_codes<2>(job.w, panel, first, in.k_padded, isa); break;
    case 3: fill_codes<3>(job.w, panel, first, in.k_padded, isa); break;
    case 4: fill_codes<4>(job.w, panel, first, in.k_padded, isa); break;
    case 5: fill_codes<5>(job.w, panel, first, in.k_padded, isa); break;
    case 6: fill_codes<6>(job.w, panel, first, in.k_padded, isa); break;
    case 7: fill_codes<7>(job.w, panel, first, in.k_padded, isa); break;
    default: fill_codes<8>(job.w, panel, first, in.k_padded, isa); break;
  }
  fill_scales(job.w, panel, first, reinterpret_cast<float*>(panel.rows));
  if (job.w.groups > 1) panel_spans<true>(job, in, panel, m_begin, m_end, first);
  else panel_spans<false>(job, in, panel, m_begin, m_end, first);
}

}  // namespace laconic::LACONIC_TARGET
