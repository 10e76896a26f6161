// LayerNorm and RMSNorm: scratch memory, and how rows are split over threads.
#include "norm.hpp"

#include "table.hpp"
#include "threads.hpp"

namespace laconic {
namespace {

constexpr std::int64_t kPad = 16;  // floats between what two threads write: a cache line

std::int64_t padded(std::int64_t d) { return d / kPad * kPad + 2 * kPad; }

/// Rows a thread takes at least: below some 16 thousand elements waking it costs more than it saves.
std::int64_t grain_of(std::int64_t d) { return d > 0 && d < 16384 ? 16384 / d : 1; }

/// The gradients of weight and bias are added up by blocks of rows, whose size does not depend on threads.
constexpr std::int64_t kParts = 16;
std::int64_t block_of(std::int64_t rows) { return rows <= 16 * kParts ? 16 : (rows + kParts - 1) / kParts; }
std::int64_t parts_of(std::int64_t rows) { return (rows + block_of(rows) - 1) / block_of(rows); }

/// `vector` where it is float32 as the kernels want it, else a copy in `scratch` that is; null stays null.
const float* floats_of(const void* vector, Dtype dtype, float offset, std::int64_t d, float* scratch, const Table& kernels) {
  if (vector == nullptr || (dtype == Dtype::float32 && offset == 0.0f)) return static_cast<const float*>(vector);
  kernels.to_floats(vector, dtype, d, offset, scratch);
  return scratch;
}

}  // namespace

std::int64_t norm_scratch(const NormForward& job, int threads) { return 16 + (threads + 2) * padded(job.d); }

std::int64_t norm_scratch(const NormBackward& job, int threads) {
  return 16 + (threads + 1 + 2 * parts_of(job.rows)) * padded(job.d);
}

void norm(const NormForward& job, float* scratch, int threads, Isa isa) {
  if (job.rows == 0 || job.d == 0) return;
  scratch = aligned(scratch);
  const Table& kernels = table(isa);
  const std::int64_t size = padded(job.d);
  const float offset = job.kind.unit_offset ? 1.0f : 0.0f;
  const float* weight = floats_of(job.weight, job.weight_dtype, offset, job.d, scratch, kernels);
  const float* bias = floats_of(job.bias, job.bias_dtype, 0.0f, job.d, scratch + size, kernels);
  parallel(threads, job.rows, grain_of(job.d), [&](std::int64_t begin, std::int64_t end, int thread) {
    kernels.norm_forward(job, weight, bias, begin, end, scratch + (2 + thread) * size);
  });
}

void norm_backward(const NormBackward& job, float* scratch, int threads, Isa isa) {
  if (job.d == 0) return;
  scratch = aligned(scratch);
  const Table& kernels = table(isa);
  const std::int64_t size = padded(job.d), block = block_of(job.rows), parts = parts_of(job.rows);
  const float offset = job.kind.unit_offset ? 1.0f : 0.0f;
  const float* weight = floats_of(job.weight, job.weight_dtype, offset, job.d, scratch, kernels);
  float* dweights = scratch + (threads + 1) * size;
  float* dbiases = dweights + parts * size;
  const std::int64_t grain = (grain_of(job.d) + block - 1) / block;
  parallel(threads, parts, grain, [&](std::int64_t begin, std::int64_t end, int thread) {
    for (std::int64_t part = begin; part < end; ++part) {
      const std::int64_t first = part * block, last = first + block < job.rows ? first + block : job.rows;
      kernels.norm_backward(job, weight, first, last, job.dweight != nullptr ? dweights + part * size : nullptr,
                            job.dbias != nullptr ? dbiases + part * size : nullptr, scratch + (1 + thread) * size);
    }
  });
  parallel(threads, job.d, 16384, [&](std::int64_t begin, std::int64_t end, int) {
    if (job.dweight != nullptr) kernels.add_parts(dweights, parts, size, job.dweight, begin, end);
    if (job.dbias != nullptr) kernels.add_parts(dbiases, parts, size, job.dbias, begin, end);
  });
}

}  // namespace laconic
