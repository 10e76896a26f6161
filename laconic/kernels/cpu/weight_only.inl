// y = x W^T with float32 inputs and packed weights, for few rows of x. Included once for every instruction set.
//
// A 32-bit word of a row holds C = 32/bits codes (3-bit codes: 24 bits, C = 8). One vector of words is shifted C times;
// each time the low bits of every lane index a small table of levels, which is a register. So the codes of one
// "plane" p are those at p, p + C, p + 2C ...: the inputs are laid out that way once, and the weights are read as they
// lie. A lane belongs to one group, so a vector of scales multiplies the sum over the C planes of a chunk.

namespace laconic::LACONIC_TARGET {

constexpr int kBase3 = 0;  // stands for the width of ternary codes, five to a byte

/// Codes in a lane of a width.
template <int Bits>
constexpr int lane_codes() {
  return Bits == kBase3 ? 20 : Bits == 3 ? 8 : 32 / (Bits == kBase3 ? 1 : Bits);
}

template <int Bits>
inline Simd::I load_lanes(const std::uint8_t* row, std::int64_t chunk, std::int64_t row_bytes) {
  constexpr int kBytes = (Bits == 3 ? 3 : 4) * Simd::kLanes;
  const std::int64_t at = chunk * kBytes, left = row_bytes - at;
  // Of 3-bit codes a whole vector is read where the row has one, though only three quarters of it are used.
  const Simd::I raw = left >= 4 * Simd::kLanes ? Simd::load_words(row + at)
                                               : Simd::load_bytes(row + at, static_cast<int>(left));
  if constexpr (Bits == 3) return Simd::spread_three(raw);
  else return raw;
}

/// float32 of n scales (or real zero points); writes whole vectors, so `out` is padded.
inline void read_floats(const void* base, Dtype dtype, std::int64_t first, std::int64_t n, float* out) {
  using V = Simd;
  if (dtype == Dtype::float32) {
    const float* from = static_cast<const float*>(base) + first;
    for (std::int64_t i = 0; i < n; ++i) out[i] = from[i];
    return;
  }
  const auto* from = static_cast<const std::uint16_t*>(base) + first;
  const bool half = dtype == Dtype::float16;
  std::int64_t i = 0;
  for (; i + V::kLanes <= n; i += V::kLanes) V::store(out + i, half ? V::from_half(from + i) : V::from_bfloat(from + i));
  for (; i < n; ++i) out[i] = half ? laconic::from_half(from[i]) : laconic::from_bfloat(from[i]);
}

/// Zero points of one row, less the middle code, as float32.
inline void read_zeros(const Matrix& w, std::int64_t row, float* out) {
  const float middle = w.middle;
  const std::int64_t at = w.one_scale ? 0 : row;
  if (w.zero_kind == Zero::real) {
    read_floats(w.zero, w.scale_dtype, at * w.groups, w.groups, out);
    for (std::int64_t g = 0; g < w.groups; ++g) out[g] -= middle;
    return;
  }
  const std::int64_t bit = at * w.bits;
  const int shift = static_cast<int>(bit & 31);
  const auto* words = static_cast<const std::uint32_t*>(w.zero) + (bit >> 5) * w.groups;
  const std::uint32_t mask = (1u << w.bits) - 1u;
  if (shift + w.bits <= 32) {
    for (std::int64_t g = 0; g < w.groups; ++g)
      out[g] = static_cast<float>(static_cast<std::int32_t>(words[g] >> shift & mask)) - middle;
  } else {
    for (std::int64_t g = 0; g < w.groups; ++g)
      out[g] = static_cast<float>(static_cast<std::int32_t>((words[g] >> shift | words[g + w.groups] << (32 - shift)) & mask)) - middle;
  }
}

/// Moves what lies beyond a boundary of groups within a lane to the second part of x.
inline void part_planes(const Matrix& w, float* first, float* second, std::int64_t size) {
  constexpr std::int64_t kLane = lane_codes<kBase3>(), kChunk = kLane * Simd::kLanes;
  for (std::int64_t i = 0; i < size; ++i) second[i] = 0.0f;
  for (std::int64_t edge = w.group; edge < w.k; edge += w.group)
    for (std::int64_t i = edge; i < w.k && i % kLane != 0; ++i) {
      const std::int64_t at = i / kChunk * kChunk + i % kLane * Simd::kLanes + i % kChunk / kLane;
      second[at] = first[at], first[at] = 0.0f;
    }
}

inline void lay_planes(const Linear& job, const Planes& to) {
  using V = Simd;
  const int codes = codes_per_lane(job.w), chunk = codes * V::kLanes;
  const std::int64_t k = job.w.k, group = job.w.group;
  alignas(64) std::int32_t step[V::kLanes];
  for (int j = 0; j < V::kLanes; ++j) step[j] = j * codes;
  const V::I steps = V::load_words(step);
  for (std::int64_t m = 0; m < job.m; ++m) {
    const float* x = job.x + m * job.x_stride;
    float* out = to.x + m * to.x_stride;
    for (std::int64_t c = 0; c < to.chunks; ++c, out += chunk) {
      const std::int64_t from = c * chunk;
      if (from + chunk <= k) {
        for (int p = 0; p < codes; ++p) V::store(out + p * V::kLanes, V::gather(x + from + p, steps));
      } else {
        for (int p = 0; p < codes; ++p)
          for (int j = 0; j < V::kLanes; ++j) {
            const std::int64_t at = from + j * codes + p;
            out[p * V::kLanes + j] = at < k ? x[at] : 0.0f;
          }
      }
    }
    if (to.second != nullptr) part_planes(job.w, to.x + m * to.x_stride, to.second + m * to.x_stride, to.x_stride);
    if (job.w.zero_kind != Zero::none) {
      for (std::int64_t g = 0; g < job.w.groups; ++g) {
        const std::int64_t begin = g * group, end = begin + group < k ? begin + group : k;
        V::F sum = V::zero();
        for (std::int64_t i = begin; i < end; i += V::kLanes)
          sum = V::add(sum, V::load_first(x + i, static_cast<int>(end - i < V::kLanes ? end - i : V::kLanes)));
        to.sums[m * to.sums_stride + g] = V::sum(sum);
      }
    }
  }
  for (std::int64_t c = 0; c < to.chunks; ++c)
    for (int j = 0; j < V::kLanes; ++j) {
      const std::int64_t at = c * chunk + j * codes;
      to.index[c * V::kLanes + j] = static_cast<std::int32_t>((at < k ? at : k - 1) / group - c * chunk / group);
    }
}

/// R rows of W from row n against M rows of x from row m0: R x M sums that stay in registers.
template <int Bits, int M, int R, bool Grouped, bool Split>
void planes_block(const Linear& job, const Planes& in, const float* levels, std::int64_t m0, std::int64_t n, float* scratch) {
  using V = Simd;
  using F = V::F;
  constexpr int kCodes = lane_codes<Bits>(), kChunk = kCodes * V::kLanes;
  const Matrix& w = job.w;
  const F low = V::load(levels), high = V::load(levels + (V::kLanes <= 8 ? 8 : 0));
  const typename V::I flip = V::splat_word(static_cast<std::int32_t>(0x80808080u));
  const std::int64_t row_bytes = 4 * w.words_per_row, padded = w.groups + V::kLanes;
  const auto* row = reinterpret_cast<const std::uint8_t*>(w.words + n * w.words_per_row);
  float* zeros = scratch + R * padded;
  for (int r = 0; r < R; ++r)
    read_floats(w.scale, w.scale_dtype, w.one_scale ? 0 : (n + r) * w.groups, w.groups, scratch + r * padded);
  if constexpr (Split)  // lanes without a second group still get a scale
    for (int r = 0; r < R; ++r) V::store(scratch + r * padded + w.groups, V::zero());
  F total[M * R];
  unroll<M * R>([&](auto i) LACONIC_UNROLLED { total[i] = V::zero(); });
  for (std::int64_t c = 0; c < in.chunks; ++c) {
    typename V::I words[R];
    F part[M * R], beyond[Split ? M * R : 1];
    unroll<M * R>([&](auto i) LACONIC_UNROLLED { part[i] = V::zero(); });
    if constexpr (Split) unroll<M * R>([&](auto i) LACONIC_UNROLLED { beyond[i] = V::zero(); });
    unroll<R>([&](auto r) LACONIC_UNROLLED {
      words[r] = load_lanes<Bits>(row + r * row_bytes, c, row_bytes);
      prefetch(row + (R + r) * row_bytes + c * 4 * V::kLanes);
      if constexpr (Bits == 8) words[r] = V::bit_xor(words[r], flip);
    });
    const float* x = in.x + m0 * in.x_stride + c * kChunk;
    if constexpr (Bits == kBase3) {
      // Two bytes of a word at a time, 16 bits apart: times three, the next digit rises above the eighth bit of each.
      const typename V::I bytes = V::splat_word(0x00ff00ff);
      unroll<2>([&](auto half) LACONIC_UNROLLED {
        typename V::I rest[R];
        unroll<R>([&](auto r) LACONIC_UNROLLED { rest[r] = V::bit_and(half == 0 ? words[r] : V::shift_right(words[r], 8), bytes); });
        unroll<5>([&](auto i) LACONIC_UNROLLED {
          F first[R], second[R];
          unroll<R>([&](auto r) LACONIC_UNROLLED {
            const typename V::I thrice = V::add_words(rest[r], V::add_words(rest[r], rest[r]));
            first[r] = V::template level<2>(V::shift_right(thrice, 8), levels, low, high);
            second[r] = V::template level<2>(V::shift_right(thrice, 24), levels, low, high);
            rest[r] = V::bit_and(thrice, bytes);
          });
          unroll<M>([&](auto m) LACONIC_UNROLLED {
            const float* at = x + m * in.x_stride + (5 * half + i) * V::kLanes;
            const F a = V::load(at), b = V::load(at + 10 * V::kLanes);
            unroll<R>([&](auto r) LACONIC_UNROLLED {
              part[m * R + r] = V::fma(second[r], b, V::fma(first[r], a, part[m * R + r]));
            });
            if constexpr (Split) {
              const float* other = at + (in.second - in.x);
              const F a2 = V::load(other), b2 = V::load(other + 10 * V::kLanes);
              unroll<R>([&](auto r) LACONIC_UNROLLED {
                beyond[m * R + r] = V::fma(second[r], b2, V::fma(first[r], a2, beyond[m * R + r]));
              });
            }
          });
        });
      });
    } else unroll<kCodes>([&](auto p) LACONIC_UNROLLED {
      F level[R];
      unroll<R>([&](auto r) LACONIC_UNROLLED {
        if constexpr (Bits == 8)
          level[r] = V::to_float(V::signed_byte(words[r], p));
        else
          level[r] = V::template level<Bits>(p == 0 ? words[r] : V::shift_right(words[r], p * Bits), levels, low, high);
      });
      unroll<M>([&](auto m) LACONIC_UNROLLED {
        const F value = V::load(x + m * in.x_stride + p * V::kLanes);
        unroll<R>([&](auto r) LACONIC_UNROLLED { part[m * R + r] = V::fma(level[r], value, part[m * R + r]); });
      });
    });
    if constexpr (Grouped) {
      const typename V::I index = V::load_words(in.index + c * V::kLanes);
      const float* scales = scratch + c * kChunk / w.group;
      unroll<R>([&](auto r) LACONIC_UNROLLED {
        const F near = V::load(scales + r * padded), scale = V::pick(near, index);
        unroll<M>([&](auto m) LACONIC_UNROLLED { total[m * R + r] = V::fma(part[m * R + r], scale, total[m * R + r]); });
        if constexpr (Split) {
          const F after = V::pick(near, V::add_words(index, V::splat_word(1)));
          unroll<M>([&](auto m) LACONIC_UNROLLED { total[m * R + r] = V::fma(beyond[m * R + r], after, total[m * R + r]); });
        }
      });
    } else {
      unroll<M * R>([&](auto i) LACONIC_UNROLLED { total[i] = V::add(total[i], part[i]); });
    }
  }
  unroll<R>([&](auto r) LACONIC_UNROLLED {
    const float* scales = scratch + r * padded;
    if (w.zero_kind != Zero::none) read_zeros(w, n + r, zeros);
    unroll<M>([&](auto m) LACONIC_UNROLLED {
      F all = total[m * R + r];
      if (w.zero_kind != Zero::none) {
        const float* sums = in.sums + (m0 + m) * in.sums_stride;
        F off = V::zero();
        for (std::int64_t g = 0; g < w.groups; g += V::kLanes) {
          const int left = static_cast<int>(w.groups - g < V::kLanes ? w.groups - g : V::kLanes);
          F size = V::mul(V::load_first(zeros + g, left), V::load_first(sums + g, left));
          if constexpr (Grouped) size = V::mul(size, V::load_first(scales + g, left));
          off = V::add(off, size);
        }
        all = V::sub(all, off);
      }
      job.out[(m0 + m) * job.out_stride + n + r] = V::sum(all) * (Grouped ? 1.0f : scales[0]);
    });
  });
}

// Blocks of several rows pay with wide vectors; with others they would only cost minutes of compiling.
constexpr bool kSpread = Simd::kLanes >= 8;

template <int Bits, int M, bool Grouped, bool Split>
void planes_rows(const Linear& job, const Planes& in, const float* levels, std::int64_t m0, std::int64_t begin,
                 std::int64_t end, float* scratch) {
  constexpr int kRows = kSpread ? kMostRows : 1;
  std::int64_t n = begin;
  for (; n + kRows <= end; n += kRows) planes_block<Bits, M, kRows, Grouped, Split>(job, in, levels, m0, n, scratch);
  for (; n < end; ++n) planes_block<Bits, M, 1, Grouped, Split>(job, in, levels, m0, n, scratch);
}

template <int Bits, bool Grouped, bool Split = false>
void planes_width(const Linear& job, const Planes& in, std::int64_t begin, std::int64_t end, float* scratch) {
  alignas(64) float levels[16];
  for (int i = 0; i < 16; ++i) {
    const int code = i & ((1 << (Bits == kBase3 ? 2 : Bits < 4 ? Bits : 4)) - 1);
    levels[i] = job.w.levels != nullptr ? job.w.levels[code] : static_cast<float>(code) - job.w.middle;
  }
  std::int64_t m = 0;
  if constexpr (kSpread && !Split) {
    if constexpr (kMostRows == 4)
      for (; m + 4 <= job.m; m += 4) planes_rows<Bits, 4, Grouped, false>(job, in, levels, m, begin, end, scratch);
    for (; m + 2 <= job.m; m += 2) planes_rows<Bits, 2, Grouped, false>(job, in, levels, m, begin, end, scratch);
  }
  for (; m < job.m; ++m) planes_rows<Bits, 1, Grouped, Split>(job, in, levels, m, begin, end, scratch);
}

template <int Bits>
void planes_bits(const Linear& job, const Planes& in, std::int64_t begin, std::int64_t end, float* scratch) {
  job.w.groups > 1 ? planes_width<Bits, true>(job, in, begin, end, scratch)
                   : planes_width<Bits, false>(job, in, begin, end, scratch);
}

inline void end_rows(const Linear& job, std::int64_t begin, std::int64_t end) {
  for (std::int64_t m = 0; m < job.m; ++m) {
    const std::int64_t at = m * job.out_stride + begin;
    finish(job.out + at, job.then.bias == nullptr ? nullptr : job.then.bias + begin,
           job.then.residual == nullptr ? nullptr : job.then.residual + at, job.then.act, end - begin);
  }
}

inline void linear_planes(const Linear& job, const Planes& in, std::int64_t begin, std::int64_t end, float* scratch) {
  switch (job.w.base3 ? kBase3 : job.w.bits) {
    case kBase3:
      if (in.second != nullptr) planes_width<kBase3, true, true>(job, in, begin, end, scratch);
      else planes_bits<kBase3>(job, in, begin, end, scratch);
      break;
    case 1: planes_bits<1>(job, in, begin, end, scratch); break;
    case 2: planes_bits<2>(job, in, begin, end, scratch); break;
    case 3: planes_bits<3>(job, in, begin, end, scratch); break;
    case 4: planes_bits<4>(job, in, begin, end, scratch); break;
    default: planes_bits<8>(job, in, begin, end, scratch); break;
  }
  end_rows(job, begin, end);
}

/// Any other width or grouping: a row becomes float32 in the cache, and is multiplied from there.
inline void linear_rows(const Linear& job, std::int64_t begin, std::int64_t end, float* scratch, Isa isa) {
  using V = Simd;
  using F = V::F;
  const Matrix& w = job.w;
  float* scales = scratch + w.k + V::kLanes;
  float* zeros = scales + w.groups + V::kLanes;
  auto* codes = reinterpret_cast<std::uint8_t*>(zeros + w.groups + V::kLanes);
  const float middle = w.middle;
  for (std::int64_t n = begin; n < end; ++n) {
    unpack_codes(w, n, 0, w.k, codes, isa);
    if (n == begin || !w.one_scale) read_floats(w.scale, w.scale_dtype, w.one_scale ? 0 : n * w.groups, w.groups, scales);
    if (w.zero_kind != Zero::none && (n == begin || !w.one_scale)) read_zeros(w, n, zeros);
    for (std::int64_t g = 0; g < w.groups; ++g) {
      const std::int64_t first = g * w.group, stop = first + w.group < w.k ? first + w.group : w.k;
      const float zero = middle + (w.zero_kind == Zero::none ? 0.0f : zeros[g]), scale = scales[g];
      if (w.levels != nullptr)
        for (std::int64_t i = first; i < stop; ++i) scratch[i] = w.levels[codes[i]] * scale;
      else
        for (std::int64_t i = first; i < stop; ++i) scratch[i] = (static_cast<float>(codes[i]) - zero) * scale;
    }
    for (std::int64_t m = 0; m < job.m; ++m) {
      const float* x = job.x + m * job.x_stride;
      F a = V::zero(), b = V::zero();
      std::int64_t i = 0;
      for (; i + 2 * V::kLanes <= w.k; i += 2 * V::kLanes) {
        a = V::fma(V::load(x + i), V::load(scratch + i), a);
        b = V::fma(V::load(x + i + V::kLanes), V::load(scratch + i + V::kLanes), b);
      }
      for (; i < w.k; i += V::kLanes) {
        const int left = static_cast<int>(w.k - i < V::kLanes ? w.k - i : V::kLanes);
        a = V::fma(V::load_first(x + i, left), V::load_first(scratch + i, left), a);
      }
      job.out[m * job.out_stride + n] = V::sum(V::add(a, b));
    }
  }
  end_rows(job, begin, end);
}

}  // namespace laconic::LACONIC_TARGET
