// The Python edge of transformer blocks.
#include <nanobind/nanobind.h>

#include <cstdint>
#include <memory>

#include "bind_linear.hpp"
#include "block.hpp"

namespace nb = nanobind;

namespace laconic::edge {
namespace {

Layer layer_of(const Weights& weights, Address bias, Int bias_length, bool int8, float x_scale) {
  const Layer layer{.w = matrix_of(weights), .bias = reinterpret_cast<const float*>(bias), .int8 = int8, .x_scale = checked_scale(x_scale)};
  if (bias != 0) check_block("bias", bias, bias_length, 1, weights.rows, 4);
  if (int8 && !takes_int8(layer.w)) refuse("inputs of 8 bits need integer weights in groups of a multiple of 4");
  return layer;
}

Layer dense_of(Address weight, Int length, Int rows, Int k, Address bias, Int bias_length) {
  check_block("weight", weight, length, rows, k, 4);
  if (bias != 0) check_block("bias", bias, bias_length, 1, rows, 4);
  Layer layer{};
  layer.w.dense = reinterpret_cast<const float*>(weight);
  layer.w.rows = rows, layer.w.k = k, layer.w.group = k > 0 ? k : 1;
  layer.bias = reinterpret_cast<const float*>(bias);
  return layer;
}

Norm norm_of(Address weight, Address bias, Int length, Int width, float eps, bool centred) {
  check_block("norm weight", weight, length, 1, width, 4);
  if (bias != 0) check_block("norm bias", bias, length, 1, width, 4);
  return {reinterpret_cast<const float*>(weight), reinterpret_cast<const float*>(bias), eps, centred};
}

void want(const char* what, const Matrix& w, Int rows, Int k) {
  if (w.rows != rows || w.k != k)
    refuse(std::string(what) + " is " + shape(w.rows, w.k) + ", the block needs " + shape(rows, k));
}

void check(const Block& b) {
  if (b.heads < 1 || b.kv_heads < 1 || b.heads % b.kv_heads != 0 || b.dim < 1)
    refuse("a block needs heads in whole groups of key heads");
  want("q", b.q.w, b.heads * b.dim, b.width);
  want("k", b.k.w, b.kv_heads * b.dim, b.width);
  want("v", b.v.w, b.kv_heads * b.dim, b.width);
  want("o", b.o.w, b.width, b.heads * b.dim);
  want("up", b.up.w, b.up.w.rows, b.width);
  want("down", b.down.w, b.width, b.up.w.rows);
  if (b.gate.w.rows != 0) want("gate", b.gate.w, b.up.w.rows, b.width);
}

std::unique_ptr<std::uint8_t[]> scratch_of(const Block& b, Int tokens, Int keys, Int queries, int threads, Isa isa) {
  return std::make_unique_for_overwrite<std::uint8_t[]>(
      static_cast<std::size_t>(block_scratch(b, tokens, keys, queries, threads, isa)));
}

void begin(const Block& b, Address x, Int x_length, Int tokens, Address cos, Address sin, Int angles, Address q,
           Int q_length, Address k, Address v, Int kv_length, Int threads, Int isa) {
  check_block("x", x, x_length, tokens, b.width, 4);
  if ((cos == 0) != (sin == 0)) refuse("cos and sin come together");
  if (cos != 0) {
    check_block("cos", cos, angles, tokens, b.dim, 4);
    check_block("sin", sin, angles, tokens, b.dim, 4);
    if (b.dim % 2 != 0) refuse("rotary positions need an even head");
  }
  check_block("q", q, q_length, tokens, b.heads * b.dim, 4);
  check_block("k", k, kv_length, tokens, b.kv_heads * b.dim, 4);
  check_block("v", v, kv_length, tokens, b.kv_heads * b.dim, 4);
  const int many = threads_of(threads);
  const Isa use = isa_of(isa);
  if (tokens == 0) return;
  const auto scratch = scratch_of(b, tokens, 0, 0, many, use);
  block_begin(b, reinterpret_cast<const float*>(x), tokens,
              {reinterpret_cast<const float*>(cos), reinterpret_cast<const float*>(sin)}, reinterpret_cast<float*>(q),
              reinterpret_cast<float*>(k), reinterpret_cast<float*>(v), scratch.get(), many, use);
}

/// Keys and values are (batch, kv_heads, keys, dim) tensors of any strides but the last, of which `length` elements
/// from the address on belong to the caller.
Strides strides_of(const char* what, Address address, Int length, Int batch, Int heads, Int tokens, Int dim,
                   Int by_batch, Int by_head, Int by_token) {
  if (by_batch < 0 || by_head < 0 || by_token < 0) refuse(std::string(what) + ": strides are not negative");
  const Int last = (batch - 1) * by_batch + (heads - 1) * by_head + (tokens - 1) * by_token + dim;
  check_block(what, address, length, 1, last, 4);
  return {by_batch, by_token, by_head};
}

void end(const Block& b, Address x, Int x_length, Int batch, Int queries, Int keys, Address q, Int q_length, Address k,
         Int k_length, Int k_batch, Int k_head, Int k_token, Address v, Int v_length, Int v_batch, Int v_head,
         Int v_token, Address mask, Int mask_length, Int mask_batch, Int mask_query, bool causal, Address out,
         Int out_length, Int threads, Int isa) {
  if (batch < 0 || queries < 0 || keys < 0) refuse("a negative size");
  const Int tokens = batch * queries;
  check_block("x", x, x_length, tokens, b.width, 4);
  check_block("out", out, out_length, tokens, b.width, 4);
  check_block("q", q, q_length, tokens, b.heads * b.dim, 4);
  const int many = threads_of(threads);
  const Isa use = isa_of(isa);
  if (tokens == 0) return;
  if (keys < 1 || (causal && keys < queries)) refuse("fewer keys than queries");
  Attention a{};
  a.q = reinterpret_cast<const float*>(q);
  a.k = reinterpret_cast<const float*>(k);
  a.v = reinterpret_cast<const float*>(v);
  a.q_at = {queries * b.heads * b.dim, b.heads * b.dim, b.dim};
  a.k_at = strides_of("k", k, k_length, batch, b.kv_heads, keys, b.dim, k_batch, k_head, k_token);
  a.v_at = strides_of("v", v, v_length, batch, b.kv_heads, keys, b.dim, v_batch, v_head, v_token);
  if (mask != 0) {
    if (mask_batch < 0 || mask_query < 0) refuse("mask: strides are not negative");
    check_block("mask", mask, mask_length, 1, (batch - 1) * mask_batch + (queries - 1) * mask_query + keys, 4);
    a.mask = reinterpret_cast<const float*>(mask);
    a.mask_batch = mask_batch, a.mask_query = mask_query;
  }
  a.batch = batch, a.heads = b.heads, a.kv_heads = b.kv_heads, a.queries = queries, a.keys = keys, a.dim = b.dim;
  a.scale = b.scale, a.causal = causal;
  const auto scratch = scratch_of(b, tokens, keys, queries, many, use);
  block_end(b, reinterpret_cast<const float*>(x), a, reinterpret_cast<float*>(out), scratch.get(), many, use);
}

}  // namespace

void bind_block(nb::module_& m) {
  using unlocked = nb::call_guard<nb::gil_scoped_release>;
  nb::class_<Layer>(m, "Layer", "A linear layer of a block.")
      .def("__init__",
           [](Layer* self, const Weights& weights, Address bias, Int bias_length, bool int8, float x_scale) {
             new (self) Layer(layer_of(weights, bias, bias_length, int8, x_scale));
           },
           nb::arg("weights"), nb::arg("bias"), nb::arg("bias_length"), nb::arg("int8"), nb::arg("x_scale"))
      .def("__init__",
           [](Layer* self, Address weight, Int length, Int rows, Int k, Address bias, Int bias_length) {
             new (self) Layer(dense_of(weight, length, rows, k, bias, bias_length));
           },
           nb::arg("weight"), nb::arg("length"), nb::arg("rows"), nb::arg("k"), nb::arg("bias"),
           nb::arg("bias_length"));
  nb::class_<Norm>(m, "Norm", "A layer norm, or a root-mean-square norm.")
      .def("__init__",
           [](Norm* self, Address weight, Address bias, Int length, Int width, float eps, bool centred) {
             new (self) Norm(norm_of(weight, bias, length, width, eps, centred));
           },
           nb::arg("weight"), nb::arg("bias"), nb::arg("length"), nb::arg("width"), nb::arg("eps"), nb::arg("centred"));
  nb::class_<Block>(m, "Block", "A transformer block; whoever holds it keeps its tensors alive.")
      .def("__init__",
           [](Block* self, const Layer& q, const Layer& k, const Layer& v, const Layer& o, const Layer* gate,
              const Layer& up, const Layer& down, const Norm& before, const Norm& after, Int width, Int heads,
              Int kv_heads, Int dim, Int act, bool pre_norm, float scale) {
             if (act < 0 || act > static_cast<Int>(Act::silu)) refuse("act: there is no activation of that number");
             new (self) Block{q, k, v, o, gate != nullptr ? *gate : Layer{}, up, down, before, after, width, heads,
                              kv_heads, dim, static_cast<Act>(act), pre_norm, scale};
             check(*self);
           },
           nb::arg("q"), nb::arg("k"), nb::arg("v"), nb::arg("o"), nb::arg("gate").none(), nb::arg("up"),
           nb::arg("down"), nb::arg("before"), nb::arg("after"), nb::arg("width"), nb::arg("heads"),
           nb::arg("kv_heads"), nb::arg("dim"), nb::arg("act"), nb::arg("pre_norm"), nb::arg("scale"))
      .def("begin", &begin, unlocked())
      .def("end", &end, unlocked());
}

}  // namespace laconic::edge
