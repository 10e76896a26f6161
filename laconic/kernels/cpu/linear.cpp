// Linear layers: which path a matrix takes, its scratch memory, and how its rows are split over threads.
#include "linear.hpp"

#include "table.hpp"
#include "threads.hpp"

namespace laconic {
namespace {

constexpr std::int64_t kGrain = 16;  // rows of W: whole cache lines of the output

struct Sizes {
  std::int64_t x, sums, index, thread;  // in floats
};

Sizes sizes(const Linear& job, Isa isa) {
  const Matrix& w = job.w;
  const std::int64_t lanes = table(isa).lanes, padded = w.groups + lanes;
  if (!reads_lanes(w)) return {0, 0, 0, w.k + w.k / 4 + 1 + 2 * padded + 2 * lanes};
  const std::int64_t chunk = codes_per_lane(w.bits) * lanes, chunks = (w.k + chunk - 1) / chunk;
  return {job.m * chunks * chunk, job.m * padded, chunks * lanes, 5 * padded + 2 * lanes};  // four rows of scales, one of zeros
}

}  // namespace

std::int64_t linear_float_scratch(const Linear& job, int threads, Isa isa) {
  const Sizes s = sizes(job, isa);
  return s.x + s.sums + s.index + threads * s.thread;
}

void linear_float(const Linear& job, float* scratch, int threads, Isa isa) {
  if (job.m == 0 || job.w.rows == 0) return;
  const Table& kernels = table(isa);
  const Sizes s = sizes(job, isa);
  float* own = scratch + s.x + s.sums + s.index;
  const auto mine = [&](int thread) { return own + thread * s.thread; };
  if (!reads_lanes(job.w)) {
    parallel(threads, job.w.rows, kGrain, [&](std::int64_t begin, std::int64_t end, int thread) {
      kernels.linear_rows(job, begin, end, mine(thread), isa);
    });
    return;
  }
  const std::int64_t lanes = kernels.lanes, chunk = codes_per_lane(job.w.bits) * lanes;
  Planes planes{
      .x = scratch,
      .sums = scratch + s.x,
      .index = reinterpret_cast<std::int32_t*>(scratch + s.x + s.sums),
      .chunks = (job.w.k + chunk - 1) / chunk,
      .x_stride = 0,
      .sums_stride = job.w.groups + lanes,
  };
  planes.x_stride = planes.chunks * chunk;
  kernels.lay_planes(job, planes);
  parallel(threads, job.w.rows, kGrain, [&](std::int64_t begin, std::int64_t end, int thread) {
    kernels.linear_planes(job, planes, begin, end, mine(thread));
  });
}

}  // namespace laconic
