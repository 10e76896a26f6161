// Transformer blocks: the order of the parts, and where their results wait.
#include "block.hpp"

#include "norm.hpp"
#include "table.hpp"
#include "threads.hpp"

namespace laconic {
namespace {

constexpr std::int64_t kFewTokens = 4;  // for which starting threads does not pay
constexpr std::int64_t kTogether = 384;   // that go through the feed-forward part together: what is between its layers stays in the cache

/// Buffers of one call, cut from one piece of memory.
struct Buffers {
  float *normed, *attended, *hidden, *wide, *other, *attention, *norm;
  std::uint8_t* linear;
  std::int64_t bytes;
};

std::int64_t lines(std::int64_t floats) { return (floats * 4 + 63) / 64 * 64; }

Linear job(const Layer& layer, const float* x, std::int64_t tokens, float* out, const float* residual, Act act) {
  return {.w = layer.w, .x = x, .out = out, .m = tokens, .x_stride = layer.w.k, .out_stride = layer.w.rows,
          .then = {.bias = layer.bias, .residual = residual, .act = act}};
}

std::int64_t linear_bytes(const Layer& layer, std::int64_t tokens, int threads, Isa isa) {
  const Linear one = job(layer, nullptr, tokens, nullptr, nullptr, Act::none);
  return layer.int8 ? linear_int8_scratch(one, threads, isa) : 4 * linear_float_scratch(one, threads, isa) + 64;
}

NormForward job(const Norm& norm, const float* x, float* out, std::int64_t tokens, std::int64_t width) {
  return {.kind = {.eps = norm.eps, .centred = norm.centred, .eps_outside = false, .unit_offset = false},
          .rows = tokens, .d = width,
          .dtype = Dtype::float32, .weight_dtype = Dtype::float32, .bias_dtype = Dtype::float32,
          .x = x, .residual = nullptr, .weight = norm.weight, .bias = norm.bias,
          .y = out, .sum = nullptr, .codes = nullptr, .scales = nullptr};
}

Buffers cut(const Block& b, std::int64_t tokens, std::int64_t keys, std::int64_t queries, int threads, Isa isa, std::uint8_t* at) {
  Attention a{};
  a.keys = keys, a.queries = queries, a.dim = b.dim;
  Buffers r{};
  const std::uintptr_t start = reinterpret_cast<std::uintptr_t>(at);
  std::int64_t used = static_cast<std::int64_t>(-start & 63u);
  const auto take = [&](std::int64_t floats) {
    float* p = reinterpret_cast<float*>(start + static_cast<std::uintptr_t>(used));
    used += lines(floats);
    return p;
  };
  const std::int64_t together = tokens < kTogether ? tokens : kTogether;
  r.normed = take(together * b.width);
  r.hidden = take(together * b.width);
  r.attended = take(tokens * b.heads * b.dim);
  r.wide = take(together * b.up.w.rows);
  r.other = take(b.gate.w.rows > 0 ? together * b.gate.w.rows : 0);
  r.attention = take(threads * attention_scratch(a));
  r.norm = take(norm_scratch(job(b.before, nullptr, nullptr, together, b.width), threads));
  r.linear = reinterpret_cast<std::uint8_t*>(take(0));
  std::int64_t most = 0;
  for (const Layer* layer : {&b.q, &b.k, &b.v, &b.o, &b.gate, &b.up, &b.down}) {
    if (layer->w.rows == 0) continue;
    const std::int64_t need = linear_bytes(*layer, together, threads, isa);
    most = need > most ? need : most;
  }
  r.bytes = used + most + 64;
  return r;
}

struct Run {
  const Table& kernels;
  int threads;
  Isa isa;
  Buffers to;

  void linear(const Layer& layer, const float* x, std::int64_t tokens, float* out, const float* residual = nullptr,
              Act act = Act::none) const {
    const Linear one = job(layer, x, tokens, out, residual, act);
    if (layer.int8) linear_int8(one, to.linear, threads, isa);
    else linear_float(one, reinterpret_cast<float*>(to.linear), threads, isa);
  }
  /// `x` and `out` may be the same.
  void norm(const Norm& norm, const float* x, std::int64_t tokens, std::int64_t width, float* out) const {
    laconic::norm(job(norm, x, out, tokens, width), to.norm, threads, isa);
  }
};

/// What follows attention, of some tokens: its projection, the norms and the two or three layers between them.
void feed_forward(const Block& b, const Run& run, const Buffers& to, const float* x, const float* attended,
                  std::int64_t tokens, float* out) {
  const std::int64_t wide = b.up.w.rows;
  run.linear(b.o, attended, tokens, to.hidden, x);
  const float* into = to.hidden;
  if (b.pre_norm) {
    run.norm(b.after, to.hidden, tokens, b.width, to.normed);
    into = to.normed;
  } else {
    run.norm(b.before, to.hidden, tokens, b.width, to.hidden);
  }
  if (b.gate.w.rows > 0) {
    run.linear(b.gate, into, tokens, to.wide, nullptr, b.act);
    run.linear(b.up, into, tokens, to.other);
    parallel(run.threads, tokens * wide, 4096, [&](std::int64_t begin, std::int64_t end, int) {
      run.kernels.multiply(to.wide, to.other, begin, end);
    });
  } else {
    run.linear(b.up, into, tokens, to.wide, nullptr, b.act);
  }
  run.linear(b.down, to.wide, tokens, out, to.hidden);
  if (!b.pre_norm) run.norm(b.after, out, tokens, b.width, out);
}

}  // namespace

std::int64_t block_scratch(const Block& b, std::int64_t tokens, std::int64_t keys, std::int64_t queries, int threads, Isa isa) {
  return cut(b, tokens, keys, queries, threads, isa, nullptr).bytes + 64;
}

void block_begin(const Block& b, const float* x, std::int64_t tokens, Rotary rotary, float* q, float* k, float* v,
                 std::uint8_t* scratch, int threads, Isa isa) {
  const Buffers to = cut(b, tokens, 0, 0, threads, isa, scratch);
  const Run run{table(isa), threads, isa, to};
  for (std::int64_t at = 0; at < tokens; at += kTogether) {
    const std::int64_t some = tokens - at < kTogether ? tokens - at : kTogether;
    const float* from = x + at * b.width;
    if (b.pre_norm) {
      run.norm(b.before, from, some, b.width, to.normed);
      from = to.normed;
    }
    run.linear(b.q, from, some, q + at * b.q.w.rows);
    run.linear(b.k, from, some, k + at * b.k.w.rows);
    run.linear(b.v, from, some, v + at * b.v.w.rows);
  }
  if (rotary.cos == nullptr) return;
  parallel(threads, tokens, kFewTokens, [&](std::int64_t begin, std::int64_t end, int) {
    run.kernels.rotate_rows(rotary, q, b.heads, b.dim, begin, end);
    run.kernels.rotate_rows(rotary, k, b.kv_heads, b.dim, begin, end);
  });
}

void block_end(const Block& b, const float* x, Attention attention, float* out, std::uint8_t* scratch, int threads, Isa isa) {
  const std::int64_t tokens = attention.batch * attention.queries;
  const Buffers to = cut(b, tokens, attention.keys, attention.queries, threads, isa, scratch);
  const Run run{table(isa), threads, isa, to};
  attention.out = to.attended;
  attention.out_at = {attention.queries * b.heads * b.dim, b.heads * b.dim, b.dim};
  const std::int64_t own = attention_scratch(attention);
  parallel(threads, attention.batch * attention.heads, 1, [&](std::int64_t begin, std::int64_t end, int thread) {
    run.kernels.attend(attention, begin, end, to.attention + thread * own);
  });
  for (std::int64_t at = 0; at < tokens; at += kTogether) {
    const std::int64_t some = tokens - at < kTogether ? tokens - at : kTogether;
    feed_forward(b, run, to, x + at * b.width, to.attended + at * b.heads * b.dim, some, out + at * b.width);
  }
}

}  // namespace laconic
