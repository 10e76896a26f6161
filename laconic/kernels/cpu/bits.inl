// Counting unequal bits of rows and columns, and rounding numbers to bits. Included once for every instruction set.
//
// Panels hold 16 columns side by side: a word of a row is repeated over the lanes and meets one word of each column, so
// every lane is a sum of its own and nothing is added across lanes at the end. Where there is an instruction that
// counts bits, a block of sums stays in registers (xor, count, add: as many operations as there are bits to read).
// Elsewhere counting is dear, and carry-save adders (Harley and Seal) count 16 words at the price of one.

namespace laconic::LACONIC_TARGET {

struct Mismatches {
  static Simd::I step(Simd::I sum, Simd::I column, Simd::I row) { return Simd::count(sum, Simd::bit_xor(column, row)); }
};

/// Rows of 4 signed bytes to a word, columns of 4 unsigned ones.
struct ByteProducts {
  static Simd::I step(Simd::I sum, Simd::I column, Simd::I row) { return Simd::dot4(sum, column, row); }
};

constexpr int kTileRows = Simd::kLanes == 16 ? 8 : Simd::kLanes == 8 ? 3 : 2;
constexpr int kTilePanels = Simd::kLanes == 16 ? 2 : 1;
constexpr int kVectors = static_cast<int>(kPanelColumns) / Simd::kLanes;  // of a panel's word

/// R rows against P panels.
template <class Product, int R, int P>
void tile_block(const Tile& t, const std::uint32_t* a, const std::uint32_t* b, std::int32_t* out) {
  using V = Simd;
  constexpr int kWide = P * kVectors;
  // Every loop over sums is unrolled: an index that is no constant would put them into memory.
  V::I sums[R][kWide];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kWide; ++v) sums[r][v] = V::splat_word(0);
  for (std::int64_t k = 0; k < t.words; ++k) {
    V::I column[kWide];
#pragma GCC unroll 4
    for (int v = 0; v < kWide; ++v) column[v] = V::load_words(b + v / kVectors * t.b_stride + k * kPanelColumns + v % kVectors * V::kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const V::I row = V::splat_word(static_cast<std::int32_t>(a[r * t.a_stride + k]));
#pragma GCC unroll 4
      for (int v = 0; v < kWide; ++v) sums[r][v] = Product::step(sums[r][v], column[v], row);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kWide; ++v) V::store_words(out + r * t.out_stride + v * V::kLanes, sums[r][v]);
}

/// The last rows, fewer than a block.
template <class Product, int R, int P>
void tile_rest(const Tile& t, std::int64_t left, const std::uint32_t* a, const std::uint32_t* b, std::int32_t* out) {
  if (left == R) tile_block<Product, R, P>(t, a, b, out);
  if constexpr (R > 1) {
    if (left < R) tile_rest<Product, R - 1, P>(t, left, a, b, out);
  }
}

template <class Product, int P>
void tile_rows(const Tile& t, std::int64_t panel) {
  const std::uint32_t* b = t.b + panel * t.b_stride;
  std::int64_t r = 0;
  for (; r + kTileRows <= t.rows; r += kTileRows)
    tile_block<Product, kTileRows, P>(t, t.a + r * t.a_stride, b, t.out + r * t.out_stride + panel * kPanelColumns);
  if (r < t.rows)
    tile_rest<Product, kTileRows, P>(t, t.rows - r, t.a + r * t.a_stride, b, t.out + r * t.out_stride + panel * kPanelColumns);
}

template <class Product>
void tile_panels(const Tile& t) {
  const std::int64_t panels = t.columns / kPanelColumns;
  std::int64_t panel = 0;
  for (; panel + kTilePanels <= panels; panel += kTilePanels) tile_rows<Product, kTilePanels>(t, panel);
  for (; panel < panels; ++panel) tile_rows<Product, 1>(t, panel);
}

/// low + a + b of each bit: the sum's low bit stays in `low`, its high bit is returned.
LACONIC_INLINE Simd::I carry(Simd::I& low, Simd::I a, Simd::I b) {
  using V = Simd;
  const V::I half = V::bit_xor(low, a), high = V::bit_or(V::bit_and(low, a), V::bit_and(half, b));
  low = V::bit_xor(half, b);
  return high;
}

/// Unequal bits of 2^Level words, added to what `low` holds of each power of two; returns the carry of 2^Level.
template <int Level>
LACONIC_INLINE Simd::I carry_words(Simd::I (&low)[4], const std::uint32_t* a, const std::uint32_t* b) {
  using V = Simd;
  if constexpr (Level == 0) {
    return V::bit_xor(V::load_words(b), V::splat_word(static_cast<std::int32_t>(*a)));
  } else {
    constexpr int kHalf = 1 << (Level - 1);
    const V::I first = carry_words<Level - 1>(low, a, b);
    return carry(low[Level - 1], first, carry_words<Level - 1>(low, a + kHalf, b + kHalf * kPanelColumns));
  }
}

/// Unequal bits of one row and of the columns in one vector of a panel.
inline Simd::I harley_seal(const std::uint32_t* a, const std::uint32_t* b, std::int64_t words) {
  using V = Simd;
  V::I total = V::splat_word(0), low[4] = {total, total, total, total};
  std::int64_t k = 0;
  for (; k + 16 <= words; k += 16) total = V::count(total, carry_words<4>(low, a + k, b + k * kPanelColumns));
  for (int level = 3; level >= 0; --level) total = V::count(V::add_words(total, total), low[level]);
  for (; k < words; ++k) total = V::count(total, carry_words<0>(low, a + k, b + k * kPanelColumns));
  return total;
}

inline void mismatch_panels(const Tile& t) {
  using V = Simd;
  if constexpr (V::kCounts) {
    tile_panels<Mismatches>(t);
  } else {
    for (std::int64_t c = 0; c < t.columns; c += V::kLanes) {
      const std::uint32_t* b = t.b + c / kPanelColumns * t.b_stride + c % kPanelColumns;
      for (std::int64_t r = 0; r < t.rows; ++r)
        V::store_words(t.out + r * t.out_stride + c, harley_seal(t.a + r * t.a_stride, b, t.words));
    }
  }
}

inline void byte_panels(const Tile& t) { tile_panels<ByteProducts>(t); }

/// R rows against one column that lies as a row, lanes along k.
template <int R>
void mismatch_column(const Tile& t, std::int64_t row, std::int64_t column) {
  using V = Simd;
  const std::uint32_t *a = t.a + row * t.a_stride, *b = t.b + column * t.b_stride;
  V::I sums[R];
  for (V::I& sum : sums) sum = V::splat_word(0);
  std::int64_t k = 0;
  for (; k + V::kLanes <= t.words; k += V::kLanes) {
    const V::I other = V::load_words(b + k);
    for (int r = 0; r < R; ++r) sums[r] = V::count(sums[r], V::bit_xor(V::load_words(a + r * t.a_stride + k), other));
  }
  if (k < t.words) {
    const int left = static_cast<int>(4 * (t.words - k));
    const V::I other = V::load_bytes(b + k, left);
    for (int r = 0; r < R; ++r) sums[r] = V::count(sums[r], V::bit_xor(V::load_bytes(a + r * t.a_stride + k, left), other));
  }
  for (int r = 0; r < R; ++r) t.out[(row + r) * t.out_stride + column] = V::sum_words(sums[r]);
}

/// As mismatch_panels, with columns that lie as rows: for few rows, where turning the columns would cost more.
inline void mismatch_rows(const Tile& t) {
  for (std::int64_t c = 0; c < t.columns; ++c) {
    std::int64_t r = 0;
    for (; r + 4 <= t.rows; r += 4) mismatch_column<4>(t, r, c);
    if (r + 2 <= t.rows) {
      mismatch_column<2>(t, r, c);
      r += 2;
    }
    if (r < t.rows) mismatch_column<1>(t, r, c);
  }
}

/// One panel of `count` rows, at most 16; the columns past them are zero.
inline void lay_panel(const std::uint32_t* rows, std::int64_t stride, std::int64_t count, std::int64_t words,
                      std::uint32_t* panel) {
  for (std::int64_t first = 0; first < kPanelColumns; first += 4) {
    const std::uint32_t* from = rows + first * stride;
    std::int64_t k = 0;
    if (first + 4 <= count)
      for (; k + 4 <= words; k += 4) Simd::turn4(from + k, stride, panel + k * kPanelColumns + first, kPanelColumns);
    for (; k < words; ++k)
      for (std::int64_t j = 0; j < 4; ++j) panel[k * kPanelColumns + first + j] = first + j < count ? from[j * stride + k] : 0u;
  }
}

/// total += weight * counts, n a multiple of 16.
inline void add_counts(std::int32_t* total, const std::int32_t* counts, std::int32_t weight, std::int64_t n) {
  using V = Simd;
  const V::I by = V::splat_word(weight);
  for (std::int64_t i = 0; i < n; i += V::kLanes)
    V::store_words(total + i, V::add_words(V::load_words(total + i), V::mul_words(V::load_words(counts + i), by)));
}

inline void store_some(void* out, Simd::I x, int n) {
  using V = Simd;
  if (n >= V::kLanes) return V::store_words(out, x);
  alignas(64) std::uint32_t all[V::kLanes];
  V::store_words(all, x);
  for (int i = 0; i < n; ++i) static_cast<std::uint32_t*>(out)[i] = all[i];
}

/// Counts of unequal bits (rows, columns) of a product's tile at (m, n), stored as what they stand for.
inline void finish_bits(const BitProduct& job, const BitFinish& f, const std::int32_t* counts, std::int64_t stride,
                        std::int64_t m, std::int64_t rows, std::int64_t n, std::int64_t columns) {
  using V = Simd;
  for (std::int64_t r = m; r < m + rows; ++r, counts += stride) {
    const V::I base = V::splat_word(f.row[r]);
    const V::F row_scale = V::splat(job.out != nullptr ? job.a_scale[job.a_scale_per_row ? r : 0] : 0.0f);
    for (std::int64_t c = 0; c < columns; c += V::kLanes) {
      const int left = static_cast<int>(columns - c < V::kLanes ? columns - c : V::kLanes);
      const V::I count = V::load_words(counts + c);
      V::I y = V::sub_words(base, V::add_words(count, count));
      if (f.column != nullptr) y = V::add_words(y, V::load_bytes(f.column + n + c, 4 * left));
      if (f.halvings != 0) y = V::shift_right_signed(y, f.halvings);
      if (job.exact != nullptr) store_some(job.exact + r * job.b.rows + n + c, y, left);
      if (job.out != nullptr) {
        const V::F scale = job.b_scale_per_row ? V::load_first(job.b_scale + n + c, left) : V::splat(job.b_scale[0]);
        V::F v = V::mul(V::mul(V::to_float(y), row_scale), scale);
        if (job.bias != nullptr) v = V::add(v, V::load_first(job.bias + n + c, left));
        V::store_first(job.out + r * job.b.rows + n + c, v, left);
      }
    }
  }
}

/// One row of signs: bit 1 where x >= 0.
inline void sign_row(const float* x, std::int64_t k, std::uint32_t* out) {
  using V = Simd;
  std::int64_t i = 0;
  for (; i + 32 <= k; i += 32) {
    std::uint32_t word = 0;
    for (int j = 0; j < 32; j += V::kLanes) word |= V::sign_bits(V::not_negative(V::load(x + i + j))) << j;
    *out++ = word;
  }
  if (i < k) {
    std::uint32_t word = 0;
    for (int j = 0; i + j < k; ++j) word |= static_cast<std::uint32_t>(x[i + j] >= 0.0f) << j;
    *out = word;
  }
}

inline Simd::I to_codes(Simd::F x, Simd::F factor, const Coding& coding) {
  using V = Simd;
  const V::F scaled = V::mul(x, factor);
  const V::F code = V::add(coding.down ? V::floor(scaled) : V::round(scaled), V::splat(coding.offset));
  return V::to_int(V::min(V::max(code, V::splat(coding.low)), V::splat(coding.high)));
}

/// One row of codes, bit i of them to plane i.
inline void plane_row(const float* x, std::int64_t k, float factor, const Coding& coding, int planes,
                      std::uint32_t* out, std::int64_t plane_stride) {
  using V = Simd;
  const V::F by = V::splat(factor);
  for (std::int64_t i = 0; i < k; i += 32, ++out) {
    std::uint32_t words[kMaxPlanes] = {};
    for (int j = 0; j < 32 && i + j < k; j += V::kLanes) {
      const int left = static_cast<int>(k - i - j < V::kLanes ? k - i - j : V::kLanes);
      const V::I codes = to_codes(V::load_first(x + i + j, left), by, coding);
      const std::uint32_t some = (std::uint32_t{1} << left) - 1u;
      for (int p = 0; p < planes; ++p) words[p] |= (V::sign_bits(V::shift_left(codes, 31 - p)) & some) << j;
    }
    for (int p = 0; p < planes; ++p) out[p * plane_stride] = words[p];
  }
}

}  // namespace laconic::LACONIC_TARGET
