// How a statistic is cut into tiles, and how one launch is shaped, as values. A tile is what one group of threads takes at a
// time. The tiles, the threads of a group and the order in which tiles meet are the reduction tree: they follow from one
// statistic's geometry and the size of its elements, never from how many statistics there are, from the GPU, or from the
// schedule. The schedule is the rest: which blocks take which tiles, and whether they hold them until the statistic is known.
//
// What an H200 said of an earlier state of these kernels is in docs/performance.md; the sizes are reasoned from that.
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
/// Vectors that a block holds of each of one array (x) or two (x and dy), in the shared memory that every GPU gives a
/// block without being asked: 44 KB and 40 KB in all. On an H200 four such blocks share a multiprocessor.
constexpr int held_vectors(int arrays) { return (arrays == 1 ? 11 : 5) * kBlockThreads; }
/// Vectors of a tile where a statistic is larger than that. Such tiles are smaller, 32 KB in all, so that more are on
/// their way.
constexpr int tile_vectors(int arrays) { return 2048 / arrays; }
/// Vectors of each array that a thread has on their way when it walks down columns: of one array, and of each of two.
inline constexpr int kSingleSlots = 8, kPairSlots = 4;
inline constexpr int kStreamBytes = kSingleSlots * kBlockThreads * kVectorBytes;  // pairs take as many
static_assert(2 * kPairSlots == kSingleSlots);

// ---- tiles: the tree ---------------------------------------------------------------------------------------------

/// How a statistic is cut into tiles in the runs traversal. A tile is `rows` steps of one run each, or a part of one
/// run.
struct Tiling {
  int group = 1, shift = 0;  // threads of a tile, 2^shift
  int rows = 1;
  int width = 1;  // elements of each row
  std::int64_t per_run = 1;  // tiles in a run; where there are several, `rows` is one
  std::int64_t tiles = 1;

  /// The most vectors of a tile that one thread holds.
  constexpr int held(int vector) const { return static_cast<int>(ceil_div(rows * ceil_div(width, vector), group)); }
};

constexpr int power_of_two_from(std::int64_t n) {
  int power = 1;
  while (power < n) power *= 2;
  return power;
}

/// Threads of a tile of so many vectors. A thread takes up to eight vectors, so that what it does once serves many of
/// them; four where eight threads are enough for the tile, since these read neighbors; more than eight where a block is
/// not enough.
constexpr int group_for(std::int64_t vectors) {
  if (vectors >= 8 * kBlockThreads) return kBlockThreads;
  return power_of_two_from(vectors <= 32 ? ceil_div(vectors, 4) : vectors <= 64 ? 8 : ceil_div(vectors, 8));
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

// The lanes traversal: 16 strands of every sixteenth step, 16 steps long, for each column.
inline constexpr int kStrands = 16, kStrandSteps = 16;
inline constexpr int kTileSteps = kStrands * kStrandSteps;
/// The most vectors of columns that a block takes side by side, of one tile or, where a row has few, of several tiles;
/// and the least where a row has that many: they are 64 bytes, which memory reads at once.
inline constexpr int kSlots = 16, kLeastSlots = 4;
/// Columns of a vector whose strands meet at once.
constexpr int joined_columns(int vector) { return vector < 4 ? vector : 4; }

/// How the lanes traversal is cut into tiles and blocks. Its rows are the tiles of one outer index after another.
struct LanesTiling {
  std::int64_t tiles = 1;  // tiles of an outer index, of kTileSteps steps each
  int steps = kStrandSteps;  // steps of the longest strand

  // The schedule.
  int width = kSlots;  // vectors side by side in a block, a power of two
  int slots = 1;  // vectors of one row in a block, of which the first and the last may be parts of vectors
  std::int64_t columns = 1;  // columns in these slots, which are a slab
  std::int64_t slabs = 1;  // slabs of a row
  std::int64_t rows = 1;  // rows of a team, or of a block that is alone
  int abreast = 1;  // rows side by side in a block
  int rounds = 1;  // rounds in which a block takes its rows, `abreast` of them in each
  bool holds = false;  // teams hold all that they work on, and read it once
  /// Where parts of a block's shared memory begin, in bytes: what strands found (its counts lie before it), what is
  /// known of statistics, and the vectors that are held or pass by.
  int found_at = 0, known_at = 0, held_at = 0;

  /// Rows that a block has.
  constexpr int own_rows() const { return rounds * abreast; }
  constexpr int threads() const { return kStrands * width; }
  constexpr std::int64_t teams(std::int64_t outer) const { return ceil_div(outer * tiles, rows) * slabs; }
  /// Bytes that a block holds of one array in one round.
  constexpr int round_bytes() const { return steps * threads() * kVectorBytes; }
};

/// Columns of a slab of at most `widest` slots: the most whole runs that fill slots of whole vectors; else the most
/// whole runs that fit the slots wherever they begin; else, where not even one run fits, all columns that there is room
/// for.
constexpr std::int64_t slab_columns_for(std::int64_t run, int vector, int widest) {
  for (int slots = widest; slots > 0; --slots)
    if (slots * vector % run == 0) return slots * vector;
  const std::int64_t fitting = (widest - 1) * vector + 1;
  return run <= fitting ? fitting / run * run : widest * vector;
}

constexpr LanesTiling lanes_tiling_for(std::int64_t steps, std::int64_t columns, std::int64_t run, int element_bytes) {
  const int vector = vector_for(element_bytes);
  const std::int64_t vectors = ceil_div(columns, vector);
  LanesTiling t;
  t.tiles = ceil_div(steps, kTileSteps);
  if (steps < kTileSteps) t.steps = static_cast<int>(ceil_div(steps, kStrands));
  t.slots = vectors < kSlots ? power_of_two_from(vectors) : kSlots;
  t.columns = vectors > kSlots && steps <= kTileSteps ? slab_columns_for(run, vector, kSlots) : t.slots * vector;
  t.slabs = ceil_div(columns, t.columns);
  t.rows = t.abreast = t.width / t.slots;
  return t;
}

// ---- schedule ----------------------------------------------------------------------------------------------------

/// The blocks that hold a whole statistic between them, so that it is read once: one block, with one tile or several,
/// or the blocks of a cluster; a tile may belong to fewer threads than a block. Where there are no blocks, there is no
/// team: tiles are summed in one launch and applied in another.
struct Team {
  int blocks = 0;
  int tiles = 0;  // tiles that each block holds

  constexpr bool exists() const { return blocks > 0; }
};

/// Bytes of shared memory that every GPU gives a block without being asked.
inline constexpr int kFreeSharedBytes = 48 << 10;
/// The most blocks of a cluster on every GPU that has clusters, and on some.
inline constexpr int kPortableCluster = 8, kMostClusterBlocks = 16;

/// What a device gives a kernel that asks for it: bytes of shared memory for each block; the most blocks of a cluster
/// in which each has so much, 1 where there are no clusters; and its number of multiprocessors.
struct Room {
  std::int32_t shared_bytes = 0;
  std::int16_t cluster = 0, processors = 0;
};
inline constexpr Room kPlainRoom{kFreeSharedBytes, 1, 132};

/// Shared memory that a block keeps for what its warps tell each other: 8 values of up to 64 bytes; and for what each tile of a
/// team found.
inline constexpr int kGroupBytes = 512, kPostBytes = 32;
/// The most tiles of a team, each of whose blocks has room for what all of its tiles found.
inline constexpr int kMostTeamTiles = 256;
constexpr int head_bytes(std::int64_t posts) { return kGroupBytes + static_cast<int>(posts) * kPostBytes; }

/// The most blocks of a team, and the most bytes that each holds, the best limit first. With 64 KB to a block three
/// blocks share a multiprocessor of an H200, with 96 KB two do, and each loads while another reduces; clusters of more
/// than eight are harder to place.
struct Limit { int blocks, bytes; };
inline constexpr int kAllBytes = 1 << 30;
inline constexpr Limit kLimits[] = {{kPortableCluster, 64 << 10},   {kPortableCluster, 96 << 10},
                                    {kMostClusterBlocks, 64 << 10}, {kMostClusterBlocks, 96 << 10},
                                    {kPortableCluster, kAllBytes},  {kMostClusterBlocks, kAllBytes}};

/// The team of a statistic of so many tiles, of which a block has room for `most` and takes `abreast` side by side.
/// Where statistics are few, each is spread over more blocks, until there are eight blocks to each multiprocessor.
constexpr Team team_within(Limit limit, std::int64_t tiles, std::int64_t statistics, int most, int abreast, Room room) {
  const int blocks_at_most = limit.blocks < room.cluster ? limit.blocks : room.cluster;
  Team team;
  if (most == 0 || ceil_div(tiles, most) > blocks_at_most) return team;
  for (int blocks = 1; blocks <= blocks_at_most; ++blocks) {
    const auto each = static_cast<int>(ceil_div(ceil_div(tiles, blocks), abreast)) * abreast;
    if (each > most || ceil_div(tiles, each) < blocks) continue;  // too many, or no fewer than before
    team = {blocks, each};
    if (statistics * blocks >= 8 * room.processors) break;
  }
  return team;
}

/// The best team for tiles of tile_bytes. Each of its blocks has `boards` boards, on which all tiles of the team post
/// what they found.
constexpr Team team_for(std::int64_t tiles, std::int64_t statistics, int tile_bytes, int abreast, Room room,
                        int boards) {
  if (tiles > kMostTeamTiles) return {};
  const int left = room.shared_bytes - head_bytes(boards * tiles);
  for (const Limit limit : kLimits) {
    const int most = (limit.bytes < left ? limit.bytes : left) / tile_bytes / abreast * abreast;
    const Team team = team_within(limit, tiles, statistics, most, abreast, room);
    if (team.exists()) return team;
  }
  return {};
}

/// The most blocks of a launch; a launch of more is refused. A block has 32 elements or more, so that it takes an array
/// of 2^36 elements to come there, and mostly of a hundred times as many.
inline constexpr std::int64_t kMostBlocks = 0x7fffffff;

enum class Direction : std::uint8_t { forward, backward };

/// The part of a traversal that a launch is: all of it, by teams; or the sums of every tile; or the rest of the work,
/// when statistics are known.
enum class Stage : std::uint8_t { all, sums, rest };

/// Groups of rows that share parameters, one for each element of a run. The terms of dweight and dbias of all rows of a
/// group become one pair for each element: `blocks` blocks or teams take the group, `turns` rows with each of their
/// groups of threads. All that is part of the tree.
struct RowGroups {
  std::int64_t rows = 1, count = 1;  // rows that share their parameters, and groups of rows that they make
  int blocks = 1, turns = 1;
};

/// The row groups of rows that share parameters. There are enough groups to keep an H200 busy, and each has so many
/// rows that what is written and read for a group is less than a twentieth of all bytes: 64 rows of halves, 32 of
/// floats. No more than 64 rows are summed one after another.
inline constexpr int kMostRowBlocks = 4;
constexpr RowGroups row_groups_for(std::int64_t rows, std::int64_t tiles, int abreast, int element_bytes) {
  const std::int64_t all = ceil_div(rows, abreast), blocks = tiles <= 2 ? kMostRowBlocks : tiles <= 4 ? 2 : 1;
  const std::int64_t least = ceil_div(element_bytes == 2 ? 64 : 32, blocks * abreast), many = all * tiles / (4 * 132);
  std::int64_t turns = many < 64 ? many : 64;
  if (turns < least) turns = least < all ? least : all;
  RowGroups r;
  r.rows = rows, r.turns = static_cast<int>(turns);
  r.blocks = static_cast<int>(ceil_div(all, turns) < blocks ? ceil_div(all, turns) : blocks);
  r.count = ceil_div(all, r.blocks * turns);
  return r;
}

/// How one task is done. A unit is a set of elements that has sums of its own: a statistic; or in the runs traversal,
/// where parameters change within a run, a piece of the run that shares one; in the lanes traversal always a column.
struct Policy {
  Traversal traversal = Traversal::runs;
  Direction direction = Direction::forward;
  int element_bytes = 4;
  std::int64_t units = 1;  // units of a statistic
  std::int64_t unit_run = 1;  // elements of a unit's run
  Tiling runs;
  LanesTiling lanes;
  RowGroups rows;
  int sharing = 1, meeting = 1;  // threads that join what the tiles of a unit, and of a statistic, have found

  // The schedule.
  Team team;
  bool collects = false;  // teams sum the gradients of parameters of their rows on the way
  int depth = 1;  // rows of a group of threads that are there or on their way at once
  bool joins_rows = false;  // the blocks of a row group are a cluster, and leave one pair for all of them

  constexpr std::int64_t tiles() const { return traversal == Traversal::lanes ? lanes.tiles : runs.tiles; }
  /// Tiles of a statistic.
  constexpr std::int64_t parts() const { return units * tiles(); }
  /// Arrays that are held: x, and in backward dy too.
  constexpr int arrays() const { return direction == Direction::backward ? 2 : 1; }
  /// Threads of a block. Its groups() take one tile each, side by side: no more of them than there are tiles, where a
  /// team has these.
  constexpr int threads(Stage stage) const {
    if (runs.group > kWarp) return runs.group;
    const int most = kBlockThreads / arrays();  // eight vectors for each thread are 32 KB then
    if (!shares(stage) || parts() * runs.group >= most) return most;
    return parts() * runs.group < kWarp ? kWarp : power_of_two_from(parts() * runs.group);
  }
  constexpr int groups(Stage stage) const { return threads(stage) >> runs.shift; }
  /// The vectors of a tile that each thread has, and the bytes of one tile for each group of a block.
  constexpr int held() const { return runs.held(vector_for(element_bytes)); }
  constexpr int tile_bytes(Stage stage) const { return held() * threads(stage) * kVectorBytes; }

  /// True where a team has several tiles.
  constexpr bool shares(Stage stage) const { return stage == Stage::all && parts() > 1; }
  /// Tiles that each group of a block has of a statistic.
  constexpr int held_tiles(Stage stage) const {
    return shares(stage) ? static_cast<int>(ceil_div(team.tiles, groups(stage))) : 1;
  }
  /// Bytes of shared memory before the tiles. Where rows follow each other there are two boards: the tiles of one row
  /// post while what those of the row before found is still read.
  constexpr int head(Stage stage) const { return head_bytes(shares(stage) ? (collects ? 2 : 1) * parts() : 0); }
  /// Vectors of sums for each vector of elements, where gradients are collected: an element has two sums, floats or
  /// doubles.
  constexpr int sum_vectors() const { return !collects ? 0 : element_bytes == 2 ? 4 : 2; }

  constexpr int shared_bytes(Stage stage) const {
    if (traversal == Traversal::lanes) {
      const bool holds = stage == Stage::all && lanes.holds;
      return lanes.held_at + (holds ? lanes.rounds * arrays() * lanes.round_bytes() : kStreamBytes);
    }
    return head(stage) + held_tiles(stage) * tile_bytes(stage) * (depth * arrays() + sum_vectors());
  }

  /// Bytes of x and dy that a block has on their way at once.
  constexpr int in_flight_bytes(Stage stage) const {
    if (traversal == Traversal::lanes) return shared_bytes(stage) - lanes.held_at;
    return held_tiles(stage) * tile_bytes(stage) * depth * arrays();
  }

  /// Blocks or teams that have rows.
  constexpr std::int64_t row_blocks(const Geometry& g) const {
    return g.statistics() / rows.rows * rows.count * rows.blocks;
  }

  constexpr Grid grid(const Geometry& g, Stage stage) const {
    const int bytes = shared_bytes(stage);
    if (traversal == Traversal::lanes) {
      const int blocks = stage == Stage::all ? team.blocks : 1;
      return {lanes.teams(g.outer) * blocks, lanes.threads(), bytes, blocks};
    }
    if (collects)
      return {row_blocks(g) * team.blocks, threads(stage), bytes, team.blocks * (joins_rows ? rows.blocks : 1)};
    if (shares(stage)) return {g.statistics() * team.blocks, threads(stage), bytes, team.blocks};
    return {ceil_div(g.statistics() * parts(), groups(stage)), threads(stage), bytes, 1};
  }
};

/// Lays out the shared memory of a block for what strands found and for what a team knows. Pairs of strands meet,
/// joined_columns() of each vector at a time; the results stay, in front of what is found by the next that meet. When
/// all have met, statistics take the place behind the results.
constexpr void lay_out(Policy& p) {
  LanesTiling& t = p.lanes;
  const int vector = vector_for(p.element_bytes), joined = joined_columns(vector), columns = t.width * joined;
  const int results = t.rounds * vector / joined * columns, entries = results + (kStrands / 2 - 1) * columns;
  const std::int64_t outers = t.rows < t.tiles ? 1 : t.rows / t.tiles;
  const auto statistics = static_cast<int>(outers * (t.columns / p.units));
  const bool backward = p.direction == Direction::backward;
  const int low_bytes = p.element_bytes == 8 ? 8 : 0;  // of float64 a mean is two numbers
  const int found_bytes = backward ? 24 : 16 + low_bytes;  // without counts, which lie apart
  const int known_bytes = (backward ? 32 : 16) + low_bytes;
  const auto whole = [](int bytes) { return (bytes + kVectorBytes - 1) / kVectorBytes * kVectorBytes; };
  t.found_at = whole(2 * entries), t.known_at = t.found_at + whole(found_bytes * results);
  const int found_end = t.found_at + found_bytes * entries, known_end = t.known_at + known_bytes * statistics;
  t.held_at = whole(found_end > known_end ? found_end : known_end);
}

/// The policy of a task, but for its schedule: the tree. `pieces`: parameters change within a run, and each piece of it
/// is a unit.
constexpr Policy policy_for(const Geometry& g, Traversal traversal, int element_bytes, Direction direction,
                            bool pieces) {
  Policy p;
  p.traversal = traversal, p.direction = direction, p.element_bytes = element_bytes;
  if (traversal == Traversal::lanes) {
    p.units = g.run;
    p.lanes = lanes_tiling_for(g.steps, g.columns(), g.run, element_bytes);
    lay_out(p);
  } else {
    p.units = pieces ? g.run / g.params.stride : 1, p.unit_run = g.run / p.units;
    p.runs = tiling_for(g.steps, p.unit_run, element_bytes, p.arrays());
    p.rows =
        row_groups_for(g.params.outer ? g.lanes : g.statistics(), p.runs.tiles, p.groups(Stage::sums), element_bytes);
  }
  const auto threads_for = [](std::int64_t n) {
    return n >= kBlockThreads ? kBlockThreads : n < kWarp ? power_of_two_from(n) : kWarp;
  };
  p.sharing = threads_for(p.tiles());
  p.meeting = p.sharing == kBlockThreads ? kBlockThreads : threads_for(p.parts() < kWarp ? p.parts() : kWarp);
  return p;
}

/// True where a block, or fewer threads, has all of a statistic, on every GPU.
constexpr bool is_alone(const Policy& p, const Geometry& g) {
  if (p.traversal == Traversal::runs) return p.parts() == 1;
  return p.lanes.tiles == 1 && (p.lanes.slabs == 1 || p.lanes.columns % g.run == 0);
}

/// Has teams collect the gradients of parameters of their rows, and returns true, if there is room for sums beside the
/// rows: two rows at once, then more, where blocks that share a multiprocessor leave room for them.
constexpr bool settle_rows(Policy& p, const Geometry& g, Room room) {
  p.collects = true;
  const int bytes = p.tile_bytes(Stage::all);
  for (p.depth = p.rows.turns > 1 ? 2 : 1; p.depth > 0; --p.depth) {
    const int each = bytes * (p.depth * p.arrays() + p.sum_vectors());
    if (p.parts() > 1) p.team = team_for(p.parts(), 1, each, 1, room, 2);
    else if (head_bytes(0) + each <= room.shared_bytes) p.team = {1, 1};
    if (p.team.exists()) break;
  }
  if (!p.team.exists() || p.row_blocks(g) * p.team.blocks > kMostBlocks) return p.collects = false, p.depth = 1, false;
  p.joins_rows = p.rows.blocks > 1 && p.team.blocks * p.rows.blocks <= room.cluster &&
                 p.team.blocks * p.rows.blocks <= kPortableCluster;
  const std::int64_t most = 2 * kBlockThreads / p.threads(Stage::all),
                     all = ceil_div(p.grid(g, Stage::all).blocks, room.processors);
  const int budget = room.shared_bytes / static_cast<int>(all < most ? all : most);
  while (p.depth < 8 && p.depth < p.rows.turns &&
         p.shared_bytes(Stage::all) + p.held_tiles(Stage::all) * bytes * p.arrays() <= budget)
    ++p.depth;
  return true;
}

/// Has teams take slabs of whole lanes, as wide as the room allows, but for 64 bytes at least. Short statistics share a block. Where
/// there is no room, a block that has all of a short statistic reads it twice.
constexpr void settle_lanes(Policy& p, const Geometry& g, Room room) {
  const LanesTiling apart = p.lanes;
  LanesTiling& t = p.lanes;
  const int vector = vector_for(p.element_bytes);
  const std::int64_t vectors = ceil_div(g.columns(), vector);
  constexpr int kHead = 11 << 10;  // at most, where three blocks share a multiprocessor
  t.holds = true;
  for (const Limit limit : kLimits)
    for (int widest = kSlots; p.meeting <= kWarp && widest >= kLeastSlots; widest /= 2) {
      t.columns = vectors <= widest ? vectors * vector : slab_columns_for(g.run, vector, widest);
      const bool aligned = t.columns % vector == 0;
      t.slots = static_cast<int>(aligned ? t.columns / vector : (t.columns + vector - 2) / vector + 1);
      t.slabs = ceil_div(g.columns(), t.columns);
      if (t.slabs > 1 && (t.slots < kLeastSlots || t.columns % g.run != 0)) continue;
      for (t.width = kSlots; t.width >= t.slots && t.width >= kLeastSlots; t.width /= 2) {
        const int bytes = limit.bytes < room.shared_bytes - kHead ? limit.bytes + kHead : room.shared_bytes;
        t.abreast = t.width / t.slots;
        for (t.rounds = bytes / t.round_bytes(); t.rounds > 0; --t.rounds) {
          t.rows = t.own_rows(), lay_out(p);
          if (p.shared_bytes(Stage::all) <= bytes) break;
        }
        const int most = t.own_rows();
        p.team = team_within(limit, t.tiles, g.outer * t.slabs, most, t.abreast, room);
        if (!p.team.exists()) continue;
        std::int64_t outers = 1;
        if (p.team.blocks == 1) {
          outers = g.outer * t.slabs / (8 * room.processors);
          if (outers < t.abreast / t.tiles) outers = t.abreast / t.tiles;
          if (outers > most / t.tiles) outers = most / t.tiles;
          if (outers > g.outer) outers = g.outer;
          if (outers < 1) outers = 1;
        }
        t.rows = outers * t.tiles;
        t.rounds = static_cast<int>(ceil_div(ceil_div(t.rows, p.team.blocks), t.abreast));
        lay_out(p);
        if (p.grid(g, Stage::all).blocks <= kMostBlocks) return;
      }
    }
  p.team = {}, p.lanes = apart;
  if (is_alone(p, g)) p.team = {1, apart.own_rows()};
}

/// Settles the schedule: who holds whole statistics, in the room that there is. `collects`: gradients of parameters are
/// summed over rows.
constexpr void settle(Policy& p, const Geometry& g, Room room, bool collects) {
  p.team = {};
  if (p.traversal == Traversal::lanes) return settle_lanes(p, g, room);
  if (collects && settle_rows(p, g, room)) return;
  if (p.parts() == 1) p.team = {1, 1};
  const int abreast = p.groups(Stage::all), bytes = p.arrays() * p.tile_bytes(Stage::all) / abreast;
  if (p.parts() > 1) p.team = team_for(p.parts(), g.statistics(), bytes, abreast, room, 1);
  if (p.team.blocks * g.statistics() > kMostBlocks) p.team = {};
}

// Rows: an instance of 49 floats, of one image of 56 x 56, of 16384 halfs, of a volume; a batch norm of small images.
static_assert(tiling_for(1, 49, 4, 1).group == 4 && tiling_for(1, 49, 4, 1).tiles == 1);
static_assert(tiling_for(1, 3136, 4, 1).group == 128 && tiling_for(1, 3136, 4, 1).held(4) == 7);
static_assert(tiling_for(1, 16384, 2, 1).held(8) == 8 && tiling_for(1, 16384, 2, 1).tiles == 1);
static_assert(tiling_for(1, 128 * 128 * 128, 4, 1).tiles == 256 && tiling_for(1, 128 * 128 * 128, 4, 1).width == 8192);
static_assert(tiling_for(1, 128 * 128 * 128, 4, 2).tiles == 512 && tiling_for(256, 49, 4, 1).rows == 157);
static_assert(tiling_for(1, std::int64_t{1} << 40, 2, 1).tiles == std::int64_t{1} << 26);
// Teams on an H200, tiles of 32 KB: a block has up to two where there are many statistics; few are spread over blocks; eight
// blocks have three each, sixteen have two, then as many as there is room for. Without clusters a block is alone.
constexpr Room kH200{227 << 10, kMostClusterBlocks, 132}, kAlone{99 << 10, 1, 84};
constexpr bool is_team(Team team, int blocks, int tiles) { return team.blocks == blocks && team.tiles == tiles; }
static_assert(is_team(team_for(2, 2000, 32 << 10, 1, kH200, 1), 1, 2));
static_assert(is_team(team_for(2, 512, 32 << 10, 1, kH200, 1), 2, 1));
static_assert(is_team(team_for(24, 8, 32 << 10, 1, kH200, 1), 8, 3));
static_assert(is_team(team_for(32, 64, 32 << 10, 1, kH200, 1), 16, 2));
static_assert(is_team(team_for(90, 1, 32 << 10, 1, kH200, 1), 15, 6) &&
              !team_for(97, 1, 32 << 10, 1, kH200, 1).exists());
static_assert(is_team(team_for(3, 8, 32 << 10, 1, kAlone, 1), 1, 3) &&
              !team_for(4, 8, 32 << 10, 1, kAlone, 1).exists());

}  // namespace normkit::cuda
