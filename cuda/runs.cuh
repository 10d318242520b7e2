// The runs traversal, forward and backward: a statistic is reduced along its contiguous runs.
//
//     statistic = steps x run elements = tiles; a tile = rows x width elements = vectors, which the threads of a group take
//     in turn:  thread 0 1 2 .. G-1 0 1 2 ..
//
//     teams:  memory -> shared memory, past the registers -> sums of each tile -> the statistic -> y or dx from shared memory,
//             so that all is read once. A team is a group with one tile, a block with several, or the blocks of a cluster, which
//             tell each other what their tiles found.
//     others: the sums of each tile in one launch; y or dx in another, when statistics are known (finish.cuh)
//
// An H200 has time for about 240 instructions of a warp while it moves what a warp reads and writes as one vector each, and issues
// three quarters of them at best: half of that is a good loop, and what is done once for each thread counts where rows are short.
#pragma once

#include <type_traits>

#include "finish.cuh"

namespace normkit::cuda {

template <int n> using Constant = std::integral_constant<int, n>;

/// Entries first, first + size, first + 2 size, ... of a table, row by row.
struct Cursor {
  int row, column, columns, down, along;

  NORMKIT_DEVICE static Cursor of(int first, int size, int columns, bool one_row) {
    if (one_row) return {0, first, columns, 0, size};
    const int row = divided(first, columns), down = divided(size, columns);
    return {row, first - row * columns, columns, down, size - down * columns};
  }
  NORMKIT_DEVICE void next() {
    row += down, column += along;
    if (column >= columns) column -= columns, ++row;
  }
};

/// The tiles of a statistic that fall to a group: `count` of them, `apart` from each other, from tile `first` on.
struct Turn {
  std::int64_t statistic, end, o, lane, first;  // no statistic from `end` on is a row of the group
  int apart, count;

  /// The index of the first tile of the turn, among all tiles.
  NORMKIT_DEVICE std::int64_t index(const Work& work) const { return statistic * work.shape.parts + first; }
  NORMKIT_DEVICE void locate(const Geometry& g) {
    o = g.outer == 1 ? 0 : quotient(statistic, g.lanes), lane = statistic - o * g.lanes;
  }
  /// The Turn of the row that the group takes `turns` later, where rows follow each other.
  NORMKIT_DEVICE Turn after(const Work& work, int turns) const {
    Turn turn = *this;
    if (!work.policy.collects) return turn;
    turn.statistic += std::int64_t{turns} * work.shape.groups;
    turn.locate(work.task.geometry);
    if (turn.statistic >= end) turn.count = 0;
    return turn;
  }
};

/// The rank of this block in its team.
NORMKIT_DEVICE int team_rank(const Work& work) {
  return kHasClusters && work.policy.team.blocks > 1 ? cluster_rank() % work.policy.team.blocks : 0;
}

/// The tiles that this group has; where rows follow each other, those of its first row. Stage::rest goes backwards,
/// since what was summed last is still in the cache.
NORMKIT_DEVICE Turn own_turn(const Work& work, Group group) {
  const Policy& policy = work.policy;
  const std::int64_t parts = work.shape.parts;
  const int own = thread_index() >> policy.runs.shift;  // among the groups of the block
  Turn turn{0, 0, 0, 0, 0, 1, 1};
  if (policy.collects) {
    const RowGroups& rows = policy.rows;
    const std::int64_t team = quotient(block_index(), policy.team.blocks),
                       sharing = quotient(team, rows.count * rows.blocks);
    turn.statistic = (team - sharing * rows.count * rows.blocks) * rows.turns * work.shape.groups + own;
    turn.statistic += sharing * rows.rows, turn.end = (sharing + 1) * rows.rows;
  } else if (work.shape.shares) {
    turn.statistic = quotient(block_index(), policy.team.blocks);
  } else {
    std::int64_t k = own_item(group.size);
    if (k >= work.shape.all) turn.count = 0;
    if (work.stage == Stage::rest) k = work.shape.all - 1 - k;
    turn.statistic = quotient(k, parts), turn.first = k - turn.statistic * parts;
  }
  if (work.shape.shares) {
    turn.first = team_rank(work) * policy.team.tiles + own, turn.apart = work.shape.groups;
    const int left = static_cast<int>(parts) - team_rank(work) * policy.team.tiles;
    const int of_block = (left < policy.team.tiles ? left : policy.team.tiles) - own;
    turn.count = of_block > 0 ? divided(of_block + turn.apart - 1, turn.apart) : 0;
  }
  turn.locate(work.task.geometry);
  return turn;
}

/// Rows of a unit, and `width` elements of each.
struct Tile {
  std::int64_t unit;
  Origin at;
  int rows, width;
  Cursor own;  // of the vectors that a thread takes
};

/// Tile k of a turn.
template <class X> NORMKIT_DEVICE Tile tile_of(const Work& work, Group group, const Turn& turn, int k) {
  const Policy& policy = work.policy;
  const Tiling& tiling = policy.runs;
  const Shape& shape = work.shape;
  const std::int64_t part = turn.first + k * turn.apart;
  Tile t;
  t.unit = policy.units == 1 ? 0 : quotient(part, tiling.tiles);
  t.at = {turn.o, 0, turn.lane, t.unit * policy.unit_run};
  int columns = shape.columns;
  if (tiling.tiles == 1) {
    t.rows = shape.steps, t.width = static_cast<int>(policy.unit_run);
  } else {
    const int place = static_cast<int>(part - t.unit * tiling.tiles), per_run = static_cast<int>(tiling.per_run),
              row = per_run == 1 ? place : divided(place, per_run);
    const std::int64_t step = std::int64_t{row} * tiling.rows,
                       within = std::int64_t{place - row * per_run} * tiling.width;
    const std::int64_t below = work.task.geometry.steps - step, left = policy.unit_run - within;
    t.at.step = step, t.at.i += within;
    t.rows = below < tiling.rows ? static_cast<int>(below) : tiling.rows;
    t.width = left < tiling.width ? static_cast<int>(left) : tiling.width;
    columns = static_cast<int>(static_cast<unsigned>(t.width + kVector<X> - 1) / kVector<X>);
  }
  if (!work.constant) t.at.phase = phase_of(work.task.geometry, t.at);
  t.own = Cursor::of(group.rank, group.size, columns, tiling.rows == 1);
  return t;
}

/// Calls f(tile, k) for the tiles of a turn, k = 0, 1, ...
template <class X, class F> NORMKIT_DEVICE void for_tiles(const Work& work, Group group, const Turn& turn, F f) {
  NORMKIT_ROLL
  for (int k = 0; k < turn.count; ++k) f(tile_of<X>(work, group, turn, k), k);
}

template <class X> NORMKIT_DEVICE Place place_of(const Work& work, const Tile& t, const Cursor& c) {
  const int first = c.column * kVector<X>, left = t.width - first;
  return {t.at, c.row, first, work.all_whole || left > kVector<X> ? kVector<X> : left};
}

/// Calls f(k, place) for this thread's vectors of a tile, k = 0, 1, ...
template <class X, class F> NORMKIT_DEVICE void for_own(const Work& work, const Tile& t, Group group, F f) {
  Cursor c = t.own;
  NORMKIT_ROLL
  for (int k = 0, v = group.rank; v < t.rows * t.own.columns; ++k, v += group.size, c.next())
    f(k, place_of<X>(work, t, c));
}

/// Calls f(k, place, address) for this thread's vectors of a tile, where `address` is the vector's in array `a`.
template <class X, class F>
NORMKIT_DEVICE void for_own(const Work& work, const Tile& t, Group group, const Operand& a, F f) {
  const std::int64_t step = a.strides.step;
  X* const first = at<X>(a, t.at);
  if (!work.only_whole)
    return for_own<X>(work, t, group, [&](int k, const Place& p) { f(k, p, first + (p.row * step + p.i)); });
  // A pointer that moves on costs fewer instructions than a place.
  Cursor c = t.own;
  X* p = first + (c.row * step + c.column * kVector<X>);
  const std::int64_t on = c.down * step + c.along * kVector<X>, down = step - c.columns * kVector<X>;
  const int all = t.rows * c.columns;
  NORMKIT_ROLL
  for (int k = 0, v = group.rank; v < all; ++k, v += group.size) {
    f(k, Place{t.at, c.row, c.column * kVector<X>, kVector<X>}, p);
    const int row = c.row + c.down;
    c.next(), p += on;
    if (c.row != row) p += down;
  }
}

// ---- what is held ------------------------------------------------------------------------------------------------

/// A tile of an array in shared memory. A thread works on its own vectors; where rows do not begin with whole vectors,
/// its group brings the tile element by element, neighboring threads neighboring elements, and takes it away so too.
template <class X> struct Held {
  Slots<X> slots;
  int shift;  // 2^shift threads of the group

  NORMKIT_DEVICE Held(const Work& work, int place)
      : slots(shared_memory() + work.shape.head, place, work.shape.held), shift(work.policy.runs.shift) {}
  /// Vector k of this thread, as a copy: a reference would be read word by word.
  NORMKIT_DEVICE Vector<X> operator[](int k) const { return slots[k]; }
  NORMKIT_DEVICE void put(int k, const Vector<X>& v) const { slots[k] = v; }

  NORMKIT_DEVICE void fetch(const Work& work, const Tile& tile, Group group, const Operand& a) const {
    if (reads_whole(work))
      return for_own<X>(work, tile, group, a,
                        [&](int k, const Place& p, const X* from) { slots.fetch(k, from, p.n, work.all_whole); });
    if constexpr (sizeof(X) < 4) return fetch_in_turns(tile, group, a);
    for_elements(tile, group, a, [](X* here, X* there) { fetch_element(here, there); });
  }

  /// Copies the whole tile, which the group has written, to array `a`.
  NORMKIT_DEVICE void take_away(const Tile& tile, Group group, const Operand& a) const {
    group.sync();
    for_elements(tile, group, a, [](X* here, X* there) { *there = *here; });
  }

 private:
  /// The address of an element, which lies in a vector of some thread of the group.
  NORMKIT_DEVICE X* address(const Tile& tile, Group group, const Cursor& c) const {
    const int v = c.row * tile.own.columns + c.column / kVector<X>, k = v >> shift;
    const int vectors = k * block_threads() + (v - (k << shift)) - group.rank;
    return at<X>(slots.first, vectors * kVector<X> + c.column % kVector<X>);
  }
  /// Calls f(address in shared memory, address in `a`) for the elements that this thread moves.
  template <class F> NORMKIT_DEVICE void for_elements(const Tile& tile, Group group, const Operand& a, F f) const {
    X* const first = at<X>(a, tile.at);
    Cursor c = Cursor::of(group.rank, group.size, tile.width, tile.rows == 1);
    NORMKIT_ROLL
    for (int e = group.rank; e < tile.rows * tile.width + NORMKIT_PLANTED(long_tail); e += group.size, c.next())
      f(address(tile, group, c), first + (c.row * a.strides.step + c.column));
  }
  /// Brings elements that cannot be copied past the registers, eight at a time.
  NORMKIT_DEVICE void fetch_in_turns(const Tile& tile, Group group, const Operand& a) const {
    constexpr int kTurn = 8;
    const X* const first = at<X>(a, tile.at);
    const int all = tile.rows * tile.width;
    Cursor from = Cursor::of(group.rank, group.size, tile.width, tile.rows == 1), to = from;
    NORMKIT_ROLL
    for (int e = group.rank; e < all; e += kTurn * group.size) {
      X x[kTurn];
      NORMKIT_UNROLL
      for (int j = 0; j < kTurn; ++j, from.next())
        if (e + j * group.size < all) x[j] = first[from.row * a.strides.step + from.column];
      NORMKIT_UNROLL
      for (int j = 0; j < kTurn; ++j, to.next())
        if (e + j * group.size < all) *address(tile, group, to) = x[j];
    }
  }
};

/// Waits until all but the last n tiles that a group has fetched are there. Each thread waits for its own copies, and
/// where other threads have brought its vectors, for the group.
NORMKIT_DEVICE void wait_for_tiles(Group group, int n, bool own) {
  if (!NORMKIT_PLANTED(missing_wait)) wait_for_all_but(n + (n > 0 && NORMKIT_PLANTED(early_tile)));
  if (!own && !NORMKIT_PLANTED(missing_group_barrier)) group.sync();
}

// ---- forward -----------------------------------------------------------------------------------------------------

struct PivotSums { double sum, squares; };
NORMKIT_DEVICE PivotSums operator+(PivotSums a, PivotSums b) { return {a.sum + b.sum, a.squares + b.squares}; }
/// PivotSums, and how many members differ from the first.
struct CarefulSums { double sum, squares, others; };
NORMKIT_DEVICE CarefulSums operator+(CarefulSums a, CarefulSums b) {
  return {a.sum + b.sum, a.squares + b.squares, a.others + b.others};
}

/// A member of a tile, which is the first member of the first thread that has any; and how many members the tile has.
struct FirstMember { double value, n; };

/// A tile that is held, as far as its moments are concerned.
template <class X> struct HeldTile {
  const Work& work;
  const Tile& tile;
  Group group;
  Held<X> held;

  /// Calls f(v, is a member) for this thread's elements: fast, or in little code.
  template <class F> NORMKIT_DEVICE void for_all(F f) const {
    for_own<X>(work, tile, group, [&](int k, const Place& p) {
      const Vector<X> v = held[k];
      for_members<kVector<X>>(members_of(work.task, p), p.n,
                              [&](int e, bool, bool member) { f(value_of(v[e]), member); });
    });
  }
  template <class F> NORMKIT_DEVICE void for_all_in_turn(F f) const {
    for_own<X>(work, tile, group, [&](int k, const Place& p) {
      const unsigned members = members_of(work.task, p);
      NORMKIT_ROLL
      for (int e = 0; e < p.n; ++e) {
        f(value_of(*at<X>(held.slots.address(k), e)), (members >> e & 1) != 0);
      }
    });
  }

  NORMKIT_DEVICE FirstMember first_member(ComputeOf<X> begin) const {
    if (!work.task.where.data && !work.forms_x)
      return {static_cast<double>(begin), static_cast<double>(tile.rows * tile.width)};
    FirstMember own{0, 0};
    for_all_in_turn([&](ComputeOf<X> v, bool member) {
      if (member && own.n == 0) own.value = static_cast<double>(v);
      own.n += member;
    });
    return all_join(group, own, [](FirstMember a, FirstMember b) -> FirstMember {
      return {a.n > 0 ? a.value : b.value, a.n + b.n};
    });
  }

  /// f(sums about the pivot). A thread sums in the compute type; the sums of threads are added up in double.
  template <class F> NORMKIT_DEVICE auto sums_about(ComputeOf<X> pivot, F f) const {
    using S = ComputeOf<X>;
    S sum = 0, squares = 0;
    for_all([&](S v, bool member) {
      const S d = member ? v - pivot : S(0);
      sum += d, squares = mul_add(d, d, squares);
    });
    const auto add = [](PivotSums a, PivotSums b) { return a + b; };
    return all_join<true>(group, PivotSums{static_cast<double>(sum), static_cast<double>(squares)}, add, f);
  }

  /// The moments of data that defeats the pivot: all members are equal, or they are summed once more in double and in
  /// two passes.
  NORMKIT_DEVICE Moments<double> careful_moments(FirstMember first, bool centered) const {
    double pivot = centered ? first.value : 0;
    NORMKIT_ROLL
    for (int pass = 0;; ++pass) {
      CarefulSums sums{0, 0, 0};
      for_all_in_turn([&](ComputeOf<X> v, bool member) {
        const double wide = static_cast<double>(v), d = member ? wide - pivot : 0;
        sums = {sums.sum + d, mul_add(d, d, sums.squares), sums.others + (member && !(wide == first.value))};
      });
      sums = all_sum(group, sums);
      if (!centered) return moments_of<double>(0, 0, sums.squares, first.n);
      if (sums.others == 0) return moments_of<double>(first.value, 0, 0, first.n);
      const Moments<double> m = from_pivot<double>(pivot, sums.sum, sums.squares, first.n);
      if (pass == 1) return m;
      pivot = m.mean;
    }
  }

  /// make(moments of the tile), in all threads of the group; the first warp calls it, if not all threads do.
  /// `begin`: the first element of the tile.
  template <class F> NORMKIT_DEVICE auto made_of(ComputeOf<X> begin, F make) const {
    using S = ComputeOf<X>;
    using Made = decltype(make(Moments<S>{}));
    struct Quick {
      Made made;
      bool trusted;
    };
    const bool centered = work.task.centered;
    const FirstMember first = first_member(begin);
    const S pivot = centered ? static_cast<S>(first.value) : S(0);
    Quick quick{{}, false};
    if (first.n > 0)
      quick = sums_about(pivot, [&](PivotSums sums) -> Quick {
        if (!trustworthy<S>(centered ? sums.sum : 0, sums.squares, first.n)) return {{}, false};
        Moments<S> m = moments_of<S>(0, 0, sums.squares, first.n);
        if (centered) m = from_pivot_of_some<S>(static_cast<double>(pivot), sums.sum, sums.squares, first.n);
        return {make(m), true};
      });
    if (quick.trusted) return quick.made;
    const Moments<S> m = first.n > 0 ? moments_of<S>(careful_moments(first, centered)) : Moments<S>{};
    return made_once<1>(group, [&] { return make(m); });
  }
};

/// Stage::all: statistics, then y. Stage::sums: the moments of every tile. Stage::rest: y, with given statistics.
/// kSpecial: what special_of() says.
template <class X, Special kSpecial> struct RunsForward {
  static constexpr const char* kName = "RunsForward";
  static constexpr int kBlocks =
      kSpecial == Special::anything || sizeof(X) == 8 || (kSpecial == Special::along && sizeof(X) == 2) ? 2 : 3;
  Work given;

  NORMKIT_DEVICE void operator()() const {
    using S = ComputeOf<X>;
    Work work = known_runs<kSpecial>(given);
    work.policy.units = 1, work.policy.collects = false, work.policy.depth = 1;  // always so: the compiler may know
    work.task.activation = given.task.activation;
    const Task& t = work.task;
    const bool shares = work.shape.shares;
    const int blocks = kHasClusters && shares ? work.policy.team.blocks : 1;
    const Group group = Group::of(work.policy.runs.group);
    const Turn turn = own_turn(work, group);
    if (turn.count == 0 && !shares) return;
    if (blocks > 1) announce_to_cluster();
    for_tiles<X>(work, group, turn, [&](const Tile& tile, int k) {
      const Held<X> held(work, k);
      if (work.forms_x) for_own<X>(work, tile, group, [&](int v, const Place& p) { held.put(v, form_x<X>(t, p)); });
      else held.fetch(work, tile, group, t.x);
      end_batch();
    });
    UnitParameters parameters;  // whoever makes something of them reads them before it has to wait
    const Group block{thread_index(), block_threads()}, whole = shares ? block : group;
    if (makes(whole) || work.policy.meeting > kWarp) parameters = UnitParameters::of(work, turn.o, turn.lane, 0);
    const auto factors_of = [&](const Statistic<S>& s) {
      Factors<S, 1> factors{};
      factors.append(s, parameters.weight, parameters.bias);
      return factors;
    };
    using M = Moments<S>;
    const auto factors_of_moments = [&](const M& m) {
      const double rstd = solved_rstd(m, t.denominator);
      if (group.rank == 0 && turn.first == 0) publish(t, turn.statistic, m, rstd);
      return factors_of(statistic_of(m, rstd));
    };
    Factors<S, 1> factors{};
    if (work.stage == Stage::rest)
      factors = made_once<1>(whole, [&] { return factors_of(given_statistic<S>(t, turn.statistic)); });
    // The first element is read from memory, so that nobody waits for the threads that bring it. It is still x where y
    // lies over x: whoever writes y has met all threads that read this.
    const auto begin_of = [&](int k) -> S {
      if (work.forms_x || k >= turn.count) return 0;
      return value_of(*at<X>(t.x, tile_of<X>(work, group, turn, k).at));
    };
    S begin = work.stage == Stage::rest ? S(0) : begin_of(0);
    if (NORMKIT_PLANTED(early_return) && group.rank >= group.size / 2) return;
    if (blocks > 1 && !NORMKIT_PLANTED(early_post)) wait_for_cluster();
    const bool own = reads_whole(work) || work.forms_x;
    if (work.stage == Stage::rest) wait_for_tiles(group, 0, own);
    else
      for_tiles<X>(work, group, turn, [&](const Tile& tile, int k) {
        const S next = begin_of(k + 1);
        wait_for_tiles(group, turn.count - 1 - k, own);
        factors = HeldTile<X>{work, tile, group, Held<X>(work, k)}.made_of(begin, [&](const M& m) -> Factors<S, 1> {
          if (work.stage == Stage::all && !shares) return factors_of_moments(m);
          if (shares) Board<M>::post(group, 0, blocks, static_cast<int>(turn.first) + k * turn.apart, m);
          else if (group.rank == 0) put_moments(m, work.partials + kMomentDoubles<S> * turn.index(work));
          return {};
        });
        begin = next;
      });
    if (work.stage == Stage::sums) return;
    if (shares) {
      meet_team(blocks);
      const Group meeting = Group::of(work.policy.meeting);
      factors = met(block, meeting, [&] {
        return factors_of_moments(joined<M>(meeting, work.policy.runs.tiles, [](std::int64_t k) {
          return Board<M>::read(static_cast<int>(k));
        }, [](M a, M b) { return merged(a, b); }));
      });
    }
    if (t.phase == Phase::reduce) return;
    const bool by_elements = !work.writes_whole && like_x<X>(t);
    for_tiles<X>(work, group, turn, [&](const Tile& tile, int k) {
      const Held<X> held(work, k);
      Piece<S> piece;
      for_own<X>(work, tile, group, t.y, [&](int v, const Place& p, X* to) {
        const Vector<X> x = held[v];
        S y[kVector<X>];
        make_y<X>(work, factors, p, piece, x, y);
        if (by_elements) held.put(v, narrowed<X>(y));
        else if (like_x<X>(t)) store(to, y, p.n, work.all_whole);
        else store(at<S>(t.y, p), y, p.n, work.all_whole);
      });
      if (by_elements) held.take_away(tile, group, t.y);
    });
  }
};

// ---- backward ----------------------------------------------------------------------------------------------------

/// Sums of dz * x_hat and of dz for each element of a run, over the rows that a group takes, beside the tiles in shared memory.
template <class X> struct RowSums {
  using S = ComputeOf<X>;
  static constexpr int kEach = kVectorBytes / sizeof(S), kVectors = kVector<X> / kEach;  // of each of the two
  Slots<S> slots;  // dweight, then dbias, of vector after vector
  const Policy& policy;
  const Shape& shape;

  NORMKIT_DEVICE RowSums(const Work& work)
      : slots(shared_memory() + work.shape.head, work.shape.held_tiles * work.policy.depth * 2, work.shape.held),
        policy(work.policy),
        shape(work.shape) {}

  NORMKIT_DEVICE void clear() const {
    const int all = shape.held_tiles * shape.held * 2 * kVectors;
    NORMKIT_ROLL
    for (int k = 0; k < all; ++k) slots[k] = zeros<S>();
  }
  /// Adds the terms of vector v of tile k of a turn; x_hat_of(e) is x_hat of element e of the vector.
  template <class F> NORMKIT_DEVICE void add(int k, int v, F x_hat_of, const S (&dz)[kVector<X>]) const {
    const int first = (k * shape.held + v) * 2 * kVectors;
    NORMKIT_UNROLL
    for (int part = 0; part < 2 * kVectors; ++part) {
      S sum[kEach];
      widened(slots[first + part], sum);
      NORMKIT_UNROLL
      for (int j = 0; j < kEach; ++j) {
        const int e = part % kVectors * kEach + j;
        sum[j] = part < kVectors ? mul_add(x_hat_of(e), dz[e], sum[j]) : sum[j] + dz[e];
      }
      slots[first + part] = narrowed<S>(sum);
    }
  }

  /// Leaves one pair for each element of the tiles of a turn. First each block joins its groups; then, where the blocks
  /// of the row group are a cluster, each block joins a part of the pairs over all blocks. All threads of the block
  /// come here, and all of such a cluster.
  NORMKIT_DEVICE void leave(const Work& work, Group group, const Turn& turn) const {
    const int teams = policy.joins_rows ? policy.rows.blocks : 1, blocks = policy.team.blocks;
    const int team = policy.joins_rows ? divided(cluster_rank(), blocks) : 0, rank = cluster_rank() - team * blocks;
    const std::int64_t index = quotient(block_index(), blocks * teams), run = work.task.geometry.run;
    S* const out = reinterpret_cast<S*>(work.task.dparams) + 2 * index * run;
    sync_block();
    for_items<X>(work, group, turn, 0, 1, [&](const Item& item, S* to) {
      S all[kEach];
      widened(*own(item, 0), all);
      NORMKIT_UNROLL_BY(2)
      for (int g = 1; g < shape.groups; ++g) {
        S next[kEach];
        widened(*own(item, g), next);
        NORMKIT_UNROLL
        for (int e = 0; e < kEach; ++e) all[e] += next[e];
      }
      if (teams == 1) store(to, all, item.n);
      else *own(item, 0) = narrowed<S>(all);
    }, out);
    if (teams == 1) return;
    arrive_at_cluster(), wait_for_cluster();
    for_items<X>(work, group, turn, team, teams, [&](const Item& item, S* to) {
      S all[kEach] = {};
      NORMKIT_UNROLL_BY(2)
      for (int t = 0; t < teams; ++t) {
        S next[kEach];
        widened(*theirs(t * blocks + rank, own(item, 0)), next);
        NORMKIT_UNROLL
        for (int e = 0; e < kEach; ++e) all[e] = t == 0 ? next[e] : all[e] + next[e];
      }
      store(to, all, item.n);
    }, out);
    arrive_at_cluster(), wait_for_cluster();  // nobody leaves while its sums are read
  }

 private:
  /// A vector of sums: slot `slot` of the threads with rank `thread` in their groups, of which n are of elements that exist.
  struct Item { int slot, thread, n; };

  /// Calls f(item, address that it goes to) for the items of a turn's tiles that fall to this thread, if this is block
  /// `part` of `parts`.
  template <class Y, class F>
  NORMKIT_DEVICE void for_items(const Work& work, Group group, const Turn& turn, int part, int parts, F f,
                                S* out) const {
    for_tiles<Y>(work, group, turn, [&](const Tile& tile, int k) {
      const int columns = (tile.width + kVector<Y> - 1) / kVector<Y> * kVectors;
      NORMKIT_ROLL
      for (int item = part * block_threads() + thread_index(); item < 2 * columns; item += parts * block_threads()) {
        const int which = item >= columns, column = item - which * columns, v = column / kVectors;
        const int first = column * kEach, n = tile.width - first < kEach ? tile.width - first : kEach;
        if (n <= 0) continue;
        const int slot =
            (k * shape.held + (v >> policy.runs.shift)) * 2 * kVectors + which * kVectors + column % kVectors;
        f(Item{slot, v & (group.size - 1), n}, out + which * work.task.geometry.run + tile.at.i + first);
      }
    });
  }
  /// The address of an item of group g of this block.
  NORMKIT_DEVICE Vector<S>* own(const Item& item, int g) const {
    const int thread = (g << policy.runs.shift) + item.thread;
    return reinterpret_cast<Vector<S>*>(slots.first +
                                        (item.slot * block_threads() + thread - thread_index()) * kVectorBytes);
  }
  /// The address in the shared memory of the block with rank `rank` in the cluster that corresponds to `here` in this
  /// block's.
  NORMKIT_DEVICE static const Vector<S>* theirs(int rank, const Vector<S>* here) {
    return reinterpret_cast<const Vector<S>*>(peer_memory(rank) +
                                              (reinterpret_cast<const std::byte*>(here) - shared_memory()));
  }
};

/// Stage::all: sums about the given mean, without the weight where it is constant, then dx. Stage::sums: the sums of
/// every tile. Stage::rest: dx, of statistics that are solved, or that need no sums. Where rows follow each other, a
/// group does all that for one row after another, while the next rows are on their way.
/// kSpecial: what special_of() says.
template <class X, Special kSpecial> struct RunsBackward {
  using S = ComputeOf<X>;
  static constexpr const char* kName = "RunsBackward";
  static constexpr int kBlocks = kSpecial == Special::anything ? 1 : 2;
  static constexpr int kBlocksBefore90 = kSpecial == Special::along && sizeof(X) == 2 ? 1 : kBlocks;
  Work given;

  NORMKIT_DEVICE void operator()() const {
    Work work = known_runs<kSpecial>(given);
    if constexpr (kSpecial == Special::along) work.params_whole = true;  // group norm has units of constant parameters
    const Policy& policy = work.policy;
    const bool shares = work.shape.shares, collects = policy.collects;
    const int blocks = kHasClusters && shares ? policy.team.blocks : 1;
    const Group group = Group::of(policy.runs.group);
    const Turn first = own_turn(work, group);
    if (first.count == 0 && !shares && !collects) return;
    if (collects) RowSums<X>(work).clear();
    if (blocks > 1) announce_to_cluster();
    const int rows = collects ? policy.rows.turns : 1, depth = collects ? policy.depth : 1;
    NORMKIT_ROLL
    for (int j = 1 - depth; j < rows; ++j) {
      // Whoever brings a row has met all that read what was in its place.
      if (j > 0 && !(reads_whole(work) && work.writes_whole)) group.sync();
      const int ahead = j + depth - 1;
      fetch(work, group, first, ahead, ahead < rows ? ahead % depth : -1);
      if (j == 0 && blocks > 1) wait_for_cluster();  // all blocks run
      if (j >= 0) solve_row(work, group, first.after(work, j), j, depth, blocks);
    }
    if (collects) RowSums<X>(work).leave(work, group, first);
  }

 private:
  /// The first slot of x of tile k of a row; the slots of dy follow.
  NORMKIT_DEVICE static int place_of_tile(const Work& work, int row, int k) {
    return (row * work.shape.held_tiles + k) * 2;
  }

  /// Brings row j to place `row`; -1: there is no such row. Each of its tiles is a batch, if only an empty one.
  NORMKIT_DEVICE static void fetch(const Work& work, Group group, const Turn& first, int j, int row) {
    const int tiles = row < 0 ? 0 : first.after(work, j).count;
    NORMKIT_ROLL
    for (int k = 0; k < first.count; ++k, end_batch()) {
      if (k >= tiles) continue;
      const Tile tile = tile_of<X>(work, group, first.after(work, j), k);
      NORMKIT_ROLL
      for (int array = 0; array < 2; ++array) {
        Operand a = work.task.x;
        if (array == 1) a = work.task.dy;
        Held<X>(work, place_of_tile(work, row, k) + array).fetch(work, tile, group, a);
      }
    }
  }

  /// Solves row j, and writes its dx. The row has been fetched, as have the `depth` - 1 rows after it.
  NORMKIT_DEVICE static void solve_row(const Work& work, Group group, const Turn& turn, int j, int depth, int blocks) {
    constexpr int N = kVector<X>;
    const Task& t = work.task;
    const Policy& policy = work.policy;
    const bool shares = work.shape.shares, collects = policy.collects;
    const bool gaps = has_gaps(t), by_elements = t.dx.data && !work.writes_whole;
    const int board = collects && !NORMKIT_PLANTED(one_board) ? j % 2 * static_cast<int>(work.shape.parts) : 0;
    const std::int64_t r = turn.statistic;
    const int rank = shares ? team_rank(work) : 0, peers = kHasClusters ? cluster_rank() - rank : 0;
    if (turn.count == 0) {
      if (shares && collects) return meet_team(blocks);  // there is no such row, but for others of the cluster
      if (!shares) return;
    }
    const RowSums<X> row_sums(work);
    const bool active = t.activation.kind != ActivationKind::none;
    const Group block{thread_index(), block_threads()}, whole = shares ? block : group;
    // What all threads need of the statistic as it was given, and of the statistic as it is solved.
    struct Before {
      Statistic<S> s;
      UnitParameters parameters;
      Factors<S, 1> given;
    };
    struct After {
      Solved<S> solved;
      Known<S, 1> known;
    };
    const Before before = made_once<0>(whole, [&] {
      Before made{given_statistic<S>(t, r), UnitParameters::of(work, turn.o, turn.lane, 0), {}};
      made.given.append(made.s, made.parameters.weight, made.parameters.bias);
      return made;
    });
    const Statistic<S> as_given = before.s;
    const UnitParameters parameters = before.parameters;
    Factors<S, 1> given = before.given;
    Reduced total;
    After after{};
    const auto solve_it = [&] {
      const Group meeting = Group::of(policy.meeting);
      const bool leads = shares ? rank == 0 && thread_index() < meeting.size : group.rank == 0 && turn.first == 0;
      after = met(whole, meeting, [&] {
        After made{};
        if (work.stage == Stage::rest && work.summed) made.solved = solved_at<S>(work, r);
        else
          made.solved = solve<S>(work, r, as_given, meeting, leads, [&](std::int64_t unit) {
            return policy.units == 1 ? parameters.weight : UnitParameters::of(work, turn.o, turn.lane, unit).weight;
          }, [&](std::int64_t unit, std::int64_t k) {
            return shares ? Board<Reduced>::read(board + static_cast<int>(unit * policy.runs.tiles + k)) : total;
          });
        if (policy.units == 1) made.known.append(made.solved, parameters.weight);
        return made;
      });
    };
    Known<S, 1>& known = after.known;
    const auto walk = [&](auto pass) {  // 0: sums, 1: dx
      for_tiles<X>(work, group, turn, [&](const Tile& tile, int k) {
        const int place = place_of_tile(work, collects ? j % depth : 0, k);
        const Held<X> x(work, place), dy(work, place + 1);
        if (policy.units > 1 && (pass == 1 || active)) {
          const UnitParameters own = UnitParameters::of(work, turn.o, turn.lane, tile.unit);
          given.append(as_given, own.weight, own.bias);
          if (pass == 1) known.append(after.solved, own.weight);
        }
        if (pass == 0) wait_for_tiles(group, depth * turn.count - 1 - k, reads_whole(work));
        Sums<S> sums{0, 0, 0};
        int count = 0;
        for_own<X>(work, tile, group, t.dx, [&](int v, const Place& p, X* to) {
          const Vector<X> vx = x[v], vdy = dy[v];
          const Incoming<S, N> in(work, given, p, vx, vdy);
          if (pass == 0) {
            for_members<N>(members_of(t, p), p.n, [&](int e, bool exists, bool member) {
              if (!exists) return;
              add(sums, in, e, given.mean[0], gaps, member);
              count += member;
            });
            return;
          }
          if (collects) row_sums.add(k, v, [&](int e) { return standardized(t, in.dz[e], in.x[e], known, 0); }, in.dz);
          S dx[N];
          make_dx<X>(work, known, p, in, dx);
          if (by_elements) x.put(v, narrowed<X>(dx));
          else if (t.dx.data) store(to, dx, p.n, work.all_whole);
        });
        if (pass == 1) {
          if (by_elements) x.take_away(tile, group, t.dx);
          return;
        }
        total = all_sum(group, reduced(sums, count));
        if (shares)
          Board<Reduced>::post(group, peers, blocks, board + static_cast<int>(turn.first) + k * turn.apart, total);
      });
    };
    // Where the compiler knows much the code is short, and each pass has a copy of its own.
    constexpr bool kCopies = kSpecial != Special::anything;
    NORMKIT_ROLL
    for (int pass = work.stage == Stage::rest ? 1 : 0; pass < 2; ++pass) {
      if (pass == 1) {
        if (work.stage == Stage::rest) wait_for_tiles(group, 0, reads_whole(work));
        if (shares) meet_team(blocks);
        solve_it();
        if (t.phase == Phase::reduce || (!t.dx.data && !work.elementwise && !collects)) return;
      }
      if constexpr (!kCopies) walk(pass);
      else if (pass == 0) walk(Constant<0>{});
      else walk(Constant<1>{});
      if (work.stage != Stage::sums) continue;
      if (group.rank == 0) put(total, work.partials + 4 * turn.index(work));
      return;
    }
  }
};

/// The sums of gradients over row groups, in ParamKind::row, where teams do not collect them: they are taken from
/// memory, once statistics are solved.
///
///     thread = one vector of elements of the runs of the rows of one block, which it walks down group by group
template <class X> struct RowGradients {
  using S = ComputeOf<X>;
  static constexpr const char* kName = "RowGradients";
  static constexpr int kBlocks = 1;
  Work given;

  static Grid grid(const Work& work) {
    const Geometry& g = work.task.geometry;
    Grid grid = grid_for_items(work.policy.row_blocks(g) * ceil_div(g.run, kVector<X>), 1);
    grid.shared_bytes = kStreamBytes;
    return grid;
  }

  NORMKIT_DEVICE void operator()() const {
    constexpr int N = kVector<X>;
    const Work work = known_as<Special::anything>(given);
    const Task& t = work.task;
    const Geometry& g = t.geometry;
    const RowGroups& rows = work.policy.rows;
    const std::int64_t vectors = ceil_div(g.run, N), blocks = rows.count * rows.blocks, k = own_item(1);
    if (k >= work.policy.row_blocks(g) * vectors) return;
    const std::int64_t block = quotient(k, vectors), i = (k - block * vectors) * N, sharing = quotient(block, blocks);
    const int n = g.run - i < N ? static_cast<int>(g.run - i) : N, groups = work.policy.groups(Stage::sums);
    const std::int64_t first = (block - sharing * blocks) * rows.turns * groups, left = rows.rows - first;
    const auto place_of = [&](std::int64_t row) {
      const std::int64_t r = sharing * rows.rows + row, o = g.outer == 1 ? 0 : quotient(r, g.lanes);
      Place p{{o, 0, r - o * g.lanes, i}, 0, 0, n};
      p.tile.phase = phase_of(g, p.tile);
      return p;
    };
    const Slots<X> x(shared_memory(), 0, kPairSlots), dy(shared_memory(), 1, kPairSlots);
    S* const out = reinterpret_cast<S*>(t.dparams) + 2 * block * g.run + i;
    NORMKIT_ROLL
    for (int group = 0; group < groups; ++group) {
      const auto place_of_row = [&](int j) { return place_of(first + std::int64_t{j} * groups + group); };
      S dweight[N], dbias[N];
      NORMKIT_UNROLL
      for (int e = 0; e < N; ++e) dweight[e] = dbias[e] = 0;
      const std::int64_t below = left <= group ? 0 : ceil_div(left - group, groups);
      streamed<kPairSlots>(below < rows.turns ? static_cast<int>(below) : rows.turns, [&](int slot, int j) {
        const Place q = place_of_row(j);
        x.fetch(slot, at<X>(t.x, q), n), dy.fetch(slot, at<X>(t.dy, q), n);
      }, [&](int slot, int j) { add_row(work, place_of_row(j), x[slot], dy[slot], dweight, dbias); });
      NORMKIT_UNROLL
      for (int e = 0; e < N; ++e) {
        if (e >= n) continue;
        out[e] = group == 0 ? dweight[e] : out[e] + dweight[e];
        out[g.run + e] = group == 0 ? dbias[e] : out[g.run + e] + dbias[e];
      }
    }
  }

 private:
  template <int N>
  NORMKIT_DEVICE static void add_row(const Work& work, const Place& p, const Vector<X>& vx, const Vector<X>& vdy,
                                     S (&dweight)[N], S (&dbias)[N]) {
    const Task& t = work.task;
    const std::int64_t r = p.tile.o * t.geometry.lanes + p.tile.lane;
    Known<S, 1> known;
    known.append(solved_at<S>(work, r), 1);
    Factors<S, 1> given;
    given.append(given_statistic<S>(t, r), 1, 0);
    const Incoming<S, N> in(work, given, p, vx, vdy);
    NORMKIT_UNROLL
    for (int e = 0; e < N; ++e) {
      const S x_hat = standardized(t, in.dz[e], in.x[e], known, 0);
      dweight[e] = mul_add(x_hat, in.dz[e], dweight[e]), dbias[e] += in.dz[e];
    }
  }
};

}  // namespace normkit::cuda
