// y = x W^T for few rows of x, rounded to 8 bits each, on integer dot products. Included once for every instruction set.
//
// A byte of W holds P = 8/bits codes (ternary: 5). One vector of bytes, shifted P times and masked, gives P vectors of
// codes; the codes of x are laid out the same way once, so that weights are read as they lie. A 32-bit lane adds up the
// products of 4 P neighbours, which belong to one group: a vector of scales multiplies the sums of a chunk.
// Ternary lanes hold 20 neighbours and groups seldom end there. Where one ends within a lane, what lies beyond is taken
// from a second copy of x, which is zero elsewhere, and gets the scale of the next group.

namespace laconic::LACONIC_TARGET {

/// How the codes of x are laid out for a matrix: codes of one byte of W, kBase3 for its five; 3 means 3-bit codes in
/// their order; 8 also stands for everything that is unpacked to bytes first.
inline int rows_width(const Matrix& w) {
  if (w.base3) return w.groups <= 1 || w.group % 20 == 0 || splits_lanes(w) ? kBase3 : 8;
  if (w.bits == 3) return Simd::kUnpacks ? 3 : 8;
  const bool whole = w.bits == 1 || w.bits == 2 || w.bits == 4;
  return whole && (w.groups <= 1 || w.group % (32 / w.bits) == 0) ? w.bits : 8;
}

/// Codes that one byte holds; 3-bit codes come as one.
constexpr int byte_planes(int width) { return width == kBase3 ? 5 : width == 3 ? 1 : 8 / width; }

/// Memory of one call, in bytes: what all threads share, and each one's own.
inline RowsSizes rows_sizes(const Linear& job) {
  constexpr std::int64_t kBytes = 4 * Simd::kLanes;
  const Matrix& w = job.w;
  const int width = rows_width(w);
  const std::int64_t chunk = kBytes * byte_planes(width), chunks = (w.k + chunk - 1) / chunk, k_padded = chunks * chunk;
  const std::int64_t padded = w.groups + Simd::kLanes, unpacked = width == 8 && (w.bits != 8 || w.base3) ? 4 * k_padded : 0;
  return {.codes = job.m * k_padded, .scale = 4 * job.m, .sums = 4 * job.m * padded, .index = 4 * chunks * Simd::kLanes,
          .thread = unpacked + 4 * (5 * padded), .natural = 2 * k_padded, .chunks = chunks, .k_padded = k_padded,
          .sums_stride = padded, .split = splits_lanes(w)};
}

/// to[c, p, j] = from[c, j, p]: codes of x as those of a chunk of W come.
template <int Planes>
void spread_codes(const std::int8_t* from, std::int64_t chunks, std::int8_t* to) {
  constexpr int kBytes = 4 * Simd::kLanes;
  for (std::int64_t c = 0; c < chunks; ++c, from += kBytes * Planes, to += kBytes * Planes)
    for (int p = 0; p < Planes; ++p)
      for (int j = 0; j < kBytes; ++j) to[p * kBytes + j] = from[j * Planes + p];
}

inline void spread_codes(int width, const std::int8_t* from, std::int64_t chunks, std::int8_t* to) {
  switch (byte_planes(width)) {
    case 1: return spread_codes<1>(from, chunks, to);
    case 2: return spread_codes<2>(from, chunks, to);
    case 4: return spread_codes<4>(from, chunks, to);
    case 5: return spread_codes<5>(from, chunks, to);
    default: return spread_codes<8>(from, chunks, to);
  }
}

/// Rounds the rows of x and lays them out; `natural` is scratch.
inline void lay_rows(const Linear& job, const RoundedRows& to, std::int8_t* natural) {
  const std::int64_t k = job.w.k, group = job.w.group, k_padded = to.k_padded;
  const int width = rows_width(job.w);
  std::int8_t* second = natural + k_padded;
  for (std::int64_t m = 0; m < job.m; ++m) {
    to.scale[m] = round_row(job.x + m * job.x_stride, k, k_padded, job.x_scale, natural);
    for (std::int64_t g = 0; g < job.w.groups; ++g)
      to.sums[m * to.sums_stride + g] = static_cast<float>(sum_codes(natural, g * group, (g + 1) * group < k ? (g + 1) * group : k));
    if (to.second != nullptr) {
      for (std::int64_t i = 0; i < k_padded; ++i) second[i] = 0;
      for (std::int64_t edge = group; edge < k; edge += group)
        for (std::int64_t i = edge; i < k && i % 20 != 0; ++i) second[i] = natural[i], natural[i] = 0;
      spread_codes(width, second, to.chunks, to.second + m * k_padded);
    }
    spread_codes(width, natural, to.chunks, to.codes + m * k_padded);
  }
  const std::int64_t chunk = k_padded / (to.chunks > 0 ? to.chunks : 1), lane = chunk / Simd::kLanes;
  for (std::int64_t c = 0; c < to.chunks; ++c)
    for (int j = 0; j < Simd::kLanes; ++j) {
      const std::int64_t at = c * chunk + j * lane;
      to.index[c * Simd::kLanes + j] = static_cast<std::int32_t>((at < k ? at : k - 1) / group - c * chunk / group);
    }
}

/// A vector of bytes of a row.
template <int Width>
inline Simd::I load_codes(const std::uint8_t* row, std::int64_t chunk, std::int64_t row_bytes) {
  constexpr int kFull = 4 * Simd::kLanes, kStep = Width == 3 ? kFull / 8 * 3 : kFull;
  const std::int64_t left = row_bytes - chunk * kStep;
  const std::uint8_t* at = row + chunk * kStep;
  return left >= kFull ? Simd::load_words(at) : Simd::load_bytes(at, static_cast<int>(left));
}

/// 3-bit codes, one a byte; a template, so that what V lacks is not looked up.
template <class V>
inline typename V::I three_bits(typename V::I bytes) {
  if constexpr (V::kUnpacks) return V::template unpack64<3>(bytes);
  else return bytes;
}

/// Rows of W as bytes: as they are stored, or as one unpacked them.
struct RowBytes {
  const std::uint8_t* first;
  std::int64_t stride, bytes;
};

/// R rows of W from row n, their bytes at `rows`, against M rows of x from row m0.
template <int Width, int M, int R, bool Grouped, bool Split>
void rows_block(const Linear& job, const RoundedRows& in, const RowBytes& rows, std::int64_t m0, std::int64_t n, float* scratch) {
  using V = Simd;
  using F = V::F;
  using I = V::I;
  constexpr int kBytes = 4 * V::kLanes, kPlanes = byte_planes(Width), kSums = M * R;
  const Matrix& w = job.w;
  const Steps steps = steps_of(w);
  const std::int64_t padded = w.groups + V::kLanes;
  for (int r = 0; r < R; ++r) {
    read_floats(w.scale, w.scale_dtype, w.one_scale ? 0 : (n + r) * w.groups, w.groups, scratch + r * padded);
    if constexpr (Split) V::store(scratch + r * padded + w.groups, V::zero());  // lanes without a second group still get a scale
  }
  F total[kSums];
  I sum[kSums];  // of a chunk, or of all where there is one group
  unroll<kSums>([&](auto i) LACONIC_UNROLLED { total[i] = V::zero(), sum[i] = V::splat_word(0); });
  const I mask = V::splat_word(Width == 1 ? 0x01010101 : Width == 2 ? 0x03030303 : 0x0f0f0f0f);
  for (std::int64_t c = 0; c < in.chunks; ++c) {
    I bytes[R], beyond[Split ? kSums : 1];
    unroll<R>([&](auto r) LACONIC_UNROLLED {
      const std::uint8_t* row = rows.first + r * rows.stride;
      bytes[r] = load_codes<Width>(row, c, rows.bytes);
      prefetch(row + R * rows.stride + c * kBytes);
    });
    if constexpr (Grouped) unroll<kSums>([&](auto i) LACONIC_UNROLLED { sum[i] = V::splat_word(0); });
    const std::int8_t* x = in.codes + m0 * in.k_padded + c * kBytes * kPlanes;
    if constexpr (Width == kBase3) {
      // A byte b is a fraction: its digits are floor(3 b / 256), and what is left, b' = 3 b mod 256, holds the next.
      // So 256 sum d x = 3 sum b x - sum b' x, and no digit is ever made.
      const std::int8_t* x2 = Split ? in.second + m0 * in.k_padded + c * kBytes * kPlanes : nullptr;
      I high[kSums], low[kSums], high2[Split ? kSums : 1], low2[Split ? kSums : 1];
      unroll<kSums>([&](auto i) LACONIC_UNROLLED {
        high[i] = low[i] = V::splat_word(0);
        if constexpr (Split) high2[i] = low2[i] = V::splat_word(0);
      });
      unroll<kPlanes>([&](auto p) LACONIC_UNROLLED {
        I next[R];
        unroll<R>([&](auto r) LACONIC_UNROLLED { next[r] = V::add_bytes(bytes[r], V::add_bytes(bytes[r], bytes[r])); });
        unroll<M>([&](auto m) LACONIC_UNROLLED {
          const I value = V::load_words(x + m * in.k_padded + p * kBytes);
          unroll<R>([&](auto r) LACONIC_UNROLLED {
            high[m * R + r] = V::dot4(high[m * R + r], bytes[r], value);
            low[m * R + r] = V::dot4(low[m * R + r], next[r], value);
          });
          if constexpr (Split) {
            const I other = V::load_words(x2 + m * in.k_padded + p * kBytes);
            unroll<R>([&](auto r) LACONIC_UNROLLED {
              high2[m * R + r] = V::dot4(high2[m * R + r], bytes[r], other);
              low2[m * R + r] = V::dot4(low2[m * R + r], next[r], other);
            });
          }
        });
        unroll<R>([&](auto r) LACONIC_UNROLLED { bytes[r] = next[r]; });
      });
      const auto digits = [](I a, I b) LACONIC_UNROLLED {
        return V::shift_right_signed(V::sub_words(V::add_words(a, V::add_words(a, a)), b), 8);
      };
      unroll<kSums>([&](auto i) LACONIC_UNROLLED {
        sum[i] = V::add_words(sum[i], digits(high[i], low[i]));
        if constexpr (Split) beyond[i] = digits(high2[i], low2[i]);
      });
    } else unroll<kPlanes>([&](auto p) LACONIC_UNROLLED {
      I code[R];
      unroll<R>([&](auto r) LACONIC_UNROLLED {
        if constexpr (Width == 8) code[r] = bytes[r];
        else if constexpr (Width == 3) code[r] = three_bits<V>(bytes[r]);
        else code[r] = V::bit_and(p == 0 ? bytes[r] : V::shift_right(bytes[r], p * Width), mask);
      });
      unroll<M>([&](auto m) LACONIC_UNROLLED {
        const I value = V::load_words(x + m * in.k_padded + p * kBytes);
        unroll<R>([&](auto r) LACONIC_UNROLLED {
          if constexpr (Width == 8) sum[m * R + r] = V::dot4(sum[m * R + r], code[r], value);
          else sum[m * R + r] = V::dot4_small(sum[m * R + r], code[r], value);
        });
      });
    });
    if constexpr (Grouped) {
      const I index = V::load_words(in.index + c * V::kLanes);
      const float* scales = scratch + c * kBytes * kPlanes / w.group;
      unroll<R>([&](auto r) LACONIC_UNROLLED {
        const F near = V::load(scales + r * padded), scale = V::pick(near, index);
        unroll<M>([&](auto m) LACONIC_UNROLLED {
          total[m * R + r] = V::fma(V::to_float(sum[m * R + r]), scale, total[m * R + r]);
        });
        if constexpr (Split) {
          const F after = V::pick(near, V::add_words(index, V::splat_word(1)));
          unroll<M>([&](auto m) LACONIC_UNROLLED {
            total[m * R + r] = V::fma(V::to_float(beyond[m * R + r]), after, total[m * R + r]);
          });
        }
      });
    }
  }
  unroll<R>([&](auto r) LACONIC_UNROLLED {
    const float* scales = scratch + r * padded;
    float* zeros = scratch + R * padded;
    if (w.zero_kind != Zero::none) read_zeros(w, n + r, zeros);
    unroll<M>([&](auto m) LACONIC_UNROLLED {
      const float* sums = in.sums + (m0 + m) * in.sums_stride;
      F all = Grouped ? total[m * R + r] : V::to_float(sum[m * R + r]);
      float off = 0.0f;
      if constexpr (Grouped) {
        F size = V::zero();
        for (std::int64_t g = 0; g < w.groups; g += V::kLanes) {
          const int left = static_cast<int>(w.groups - g < V::kLanes ? w.groups - g : V::kLanes);
          F zero = V::splat(steps.middle);
          if (w.zero_kind != Zero::none) zero = V::add(zero, V::load_first(zeros + g, left));
          size = V::fma(V::mul(V::load_first(scales + g, left), zero), V::load_first(sums + g, left), size);
        }
        all = V::sub(all, size);
      } else {
        off = (steps.middle + (w.zero_kind != Zero::none ? zeros[0] : 0.0f)) * sums[0];
      }
      const float scale = in.scale[m0 + m] * steps.step * (Grouped ? 1.0f : scales[0]);
      job.out[(m0 + m) * job.out_stride + n + r] = (V::sum(all) - off) * scale;
    });
  });
}

/// Rows [begin, end) of W against M rows of x.
template <int Width, int M, bool Grouped, bool Split>
void rows_inputs(const Linear& job, const RoundedRows& in, std::int64_t m, std::int64_t begin, std::int64_t end,
                 std::uint8_t* scratch, Isa isa) {
  constexpr int kRows = !kSpread ? 1 : M == 1 ? kMostRows : 2;
  const Matrix& w = job.w;
  const std::int64_t row_bytes = 4 * w.words_per_row;
  const bool unpacks = Width == 8 && (w.bits != 8 || w.base3);
  auto* scales = reinterpret_cast<float*>(scratch + (unpacks ? 4 * in.k_padded : 0));
  const auto rows = [&](std::int64_t n, int count) -> RowBytes {
    if (!unpacks) return {reinterpret_cast<const std::uint8_t*>(w.words) + n * row_bytes, row_bytes, row_bytes};
    for (int r = 0; r < count; ++r) {
      std::uint8_t* row = scratch + r * in.k_padded;
      unpack_codes(w, n + r, 0, w.k, row, isa);
      for (std::int64_t i = w.k; i < in.k_padded; ++i) row[i] = 0;
    }
    return {scratch, in.k_padded, in.k_padded};
  };
  std::int64_t n = begin;
  for (; n + kRows <= end; n += kRows) rows_block<Width, M, kRows, Grouped, Split>(job, in, rows(n, kRows), m, n, scales);
  if constexpr (kRows > 1)
    for (; n < end; ++n) rows_block<Width, M, 1, Grouped, Split>(job, in, rows(n, 1), m, n, scales);
}

template <int Width, bool Grouped, bool Split = false>
void rows_of_width(const Linear& job, const RoundedRows& in, std::int64_t begin, std::int64_t end, std::uint8_t* scratch, Isa isa) {
  // Ternary weights need four sums where others need one: more rows of x would not fit the registers.
  constexpr int kMost = !kSpread || Width == kBase3 ? 1 : kWide ? kMostRows : 2;
  std::int64_t m = 0;
  if constexpr (kMost > 1)
    for (; m + kMost <= job.m; m += kMost) rows_inputs<Width, kMost, Grouped, Split>(job, in, m, begin, end, scratch, isa);
  for (; m < job.m; ++m) rows_inputs<Width, 1, Grouped, Split>(job, in, m, begin, end, scratch, isa);
}

template <int Width>
void rows_grouped(const Linear& job, const RoundedRows& in, std::int64_t begin, std::int64_t end, std::uint8_t* scratch, Isa isa) {
  job.w.groups > 1 ? rows_of_width<Width, true>(job, in, begin, end, scratch, isa)
                   : rows_of_width<Width, false>(job, in, begin, end, scratch, isa);
}

inline void linear_int8_rows(const Linear& job, const RoundedRows& in, std::int64_t begin, std::int64_t end,
                             std::uint8_t* scratch, Isa isa) {
  switch (rows_width(job.w)) {
    case kBase3:
      if (in.second != nullptr) rows_of_width<kBase3, true, true>(job, in, begin, end, scratch, isa);
      else rows_grouped<kBase3>(job, in, begin, end, scratch, isa);
      break;
    case 1: rows_grouped<1>(job, in, begin, end, scratch, isa); break;
    case 2: rows_grouped<2>(job, in, begin, end, scratch, isa); break;
    case 3: rows_grouped<Simd::kUnpacks ? 3 : 8>(job, in, begin, end, scratch, isa); break;  // the first where it occurs
    case 4: rows_grouped<4>(job, in, begin, end, scratch, isa); break;
    default: rows_grouped<8>(job, in, begin, end, scratch, isa); break;
  }
  end_rows(job, begin, end);
}

}  // namespace laconic::LACONIC_TARGET
