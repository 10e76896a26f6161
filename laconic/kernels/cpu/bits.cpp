// Products by counting bits: which kernel a shape takes, its scratch memory, and how it is split over threads.
#include "bits.hpp"

#include <algorithm>

#include "kernels.hpp"
#include "table.hpp"
#include "threads.hpp"

namespace laconic {
namespace {

constexpr std::int64_t kFew = 16;            // rows below which turning b into panels costs more than it saves
constexpr std::int64_t kRows = 64;           // of a tile
constexpr std::int64_t kColumns = 64;        // of a tile, whole panels
constexpr std::int64_t kDepth = 512;         // words along k at a time: 4 panels of them are 128 KiB
constexpr std::int64_t kTurned = 1 << 20;    // words of b that lie as panels at a time: 4 MiB

std::int64_t blocks(std::int64_t n, std::int64_t size) { return (n + size - 1) / size; }

bool few(const BitProduct& job) { return job.a.rows < kFew; }

/// Columns of b that are turned at once: whole tiles.
std::int64_t turned_columns(const BitProduct& job) {
  const std::int64_t words = std::max<std::int64_t>(1, words_for(job.k, 1) * job.b.planes);
  const std::int64_t fit = std::max<std::int64_t>(kColumns, kTurned / words / kColumns * kColumns);
  return std::min(fit, blocks(job.b.rows, kColumns) * kColumns);
}

/// sum_i c_i (2 popcount(x_i) - k) for each row of one matrix: its numbers v, added up.
void sum_rows(const BitMatrix& x, std::int64_t k, const std::uint32_t* zeros, std::int32_t* sums, int threads,
              const Table& kernels) {
  const std::int64_t words = words_for(k, 1);
  parallel(threads, x.rows, kRows, [&](std::int64_t begin, std::int64_t end, int) {
    std::fill(sums + begin, sums + end, 0);
    std::int32_t ones[kRows];
    for (std::int64_t row = begin; row < end; row += kRows) {
      const std::int64_t n = std::min(kRows, end - row);
      for (int p = 0; p < x.planes; ++p) {
        kernels.mismatch_rows({.a = zeros, .a_stride = 0, .rows = 1, .b = x.words + (p * x.rows + row) * words,
                               .b_stride = words, .columns = n, .words = words, .out = ones, .out_stride = kRows});
        for (std::int64_t i = 0; i < n; ++i)
          sums[row + i] += x.weight(p) * (2 * ones[i] - static_cast<std::int32_t>(k));
      }
    }
  });
}

/// One tile: counts of every pair of planes, weighted and added up. `columns(plane, k)` is where b's columns begin.
template <class Kernel, class Columns>
void multiply(const BitProduct& job, const BitFinish& finish, Kernel kernel, const Columns& columns,
              std::int64_t b_stride, std::int64_t m, std::int64_t rows, std::int64_t n, std::int64_t width,
              std::int64_t computed, const Table& kernels) {
  alignas(64) std::int32_t counts[kRows * kColumns], total[kRows * kColumns];
  const std::int64_t words = words_for(job.k, 1);
  const bool once = job.a.planes * job.b.planes == 1 && job.a.weight(0) * job.b.weight(0) == 1 && words <= kDepth;
  if (!once) std::fill(total, total + rows * kColumns, 0);
  for (int i = 0; i < job.a.planes; ++i)
    for (int j = 0; j < job.b.planes; ++j)
      for (std::int64_t k = 0; k < std::max<std::int64_t>(words, 1); k += kDepth) {
        kernel({.a = job.a.words + (i * job.a.rows + m) * words + k, .a_stride = words, .rows = rows,
                .b = columns(j, k), .b_stride = b_stride, .columns = computed, .words = std::min(kDepth, words - k),
                .out = counts, .out_stride = kColumns});
        if (!once) kernels.add_counts(total, counts, job.a.weight(i) * job.b.weight(j), rows * kColumns);
      }
  kernels.finish_bits(job, finish, once ? counts : total, kColumns, m, rows, n, width);
}

void multiply_few(const BitProduct& job, const BitFinish& finish, int threads, const Table& kernels) {
  const std::int64_t words = words_for(job.k, 1);
  parallel(threads, job.b.rows, kColumns, [&](std::int64_t begin, std::int64_t end, int) {
    for (std::int64_t n = begin; n < end; n += kColumns) {
      const std::int64_t width = std::min(kColumns, end - n);
      const auto columns = [&](int plane, std::int64_t k) { return job.b.words + (plane * job.b.rows + n) * words + k; };
      multiply(job, finish, kernels.mismatch_rows, columns, words, 0, job.a.rows, n, width, width, kernels);
    }
  });
}

void multiply_many(const BitProduct& job, const BitFinish& finish, std::uint32_t* turned, int threads,
                   const Table& kernels) {
  const std::int64_t words = words_for(job.k, 1), panel = words * kPanelColumns, at_once = turned_columns(job);
  const std::int64_t plane_size = at_once / kPanelColumns * panel;
  for (std::int64_t first = 0; first < job.b.rows; first += at_once) {
    const std::int64_t columns = std::min(at_once, job.b.rows - first), panels = blocks(columns, kPanelColumns);
    parallel(threads, panels * job.b.planes, 1, [&](std::int64_t begin, std::int64_t end, int) {
      for (std::int64_t task = begin; task < end; ++task) {
        const std::int64_t plane = task / panels, p = task % panels, n = first + p * kPanelColumns;
        kernels.lay_panel(job.b.words + (plane * job.b.rows + n) * words, words, std::min(kPanelColumns, job.b.rows - n), words,
                          turned + plane * plane_size + p * panel);
      }
    });
    const std::int64_t down = blocks(job.a.rows, kRows), across = blocks(columns, kColumns);
    parallel(threads, down * across, 1, [&](std::int64_t begin, std::int64_t end, int) {
      for (std::int64_t task = begin; task < end; ++task) {
        const std::int64_t m = task % down * kRows, at = task / down * kColumns;
        const std::int64_t rows = std::min(kRows, job.a.rows - m), width = std::min(kColumns, columns - at);
        const auto where = [&](int plane, std::int64_t k) {
          return turned + plane * plane_size + at / kPanelColumns * panel + k * kPanelColumns;
        };
        multiply(job, finish, kernels.mismatch_panels, where, panel, m, rows, first + at, width,
                 blocks(width, kPanelColumns) * kPanelColumns, kernels);
      }
    });
  }
}

}  // namespace

std::int64_t bit_product_scratch(const BitProduct& job) {
  const std::int64_t words = words_for(job.k, 1);
  const std::int64_t turned = few(job) ? 0 : turned_columns(job) * words * job.b.planes;
  return turned + words + job.a.rows + job.b.rows;
}

void bit_product(const BitProduct& job, std::uint32_t* scratch, int threads, Isa isa) {
  if (job.a.rows == 0 || job.b.rows == 0) return;
  const Table& kernels = table(isa);
  const std::int64_t words = words_for(job.k, 1);
  std::uint32_t* turned = scratch;  // first, where the memory is aligned
  std::uint32_t* zeros = turned + (few(job) ? 0 : turned_columns(job) * words * job.b.planes);
  auto* row = reinterpret_cast<std::int32_t*>(zeros + words);
  std::int32_t* column = row + job.a.rows;
  std::fill(zeros, zeros + words, 0u);

  // y 2^halvings = sum_k (v_a + o_a)(v_b + o_b), in which v_a v_b = sum_ij c_i c_j (k - 2 counts)
  const std::int32_t ka = job.a.offset(), kb = job.b.offset(), k = static_cast<std::int32_t>(job.k);
  std::int32_t all = 0;
  for (int i = 0; i < job.a.planes; ++i)
    for (int j = 0; j < job.b.planes; ++j) all += job.a.weight(i) * job.b.weight(j);
  std::fill(row, row + job.a.rows, 0);
  if (kb != 0) sum_rows(job.a, job.k, zeros, row, threads, kernels);
  for (std::int64_t m = 0; m < job.a.rows; ++m) row[m] = kb * row[m] + k * (all + ka * kb);
  if (ka != 0) {
    sum_rows(job.b, job.k, zeros, column, threads, kernels);
    for (std::int64_t n = 0; n < job.b.rows; ++n) column[n] *= ka;
  }
  const BitFinish finish{.row = row, .column = ka != 0 ? column : nullptr, .halvings = job.a.halvings() + job.b.halvings()};
  if (few(job)) multiply_few(job, finish, threads, kernels);
  else multiply_many(job, finish, turned, threads, kernels);
}

void pack_signs(const float* x, std::int64_t rows, std::int64_t k, std::uint32_t* out, int threads, Isa isa) {
  const Table& kernels = table(isa);
  parallel(threads, rows, 1, [&](std::int64_t begin, std::int64_t end, int) {
    for (std::int64_t r = begin; r < end; ++r) kernels.sign_row(x + r * k, k, out + r * words_for(k, 1));
  });
}

void pack_planes(const float* x, std::int64_t rows, std::int64_t k, const Coding& coding, int planes,
                 std::uint32_t* out, int threads, Isa isa) {
  const Table& kernels = table(isa);
  const std::int64_t words = words_for(k, 1);
  parallel(threads, rows, 1, [&](std::int64_t begin, std::int64_t end, int) {
    for (std::int64_t r = begin; r < end; ++r)
      kernels.plane_row(x + r * k, k, coding.factor[coding.per_row ? r : 0], coding, planes, out + r * words, rows * words);
  });
}

void pack_planes(const std::uint8_t* codes, std::int64_t rows, std::int64_t k, int planes, std::uint32_t* out,
                 int threads) {
  const std::int64_t words = words_for(k, 1);
  parallel(threads, rows, 1, [&](std::int64_t begin, std::int64_t end, int) {
    for (std::int64_t r = begin; r < end; ++r)
      for (std::int64_t w = 0; w < words; ++w) {
        std::uint32_t found[kMaxPlanes] = {};
        for (std::int64_t j = 0; j < 32; j += 8) {
          std::uint64_t eight = 0;
          for (std::int64_t i = 0, at = 32 * w + j; i < 8 && at + i < k; ++i)
            eight |= std::uint64_t{codes[r * k + at + i]} << (8 * i);
          // Bit p of eight bytes, gathered into one byte: the product puts byte i's bit at 56 + i, and none meet below.
          for (int p = 0; p < planes; ++p)
            found[p] |= static_cast<std::uint32_t>((eight >> p & 0x0101010101010101u) * 0x0102040810204080u >> 56) << j;
        }
        for (int p = 0; p < planes; ++p) out[(p * rows + r) * words + w] = found[p];
      }
  });
}

}  // namespace laconic
