// Kernels that take row after row, chosen for the CPU and split over threads: unpacking, dequantizing, Walsh-Hadamard.
#include "kernels.hpp"
#include "table.hpp"
#include "threads.hpp"

namespace laconic {
namespace {

/// Rows a thread takes at least: below some 16 thousand elements waking it costs more than it saves.
std::int64_t grain_of(std::int64_t length) { return length > 0 && length < 16384 ? 16384 / length : 1; }

}  // namespace

void unpack_row(const std::uint32_t* words, int bits, std::int64_t k, std::uint8_t* codes, Isa isa) {
  table(isa).unpack_row(words, bits, k, codes);
}

void dequantize(const Dequantize& job, std::int64_t row_begin, std::int64_t row_end, int threads, Isa isa) {
  const auto rows = table(isa).dequantize_rows;
  parallel(threads, row_end - row_begin, grain_of(job.k), [&](std::int64_t begin, std::int64_t end, int) {
    rows(job, row_begin + begin, row_begin + end);
  });
}

std::int64_t hadamard_scratch(const Hadamard& job, int threads) { return job.dtype == Dtype::float32 ? 0 : threads * job.n; }

void hadamard(const Hadamard& job, float* scratch, int threads, Isa isa) {
  const auto rows = table(isa).hadamard_rows;
  parallel(threads, job.rows, grain_of(job.n), [&](std::int64_t begin, std::int64_t end, int thread) {
    rows(job, begin, end, scratch + (job.dtype == Dtype::float32 ? 0 : thread * job.n));
  });
}

}  // namespace laconic
