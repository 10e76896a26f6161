// Convolutions of bits and bytes: the padded map, panels copied from it, and how the work is split over threads.
#include "conv.hpp"

#include <algorithm>
#include <cstring>

#include "table.hpp"
#include "threads.hpp"

namespace laconic {
namespace {

constexpr std::int64_t kMostPanels = 8;            // of one task
constexpr std::int64_t kCached = 256 * 1024 / 4;   // words of a task's panels
constexpr std::int64_t kRows = 64;                 // channels of the output at a time
constexpr std::int64_t kWidest = kMostPanels * kPanelColumns;

std::int64_t blocks(std::int64_t n, std::int64_t size) { return (n + size - 1) / size; }

struct Plan {
  std::int64_t words, plane, group_map, image_map;  // of the map, in words: at a place; of one word; of a group; of an image
  std::int64_t depth;                               // words along k
  std::int64_t places, panels, wide, across, down;  // places of the output; panels; of one task; tasks; splits of the channels
};

Plan plan(const ConvJob& job, int threads) {
  const ConvShape& s = job.shape;
  Plan p{};
  p.words = job.words();
  p.plane = s.padded(0) * s.padded(1);
  p.group_map = p.words * p.plane;
  p.image_map = s.groups * p.group_map;
  p.depth = s.taps() * p.words;
  p.places = s.out(0) * s.out(1);
  p.panels = blocks(p.places, kPanelColumns);
  p.wide = std::clamp<std::int64_t>(kCached / std::max<std::int64_t>(1, p.depth * kPanelColumns), 2, kMostPanels);
  p.across = blocks(p.panels, p.wide);
  // A task for every thread: fewer panels each (two share what is read of the weights), then fewer channels.
  const auto tasks = [&] { return s.images * s.groups * p.across; };
  while (tasks() < 2 * threads && p.wide > 2) p.across = blocks(p.panels, p.wide /= 2);
  const std::int64_t most = blocks(s.out_channels, kRows);
  p.down = tasks() >= 2 * threads ? 1 : std::min(most, blocks(2 * threads, std::max<std::int64_t>(1, tasks())));
  return p;
}

std::int64_t whole_lines(std::int64_t words) { return blocks(words, 16) * 16; }

// What a thread has of its own: panels, and sums of a tile.
std::int64_t own_words(const Plan& p) { return whole_lines(p.wide * kPanelColumns * p.depth) + kRows * kWidest; }

/// What zeros, as they lie in the padding, add to the counts of each row at each tap: (taps, rows).
struct Padding {
  std::int32_t* counts;  // null where padding takes part
  std::int64_t taps;
};

void lay_map(const ConvJob& job, const Plan& p, std::uint32_t* map, int threads, const Table& kernels) {
  const ConvShape& s = job.shape;
  const std::int64_t in_word = job.kind == Conv::bits ? 32 : 4, across = s.padded(1);
  parallel(threads, s.images * s.groups * p.words, 1, [&](std::int64_t begin, std::int64_t end, int) {
    for (std::int64_t at = begin; at < end; ++at) {
      const std::int64_t word = at % p.words, group = at / p.words;  // of all groups of all images
      const int channels = static_cast<int>(std::min(in_word, s.channels - word * in_word));
      const float* x = job.x + (group * s.channels + word * in_word) * s.height * s.width;
      std::uint32_t pad = 0;
      if (job.kind == Conv::bytes) pad = static_cast<std::uint32_t>(job.coding.offset) * 0x01010101u;
      else if (job.pad == 1) pad = channels == 32 ? ~0u : (1u << channels) - 1u;
      std::uint32_t* out = map + at * p.plane;
      const std::int64_t above = s.padding[0] * across;
      std::fill(out, out + above, pad);
      std::fill(out + p.plane - above, out + p.plane, pad);
      // Without padding at the sides the rows are one.
      const std::int64_t rows = s.padding[1] == 0 ? 1 : s.height, width = s.padding[1] == 0 ? s.height * s.width : s.width;
      for (std::int64_t y = 0; y < rows; ++y) {
        std::uint32_t* row = out + above + y * across;
        std::fill(row, row + s.padding[1], pad);
        std::fill(row + across - s.padding[1], row + across, pad);
        const float* from = x + y * s.width;
        if (job.kind == Conv::bits) kernels.map_signs(from, s.height * s.width, channels, width, row + s.padding[1]);
        else kernels.map_bytes(from, s.height * s.width, channels, width, job.coding, row + s.padding[1]);
      }
    }
  });
}

/// Where the 16 places of a panel begin in the map, in words; the last place is repeated past the end.
struct Places {
  std::int64_t at[kPanelColumns], row[kPanelColumns], column[kPanelColumns];  // row, column: of the padded map
  bool neighbours;                                       // at[j] = at[0] + j
};

Places places_of(const ConvShape& s, std::int64_t panel, std::int64_t places) {
  Places p{};
  p.neighbours = true;
  for (std::int64_t j = 0; j < kPanelColumns; ++j) {
    const std::int64_t place = std::min(panel * kPanelColumns + j, places - 1);
    p.row[j] = place / s.out(1) * s.stride[0];
    p.column[j] = place % s.out(1) * s.stride[1];
    p.at[j] = p.row[j] * s.padded(1) + p.column[j];
    p.neighbours = p.neighbours && p.at[j] == p.at[0] + j;
  }
  return p;
}

void lay_places(const ConvShape& s, const Plan& p, const Places& places, const std::uint32_t* map, std::uint32_t* panel) {
  for (std::int64_t y = 0; y < s.kernel[0]; ++y)
    for (std::int64_t x = 0; x < s.kernel[1]; ++x) {
      const std::uint32_t* tap = map + y * s.dilation[0] * s.padded(1) + x * s.dilation[1];
      for (std::int64_t w = 0; w < p.words; ++w, tap += p.plane, panel += kPanelColumns) {
        if (places.neighbours) std::memcpy(panel, tap + places.at[0], kPanelColumns * sizeof *panel);
        else
          for (std::int64_t j = 0; j < kPanelColumns; ++j) panel[j] = tap[places.at[j]];
      }
    }
}

/// Takes the taps that lie in the padding out of the counts of one panel, and out of how many bits each place has.
void leave_padding_out(const ConvShape& s, const Places& places, const Padding& padding, std::int64_t all_rows,
                       std::int64_t first, std::int64_t rows, std::int32_t* sums, std::int32_t* column,
                       const Table& kernels) {
  for (std::int64_t tap = 0; tap < padding.taps; ++tap) {
    const std::int64_t y = tap / s.kernel[1] * s.dilation[0] - s.padding[0];
    const std::int64_t x = tap % s.kernel[1] * s.dilation[1] - s.padding[1];
    alignas(64) std::int32_t outside[kPanelColumns];
    std::int32_t some = 0;
    for (std::int64_t j = 0; j < kPanelColumns; ++j) {
      const std::int64_t at_y = places.row[j] + y, at_x = places.column[j] + x;
      outside[j] = at_y < 0 || at_y >= s.height || at_x < 0 || at_x >= s.width ? -1 : 0;
      some |= outside[j];
    }
    if (some == 0) continue;
    for (std::int64_t j = 0; j < kPanelColumns; ++j) column[j] -= outside[j] & static_cast<std::int32_t>(s.channels);
    kernels.leave_out(sums, kWidest, rows, padding.counts + tap * all_rows + first, outside);
  }
}

struct Task {
  std::int64_t image, group, panel, row_begin, row_end;  // rows: of all groups
};

void run(const ConvJob& job, const Plan& p, const Task& task, const std::uint32_t* map, const Padding& padding,
         std::uint32_t* own, const Table& kernels) {
  const ConvShape& s = job.shape;
  const std::int64_t all_rows = s.groups * s.out_channels, panel_words = p.depth * kPanelColumns;
  const std::int64_t panels = std::min(p.wide, p.panels - task.panel);
  std::uint32_t* laid = own;
  auto* sums = reinterpret_cast<std::int32_t*>(own + whole_lines(p.wide * panel_words));
  Places places[kMostPanels];
  for (std::int64_t i = 0; i < panels; ++i) {
    places[i] = places_of(s, task.panel + i, p.places);
    lay_places(s, p, places[i], map + task.image * p.image_map + task.group * p.group_map, laid + i * panel_words);
  }
  const std::int64_t place = task.panel * kPanelColumns, columns = std::min(panels * kPanelColumns, p.places - place);
  const std::int32_t all = static_cast<std::int32_t>(s.taps() * s.channels);
  for (std::int64_t row = task.row_begin; row < task.row_end; row += kRows) {
    const std::int64_t rows = std::min(kRows, task.row_end - row);
    const Tile tile{.a = job.weight + row * p.depth, .a_stride = p.depth, .rows = rows, .b = laid, .b_stride = panel_words,
                    .columns = panels * kPanelColumns, .words = p.depth, .out = sums, .out_stride = kWidest};
    std::int32_t base[kRows], column[kWidest] = {};
    if (job.kind == Conv::bits) {
      kernels.mismatch_panels(tile);
      std::fill(base, base + rows, all);
      if (padding.counts != nullptr)
        for (std::int64_t i = 0; i < panels; ++i)
          leave_padding_out(s, places[i], padding, all_rows, row, rows, sums + i * kPanelColumns, column + i * kPanelColumns, kernels);
    } else {
      kernels.byte_panels(tile);
      const auto zero = static_cast<std::int32_t>(job.coding.offset);
      for (std::int64_t r = 0; r < rows; ++r)
        base[r] = zero == 0 ? 0 : -zero * kernels.sum_bytes(tile.a + r * p.depth, p.depth);
    }
    const ConvFinish finish{
        .times = job.kind == Conv::bits ? -2 : 1,
        .row = base,
        .column = padding.counts != nullptr ? column : nullptr,
        .scale = job.scale + (job.per_image ? task.image * all_rows : 0) + row,
        .bias = job.bias != nullptr ? job.bias + row : nullptr,
        .act = job.act,
        .out = job.out + (task.image * all_rows + row) * p.places + place,
        .out_stride = p.places,
    };
    kernels.finish_conv(finish, sums, kWidest, rows, columns);
  }
}

}  // namespace

std::int64_t conv_scratch(const ConvJob& job, int threads) {
  const Plan p = plan(job, threads);
  const std::int64_t rows = job.shape.groups * job.shape.out_channels;
  return whole_lines(job.shape.images * p.image_map) + threads * own_words(p) + p.words + rows * job.shape.taps();
}

void conv(const ConvJob& job, std::uint32_t* scratch, int threads, Isa isa) {
  const ConvShape& s = job.shape;
  const Plan p = plan(job, threads);
  const std::int64_t rows = s.groups * s.out_channels, taps = s.taps();
  if (s.images * rows * p.places == 0) return;
  const Table& kernels = table(isa);
  std::uint32_t *map = scratch, *own = map + whole_lines(s.images * p.image_map), *zeros = own + threads * own_words(p);
  Padding padding{nullptr, taps};
  if (job.kind == Conv::bits && job.pad == 0 && (s.padding[0] != 0 || s.padding[1] != 0)) {
    padding.counts = reinterpret_cast<std::int32_t*>(zeros + p.words);
    std::fill(zeros, zeros + p.words, 0u);
    parallel(threads, taps, 1, [&](std::int64_t begin, std::int64_t end, int) {
      for (std::int64_t tap = begin; tap < end; ++tap)
        kernels.mismatch_rows({.a = zeros, .a_stride = 0, .rows = 1, .b = job.weight + tap * p.words, .b_stride = p.depth,
                               .columns = rows, .words = p.words, .out = padding.counts + tap * rows, .out_stride = rows});
    });
  }
  lay_map(job, p, map, threads, kernels);
  const std::int64_t share = blocks(blocks(s.out_channels, kRows), p.down) * kRows;
  parallel(threads, s.images * s.groups * p.across * p.down, 1, [&](std::int64_t begin, std::int64_t end, int thread) {
    for (std::int64_t at = begin; at < end; ++at) {
      const std::int64_t down = at % p.down, across = at / p.down % p.across, group = at / p.down / p.across;
      const std::int64_t first = group % s.groups * s.out_channels;
      const Task task{.image = group / s.groups, .group = group % s.groups, .panel = across * p.wide,
                      .row_begin = first + std::min(s.out_channels, down * share),
                      .row_end = first + std::min(s.out_channels, (down + 1) * share)};
      run(job, p, task, map, padding, own + thread * own_words(p), kernels);
    }
  });
}

}  // namespace laconic
