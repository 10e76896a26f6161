// Every instruction set that this CPU has against the portable kernels, on random shapes: for CPUs on which there is no
// PyTorch to compare with. `make neon` compiles it for AArch64 and runs it under qemu. Exit status 1 where they differ.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <map>
#include <memory>
#include <new>
#include <random>
#include <string>
#include <vector>

#include "bits.hpp"
#include "cache.hpp"
#include "conv.hpp"
#include "halves.hpp"
#include "kernels.hpp"
#include "linear.hpp"
#include "norm.hpp"
#include "sparse.hpp"
#include "table.hpp"

namespace {

using namespace laconic;
using Int = std::int64_t;

std::mt19937 random_bits(1);

Int pick(Int least, Int most) { return std::uniform_int_distribution<Int>(least, most)(random_bits); }
template <class T>
T one_of(std::initializer_list<T> all) {
  return all.begin()[pick(0, static_cast<Int>(all.size()) - 1)];
}
bool coin() { return pick(0, 1) == 1; }

/// Odd sizes and the edges of vectors, blocks and words.
Int size(Int most) { return std::min(most, coin() ? one_of<Int>({1, 3, 4, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65}) : pick(1, most)); }

/// Memory aligned to a cache line, or one element past it where nothing asks for alignment.
template <class T>
struct Memory {
  struct Free {
    void operator()(std::uint8_t* p) const { ::operator delete(p, std::align_val_t{64}); }
  };
  std::unique_ptr<std::uint8_t, Free> bytes;
  T* at;
  Int length;

  explicit Memory(Int n, bool shifted = false)
      : bytes(static_cast<std::uint8_t*>(::operator new(static_cast<std::size_t>(n + 1) * sizeof(T) + 64, std::align_val_t{64}))),
        at(reinterpret_cast<T*>(bytes.get()) + (shifted ? 1 : 0)),
        length(n) {
    std::memset(bytes.get(), 0xff, static_cast<std::size_t>(n + 1) * sizeof(T) + 64);  // no numbers: what is not written shows
  }
  operator T*() const { return at; }
};

Memory<float> floats(Int n, float least = -1.0f, float most = 1.0f) {
  Memory<float> x(n, coin());
  std::uniform_real_distribution<float> any(least, most);
  for (Int i = 0; i < n; ++i) x[i] = any(random_bits);
  return x;
}

template <class T>
Memory<T> integers(Int n, Int least, Int most) {
  Memory<T> x(n, coin());
  for (Int i = 0; i < n; ++i) x[i] = static_cast<T>(pick(least, most));
  return x;
}

Memory<std::uint32_t> words(Int n) { return integers<std::uint32_t>(n, 0, std::numeric_limits<std::uint32_t>::max()); }

Dtype floating() { return one_of({Dtype::float32, Dtype::float16, Dtype::bfloat16}); }

/// Numbers of a floating type, as bytes.
Memory<std::uint8_t> stored(Int n, Dtype dtype, float least = -1.0f, float most = 1.0f) {
  Memory<std::uint8_t> x(n * static_cast<Int>(size_of(dtype)));
  const Memory<float> from = floats(n, least, most);
  for (Int i = 0; i < n; ++i) {
    if (dtype == Dtype::float32) reinterpret_cast<float*>(x.at)[i] = from[i];
    else reinterpret_cast<std::uint16_t*>(x.at)[i] = dtype == Dtype::float16 ? to_half(from[i]) : to_bfloat(from[i]);
  }
  return x;
}

float number(const void* base, Dtype dtype, Int i) {
  if (dtype == Dtype::float32) return static_cast<const float*>(base)[i];
  const std::uint16_t h = static_cast<const std::uint16_t*>(base)[i];
  return dtype == Dtype::float16 ? from_half(h) : from_bfloat(h);
}

/// What one kernel did in all cases so far.
struct Tally {
  Int cases = 0, failed = 0;
  double worst = 0.0;  // difference over what is allowed
};
std::map<std::string, Tally> tallies;

void note(const std::string& what, bool equal, double share, const std::string& detail) {
  Tally& tally = tallies[what];
  ++tally.cases;
  tally.worst = std::max(tally.worst, share);
  if (equal) return;
  if (++tally.failed <= 3) std::printf("%s differs: %s\n", what.c_str(), detail.c_str());
}

/// Differences of at most `relative` of the largest number.
void same_numbers(const std::string& what, const void* got, const void* want, Dtype dtype, Int n, double relative, const std::string& detail) {
  double largest = 1e-30, most = 0.0;
  for (Int i = 0; i < n; ++i) largest = std::max(largest, std::abs(static_cast<double>(number(want, dtype, i))));
  bool equal = true;
  for (Int i = 0; i < n; ++i) {
    const double a = number(got, dtype, i), b = number(want, dtype, i), off = std::abs(a - b);
    if (std::isnan(a) != std::isnan(b) || !std::isfinite(b)) equal = false;
    most = std::max(most, off);
  }
  note(what, equal && most <= relative * largest, most / (relative * largest), detail);
}

void same_bytes(const std::string& what, const void* got, const void* want, Int bytes, const std::string& detail) {
  note(what, bytes == 0 || std::memcmp(got, want, static_cast<std::size_t>(bytes)) == 0, 0.0, detail);
}

std::string sizes(std::initializer_list<Int> all) {
  std::string text;
  for (const Int one : all) text += (text.empty() ? "" : " ") + std::to_string(one);
  return text;
}

int threads() { return static_cast<int>(pick(1, 3)); }

double tolerance(Dtype dtype) { return dtype == Dtype::float32 ? 1e-5 : dtype == Dtype::float16 ? 2e-3 : 1.6e-2; }

// --- one random case of each kernel ---

void linear_case(Isa isa) {
  const int bits = one_of({1, 2, 3, 4, 8, 4, 2, 5, 6, 7});
  const bool base3 = bits == 2 && coin(), table = !base3 && bits <= 4 && (bits == 1 || pick(0, 3) == 0);
  const Int k = size(700), rows = size(70), m = one_of<Int>({1, 2, 3, 5, 8, 9, 33}), per_row = base3 ? (k + 19) / 20 : words_for(k, bits);
  const Int group = coin() ? std::max<Int>(k, 1) : one_of<Int>({4, 20, 32, 33, 40, 64, 128}), groups = (k - 1) / group + 1;
  const bool one = groups == 1 && pick(0, 3) == 0;
  const Int scale_rows = one ? 1 : rows;
  const Zero kind = table || base3 ? Zero::none : one_of({Zero::none, Zero::packed, Zero::real});
  const Dtype dtype = floating();
  const auto codes = words(rows * per_row);
  const auto scale = stored(scale_rows * groups, dtype, 0.01f, 1.0f);
  const auto zero_words = words(words_for(scale_rows, bits) * groups);
  const auto zero_reals = stored(scale_rows * groups, dtype, 0.0f, 4.0f);
  Memory<float> levels = floats(16);
  if (bits == 1) levels[0] = -1.0f, levels[1] = 1.0f;
  const auto x = floats(m * k), bias = floats(rows), residual = floats(m * rows);
  Linear job{};
  job.w = {.dense = nullptr, .words = codes, .scale = scale.at,
           .zero = kind == Zero::packed ? static_cast<const void*>(zero_words.at) : zero_reals.at,
           .levels = table ? levels.at : nullptr, .rows = rows, .k = k, .words_per_row = per_row, .groups = groups,
           .group = group, .bits = bits, .middle = base3 ? 1.0f : static_cast<float>(1 << (bits - 1)), .base3 = base3,
           .scale_dtype = dtype, .zero_kind = kind, .one_scale = one};
  job.x = x, job.m = m, job.x_stride = k, job.out_stride = rows;
  job.then = {.bias = coin() ? bias.at : nullptr, .residual = coin() ? residual.at : nullptr,
              .act = one_of({Act::none, Act::relu, Act::gelu, Act::gelu_tanh, Act::silu})};
  const std::string kept = base3 ? "ternary" : bits == 1 ? "binary" : table ? "tables" : std::to_string(bits) + " bits";
  const std::string detail = sizes({m, k, rows, group, static_cast<Int>(kind), static_cast<Int>(dtype)});
  const int many = threads();
  const auto run = [&](Isa use, bool int8, float* out) {
    job.out = out;
    if (int8) {
      const Memory<std::uint8_t> scratch(linear_int8_scratch(job, many, use));
      linear_int8(job, scratch, many, use);
    } else {
      const Memory<float> scratch(linear_float_scratch(job, many, use));
      linear_float(job, scratch, many, use);
    }
  };
  job.x_scale = coin() ? 0.02f : 0.0f;
  for (const bool int8 : {false, true}) {
    if (int8 && !takes_int8(job.w)) continue;
    const Memory<float> got(m * rows), want(m * rows);
    run(isa, int8, got), run(Isa::portable, int8, want);
    same_numbers("linear, " + kept + (int8 ? ", inputs of 8 bits" : ""), got, want, Dtype::float32, m * rows, 2e-5, detail);
  }
}

/// A layer that stores its results as the codes that the next one reads; sums over the next one's groups.
void next_case(Isa isa) {
  const Int k = 4 * size(60), rows = size(150), m = pick(9, 40);
  const Int group = coin() ? rows : one_of<Int>({4, 20, 32, 64}), groups = (rows - 1) / group + 1, per_row = words_for(k, 8);
  const auto codes = words(rows * per_row);
  const auto scale = stored(rows, Dtype::float32, 0.001f, 0.01f);
  const auto x = floats(m * k), bias = floats(rows);
  Linear job{}, next{};
  job.w = {.dense = nullptr, .words = codes, .scale = scale.at, .zero = nullptr, .levels = nullptr, .rows = rows, .k = k,
           .words_per_row = per_row, .groups = 1, .group = k, .bits = 8, .middle = 128.0f, .base3 = false,
           .scale_dtype = Dtype::float32, .zero_kind = Zero::none, .one_scale = false};
  job.x = x, job.m = m, job.x_stride = k, job.out_stride = rows, job.next_scale = next.x_scale = 0.05f;
  job.then = {.bias = bias, .residual = nullptr, .act = one_of({Act::none, Act::relu, Act::gelu})};
  next.w.k = rows, next.w.groups = groups, next.w.group = group, next.m = m;
  const int many = threads();
  const auto run = [&](Isa use, float* numbers, float* sums) {
    const Memory<std::uint8_t> mine(rounded_bytes(job, use) + 64), other(rounded_bytes(next, use) + 64);
    const Memory<std::uint8_t> scratch(products_bytes(job, many, use));
    const Rounded in = rounded_at(job, mine, use), to = rounded_at(next, other, use);
    Linear storing = job;
    storing.next = &to;
    clear_beyond(next, to, use);
    round_inputs(job, in, scratch, many, use);
    multiply_rounded(storing, in, scratch, many, use);
    sum_inputs(next, to, many, use);
    const Int tile = table(use).tile;
    for (Int i = 0; i < m; ++i) {
      for (Int n = 0; n < rows; ++n)
        numbers[i * rows + n] = to.codes[i / tile * tile * to.k_padded + i % tile * 4 + n / 4 * 4 * tile + n % 4];
      for (Int g = 0; g < groups; ++g) {
        float left = static_cast<float>(to.sums[i * groups + g]);
        for (Int n = g * group; n < std::min(rows, (g + 1) * group); ++n) left -= numbers[i * rows + n];
        sums[i * groups + g] = left;  // none where sums are those of the codes
      }
    }
  };
  const Memory<float> got(m * rows), want(m * rows), sums(m * groups), others(m * groups);
  run(isa, got, sums), run(Isa::portable, want, others);
  const std::string detail = sizes({m, k, rows, group});
  double most = 0.0, apart = 0.0;
  for (Int i = 0; i < m * rows; ++i) most = std::max(most, std::abs(static_cast<double>(got[i]) - want[i]));
  for (Int i = 0; i < m * groups; ++i) apart = std::max(apart, std::abs(static_cast<double>(sums[i])) + std::abs(others[i]));
  note("linear, results as the next layer's codes", most <= 1.0, most, detail);  // a last bit may turn a code
  note("linear, sums of these codes", apart == 0.0, apart, detail);
}

void sparse_case(Isa isa) {
  const bool pairs = coin();
  const Dtype dtype = one_of({Dtype::float32, Dtype::bfloat16, Dtype::int8});
  const Int r = pairs ? 1 : one_of<Int>({1, 4, 8, 16}), c = pairs ? 1 : one_of<Int>({1, 4, 5, 8, 16, 32});
  const Int rows = pairs ? size(60) : r * pick(1, 5), k = pairs ? 4 * size(60) : c * pick(1, 9), m = one_of<Int>({1, 2, 3, 8, 9, 20, 70});
  std::vector<std::int32_t> starts{0};
  std::vector<std::uint32_t> index;
  const Int per_row = words_for(k / 2, 2);
  if (pairs) {  // two different places in every four, in order
    index.assign(static_cast<std::size_t>(rows * per_row), 0);
    for (Int row = 0; row < rows; ++row)
      for (Int i = 0; i < k / 2; i += 2) {
        const auto first = static_cast<std::uint32_t>(pick(0, 2)), second = static_cast<std::uint32_t>(pick(first + 1, 3));
        index[static_cast<std::size_t>(row * per_row + i / 16)] |= (first | second << 2) << (2 * (i % 16));
      }
  } else {
    for (Int b = 0; b < rows / r; ++b) {
      for (Int column = 0; column < k / c; ++column)
        if (coin()) index.push_back(static_cast<std::uint32_t>(column));
      starts.push_back(static_cast<std::int32_t>(index.size()));
    }
  }
  const Int count = pairs ? rows * (k / 2) : static_cast<Int>(index.size()) * r * c;
  const auto bytes = integers<std::int8_t>(count, -127, 127);
  const auto numbers = stored(count, dtype == Dtype::int8 ? Dtype::float32 : dtype);
  const auto scale = floats(rows, 0.01f, 1.0f), bias = floats(rows), x = floats(m * k);
  SparseLinear job{};
  job.w = {.values = dtype == Dtype::int8 ? static_cast<const void*>(bytes.at) : numbers.at, .index = index.data(),
           .starts = pairs ? nullptr : starts.data(), .scale = dtype == Dtype::int8 ? scale.at : nullptr, .dtype = dtype,
           .rows = rows, .k = k, .r = r, .c = c, .words_per_row = per_row};
  job.x = x, job.bias = coin() ? bias.at : nullptr, job.m = m, job.act = one_of({Act::none, Act::gelu});
  const int many = threads();
  const Memory<float> got(m * rows), want(m * rows);
  for (const Isa use : {isa, Isa::portable}) {
    job.out = use == isa ? got : want;
    const Memory<float> scratch(sparse_linear_scratch(job, use));
    sparse_linear(job, scratch, many, use);
  }
  same_numbers(pairs ? "sparse, 2:4" : "sparse, blocks", got, want, Dtype::float32, m * rows, 2e-5,
               sizes({m, k, rows, r, c, static_cast<Int>(dtype)}));
}

void norm_case(Isa isa) {
  const Int rows = size(40), d = size(700);
  const Dtype dtype = floating(), weight_dtype = floating();
  const auto bytes = static_cast<Int>(size_of(dtype));
  const auto x = stored(rows * d, dtype, -2.0f, 3.0f), residual = stored(rows * d, dtype);
  const auto weight = stored(d, weight_dtype), bias = stored(d, weight_dtype);
  const NormKind kind{.eps = 1e-5f, .centred = coin(), .eps_outside = coin(), .unit_offset = coin()};
  const std::string detail = sizes({rows, d, static_cast<Int>(dtype), kind.centred, kind.eps_outside});
  const bool add = coin(), weighted = coin();
  const int many = threads();
  const Memory<std::uint8_t> y[2] = {Memory<std::uint8_t>(rows * d * bytes), Memory<std::uint8_t>(rows * d * bytes)};
  const Memory<std::uint8_t> sum[2] = {Memory<std::uint8_t>(rows * d * bytes), Memory<std::uint8_t>(rows * d * bytes)};
  const Memory<std::int8_t> codes[2] = {Memory<std::int8_t>(rows * d), Memory<std::int8_t>(rows * d)};
  const Memory<float> scales[2] = {Memory<float>(rows), Memory<float>(rows)};
  for (int i = 0; i < 2; ++i) {
    const NormForward job{.kind = kind, .rows = rows, .d = d, .dtype = dtype, .weight_dtype = weight_dtype,
                          .bias_dtype = weight_dtype, .x = x.at, .residual = add ? residual.at : nullptr,
                          .weight = weighted ? weight.at : nullptr, .bias = weighted ? bias.at : nullptr, .y = y[i].at,
                          .sum = add ? sum[i].at : nullptr, .codes = codes[i], .scales = scales[i]};
    const Memory<float> scratch(norm_scratch(job, many));
    norm(job, scratch, many, i == 0 ? isa : Isa::portable);
  }
  same_numbers("norm", y[0].at, y[1].at, dtype, rows * d, tolerance(dtype), detail);
  if (add) same_bytes("norm, sum", sum[0].at, sum[1].at, rows * d * bytes, detail);
  same_numbers("norm, scales", scales[0].at, scales[1].at, Dtype::float32, rows, tolerance(dtype), detail);
  bool near = true;
  for (Int i = 0; i < rows * d; ++i) near = near && std::abs(codes[0][i] - codes[1][i]) <= 2;  // of 255
  note("norm, codes", near, 0.0, detail);

  const auto grad = stored(rows * d, dtype), other = stored(rows * d, dtype);
  const Memory<float> dweight[2] = {Memory<float>(d), Memory<float>(d)}, dbias[2] = {Memory<float>(d), Memory<float>(d)};
  for (int i = 0; i < 2; ++i) {
    const NormBackward job{.kind = kind, .rows = rows, .d = d, .dtype = dtype, .weight_dtype = weight_dtype,
                           .grad = grad.at, .x = x.at, .grad_sum = add ? other.at : nullptr,
                           .weight = weighted ? weight.at : nullptr, .dx = y[i].at, .dweight = dweight[i], .dbias = dbias[i]};
    const Memory<float> scratch(norm_scratch(job, many));
    norm_backward(job, scratch, many, i == 0 ? isa : Isa::portable);
  }
  if (d >= 3) same_numbers("norm, backward", y[0].at, y[1].at, dtype, rows * d, 10.0 * tolerance(dtype), detail);  // of one or two numbers, noise is left
  same_numbers("norm, backward, bias", dbias[0].at, dbias[1].at, Dtype::float32, d, 1e-5, detail);
  if (d >= 3) same_numbers("norm, backward, weight", dweight[0].at, dweight[1].at, Dtype::float32, d, 1e-4, detail);
}

void rows_case(Isa isa) {
  const int bits = static_cast<int>(pick(1, 8));
  const Int k = size(5000), rows = size(9), per_row = words_for(k, bits), group = one_of<Int>({k, 32, 33, 128}), groups = (k - 1) / group + 1;
  const auto codes = words(rows * per_row);
  const Memory<std::uint8_t> bytes[2] = {Memory<std::uint8_t>(k), Memory<std::uint8_t>(k)};
  const auto dtype = floating(), zero_dtype = one_of({Dtype::none, Dtype::uint8, Dtype::float32});
  const auto scale = stored(rows * groups, dtype), zero = stored(rows * groups, Dtype::float32);
  const Memory<float> out[2] = {Memory<float>(rows * k), Memory<float>(rows * k)};
  for (int i = 0; i < 2; ++i) {
    const Isa use = i == 0 ? isa : Isa::portable;
    unpack_row(codes, bits, k, bytes[i], use);
    dequantize({.words = codes, .scale = scale.at, .zero = zero.at, .out = out[i], .scale_dtype = dtype,
                .zero_dtype = zero_dtype, .words_per_row = per_row, .groups = groups, .group = group, .k = k, .bits = bits},
               0, rows, threads(), use);
  }
  same_bytes("unpack", bytes[0].at, bytes[1].at, k, sizes({bits, k}));
  same_bytes("dequantize", out[0].at, out[1].at, rows * k * 4, sizes({bits, rows, k, group}));

  const Dtype as = floating();
  const Int n = Int{1} << pick(0, 14), length = rows * n * static_cast<Int>(size_of(as));
  const auto x = stored(rows * n, as);
  const Memory<std::uint8_t> turned[2] = {Memory<std::uint8_t>(length), Memory<std::uint8_t>(length)};
  for (int i = 0; i < 2; ++i) {
    std::memcpy(turned[i].at, x.at, static_cast<std::size_t>(length));
    const Hadamard job{.x = turned[i].at, .dtype = as, .rows = rows, .n = n, .scale = 0.25f};
    const int many = threads();
    const Memory<float> scratch(hadamard_scratch(job, many));
    hadamard(job, scratch, many, i == 0 ? isa : Isa::portable);
  }
  same_bytes("hadamard", turned[0].at, turned[1].at, length, sizes({rows, n, static_cast<Int>(as)}));
}

/// Keys or values with room for `capacity` tokens, filled by `append_tokens` on every instruction set alike.
struct Stored {
  Tokens tokens;
  Memory<std::uint8_t> data, scale, low;
};

Stored store(Isa isa, Int heads, Int capacity, Int dim, bool channels) {
  const int bits = one_of({0, 8, 4, 2});
  const bool by_channel = bits != 0 && channels && coin();
  const Dtype dtype = floating();
  const auto bytes = static_cast<Int>(size_of(dtype));
  const Int group = bits != 0 && !by_channel && dim % kPad == 0 && coin() ? kPad : dim, groups = by_channel ? dim : dim / group;
  const Int ranges = heads * (by_channel ? capacity / kBlock : capacity);
  Tokens to{.data = nullptr, .scale = nullptr, .low = nullptr, .capacity = capacity, .dim = dim, .groups = groups,
            .group = group, .bits = bits, .dtype = dtype, .by_channel = by_channel};
  if (bits == 0) {
    to.groups = 1;
    Stored plain{to, stored(heads * capacity * dim, dtype), Memory<std::uint8_t>(0), Memory<std::uint8_t>(0)};
    plain.tokens.data = plain.data.at;
    return plain;
  }
  const auto x = floats(heads * capacity * dim);
  const auto fill = [&](Isa use) {
    Stored one{to, Memory<std::uint8_t>(heads * capacity * row_bytes(to)), Memory<std::uint8_t>(ranges * groups * bytes),
               Memory<std::uint8_t>(ranges * groups * bytes)};
    one.tokens.data = one.data.at, one.tokens.scale = one.scale.at, one.tokens.low = one.low.at;
    const CacheAppend job{.to = one.tokens, .x = x, .heads = heads, .at = 0, .count = capacity};
    const int many = threads();
    const Memory<float> scratch(append_scratch(job, many));
    append_tokens(job, scratch, many, use);
    return one;
  };
  Stored got = fill(isa);
  const Stored want = fill(Isa::portable);
  const std::string detail = sizes({heads, capacity, dim, bits, group, by_channel, static_cast<Int>(dtype)});
  same_bytes("cache, append, codes", got.data.at, want.data.at, got.data.length, detail);
  same_bytes("cache, append, scales", got.scale.at, want.scale.at, got.scale.length, detail);
  same_bytes("cache, append, lows", got.low.at, want.low.at, got.low.length, detail);
  return got;
}

void cache_case(Isa isa) {
  const Int batch = pick(1, 2), kv_heads = pick(1, 2), heads = kv_heads * pick(1, 5), q_len = one_of<Int>({1, 1, 3});
  const Int dim = coin() ? 16 * pick(1, 8) : size(70), value_dim = coin() ? dim : size(70), capacity = kBlock * pick(1, 20);
  const Stored keys = store(isa, batch * kv_heads, capacity, dim, true), values = store(isa, batch * kv_heads, capacity, value_dim, false);
  const Int length = pick(q_len, capacity);
  const auto q = floats(batch * heads * q_len * dim, -3.0f, 3.0f), added = floats(batch * q_len * length, -2.0f, 0.0f);
  CacheAttention job{};
  job.q = q;
  job.spans[0] = {keys.tokens, values.tokens, length};
  job.spans[1] = {keys.tokens, values.tokens, coin() ? 0 : pick(0, capacity)};
  job.batch = batch, job.heads = heads, job.kv_heads = kv_heads, job.q_len = q_len, job.scale = 0.3f, job.causal = coin();
  if (job.spans[1].length == 0 && coin())
    job.mask = added.at, job.mask_kind = Mask::added, job.mask_batch = q_len * length, job.mask_query = length;
  const Int n = batch * heads * q_len * value_dim;
  const Memory<float> out[2] = {Memory<float>(n), Memory<float>(n)};
  const int many = threads();
  for (int i = 0; i < 2; ++i) {
    job.out = out[i];
    const Memory<float> scratch(decode_scratch(job, many));
    decode_attention(job, scratch, many, i == 0 ? isa : Isa::portable);
  }
  same_numbers("cache, attention", out[0].at, out[1].at, Dtype::float32, n, 2e-5,
               sizes({batch, heads, kv_heads, q_len, dim, value_dim, length, job.spans[1].length, keys.tokens.bits, values.tokens.bits}));
}

void bits_case(Isa isa) {
  const Int k = size(3000), m = one_of<Int>({1, 3, 15, 16, 17, 70}), n = size(100), per_row = words_for(k, 1);
  const auto x = floats(m * k, -9.0f, 9.0f), factor = floats(1, 0.5f, 1.5f);
  const int planes = static_cast<int>(pick(1, kMaxPlanes)), other = static_cast<int>(pick(1, kMaxPlanes));
  const float most = static_cast<float>((1 << planes) - 1);
  const Coding coding{.factor = factor, .per_row = false, .down = coin(), .offset = 0.5f * most, .low = 0.0f, .high = most};
  const Memory<std::uint32_t> signs[2] = {Memory<std::uint32_t>(m * per_row), Memory<std::uint32_t>(m * per_row)};
  const Memory<std::uint32_t> coded[2] = {Memory<std::uint32_t>(planes * m * per_row), Memory<std::uint32_t>(planes * m * per_row)};
  const auto weights = integers<std::uint8_t>(n * k, 0, (1 << other) - 1);
  const Memory<std::uint32_t> b(other * n * per_row);
  pack_planes(weights, n, k, other, b, threads());
  const Memory<std::int32_t> exact[2] = {Memory<std::int32_t>(m * n), Memory<std::int32_t>(m * n)};
  const Memory<float> out[2] = {Memory<float>(m * n), Memory<float>(m * n)};
  const auto a_scale = floats(m), b_scale = floats(n), bias = floats(n);
  const auto a_encoding = one_of({Encoding::bipolar, Encoding::unsigned_codes, Encoding::twos});
  const auto b_encoding = one_of({Encoding::bipolar, Encoding::unsigned_codes, Encoding::twos});
  for (int i = 0; i < 2; ++i) {
    const Isa use = i == 0 ? isa : Isa::portable;
    pack_signs(x, m, k, signs[i], threads(), use);
    pack_planes(x, m, k, coding, planes, coded[i], threads(), use);
    const BitProduct job{.a = {coded[1], m, planes, a_encoding}, .b = {b, n, other, b_encoding}, .k = k,
                         .exact = exact[i], .out = out[i], .a_scale = a_scale, .b_scale = b_scale, .bias = bias,
                         .a_scale_per_row = true, .b_scale_per_row = true};
    if (i == 0) pack_planes(x, m, k, coding, planes, coded[1], 1, Isa::portable);
    const Memory<std::uint32_t> scratch(bit_product_scratch(job));
    bit_product(job, scratch, threads(), use);
  }
  const std::string detail = sizes({m, k, n, planes, other});
  same_bytes("bits, signs", signs[0].at, signs[1].at, m * per_row * 4, detail);
  same_bytes("bits, planes", coded[0].at, coded[1].at, planes * m * per_row * 4, detail);
  same_bytes("bits, product", exact[0].at, exact[1].at, m * n * 4, detail);
  same_numbers("bits, scaled product", out[0].at, out[1].at, Dtype::float32, m * n, 1e-6, detail);
}

void conv_case(Isa isa) {
  ConvJob job{};
  job.kind = one_of({Conv::bits, Conv::bytes});
  ConvShape& s = job.shape;
  s = {.images = pick(1, 2), .groups = pick(1, 2), .channels = size(40), .out_channels = size(20), .height = pick(3, 20),
       .width = pick(3, 20), .kernel = {pick(1, 3), pick(1, 3)}, .stride = {pick(1, 2), pick(1, 2)},
       .padding = {pick(0, 2), pick(0, 2)}, .dilation = {1, pick(1, 1)}};
  const Int places = s.out(0) * s.out(1), channels = s.groups * s.out_channels, n = s.images * channels * places;
  const auto x = floats(s.images * s.groups * s.channels * s.height * s.width, -3.0f, 3.0f);
  const auto scale = floats(channels), bias = floats(channels), factor = floats(1, 20.0f, 40.0f);
  const Memory<std::uint32_t> weight = words(channels * s.taps() * job.words());
  const Int unused = s.channels % (job.kind == Conv::bits ? 32 : 4) * (job.kind == Conv::bits ? 1 : 8);
  if (unused != 0)  // of a tap's last word, what lies past the channels is zero
    for (Int i = job.words() - 1; i < weight.length; i += job.words()) weight[i] &= (1u << unused) - 1u;
  job.x = x, job.weight = weight, job.scale = scale, job.bias = coin() ? bias.at : nullptr, job.act = one_of({Act::none, Act::relu});
  job.pad = one_of({-1, 0, 1});
  job.coding = {.factor = factor, .per_row = false, .down = false, .offset = 100.0f, .low = 0.0f, .high = 255.0f};
  const Memory<float> out[2] = {Memory<float>(n), Memory<float>(n)};
  const int many = threads();
  for (int i = 0; i < 2; ++i) {
    job.out = out[i];
    const Memory<std::uint32_t> scratch(conv_scratch(job, many));
    conv(job, scratch, many, i == 0 ? isa : Isa::portable);
  }
  same_numbers(job.kind == Conv::bits ? "convolution of bits" : "convolution of bytes", out[0].at, out[1].at, Dtype::float32, n, 1e-6,
               sizes({s.channels, s.out_channels, s.height, s.width, s.kernel[0], s.kernel[1], job.pad}));
}

}  // namespace

int main(int count, char** arguments) {
  const int cases = count > 1 ? std::atoi(arguments[1]) : 300;
  Int failed = 0;
  for (int number = 1; number <= static_cast<int>(best_isa()); ++number) {
    const Isa isa = static_cast<Isa>(number);
    tallies.clear();
    for (int i = 0; i < cases; ++i)
      for (const auto& one : {linear_case, next_case, sparse_case, norm_case, rows_case, cache_case, bits_case, conv_case}) one(isa);
    std::printf("%s against portable:\n", std::string(name(isa)).c_str());
    for (const auto& [what, tally] : tallies) {
      std::printf("  %-36s %5lld cases, %lld differ, at most %.2f of what is allowed\n", what.c_str(),
                  static_cast<long long>(tally.cases), static_cast<long long>(tally.failed), tally.worst);
      failed += tally.failed;
    }
  }
  if (best_isa() == Isa::portable) std::printf("this CPU has portable kernels alone\n");
  return failed == 0 ? 0 : 1;
}
