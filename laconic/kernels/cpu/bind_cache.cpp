// The Python edge of attention over a cache.
#include <nanobind/nanobind.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "cache.hpp"
#include "checks.hpp"

namespace nb = nanobind;

namespace laconic::edge {
namespace {

/// What `Tokens` is made from; every address with the number of elements behind it.
struct Store {
  Address data;
  Int data_length;
  Address scale;
  Int scale_length;
  Address low;
  Int low_length;
  Int bits, dtype, heads, capacity, dim, group, by_channel;
};

Tokens tokens_of(const Store& s) {
  if (s.heads < 0 || s.capacity < 0 || s.dim < 1 || s.dim > 65536)
    refuse("a cache of " + std::to_string(s.heads) + " heads, " + std::to_string(s.capacity) + " tokens and " +
           std::to_string(s.dim) + " numbers a token is out of range");
  if (s.capacity != 0 && s.heads > std::numeric_limits<Int>::max() / 8 / s.capacity)
    refuse("heads and capacity: " + shape(s.heads, s.capacity) + " is too large to address");
  const Dtype dtype = dtype_of("dtype", s.dtype, true);
  const auto size = static_cast<Int>(size_of(dtype));
  const Int rows = s.heads * s.capacity;
  if (s.bits == 0) {
    check_block("floats", s.data, s.data_length, rows, s.dim, size);
    return {.data = reinterpret_cast<const void*>(s.data), .scale = nullptr, .low = nullptr, .capacity = s.capacity,
            .dim = s.dim, .groups = 1, .group = s.dim, .bits = 0, .dtype = dtype, .by_channel = false};
  }
  if (s.bits != 8 && s.bits != 4 && s.bits != 2) refuse("bits is " + std::to_string(s.bits) + ", must be 8, 4 or 2");
  const bool by_channel = s.by_channel != 0;
  if (!by_channel && (s.group < 1 || s.dim % s.group != 0 || (s.group != s.dim && s.group % kPad != 0)))
    refuse("group is " + std::to_string(s.group) + ", must be " + std::to_string(s.dim) +
           " or a divisor of it and a multiple of " + std::to_string(kPad));
  if (by_channel && s.capacity % kBlock != 0)
    refuse("capacity is " + std::to_string(s.capacity) + ", must be a multiple of " + std::to_string(kBlock));
  const Int groups = by_channel ? s.dim : s.dim / s.group, ranges = by_channel ? rows / kBlock : rows;
  check_block("codes", s.data, s.data_length, rows, words_for(s.dim, static_cast<int>(s.bits)), 4);
  check_block("scale", s.scale, s.scale_length, ranges, groups, size);
  check_block("low", s.low, s.low_length, ranges, groups, size);
  return {.data = reinterpret_cast<const void*>(s.data), .scale = reinterpret_cast<const void*>(s.scale),
          .low = reinterpret_cast<const void*>(s.low), .capacity = s.capacity, .dim = s.dim, .groups = groups,
          .group = by_channel ? s.dim : s.group, .bits = static_cast<int>(s.bits), .dtype = dtype,
          .by_channel = by_channel};
}

int cache_threads(Int threads) {
  if (threads < 1 || threads > 4096) refuse("threads is " + std::to_string(threads) + ", must be 1 to 4096");
  return static_cast<int>(threads);
}

/// Elements from the first to the last that strides reach, for counts of steps.
Int reach(const Int (&counts)[3], const Int (&strides)[3], Int last) {
  Int most = last;
  for (int i = 0; i < 3; ++i) {
    if (strides[i] < 0) refuse("mask: a stride is negative");
    if (counts[i] > 1 && strides[i] > std::numeric_limits<Int>::max() / 8 / counts[i])
      refuse("mask: a stride is too large");
    most += (counts[i] - 1) * strides[i];
  }
  return most;
}

/// spans: keys and values of each, one after the other; lengths: tokens of each that count.
void attention(Address q, Int q_length, Int batch, Int heads, Int kv_heads, Int q_len, const std::vector<Store>& spans,
               const std::vector<Int>& lengths, Address mask, Int mask_length, Int mask_kind, Int mask_batch,
               Int mask_head, Int mask_query, float scale, bool causal, Address out, Int out_length, Int threads,
               Int isa) {
  if (batch < 0 || kv_heads < 1 || heads < kv_heads || heads % kv_heads != 0 || q_len < 0)
    refuse("heads: " + std::to_string(heads) + " of queries do not share " + std::to_string(kv_heads) + " of keys");
  if (lengths.size() < 1 || lengths.size() > 2 || spans.size() != 2 * lengths.size())
    refuse("spans: one or two, each of keys and values");
  CacheAttention job{};
  Int total = 0;
  for (std::size_t i = 0; i < lengths.size(); ++i) {
    const Store &keys = spans[2 * i], &values = spans[2 * i + 1];
    job.spans[i] = {tokens_of(keys), tokens_of(values), lengths[i]};
    if (values.by_channel != 0) refuse("values have no scales by channel");
    if (keys.dim != spans[0].dim || values.dim != spans[1].dim) refuse("spans differ in the numbers of a token");
    for (const Store* s : {&keys, &values}) {
      if (s->heads != batch * kv_heads)
        refuse("a cache has " + std::to_string(s->heads) + " heads over the batch, queries need " +
               std::to_string(batch * kv_heads));
      if (lengths[i] < 0 || lengths[i] > s->capacity)
        refuse(std::to_string(lengths[i]) + " tokens do not lie in a cache of " + std::to_string(s->capacity));
    }
    total += lengths[i];
  }
  if (lengths.size() == 1) job.spans[1] = {job.spans[0].keys, job.spans[0].values, 0};
  if (mask_kind < 0 || mask_kind > 2) refuse("mask: there is no kind number " + std::to_string(mask_kind));
  check_block("q", q, q_length, batch * heads, q_len * spans[0].dim, 4);
  check_block("out", out, out_length, batch * heads, q_len * spans[1].dim, 4);
  if (mask_kind != 0 && total != 0 && batch != 0 && q_len != 0)
    check_block("mask", mask, mask_length, 1,
                reach({batch, heads, q_len}, {mask_batch, mask_head, mask_query}, total), mask_kind == 1 ? 4 : 1);
  job.q = reinterpret_cast<const float*>(q);
  job.out = reinterpret_cast<float*>(out);
  job.mask = reinterpret_cast<const void*>(mask);
  job.mask_kind = static_cast<Mask>(mask_kind);
  job.batch = batch;
  job.heads = heads;
  job.kv_heads = kv_heads;
  job.q_len = q_len;
  job.mask_batch = mask_batch;
  job.mask_head = mask_head;
  job.mask_query = mask_query;
  job.scale = scale;
  job.causal = causal;
  const int many = cache_threads(threads);
  const Isa use = isa_of(isa);
  const auto scratch = std::make_unique_for_overwrite<float[]>(static_cast<std::size_t>(decode_scratch(job, many)));
  decode_attention(job, scratch.get(), many, use);
}

void append(const Store& to, Address x, Int x_length, Int at, Int count, Int threads, Int isa) {
  CacheAppend job{.to = tokens_of(to), .x = reinterpret_cast<const float*>(x), .heads = to.heads, .at = at,
                  .count = count};
  if (to.bits == 0) refuse("floats are not packed: copy them");
  if (at < 0 || count < 0 || at > to.capacity || count > to.capacity - at)
    refuse("tokens " + std::to_string(at) + " to " + std::to_string(at + count) + " do not lie in a cache of " +
           std::to_string(to.capacity));
  if (to.by_channel != 0 && (at % kBlock != 0 || count % kBlock != 0))
    refuse("scales by channel need blocks of " + std::to_string(kBlock) + " tokens, got " + std::to_string(count) +
           " at " + std::to_string(at));
  check_block("x", x, x_length, to.heads * count, to.dim, 4);
  const int many = cache_threads(threads);
  const Isa use = isa_of(isa);
  const auto scratch = std::make_unique_for_overwrite<float[]>(static_cast<std::size_t>(append_scratch(job, many)));
  append_tokens(job, scratch.get(), many, use);
}

}  // namespace

void bind_cache(nb::module_& m) {
  using unlocked = nb::call_guard<nb::gil_scoped_release>;
  m.attr("CACHE_BLOCK") = kBlock;
  nb::class_<Store>(m, "CacheTokens",
                    "Addresses and sizes of a cache's keys or values; its owner keeps the tensors alive.")
      .def("__init__",
           [](Store* self, Address data, Int data_length, Address scale, Int scale_length, Address low, Int low_length,
              Int bits, Int dtype, Int heads, Int capacity, Int dim, Int group, Int by_channel) {
             new (self) Store{data, data_length, scale, scale_length, low, low_length, bits, dtype, heads, capacity,
                              dim, group, by_channel};
             static_cast<void>(tokens_of(*self));  // refuse now, and not at the first use
           },
           nb::arg("data"), nb::arg("data_length"), nb::arg("scale"), nb::arg("scale_length"), nb::arg("low"),
           nb::arg("low_length"), nb::arg("bits"), nb::arg("dtype"), nb::arg("heads"), nb::arg("capacity"),
           nb::arg("dim"), nb::arg("group"), nb::arg("by_channel"));
  m.def("decode_attention", &attention, nb::arg("q"), nb::arg("q_length"), nb::arg("batch"), nb::arg("heads"),
        nb::arg("kv_heads"), nb::arg("q_len"), nb::arg("spans"), nb::arg("lengths"), nb::arg("mask"),
        nb::arg("mask_length"), nb::arg("mask_kind"), nb::arg("mask_batch"), nb::arg("mask_head"),
        nb::arg("mask_query"), nb::arg("scale"), nb::arg("causal"), nb::arg("out"), nb::arg("out_length"),
        nb::arg("threads"), nb::arg("isa") = -1, unlocked());
  m.def("cache_append", &append, nb::arg("to"), nb::arg("x"), nb::arg("x_length"), nb::arg("at"), nb::arg("count"),
        nb::arg("threads"), nb::arg("isa") = -1, unlocked());
}

}  // namespace laconic::edge
