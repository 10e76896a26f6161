// Linear layers: which path a matrix takes, its scratch memory, and how its rows are split over threads.
#include "linear.hpp"

#include <cstring>

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
  const std::int64_t chunk = codes_per_lane(w) * lanes, chunks = (w.k + chunk - 1) / chunk;
  return {(splits_lanes(w) ? 2 : 1) * job.m * chunks * chunk, job.m * padded, chunks * lanes, 5 * padded + 2 * lanes};  // four rows of scales, one of zeros
}

std::int64_t whole_lines(std::int64_t bytes) { return (bytes + 63) / 64 * 64; }

}  // namespace

namespace {

constexpr std::int64_t kFew = 8;         // rows of x that meet codes as they come
constexpr std::int64_t kDenseRows = 96;  // rows of x, whole tiles, that one panel meets before the next

void by_panels(const Linear& job, float* scratch, int threads, Isa isa) {
  const Table& kernels = table(isa);
  const std::int64_t own = kernels.dense_scratch(job.w), panels = (job.w.rows + kernels.panel - 1) / kernels.panel;
  // A second block unpacks the panels again: only where there are fewer panels than threads does it pay to have one.
  const std::int64_t size = panels >= 2 * threads ? job.m : kDenseRows, blocks = (job.m + size - 1) / size;
  parallel(threads, panels * blocks, 1, [&](std::int64_t begin, std::int64_t end, int thread) {
    for (std::int64_t task = begin; task < end; ++task) {
      const std::int64_t block = task / panels * size, stop = block + size < job.m ? block + size : job.m;
      kernels.linear_dense(job, task % panels, block, stop, scratch + thread * own, isa);
    }
  });
}

bool takes_panels(const Linear& job) { return job.m > kFew && job.w.k > 0; }

}  // namespace

std::int64_t linear_float_scratch(const Linear& job, int threads, Isa isa) {
  if (takes_panels(job)) return threads * table(isa).dense_scratch(job.w);
  if (job.w.dense != nullptr) return 0;
  const Sizes s = sizes(job, isa);
  return s.x + s.sums + s.index + threads * s.thread;
}

void linear_float(const Linear& job, float* scratch, int threads, Isa isa) {
  if (job.m == 0 || job.w.rows == 0) return;
  const Table& kernels = table(isa);
  if (takes_panels(job)) return by_panels(job, scratch, threads, isa);
  if (job.w.dense != nullptr) {
    return parallel(threads, job.w.rows, kGrain, [&](std::int64_t begin, std::int64_t end, int) {
      kernels.dense_rows(job, begin, end);
    });
  }
  const Sizes s = sizes(job, isa);
  float* own = scratch + s.x + s.sums + s.index;
  const auto mine = [&](int thread) { return own + thread * s.thread; };
  if (!reads_lanes(job.w)) {
    parallel(threads, job.w.rows, kGrain, [&](std::int64_t begin, std::int64_t end, int thread) {
      kernels.linear_rows(job, begin, end, mine(thread), isa);
    });
    return;
  }
  const std::int64_t lanes = kernels.lanes, chunk = codes_per_lane(job.w) * lanes;
  Planes planes{
      .x = scratch,
      .second = splits_lanes(job.w) ? scratch + s.x / 2 : nullptr,
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

namespace {

struct RowsMemory {
  RowsSizes size;
  std::int64_t second, scale, sums, index, natural, own, thread, end;  // offsets in bytes but `thread`, a size

  explicit RowsMemory(const RowsSizes& s, int threads) : size(s) {
    second = whole_lines(s.codes), scale = second + (s.split ? whole_lines(s.codes) : 0);
    sums = scale + whole_lines(s.scale), index = sums + whole_lines(s.sums);
    natural = index + whole_lines(s.index), own = natural + whole_lines(s.natural);
    thread = whole_lines(s.thread), end = own + threads * thread;
  }
};

void linear_int8_by_rows(const Linear& job, std::uint8_t* scratch, int threads, Isa isa) {
  const Table& kernels = table(isa);
  const RowsMemory at(kernels.rows_sizes(job), threads);
  const RoundedRows in{
      .codes = reinterpret_cast<std::int8_t*>(scratch),
      .second = at.size.split ? reinterpret_cast<std::int8_t*>(scratch + at.second) : nullptr,
      .scale = reinterpret_cast<float*>(scratch + at.scale),
      .sums = reinterpret_cast<float*>(scratch + at.sums),
      .index = reinterpret_cast<std::int32_t*>(scratch + at.index),
      .chunks = at.size.chunks,
      .k_padded = at.size.k_padded,
      .sums_stride = at.size.sums_stride,
  };
  kernels.lay_rows(job, in, reinterpret_cast<std::int8_t*>(scratch + at.natural));
  parallel(threads, job.w.rows, kGrain, [&](std::int64_t begin, std::int64_t end, int thread) {
    kernels.linear_int8_rows(job, in, begin, end, scratch + at.own + thread * at.thread, isa);
  });
}

}  // namespace

bool has_few_rows(const Linear& job) { return job.m <= kFew; }

Rounded rounded_at(const Linear& job, std::uint8_t* memory, Isa isa) {
  const int tile = table(isa).tile;
  const std::int64_t k = whole_lines(job.w.k), codes = whole_lines((job.m + tile - 1) / tile * tile * k);
  return {
      .codes = reinterpret_cast<std::int8_t*>(memory),
      .scale = reinterpret_cast<float*>(memory + codes),
      .sums = reinterpret_cast<std::int32_t*>(memory + codes + whole_lines(4 * job.m)),
      .k_padded = k,
  };
}

std::int64_t rounded_bytes(const Linear& job, Isa isa) {
  const int tile = table(isa).tile;
  return whole_lines((job.m + tile - 1) / tile * tile * whole_lines(job.w.k)) + whole_lines(4 * job.m) +
         whole_lines(4 * job.m * job.w.groups);
}

std::int64_t rounding_bytes(const Linear& job) { return whole_lines(job.w.k); }

void round_inputs(const Linear& job, const Rounded& to, std::uint8_t* scratch, int threads, Isa isa) {
  const Table& kernels = table(isa);
  parallel(threads, job.m, kernels.tile, [&](std::int64_t begin, std::int64_t end, int thread) {
    kernels.round_inputs(job, to, begin, end, reinterpret_cast<std::int8_t*>(scratch + thread * rounding_bytes(job)));
  });
}

void sum_inputs(const Linear& job, const Rounded& of, int threads, Isa isa) {
  const Table& kernels = table(isa);
  parallel(threads, job.m, kernels.tile, [&](std::int64_t begin, std::int64_t end, int) { kernels.sum_inputs(job, of, begin, end); });
}

void clear_beyond(const Linear& job, const Rounded& of, Isa isa) {
  const std::int64_t tile = table(isa).tile, from = job.w.k / 4 * 4, bytes = (of.k_padded - from) * tile;
  for (std::int64_t m = 0; bytes > 0 && m < job.m; m += tile) std::memset(of.codes + m * of.k_padded + from * tile, 0, static_cast<std::size_t>(bytes));
}

namespace {

/// Memory of one thread, in bytes: a panel of codes, its scales, and rows of codes or scales, which share their place.
std::int64_t panel_bytes(const Linear& job, Isa isa) {
  const Table& kernels = table(isa);
  const Matrix& w = job.w;
  const std::int64_t k = whole_lines(w.k), panel = (k + 4 * (2 * w.groups + kInputRows)) * kernels.panel;
  const std::int64_t rows = k * kernels.lanes, scales = 8 * (w.groups + kernels.lanes);
  return whole_lines(panel + (rows > scales ? rows : scales));
}

}  // namespace

std::int64_t products_bytes(const Linear& job, int threads, Isa isa) { return threads * panel_bytes(job, isa); }

void multiply_rounded(const Linear& job, const Rounded& in, std::uint8_t* scratch, int threads, Isa isa) {
  const Table& kernels = table(isa);
  const std::int64_t own = panel_bytes(job, isa);
  const std::int64_t panels = (job.w.rows + kernels.panel - 1) / kernels.panel;
  const std::int64_t blocks = (job.m + kInputRows - 1) / kInputRows;
  parallel(threads, panels * blocks, 1, [&](std::int64_t begin, std::int64_t end, int thread) {
    for (std::int64_t task = begin; task < end; ++task) {
      const std::int64_t block = task / panels * kInputRows, stop = block + kInputRows < job.m ? block + kInputRows : job.m;
      kernels.linear_int8(job, in, task % panels, block, stop, scratch + thread * own, isa);
    }
  });
}

std::int64_t linear_int8_scratch(const Linear& job, int threads, Isa isa) {
  if (has_few_rows(job)) return RowsMemory(table(isa).rows_sizes(job), threads).end + 64;
  return rounded_bytes(job, isa) + products_bytes(job, threads, isa) + 64;
}

void linear_int8(const Linear& job, std::uint8_t* scratch, int threads, Isa isa) {
  if (job.m == 0 || job.w.rows == 0) return;
  scratch += -reinterpret_cast<std::uintptr_t>(scratch) & 63u;
  if (has_few_rows(job)) return linear_int8_by_rows(job, scratch, threads, isa);
  const Rounded in = rounded_at(job, scratch, isa);
  std::uint8_t* own = scratch + rounded_bytes(job, isa);
  round_inputs(job, in, own, threads, isa);  // a panel is larger than a row of codes
  multiply_rounded(job, in, own, threads, isa);
}

}  // namespace laconic
