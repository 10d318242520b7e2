// How a statistic is cut into tiles, and how one launch is shaped, as values. A tile is what one group of threads takes at a
// time. The tiles, the threads of a group and the order in which tiles meet are the reduction tree: they follow from one
// statistic's geometry and the size of its elements, never from how many statistics there are, from the GPU, or from the
// schedule. The schedule is the rest: which blocks take which tiles, and whether they hold them until the statistic is known.
//
// The sizes are reasoned, not measured: nothing here has seen a GPU yet.
#pragma once

#include <cstdint>

#include "backend.hpp"

namespace normkit::cuda {

/// Blocks and threads of one launch, the blocks of one cluster, and the bytes of shared memory that each block has.
struct Grid {
  std::int64_t blocks = 1;
  int threads = 256;
  int shared_bytes = 0;
  int cluster = 1;
};

inline constexpr int kVectorBytes = 16;  // the widest load
constexpr int vector_for(int element_bytes) { return kVectorBytes / element_bytes; }
inline constexpr int kBlockThreads = 256;
inline constexpr int kWarp = 32;
/// Vectors that a block holds of each array, one (x) or two (x and dy), without the shared memory that a GPU gives to those who
/// ask: 44 KB and 40 KB in all. A block of an H200 has three others beside it.
constexpr int held_vectors(int arrays) { return (arrays == 1 ? 11 : 5) * kBlockThreads; }
/// Where a statistic is larger: smaller tiles, of 32 KB in all, so that more of them are on their way.
constexpr int tile_vectors(int arrays) { return 2048 / arrays; }
/// Where they walk down columns, threads have so many vectors of each array on their way.
inline constexpr int kSingleSlots = 8, kPairSlots = 4;
inline constexpr int kStreamBytes = kSingleSlots * kBlockThreads * kVectorBytes;  // pairs take as many
static_assert(2 * kPairSlots == kSingleSlots);

// ---- tiles: the tree ---------------------------------------------------------------------------------------------

/// Tiles of a statistic in the runs traversal: `rows` steps of one run each, or a part of one run.
struct Tiling {
  int group = 1, shift = 0;  // threads of a tile, 2^shift
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

/// Threads of a tile of so many vectors: up to four vectors each, so that what a thread does once is shared by as many; more where
/// a block is not enough.
constexpr int group_for(std::int64_t vectors) {
  return vectors >= 4 * kBlockThreads ? kBlockThreads : power_of_two_from(ceil_div(vectors, 4));
}

constexpr Tiling tiling_for(std::int64_t steps, std::int64_t run, int element_bytes, int arrays) {
  const int vector = vector_for(element_bytes), held = held_vectors(arrays), tile = tile_vectors(arrays);
  const std::int64_t per_row = ceil_div(run, vector);
  Tiling t;
  if (per_row <= held && steps <= held / per_row) {
    t.group = group_for(steps * per_row), t.rows = static_cast<int>(steps), t.width = static_cast<int>(run);
    while (1 << t.shift < t.group) ++t.shift;
    return t;
  }
  t.group = kBlockThreads, t.shift = 8;
  if (per_row <= tile) {
    t.rows = static_cast<int>(tile / per_row), t.width = static_cast<int>(run);
    t.tiles = ceil_div(steps, t.rows);
    return t;
  }
  t.per_run = ceil_div(per_row, tile);
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
  int slots = 1;  // vectors of columns side by side in a block, of which the first and the last may be parts
  std::int64_t columns = 1;  // that they hold
  std::int64_t slabs = 1;  // of so many columns, in a row
  std::int64_t tiles = 1;  // of kTileSteps

  /// Tiles side by side in a block.
  constexpr int abreast() const { return kSlots / slots; }
  constexpr std::int64_t blocks(std::int64_t outer) const { return ceil_div(outer * tiles, abreast()) * slabs; }
};

/// Columns of a slab where there are many: the most whole runs that fill slots of whole vectors; or that fit them, wherever they
/// begin; or all that there is room for.
constexpr std::int64_t slab_columns_for(std::int64_t run, int vector) {
  for (int slots = kSlots; slots > 0; --slots)
    if (slots * vector % run == 0) return slots * vector;
  const std::int64_t fitting = (kSlots - 1) * vector + 1;
  return run <= fitting ? fitting / run * run : kSlots * vector;
}

constexpr LanesTiling lanes_tiling_for(std::int64_t steps, std::int64_t columns, std::int64_t run, int element_bytes) {
  const int vector = vector_for(element_bytes);
  const std::int64_t vectors = ceil_div(columns, vector);
  LanesTiling t;
  t.slots = vectors < kSlots ? power_of_two_from(vectors) : kSlots;
  t.columns = vectors > kSlots && steps <= kTileSteps ? slab_columns_for(run, vector) : t.slots * vector;
  t.slabs = ceil_div(columns, t.columns);
  t.tiles = ceil_div(steps, kTileSteps);
  return t;
}

// ---- schedule ----------------------------------------------------------------------------------------------------

/// Who holds a whole statistic between them, so that it is read once: one block, with one tile or several, or the blocks of a
/// cluster; a tile may belong to fewer threads than a block. No blocks: nobody; tiles are summed in one launch and applied in
/// another.
struct Team {
  int blocks = 0;
  int tiles = 0;  // that each block holds

  constexpr bool exists() const { return blocks > 0; }
};

/// Blocks of a cluster that every GPU with clusters can have.
inline constexpr int kClusterBlocks = 8;
/// Tiles of 32 KB that a block holds: with three of them, two blocks share a multiprocessor of an H200.
inline constexpr int kMostTiles = 3;
inline constexpr int kMostTeamTiles = kClusterBlocks * kMostTiles;
/// So many statistics keep all of an H200 busy with one block to each; where there are fewer, blocks share them.
inline constexpr std::int64_t kManyStatistics = 2 * 132;

constexpr Team team_for(std::int64_t tiles, std::int64_t statistics) {
  if (tiles > kMostTeamTiles) return {};
  Team team{1, static_cast<int>(tiles)};
  if (tiles > kMostTiles || (tiles > 1 && statistics < kManyStatistics)) {
    team.tiles = static_cast<int>(ceil_div(tiles, kClusterBlocks));
    team.blocks = static_cast<int>(ceil_div(tiles, team.tiles));
  }
  return team;
}

/// Shared memory that a block keeps for what its warps tell each other: 8 values of up to 64 bytes; and for what the tiles of a
/// team found: up to 32 bytes each.
inline constexpr int kGroupBytes = 512, kBoardBytes = kMostTeamTiles * 32;
inline constexpr int kHeadBytes = kGroupBytes + kBoardBytes;
/// What every GPU gives, and what all but compute capability 7.5 give those who ask: 99 KB at least.
inline constexpr int kFreeSharedBytes = 48 << 10, kMostSharedBytes = 99 << 10;

/// Blocks that a launch may have; one of more is refused. Each has 32 elements or more, so that an array must have 2^36 to come
/// there, and mostly has a hundred times as many.
inline constexpr std::int64_t kMostBlocks = 0x7fffffff;

enum class Direction : std::uint8_t { forward, backward };

/// Which part of a traversal a launch is: all of it by teams, or the sums of every tile, or what is left when statistics are
/// known.
enum class Stage : std::uint8_t { all, sums, rest };

/// How one task is gone about. A unit is what is summed for itself: a statistic, or where gradients of parameters are summed,
/// what shares one of them: a piece of its run (runs) or a column (lanes; there always).
struct Policy {
  Traversal traversal = Traversal::runs;
  Direction direction = Direction::forward;
  int element_bytes = 4;
  std::int64_t units = 1;  // in a statistic
  std::int64_t unit_run = 1;  // elements of a unit's run
  Tiling runs;
  LanesTiling lanes;
  Team team;
  int meeting = 1;  // threads that put together what the tiles of a statistic (forward) or of a unit (backward) found

  constexpr std::int64_t tiles() const { return traversal == Traversal::lanes ? lanes.tiles : runs.tiles; }
  /// What backward holds: x and dy.
  constexpr int arrays() const { return direction == Direction::backward ? 2 : 1; }
  /// Tiles that the groups of a block take side by side.
  constexpr int groups() const { return runs.group > kWarp ? 1 : kBlockThreads / runs.group; }

  /// True where a team has several tiles.
  constexpr bool shares(Stage stage) const { return stage == Stage::all && runs.tiles > 1; }

  constexpr int shared_bytes(Stage stage) const {
    const int vector = vector_for(element_bytes);
    const bool backward = direction == Direction::backward;
    if (traversal == Traversal::lanes) {  // then pairs of strands meet, with moments or sums for each column
      const int meeting_bytes = kStrands / 2 * kSlots * vector * (backward ? 32 : 24);
      return meeting_bytes > kStreamBytes ? meeting_bytes : kStreamBytes;
    }
    const int tiles = stage == Stage::all ? team.tiles : 1;
    return kHeadBytes + groups() * tiles * arrays() * runs.group * runs.held(vector) * kVectorBytes;
  }

  constexpr Grid grid(const Geometry& g, Stage stage) const {
    const int bytes = shared_bytes(stage);
    if (traversal == Traversal::lanes) return {lanes.blocks(g.outer), kBlockThreads, bytes, 1};
    const int threads = runs.group > kWarp ? runs.group : kBlockThreads;
    if (shares(stage)) return {g.statistics() * team.blocks, threads, bytes, team.blocks};
    return {ceil_div(g.statistics() * units * runs.tiles, groups()), threads, bytes, 1};
  }
};

/// `pieces`: parameters change within a run, and each piece of it is a unit.
constexpr Policy policy_for(const Geometry& g, Traversal traversal, int element_bytes, Direction direction,
                            bool pieces) {
  Policy p;
  p.traversal = traversal, p.direction = direction, p.element_bytes = element_bytes;
  if (traversal == Traversal::lanes) {
    p.units = g.run;
    p.lanes = lanes_tiling_for(g.steps, g.columns(), g.run, element_bytes);
    const bool has_whole_lanes = p.lanes.slabs == 1 || p.lanes.columns % g.run == 0;
    if (p.lanes.tiles == 1 && has_whole_lanes) p.team = {1, 1};
  } else {
    p.units = pieces ? g.run / g.params.stride : 1, p.unit_run = g.run / p.units;
    p.runs = tiling_for(g.steps, p.unit_run, element_bytes, p.arrays());
    if (p.units == 1) p.team = team_for(p.runs.tiles, g.statistics());
  }
  const std::int64_t parts = direction == Direction::forward ? p.units * p.tiles() : p.tiles();
  p.meeting = parts < kWarp ? power_of_two_from(parts) : kWarp;
  return p;
}

// Rows: an instance of 49 floats, of one image of 56 x 56, of 16384 halfs, of a volume; a batch norm of small images.
static_assert(tiling_for(1, 49, 4, 1).group == 4 && tiling_for(1, 49, 4, 1).tiles == 1);
static_assert(tiling_for(1, 3136, 4, 1).group == 256 && tiling_for(1, 3136, 4, 1).held(4) == 4);
static_assert(tiling_for(1, 16384, 2, 1).held(8) == 8 && tiling_for(1, 16384, 2, 1).tiles == 1);
static_assert(tiling_for(1, 128 * 128 * 128, 4, 1).tiles == 256 && tiling_for(1, 128 * 128 * 128, 4, 1).width == 8192);
static_assert(tiling_for(1, 128 * 128 * 128, 4, 2).tiles == 512 && tiling_for(256, 49, 4, 1).rows == 157);
static_assert(tiling_for(1, std::int64_t{1} << 40, 2, 1).tiles == std::int64_t{1} << 26);
// Teams: a block has up to three tiles where there are many statistics, else two blocks have as many; eight have 24.
static_assert(team_for(3, 1000).blocks == 1 && team_for(3, 1000).tiles == 3 && team_for(2, 8).blocks == 2);
static_assert(team_for(4, 1000).blocks == 4 && team_for(16, 1000).tiles == 2 && team_for(24, 8).blocks == 8);
static_assert(team_for(17, 8).blocks == 6 && !team_for(25, 1000).exists());

}  // namespace normkit::cuda
