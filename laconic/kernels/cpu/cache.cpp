// Attention over a cache: its tasks, their scratch memory, and the order in which their results are put together.
#include "cache.hpp"

#include "table.hpp"
#include "threads.hpp"

namespace laconic {
namespace {

constexpr std::int64_t padded(std::int64_t n) { return (n + kPad - 1) / kPad * kPad; }
constexpr std::int64_t most(std::int64_t a, std::int64_t b) { return a > b ? a : b; }
constexpr std::int64_t splits_of(std::int64_t length) { return (length + kSplit - 1) / kSplit; }
constexpr std::int64_t groups_of(const Tokens& x) { return x.bits != 0 && !x.by_channel ? x.groups : 1; }

}  // namespace

CacheSizes::CacheSizes(const CacheAttention& job) {
  const Span &a = job.spans[0], &b = job.spans[1];
  heads = job.batch * job.kv_heads;
  rows = queries_per_head(job);
  first_splits = splits_of(a.length);
  splits = first_splits + splits_of(b.length);
  // A span of length 0 may say nothing of its rows.
  const Tokens &keys = (a.length != 0 ? a : b).keys, &values = (a.length != 0 ? a : b).values;
  key_width = padded(keys.dim);
  value_dim = values.dim;
  value_width = padded(values.dim);
  partial = value_width + kPad;
  const std::int64_t first = most(groups_of(a.keys), groups_of(a.values));
  const std::int64_t groups = most(first, most(groups_of(b.keys), groups_of(b.values)));
  scales = most(groups * kTokens, key_width) + kPad;
  partials = heads * splits * rows * partial;
  thread = rows * (2 * key_width + 2 + 2 * kTokens) + 2 * scales;
}

std::int64_t decode_scratch(const CacheAttention& job, int threads) {
  const CacheSizes s(job);
  return s.partials + threads * s.thread;
}

void decode_attention(const CacheAttention& job, float* scratch, int threads, Isa isa) {
  const CacheSizes s(job);
  if (s.heads == 0 || s.rows == 0) return;
  const Table& kernels = table(isa);
  // A task is a head and a range of tokens; how they are cut depends on lengths alone.
  parallel(threads, s.heads * s.splits, 1, [&](std::int64_t begin, std::int64_t end, int thread) {
    for (std::int64_t task = begin; task < end; ++task)
      kernels.attend_cache(job, s, task, scratch, scratch + s.partials + thread * s.thread);
  });
  parallel(threads, s.heads * s.rows, 4, [&](std::int64_t begin, std::int64_t end, int) {
    kernels.join_cache(job, s, scratch, begin, end);
  });
}

std::int64_t append_scratch(const CacheAppend& job, int threads) { return threads * (3 * (job.to.dim + kPad)); }

void append_tokens(const CacheAppend& job, float* scratch, int threads, Isa isa) {
  const Table& kernels = table(isa);
  const std::int64_t own = 3 * (job.to.dim + kPad);
  const std::int64_t grain = job.to.by_channel ? kBlock : 1;  // a head's tokens are a multiple of it
  parallel(threads, job.heads * job.count, grain, [&](std::int64_t begin, std::int64_t end, int thread) {
    kernels.append_cache(job, begin, end, scratch + thread * own);
  });
}

}  // namespace laconic
