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
  std::uint8_t *rounded, *wide_rounded, *linear;
  std::int64_t bytes;
};

std::int64_t lines(std::int64_t floats) { return (floats * 4 + 63) / 64 * 64; }

Linear job(const Layer& layer, const float* x, std::int64_t tokens, float* out, const float* residual, Act act) {
  return {.w = layer.w, .x = x, .out = out, .m = tokens, .x_stride = layer.w.k, .out_stride = layer.w.rows,
          .then = {.bias = layer.bias, .residual = residual, .act = act}, .x_scale = layer.x_scale};
}

std::int64_t linear_bytes(const Layer& layer, std::int64_t tokens, int threads, Isa isa) {
  const Linear one = job(layer, nullptr, tokens, nullptr, nullptr, Act::none);
  if (!layer.int8) return 4 * linear_float_scratch(one, threads, isa) + 64;
  return has_few_rows(one) ? linear_int8_scratch(one, threads, isa) : products_bytes(one, threads, isa);
}

/// Bytes of the rounded inputs of a layer; 0 where it rounds them itself, or does not.
std::int64_t input_bytes(const Layer& layer, std::int64_t tokens, Isa isa) {
  const Linear one = job(layer, nullptr, tokens, nullptr, nullptr, Act::none);
  return layer.int8 && layer.w.rows > 0 && !has_few_rows(one) ? rounded_bytes(one, isa) : 0;
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
  std::int64_t rounded = 0, most = 0;
  for (const Layer* layer : {&b.q, &b.k, &b.v, &b.o, &b.gate, &b.up}) {
    const std::int64_t need = input_bytes(*layer, together, isa);
    rounded = need > rounded ? need : rounded;
  }
  r.rounded = reinterpret_cast<std::uint8_t*>(take(rounded / 4));
  r.wide_rounded = reinterpret_cast<std::uint8_t*>(take(input_bytes(b.down, together, isa) / 4));
  r.linear = reinterpret_cast<std::uint8_t*>(take(0));
  for (const Layer* layer : {&b.q, &b.k, &b.v, &b.o, &b.gate, &b.up, &b.down}) {
    if (layer->w.rows == 0) continue;
    const std::int64_t need = linear_bytes(*layer, together, threads, isa);
    most = need > most ? need : most;
  }
  r.bytes = used + most + 64;
  return r;
}

/// What was rounded last: layers that read the same do not round it again.
struct Last {
  const float* x = nullptr;
  float scale = 0.0f;
  std::int64_t groups = 0, group = 0;
};

struct Run {
  const Table& kernels;
  int threads;
  Isa isa;
  Buffers to;
  Last last{};

  /// The inputs of a layer as they were rounded, or are now.
  Rounded inputs(const Linear& one) {
    const Rounded in = rounded_at(one, to.rounded, isa);
    if (one.x != last.x || one.x_scale != last.scale) round_inputs(one, in, to.linear, threads, isa);
    else if (one.w.groups != last.groups || one.w.group != last.group) sum_inputs(one, in, threads, isa);
    last = {one.x, one.x_scale, one.w.groups, one.w.group};
    return in;
  }
  void linear(const Layer& layer, const float* x, std::int64_t tokens, float* out, const float* residual = nullptr,
              Act act = Act::none) {
    const Linear one = job(layer, x, tokens, out, residual, act);
    if (!layer.int8) linear_float(one, reinterpret_cast<float*>(to.linear), threads, isa);
    else if (has_few_rows(one)) linear_int8(one, to.linear, threads, isa);
    else multiply_rounded(one, inputs(one), to.linear, threads, isa);
  }
  /// `x` and `out` may be the same. Where the layer that reads the result rounds it, rows are rounded while they are near.
  void norm(const Norm& norm, const float* x, std::int64_t tokens, std::int64_t width, float* out, const Layer& reader) {
    const NormForward work = job(norm, x, out, tokens, width);
    const Linear next = job(reader, out, tokens, nullptr, nullptr, Act::none);
    last = {};
    if (!reader.int8 || has_few_rows(next)) return laconic::norm(work, to.norm, threads, isa);
    const Rounded in = rounded_at(next, to.rounded, isa);
    const std::int64_t own = norm_scratch(work, 1) - norm_scratch(work, 0);
    each_tile(tokens, [&](std::int64_t begin, std::int64_t end, int thread) {
      kernels.norm_forward(work, norm.weight, norm.bias, begin, end, to.norm + thread * own);
      kernels.round_inputs(next, in, begin, end, row_codes(next, thread));
    });
    last = {out, next.x_scale, next.w.groups, next.w.group};
  }
  /// wide <- act(up(x)) or act(gate(x)) * up(x), then out <- down(wide) + residual.
  void perceptron(const Block& b, const float* x, std::int64_t tokens, float* out) {
    const std::int64_t wide = b.up.w.rows;
    Linear up = job(b.up, x, tokens, to.wide, nullptr, b.act);
    const Linear down = job(b.down, to.wide, tokens, out, to.hidden, Act::none);
    if (!b.down.int8 || has_few_rows(down)) {
      both(b, x, tokens);
      if (b.gate.w.rows > 0) parallel(threads, tokens * wide, 4096, [&](std::int64_t begin, std::int64_t end, int) {
        kernels.multiply(to.wide, to.other, begin, end);
      });
      return linear(b.down, to.wide, tokens, out, to.hidden);
    }
    const Rounded in = rounded_at(down, to.wide_rounded, isa);
    if (b.gate.w.rows == 0 && b.down.x_scale > 0.0f && b.up.int8) {  // known before: `up` stores what `down` reads
      clear_beyond(down, in, isa);
      up.next = &in, up.next_scale = b.down.x_scale;
      multiply_rounded(up, inputs(up), to.linear, threads, isa);
      sum_inputs(down, in, threads, isa);
    } else {
      both(b, x, tokens);
      each_tile(tokens, [&](std::int64_t begin, std::int64_t end, int thread) {
        if (b.gate.w.rows > 0) kernels.multiply(to.wide, to.other, begin * wide, end * wide);
        kernels.round_inputs(down, in, begin, end, row_codes(down, thread));
      });
    }
    multiply_rounded(down, in, to.linear, threads, isa);
  }

 private:
  void both(const Block& b, const float* x, std::int64_t tokens) {
    linear(b.gate.w.rows > 0 ? b.gate : b.up, x, tokens, to.wide, nullptr, b.act);
    if (b.gate.w.rows > 0) linear(b.up, x, tokens, to.other);
  }
  /// Scratch of one thread for a row of codes; products are not under way meanwhile.
  std::int8_t* row_codes(const Linear& one, int thread) const {
    return reinterpret_cast<std::int8_t*>(to.linear + thread * rounding_bytes(one));
  }
  /// f(begin, end, thread) over runs of tokens that stay in the cache: tiles, of rows that are rounded together.
  template <class F>
  void each_tile(std::int64_t tokens, const F& f) const {
    const std::int64_t tile = kernels.tile;
    parallel(threads, tokens, tile, [&](std::int64_t begin, std::int64_t end, int thread) {
      for (std::int64_t at = begin; at < end; at += tile) f(at, at + tile < end ? at + tile : end, thread);
    });
  }
};

/// What follows attention, of some tokens: its projection, the norms and the two or three layers between them.
void feed_forward(const Block& b, Run& run, const float* x, const float* attended, std::int64_t tokens, float* out) {
  const Buffers& to = run.to;
  run.last = {};
  run.linear(b.o, attended, tokens, to.hidden, x);
  float* into = b.pre_norm ? to.normed : to.hidden;
  run.norm(b.pre_norm ? b.after : b.before, to.hidden, tokens, b.width, into, b.gate.w.rows > 0 ? b.gate : b.up);
  run.perceptron(b, into, tokens, out);
  if (!b.pre_norm) run.norm(b.after, out, tokens, b.width, out, Layer{});
}

}  // namespace

std::int64_t block_scratch(const Block& b, std::int64_t tokens, std::int64_t keys, std::int64_t queries, int threads, Isa isa) {
  return cut(b, tokens, keys, queries, threads, isa, nullptr).bytes + 64;
}

void block_begin(const Block& b, const float* x, std::int64_t tokens, Rotary rotary, float* q, float* k, float* v,
                 std::uint8_t* scratch, int threads, Isa isa) {
  const Buffers to = cut(b, tokens, 0, 0, threads, isa, scratch);
  Run run{table(isa), threads, isa, to};
  for (std::int64_t at = 0; at < tokens; at += kTogether) {
    const std::int64_t some = tokens - at < kTogether ? tokens - at : kTogether;
    const float* from = x + at * b.width;
    run.last = {};
    if (b.pre_norm) {
      run.norm(b.before, from, some, b.width, to.normed, b.q);
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
  Run run{table(isa), threads, isa, to};
  attention.out = to.attended;
  attention.out_at = {attention.queries * b.heads * b.dim, b.heads * b.dim, b.dim};
  const std::int64_t own = attention_scratch(attention);
  parallel(threads, attention.batch * attention.heads, 1, [&](std::int64_t begin, std::int64_t end, int thread) {
    run.kernels.attend(attention, begin, end, to.attention + thread * own);
  });
  for (std::int64_t at = 0; at < tokens; at += kTogether) {
    const std::int64_t some = tokens - at < kTogether ? tokens - at : kTogether;
    feed_forward(b, run, x + at * b.width, to.attended + at * b.heads * b.dim, some, out + at * b.width);
  }
}

}  // namespace laconic
