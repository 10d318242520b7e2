// How a statistic is cut into tiles and who works on them, as values. A tile is what one group of threads holds in shared
// memory; the tiles, and the threads of a group, are the reduction tree. So they follow from one statistic's geometry and
// the size of its elements, never from how many statistics there are or how large the GPU is.
//
// The sizes are reasoned, not measured: nothing here has seen a GPU yet.
#pragma once

#include <cstdint>

#include "backend.hpp"

namespace normkit::cuda {

inline constexpr int kVectorBytes = 16;  // the widest load
/// Elements of a vector: no more than eight, since each has its own sums.
constexpr int vector_for(int element_bytes) { return element_bytes == 1 ? 8 : kVectorBytes / element_bytes; }
inline constexpr int kBlockThreads = 256;
/// 44 KB: what threads of a block hold without the shared memory that a GPU gives to those who ask; a block of an H200 has three
/// others beside it.
inline constexpr int kHeldVectors = 11 * kBlockThreads;
/// Where a statistic is larger: a smaller tile, so that more of them are on their way.
inline constexpr int kTileVectors = 2048;
/// A statistic of fewer vectors belongs to one warp or less.
inline constexpr int kWarpVectors = 128;

/// Tiles of a statistic in the runs traversal: `rows` steps of one run each, or a part of one run.
struct Tiling {
  int group = 1;  // threads of a tile
  int rows = 1;
  int width = 1;  // elements of each row
  std::int64_t per_run = 1;  // tiles in a run; where it is more than one, rows is one
  std::int64_t tiles = 1;

  /// Vectors of a tile that one thread holds at most.
  constexpr int held(int vector) const { return static_cast<int>(ceil_div(rows * ceil_div(width, vector), group)); }
};

constexpr int power_of_two_from(std::int64_t n) {
  int power = 1;
  while (power < n) power *= 2;
  return power;
}

/// Threads of a tile of so many vectors: two vectors each where that is a warp at most, else four, else more.
constexpr int group_for(std::int64_t vectors) {
  if (vectors <= 64) return power_of_two_from(ceil_div(vectors, 2));
  if (vectors <= kWarpVectors) return 32;
  return vectors >= 4 * kBlockThreads ? kBlockThreads : power_of_two_from(ceil_div(vectors, 4));
}

constexpr Tiling tiling_for(std::int64_t steps, std::int64_t run, int element_bytes) {
  const int vector = vector_for(element_bytes);
  const std::int64_t per_row = ceil_div(run, vector);
  Tiling t;
  if (per_row <= kHeldVectors && steps <= kHeldVectors / per_row) {
    t.group = group_for(steps * per_row), t.rows = static_cast<int>(steps), t.width = static_cast<int>(run);
    return t;
  }
  t.group = kBlockThreads;
  if (per_row <= kTileVectors) {
    t.rows = static_cast<int>(kTileVectors / per_row), t.width = static_cast<int>(run);
    t.tiles = ceil_div(steps, t.rows);
    return t;
  }
  t.per_run = ceil_div(per_row, kTileVectors);
  t.width = static_cast<int>(ceil_div(per_row, t.per_run)) * vector;
  t.per_run = ceil_div(run, t.width);
  t.tiles = steps * t.per_run;
  return t;
}

// The lanes traversal: 16 strands of every sixteenth step, 16 steps long, side by side with up to 16 vectors of columns.
// A block takes the columns of one tile, or where they are few, of several tiles.
inline constexpr int kStrands = 16, kSlots = 16, kStrandSteps = 16;
inline constexpr int kTileSteps = kStrands * kStrandSteps;

struct LanesTiling {
  int slots = 1;  // vectors of columns side by side in a block
  std::int64_t slabs = 1;  // of so many vectors, in a row
  std::int64_t tiles = 1;  // of kTileSteps
};

constexpr LanesTiling lanes_tiling_for(std::int64_t steps, std::int64_t columns, int element_bytes) {
  const std::int64_t vectors = ceil_div(columns, vector_for(element_bytes));
  LanesTiling t;
  t.slots = vectors < kSlots ? power_of_two_from(vectors) : kSlots;
  t.slabs = ceil_div(vectors, t.slots);
  t.tiles = ceil_div(steps, kTileSteps);
  return t;
}

// Rows: an instance of 49 floats, of one image of 56 x 56, of 16384 halfs, of a volume; a batch norm of small images.
static_assert(tiling_for(1, 49, 4).group == 8 && tiling_for(1, 49, 4).tiles == 1);
static_assert(tiling_for(1, 3136, 4).group == 256 && tiling_for(1, 3136, 4).held(4) == 4);
static_assert(tiling_for(1, 16384, 2).held(8) == 8 && tiling_for(1, 16384, 2).tiles == 1);
static_assert(tiling_for(1, 128 * 128 * 128, 4).tiles == 256 && tiling_for(1, 128 * 128 * 128, 4).width == 8192);
static_assert(tiling_for(256, 49, 4).rows == 157 && tiling_for(256, 49, 4).tiles == 2);
static_assert(tiling_for(1, std::int64_t{1} << 40, 1).tiles == std::int64_t{1} << 26);

}  // namespace normkit::cuda
