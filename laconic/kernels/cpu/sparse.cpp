// Linear layers on sparse weights: which way to multiply, scratch memory, and how rows are split over threads.
#include "sparse.hpp"

#include "table.hpp"
#include "threads.hpp"

namespace laconic {
namespace {

constexpr std::int64_t kFew = 8;  // rows of x up to which W is read once for four of them

/// Vectors of rows of x that stay together where `left` are still to come.
int vectors_of(std::int64_t left, int lanes) { return left > 2 * lanes ? 4 : left > lanes ? 2 : 1; }

std::int64_t padded(std::int64_t floats) { return (floats + 15) / 16 * 16; }

}  // namespace

std::int64_t sparse_linear_scratch(const SparseLinear& job, Isa isa) {
  if (job.m <= kFew) return 0;
  const int lanes = table(isa).lanes;
  const std::int64_t width = static_cast<std::int64_t>(vectors_of(job.m, lanes)) * lanes;
  return 16 + padded(job.w.k * width) + padded(job.w.rows * width) + job.w.rows / job.w.r;
}

void sparse_linear(const SparseLinear& job, float* scratch, int threads, Isa isa) {
  if (job.m == 0 || job.w.rows == 0) return;
  const Table& kernels = table(isa);
  const std::int64_t units = job.w.rows / job.w.r, grain = job.w.r < 16 ? (16 + job.w.r - 1) / job.w.r : 1;
  if (job.m <= kFew) {
    parallel(threads, units, grain, [&](std::int64_t begin, std::int64_t end, int) { kernels.sparse_few(job, begin, end); });
    return;
  }
  scratch = aligned(scratch);
  const std::int64_t widest = static_cast<std::int64_t>(vectors_of(job.m, kernels.lanes)) * kernels.lanes;
  Columns in{.columns = scratch, .sums = scratch + padded(job.w.k * widest), .next = nullptr, .m0 = 0, .vectors = 0};
  in.next = reinterpret_cast<std::int32_t*>(in.sums + padded(job.w.rows * widest));
  while (in.m0 < job.m) {
    in.vectors = vectors_of(job.m - in.m0, kernels.lanes);
    parallel(threads, job.w.k, kernels.lanes, [&](std::int64_t begin, std::int64_t end, int) {
      kernels.lay_columns(job, in, begin, end);
    });
    parallel(threads, units, grain, [&](std::int64_t begin, std::int64_t end, int) {
      kernels.sparse_many(job, in, begin, end);
    });
    in.m0 += in.vectors * kernels.lanes;
  }
}

}  // namespace laconic
