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
// An H200 has time for about 210 instructions of a warp while it moves what a warp reads and writes as one vector each: half of
// that is a good loop, and what is done once for each thread counts where rows are short.
#pragma once

#include "finish.cuh"

namespace normkit::cuda {

NORMKIT_CALLED int divided(int a, int b) {
  return static_cast<int>(static_cast<unsigned>(a) / static_cast<unsigned>(b));
}

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

/// The tiles that fall to a group: `count` of one unit, from its tile `place` on.
struct Turn {
  std::int64_t statistic, unit;  // which of those that the statistic has
  std::int64_t o, lane;
  int place, count;

  NORMKIT_DEVICE std::int64_t index(const Policy& p) const {  // of its first tile among all
    return (statistic * p.units + unit) * p.runs.tiles + place;
  }
};

/// What is left when statistics are known goes backwards, since what was summed last is still in the cache.
NORMKIT_DEVICE Turn own_turn(const Work& work, Group group) {
  const Policy& policy = work.policy;
  const std::int64_t lanes = work.task.geometry.lanes, tiles = policy.runs.tiles;
  Turn turn;
  turn.count = 1;
  if (policy.shares(work.stage)) {
    turn.statistic = quotient(block_index(), policy.team.blocks), turn.unit = 0;
    turn.place = cluster_rank() * policy.team.tiles;
    const int left = static_cast<int>(tiles) - turn.place;
    turn.count = left < policy.team.tiles ? left : policy.team.tiles;
  } else {
    const std::int64_t all = work.task.geometry.statistics() * policy.units * tiles;
    std::int64_t k = own_item(group.size);
    if (k >= all) turn.count = 0;
    if (work.stage == Stage::rest) k = all - 1 - k;
    const std::int64_t unit = quotient(k, tiles);
    turn.place = static_cast<int>(k - unit * tiles);
    turn.statistic = quotient(unit, policy.units), turn.unit = unit - turn.statistic * policy.units;
  }
  turn.o = quotient(turn.statistic, lanes), turn.lane = turn.statistic - turn.o * lanes;
  return turn;
}

/// Rows of a unit, and `width` elements of each.
struct Tile {
  Origin at;
  int rows, width;
  Cursor own;  // of the vectors that a thread takes
};

/// Tile k of a turn.
template <class X> NORMKIT_DEVICE Tile tile_of(const Work& work, Group group, const Turn& turn, int k) {
  const Policy& policy = work.policy;
  const Tiling& tiling = policy.runs;
  const int place = turn.place + k,
            row = tiling.per_run == 1 ? place : divided(place, static_cast<int>(tiling.per_run));
  const std::int64_t step = std::int64_t{row} * tiling.rows;
  const std::int64_t within = (place - row * tiling.per_run) * tiling.width;
  const std::int64_t below = work.task.geometry.steps - step, left = policy.unit_run - within;
  Tile t;
  t.at = {turn.o, step, turn.lane, turn.unit * policy.unit_run + within};
  if (!work.constant) t.at.phase = phase_of(work.task.geometry, t.at);
  t.rows = below < tiling.rows ? static_cast<int>(below) : tiling.rows;
  t.width = left < tiling.width ? static_cast<int>(left) : tiling.width;
  t.own = Cursor::of(group.rank, group.size, (t.width + kVector<X> - 1) / kVector<X>, tiling.rows == 1);
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

// ---- what is held ------------------------------------------------------------------------------------------------

/// A tile of an array in shared memory. A thread works on its own vectors; where rows do not begin with whole ones, its group
/// brings them element by element, neighbors by neighbors, and takes them away so too.
template <class X> struct Held {
  Slots<X> slots;
  int shift;  // 2^shift threads of the group

  NORMKIT_DEVICE Held(const Work& work, int place)
      : slots(shared_memory() + kHeadBytes, place, work.policy.runs.held(kVector<X>)), shift(work.policy.runs.shift) {}
  NORMKIT_DEVICE Vector<X>& operator[](int k) const { return slots[k]; }

  NORMKIT_DEVICE void fetch(const Work& work, const Tile& tile, Group group, const Operand& a) const {
    if (reads_whole(work))
      return for_own<X>(work, tile, group,
                        [&](int k, const Place& p) { slots.fetch(k, at<X>(a, p), p.n, work.all_whole); });
    if constexpr (sizeof(X) < 4) return fetch_in_turns(tile, group, a);
    for_elements(tile, group, a, [](X* here, X* there) { fetch_element(here, there); });
  }

  /// Takes away what the group has written, all of it.
  NORMKIT_DEVICE void take_away(const Tile& tile, Group group, const Operand& a) const {
    group.sync();
    for_elements(tile, group, a, [](X* here, X* there) { *there = *here; });
  }

 private:
  /// Where an element lies: in a vector of some thread of the group.
  NORMKIT_DEVICE X* address(const Tile& tile, Group group, const Cursor& c) const {
    const int v = c.row * tile.own.columns + c.column / kVector<X>, k = v >> shift;
    const int vectors = k * block_threads() + (v - (k << shift)) - group.rank;
    return at<X>(slots.first, vectors * kVector<X> + c.column % kVector<X>);
  }
  /// Calls f(here, there) for the elements that this thread moves.
  template <class F> NORMKIT_DEVICE void for_elements(const Tile& tile, Group group, const Operand& a, F f) const {
    X* const first = at<X>(a, tile.at);
    Cursor c = Cursor::of(group.rank, group.size, tile.width, tile.rows == 1);
    NORMKIT_ROLL
    for (int e = group.rank; e < tile.rows * tile.width + NORMKIT_PLANTED(long_tail); e += group.size, c.next())
      f(address(tile, group, c), first + (c.row * a.strides.step + c.column));
  }
  /// Elements that are not copied aside, eight on their way at a time.
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

/// Waits for what a group has had copied aside: each thread for its own, or, where others have brought it, for them.
NORMKIT_DEVICE void wait_for_copies(Group group, bool own) {
  end_batch();
  if (!NORMKIT_PLANTED(missing_wait)) wait_for_batches<0>();
  if (!own && !NORMKIT_PLANTED(missing_group_barrier)) group.sync();
}

// ---- forward -----------------------------------------------------------------------------------------------------

struct PivotSums { double sum, squares; };
NORMKIT_DEVICE PivotSums operator+(PivotSums a, PivotSums b) { return {a.sum + b.sum, a.squares + b.squares}; }
/// The same, and how many members differ from the first.
struct CarefulSums { double sum, squares, others; };
NORMKIT_DEVICE CarefulSums operator+(CarefulSums a, CarefulSums b) {
  return {a.sum + b.sum, a.squares + b.squares, a.others + b.others};
}

/// A member of a tile: the first of the thread that has one and comes first; and how many members there are.
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

  /// Sums in the compute type, and over threads in double.
  NORMKIT_DEVICE PivotSums sums_about(ComputeOf<X> pivot) const {
    using S = ComputeOf<X>;
    S sum = 0, squares = 0;
    for_all([&](S v, bool member) {
      const S d = member ? v - pivot : S(0);
      sum += d, squares = mul_add(d, d, squares);
    });
    return all_sum(group, PivotSums{static_cast<double>(sum), static_cast<double>(squares)});
  }

  /// For data that defeats the pivot: all equal, or once more in double and in two passes.
  NORMKIT_DEVICE Moments careful_moments(FirstMember first, bool centered) const {
    double pivot = centered ? first.value : 0;
    NORMKIT_ROLL
    for (int pass = 0;; ++pass) {
      CarefulSums sums{0, 0, 0};
      for_all_in_turn([&](ComputeOf<X> v, bool member) {
        const double wide = static_cast<double>(v), d = member ? wide - pivot : 0;
        sums = {sums.sum + d, mul_add(d, d, sums.squares), sums.others + (member && !(wide == first.value))};
      });
      sums = all_sum(group, sums);
      if (!centered) return {0, sums.squares, first.n};
      if (sums.others == 0) return {first.value, 0, first.n};
      const Moments m = from_pivot(pivot, sums.sum, sums.squares, first.n);
      if (pass == 1) return m;
      pivot = m.mean;
    }
  }

  /// `begin`: the first element of the tile.
  NORMKIT_DEVICE Moments moments(ComputeOf<X> begin) const {
    using S = ComputeOf<X>;
    const bool centered = work.task.centered;
    const FirstMember first = first_member(begin);
    const S pivot = centered ? static_cast<S>(first.value) : S(0);
    if (first.n == 0) return {0, 0, 0};
    const PivotSums sums = sums_about(pivot);
    if (!trustworthy<S>(centered ? sums.sum : 0, sums.squares, first.n)) return careful_moments(first, centered);
    if (!centered) return {0, sums.squares, first.n};
    return from_pivot(static_cast<double>(pivot), sums.sum, sums.squares, first.n);
  }
};

/// Stage::all: statistics, then y. Stage::sums: the moments of every tile. Stage::rest: y, with given statistics.
/// kSpecial: what special_of() says.
template <class X, Special kSpecial> struct RunsForward {
  static constexpr const char* kName = "RunsForward";
  static constexpr int kBlocks = kSpecial == Special::none ? 3 : 2;
  Work given;

  NORMKIT_DEVICE void operator()() const {
    using S = ComputeOf<X>;
    Work work = known_as<kSpecial>(given);
    work.policy.units = 1;  // as always in forward: the compiler may know
    const Task& t = work.task;
    const bool shares = work.policy.shares(work.stage);
    const int blocks = kHasClusters && shares ? work.policy.team.blocks : 1;
    const Group group = Group::of(work.policy.runs.group);
    const Turn turn = own_turn(work, group);
    if (turn.count == 0) return;
    if (blocks > 1) arrive_at_cluster();  // this block runs
    S begin = 0;
    for_tiles<X>(work, group, turn, [&](const Tile& tile, int k) {
      const Held<X> held(work, k);
      // From memory, where nobody has to wait for those that bring it. Whoever writes y has met all that read this.
      if (k == 0 && !work.forms_x) begin = value_of(*at<X>(t.x, tile.at));
      if (work.forms_x) for_own<X>(work, tile, group, [&](int v, const Place& p) { held[v] = form_x<X>(t, p); });
      else held.fetch(work, tile, group, t.x);
    });
    wait_for_copies(group, reads_whole(work) || work.forms_x);
    if (NORMKIT_PLANTED(early_return) && group.rank >= group.size / 2) return;
    Moments m;
    if (work.stage != Stage::rest)
      for_tiles<X>(work, group, turn, [&](const Tile& tile, int k) {
        if (k > 0 && !work.forms_x) begin = value_of(*at<X>(t.x, tile.at));
        m = HeldTile<X>{work, tile, group, Held<X>(work, k)}.moments(begin);
        if (!shares) return;
        if (blocks > 1 && k == 0 && !NORMKIT_PLANTED(early_post)) wait_for_cluster();
        Board<Moments>::post(group, blocks, turn.place + k, m);
      });
    if (work.stage == Stage::sums) {
      if (group.rank == 0) put(m, work.partials + 3 * turn.index(work.policy));
      return;
    }
    Statistic<S> s;
    if (work.stage == Stage::rest) {
      s = given_statistic<S>(t, turn.statistic);
    } else {
      if (shares) meet_team(blocks), m = moments_of_team(work);
      s = statistic_of<S>(m.mean, rstd_of(m, t.eps));
      if (group.rank == 0 && turn.place == 0) publish<S>(t, turn.statistic, m, s.rstd);
    }
    if (t.phase == Phase::reduce) return;
    const UnitParameters parameters = UnitParameters::of(work, turn.o, turn.lane, 0);
    Factors<S, 1> factors;
    factors.append(s, parameters.weight, parameters.bias);
    const bool by_elements = !work.writes_whole && like_x<X>(t);
    for_tiles<X>(work, group, turn, [&](const Tile& tile, int k) {
      const Held<X> held(work, k);
      Piece<S> piece;
      for_own<X>(work, tile, group, [&](int v, const Place& p) {
        S y[kVector<X>];
        make_y<X>(work, factors, p, piece, held[v], y);
        if (by_elements) held[v] = narrowed<X>(y);
        else store_y<X>(work, p, y);
      });
      if (by_elements) held.take_away(tile, group, t.y);
    });
  }

 private:
  NORMKIT_DEVICE static Moments moments_of_team(const Work& work) {
    return joined<Moments>(Group::of(work.policy.meeting), work.policy.runs.tiles, [](std::int64_t k) {
      return Board<Moments>::read(static_cast<int>(k));
    }, [](Moments a, Moments b) { return merge(a, b); });
  }
};

// ---- backward ----------------------------------------------------------------------------------------------------

/// Stage::all: sums about the given mean, without the weight where it is constant, then dx. Stage::sums: those of every tile.
/// Stage::rest: dx, of statistics that are solved, or that need no sums.
/// kSpecial: what special_of() says.
template <class X, Special kSpecial> struct RunsBackward {
  static constexpr const char* kName = "RunsBackward";
  static constexpr int kBlocks = kSpecial == Special::anything ? 1 : 2;
  Work given_work;

  NORMKIT_DEVICE void operator()() const {
    using S = ComputeOf<X>;
    constexpr int N = kVector<X>;
    const Work work = known_as<kSpecial>(given_work);
    const Task& t = work.task;
    const bool shares = work.policy.shares(work.stage);
    const int blocks = kHasClusters && shares ? work.policy.team.blocks : 1;
    const Group group = Group::of(work.policy.runs.group);
    const Turn turn = own_turn(work, group);
    if (turn.count == 0) return;
    if (blocks > 1) arrive_at_cluster();  // as in forward
    for_tiles<X>(work, group, turn, [&](const Tile& tile, int k) {
      NORMKIT_ROLL
      for (int array = 0; array < 2; ++array) {
        Operand a = t.x;
        if (array == 1) a = t.dy;
        Held<X>(work, 2 * k + array).fetch(work, tile, group, a);
      }
    });
    const std::int64_t r = turn.statistic;
    const UnitParameters parameters = UnitParameters::of(work, turn.o, turn.lane, turn.unit);
    const Statistic<S> s = given_statistic<S>(t, r);
    Factors<S, 1> given;
    given.append(s, parameters.weight, parameters.bias);
    wait_for_copies(group, reads_whole(work));
    const bool gaps = has_gaps(t), by_elements = t.dx.data && !work.writes_whole;
    Reduced total;
    Known<S, 1> known;
    NORMKIT_ROLL
    for (int pass = work.stage == Stage::rest ? 1 : 0; pass < 2; ++pass) {  // the sums, then dx
      if (pass == 1) {
        if (shares) meet_team(blocks);
        const bool leads = group.rank == 0 && turn.unit == 0 && turn.place == 0;
        const Solved solved = work.stage == Stage::rest && work.summed
                                  ? solved_at(work, r)
                                  : solve<S>(work, r, s, Group::of(work.policy.meeting), leads, [&](std::int64_t) {
          return parameters.weight;
        }, [&](std::int64_t, std::int64_t k) { return shares ? Board<Reduced>::read(static_cast<int>(k)) : total; });
        if (t.phase == Phase::reduce || (!t.dx.data && !work.elementwise)) return;
        known.append(solved, parameters.weight);
      }
      for_tiles<X>(work, group, turn, [&](const Tile& tile, int k) {
        const Held<X> x(work, 2 * k), dy(work, 2 * k + 1);
        Sums<S> sums{0, 0, 0};
        int count = 0;
        for_own<X>(work, tile, group, [&](int v, const Place& p) {
          const Incoming<S, N> in(work, given, p, x[v], dy[v]);
          if (pass == 0) {
            for_members<N>(members_of(t, p), p.n, [&](int e, bool exists, bool member) {
              if (!exists) return;
              add(sums, in, e, given.mean[0], gaps, member);
              count += member;
            });
            return;
          }
          S dx[N];
          make_dx<X>(work, known, p, in, dx);
          if (by_elements) x[v] = narrowed<X>(dx);
          else if (t.dx.data) store(at<X>(t.dx, p), dx, p.n, work.all_whole);
        });
        if (pass == 1) {
          if (by_elements) x.take_away(tile, group, t.dx);
          return;
        }
        total = all_sum(group, reduced(sums, count));
        if (!shares) return;
        if (blocks > 1 && k == 0) wait_for_cluster();
        Board<Reduced>::post(group, blocks, turn.place + k, total);
      });
      if (work.stage != Stage::sums) continue;
      if (group.rank == 0) put(total, work.partials + 4 * turn.index(work.policy));
      return;
    }
  }
};

/// ParamKind::row: sums of dz * x_hat and of dz over 64 rows at a time, for each element of a run.
///
///     thread = one vector of elements of the runs of one group of rows, which it walks down
template <class X> struct RowGradients {
  static constexpr const char* kName = "RowGradients";
  static constexpr int kBlocks = 2;
  Work work;

  static Grid grid(const Geometry& g) {
    Grid grid = grid_for_items(g.outer * row_groups(g) * ceil_div(g.run, kVector<X>), 1);
    grid.shared_bytes = kStreamBytes;
    return grid;
  }

  NORMKIT_DEVICE void operator()() const {
    using S = ComputeOf<X>;
    constexpr int N = kVector<X>;
    const Task& t = work.task;
    const Geometry& g = t.geometry;
    const std::int64_t vectors = ceil_div(g.run, N), groups = row_groups(g), items = g.outer * groups * vectors;
    const std::int64_t k = own_item(1);
    if (k >= items) return;
    const std::int64_t group = quotient(k, vectors), i = (k - group * vectors) * N;
    const std::int64_t o = quotient(group, groups), row = (group - o * groups) * kRowGroup;
    const int n = g.run - i < N ? static_cast<int>(g.run - i) : N;
    const int rows = g.lanes - row < kRowGroup ? static_cast<int>(g.lanes - row) : static_cast<int>(kRowGroup);
    Place p{{o, 0, row, i}, 0, 0, n};
    p.tile.phase = phase_of(g, p.tile);
    const auto place_of_row = [&](int j) {
      Place q = p;
      return q.tile.lane += j, q;
    };
    const Slots<X> x(shared_memory(), 0, kPairSlots), dy(shared_memory(), 1, kPairSlots);
    S dweight[N], dbias[N];
    NORMKIT_UNROLL
    for (int e = 0; e < N; ++e) dweight[e] = dbias[e] = 0;
    streamed<kPairSlots>(rows, [&](int slot, int j) {
      const Place q = place_of_row(j);
      x.fetch(slot, at<X>(t.x, q), n), dy.fetch(slot, at<X>(t.dy, q), n);
    }, [&](int slot, int j) { add_row(place_of_row(j), x[slot], dy[slot], dweight, dbias); });
    double* const out = t.dparams + 2 * (group * g.run + i);
    NORMKIT_UNROLL
    for (int e = 0; e < N; ++e)
      if (e < n) out[2 * e] = static_cast<double>(dweight[e]), out[2 * e + 1] = static_cast<double>(dbias[e]);
  }

 private:
  template <class S, int N>
  NORMKIT_DEVICE void add_row(const Place& p, const Vector<X>& vx, const Vector<X>& vdy, S (&dweight)[N],
                              S (&dbias)[N]) const {
    const Task& t = work.task;
    const std::int64_t r = p.tile.o * t.geometry.lanes + p.tile.lane;
    Known<S, 1> known;
    known.append(solved_at(work, r), 1);
    S x[N], dz[N], weight[N];
    widened(vx, x);
    widened(vdy, dz);
    if (t.activation.kind != ActivationKind::none) {
      Factors<S, 1> given;
      given.append(given_statistic<S>(t, r), 1, 0);
      incoming(work, given, p, x, dz, weight);
    }
    NORMKIT_UNROLL
    for (int e = 0; e < N; ++e) {
      const S x_hat = standardized(t, dz[e], x[e], known, 0);
      dweight[e] = mul_add(x_hat, dz[e], dweight[e]), dbias[e] += dz[e];
    }
  }
};

}  // namespace normkit::cuda
