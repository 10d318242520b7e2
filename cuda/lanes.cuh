// The lanes traversal, forward and backward: a statistic is reduced across steps; its columns are neighbors in memory.
//
//     a tile = 256 steps = 16 strands of every 16th step       a block = 16 strands x up to 16 slots, a thread each
//     slot   = one vector of columns of one tile: neighbors of a row first, then, where few are taken, tiles
//
//     slot    0 1 2 .. 15  (memory: one row, 256 bytes)
//     step 0  strand 0
//     step 1  strand 1          each thread walks down its strand, 16 steps, with a set of sums for each of its columns;
//      ..                       strands merge by pairs in a warp, then in shared memory, always in the same order
//     step 16 strand 0
//
//     teams:  memory -> shared memory, past the registers -> sums of each tile, which stay in the shared memory of its block ->
//             each block solves some of the team's statistics, from what all of them found, and tells all -> y or dx from shared
//             memory, so that all is read once. A team is a block or the blocks of a cluster.
//     others: the sums of each tile in one launch; y or dx in another, when statistics are known (finish.cuh)
//
// The order in which strands merge does not depend on which columns and tiles share a block, so neither do the bits of
// a column.
#pragma once

#include "finish.cuh"

namespace normkit::cuda {

NORMKIT_DEVICE bool has_teams(const Work& work) { return work.stage == Stage::all; }
NORMKIT_DEVICE int blocks_of_team(const Work& work) {
  return kHasClusters && has_teams(work) ? work.policy.team.blocks : 1;
}

/// The part of x that a team has, or a block that is alone: rows of tiles, from `row` on, of the columns [first, first
/// + columns). The rows of a team begin with the first tile of an outer index. `rank` is this block's in its team.
struct Slab {
  std::int64_t row, first;
  int columns, rank;
};
template <class X> NORMKIT_DEVICE Slab slab_of(const Work& work, std::int64_t block) {
  const LanesTiling& tiling = work.policy.lanes;
  const std::int64_t team = quotient(block, blocks_of_team(work)), row = quotient(team, tiling.slabs);
  Slab slab;
  slab.rank = static_cast<int>(block - team * blocks_of_team(work)), slab.row = row * tiling.rows;
  slab.first = (team - row * tiling.slabs) * tiling.columns;
  const std::int64_t left = work.task.geometry.columns() - slab.first;
  slab.columns = static_cast<int>(left < tiling.columns ? left : tiling.columns);
  return slab;
}

/// The part of a tile that a thread has in a round: a vector of n columns, and in it every 16th step from `strand` on.
/// n = 0: none.
struct Strand {
  std::int64_t tile;
  Origin at;  // the first step of the tile, the first column of the vector
  int n, strand, steps;

  /// The j-th place of the strand, j < steps.
  NORMKIT_DEVICE Place operator[](int j) const { return {at, strand + j * kStrands, 0, n}; }
};

NORMKIT_DEVICE int own_slot(const Work& work) { return computed_anew(thread_index()) & (work.policy.lanes.width - 1); }

/// The strand that this thread has in slot `slot` of its block, in round `round`.
template <class X> NORMKIT_DEVICE Strand strand_of(const Work& work, const Slab& slab, int round, int slot) {
  const Geometry& g = work.task.geometry;
  const LanesTiling& tiling = work.policy.lanes;
  const int down = tiling.abreast == 1 ? 0 : divided(slot, tiling.slots);
  const int before = static_cast<int>(slab.first) & (kVector<X> - 1),  // of the columns of the first vector
      begin = (slot - down * tiling.slots) * kVector<X> - before, end = begin + kVector<X>;
  const int column = begin < 0 ? 0 : begin, n = (end < slab.columns ? end : slab.columns) - column;
  const std::int64_t row = (slab.rank * tiling.rounds + round) * tiling.abreast + down, index = slab.row + row;
  Strand s;
  s.at.o = quotient(index, tiling.tiles), s.tile = index - s.at.o * tiling.tiles;
  s.at.i = slab.first + column;
  s.at.step = s.tile * kTileSteps, s.strand = computed_anew(thread_index()) >> log2_of(tiling.width);
  const std::int64_t below = g.steps - s.at.step - s.strand;
  s.n = n <= 0 || down >= tiling.abreast || row >= tiling.rows || s.at.o >= g.outer ? 0 : n;
  s.steps = s.n == 0 || below <= 0          ? 0
            : below > kTileSteps - kStrands ? kStrandSteps
                                            : static_cast<int>((below + kStrands - 1) / kStrands);
  return s;
}

/// The place of this block in the order of work. Stage::rest goes backwards, since what was summed last is still in the
/// cache.
NORMKIT_DEVICE std::int64_t own_block(const Work& work) {
  const std::int64_t block = computed_anew(static_cast<int>(block_index()));
  return work.stage == Stage::rest ? block_count() - 1 - block : block;
}

/// The slab of this block. Where registers are few, it is quickly made again.
template <class X> NORMKIT_DEVICE Slab own_slab(const Work& work) { return slab_of<X>(work, own_block(work)); }
/// The strand of this thread in round `round`.
template <class X> NORMKIT_DEVICE Strand own_strand(const Work& work, int round) {
  return strand_of<X>(work, own_slab<X>(work), round, own_slot(work));
}

// ---- what is held ------------------------------------------------------------------------------------------------

/// Steps of a strand that arrive as one batch.
inline constexpr int kBatchSteps = 4;

NORMKIT_DEVICE bool holds(const Work& work) { return has_teams(work) && work.policy.lanes.holds; }

/// The slots for array `array` of a round: for all that this thread holds of it; or where nothing is held, for
/// kSlotsAhead vectors that pass by.
template <class X, int kSlotsAhead> NORMKIT_DEVICE Slots<X> held_of(const Work& work, int round, int array) {
  const LanesTiling& tiling = work.policy.lanes;
  const bool held = holds(work);
  return Slots<X>(shared_memory() + tiling.held_at, held ? round * work.policy.arrays() + array : array,
                  held ? tiling.steps : kSlotsAhead);
}

/// Where the places of a strand lie in an array, and whether all are whole vectors. If they are not, they go element by
/// element.
template <class X> struct Column {
  X* first;
  std::int64_t apart;
  int n;
  bool whole;

  NORMKIT_DEVICE Column(const Operand& a, const Strand& s)
      : first(at<X>(a, s[0])),
        apart(a.strides.step * kStrands),
        n(s.n),
        whole(n == kVector<X> && is_wide(first) && apart * static_cast<int>(sizeof(X)) % kVectorBytes == 0) {}
  NORMKIT_DEVICE X* operator[](int j) const { return first + j * apart; }
  NORMKIT_DEVICE void fetch(const Slots<X>& to, int slot, int j) const {
    if (whole) copy_aside<kVectorBytes>(to.address(slot), (*this)[j]);
    else fetch_elements(reinterpret_cast<X*>(to.address(slot)), (*this)[j], n);
  }
  template <class S> NORMKIT_DEVICE void put(int j, const S (&v)[kVector<X>]) const {
    const Vector<X> out = narrowed<X>(v);
    if (whole) store_words((*this)[j], out.word);
    else store_elements((*this)[j], out, n);
  }
};

/// Starts to bring everything that this thread holds: fetching(round, strand) returns a function that brings place j.
template <class X, class Fetching> NORMKIT_DEVICE void fetch_all(const Work& work, Fetching fetching) {
  const LanesTiling& tiling = work.policy.lanes;
  NORMKIT_ROLL
  for (int round = 0; round < tiling.rounds; ++round) {
    const Strand s = own_strand<X>(work, round);
    const auto fetch = fetching(round, s);
    NORMKIT_ROLL
    for (int j = 0; j < tiling.steps; ++j) {
      if (j < s.steps) fetch(j);
      if ((j + 1) % kBatchSteps == 0 || j + 1 == tiling.steps) end_batch();
    }
  }
}

/// Calls f(slot, j) for all steps of a strand, when their vector is there: it is held, or fetch(slot, j) has brought
/// it, as in streamed().
template <int kSlotsAhead, class Fetch, class F>
NORMKIT_DEVICE void for_steps(const Work& work, const Strand& s, int round, Fetch fetch, F f) {
  const LanesTiling& tiling = work.policy.lanes;
  const bool held = holds(work);
  NORMKIT_ROLL
  for (int j = held ? 0 : 1 - kSlotsAhead; j < s.steps; ++j) {
    if (held) {
      if (j % kBatchSteps == 0)
        wait_for_all_but((tiling.rounds - round) * ((tiling.steps + kBatchSteps - 1) / kBatchSteps) - 1 -
                         j / kBatchSteps);
    } else {
      const int ahead = j + kSlotsAhead - 1;
      if (ahead < s.steps) fetch(ahead % kSlotsAhead, ahead);
      end_batch();
      if (j < 0) continue;
      wait_for_batches<kSlotsAhead - 1>();
    }
    f(held ? j : j % kSlotsAhead, j);
  }
}

// ---- where columns meet ------------------------------------------------------------------------------------------

/// What strands found, in the shared memory of a block: moments or sums, of which the last is a count of 256 at most.
template <class T> struct Found {
  static constexpr int kDoubles = sizeof(T) / sizeof(double) - 1;
  std::uint16_t* count;
  double* value;

  NORMKIT_DEVICE Found(const Work& work, std::byte* memory)
      : count(reinterpret_cast<std::uint16_t*>(memory)),
        value(reinterpret_cast<double*>(memory + work.policy.lanes.found_at)) {}
  NORMKIT_DEVICE void put(int k, const T& v) const {
    double all[kDoubles + 1];
    __builtin_memcpy(all, &v, sizeof(T));
    NORMKIT_UNROLL
    for (int d = 0; d < kDoubles; ++d) value[k * kDoubles + d] = all[d];
    count[k] = static_cast<std::uint16_t>(all[kDoubles]);
  }
  NORMKIT_DEVICE T operator[](int k) const {
    double all[kDoubles + 1];
    NORMKIT_UNROLL
    for (int d = 0; d < kDoubles; ++d) all[d] = value[k * kDoubles + d];
    all[kDoubles] = count[k];
    T v;
    __builtin_memcpy(&v, all, sizeof(T));
    return v;
  }
};

/// Joins what the strands of a block found, strand by strand. own() returns what this thread has of its first column,
/// then of its second, and so on. Calls put(slot, column within the slot, index among what was found, value) for each
/// column. All threads of the block come here.
template <class X, class T, class Own, class Join, class Put>
NORMKIT_DEVICE void join_strands(const Work& work, int round, Own own, Join join, Put put) {
  constexpr int kOnce = joined_columns(kVector<X>), kMeetings = kVector<X> / kOnce;
  const int width = work.policy.lanes.width, columns = width * kOnce, thread = thread_index();
  const int shift = log2_of(width), pair = (thread >> shift) / 2;
  const Found<T> found(work, shared_memory());
  NORMKIT_ROLL
  for (int meeting = 0; meeting < kMeetings; ++meeting) {
    const int first = (has_teams(work) ? round * kMeetings + meeting : 0) * columns;
    sync_block();  // others may still read what lies there
    NORMKIT_ROLL
    for (int e = 0; e < kOnce; ++e) {
      const T v = own(), other = shuffle(v, thread % kWarp ^ width, ~0u);
      if ((thread & width) == 0) found.put(first + pair * columns + own_slot(work) * kOnce + e, join(v, other));
    }
    sync_block();
    if (thread >= columns) continue;
    T all = found[first + thread];
    NORMKIT_ROLL
    for (int k = 1; k < kStrands / 2; ++k) all = join(all, found[first + k * columns + thread]);
    put(thread / kOnce, meeting * kOnce + thread % kOnce, first + thread, all);
  }
}

/// What the blocks of a team found of column `column` of its slab in its row `row`. All blocks of the team have met
/// since they wrote it.
template <class X, class T> NORMKIT_DEVICE T found_of(const Work& work, const Slab& slab, int row, int column) {
  constexpr int N = kVector<X>, kOnce = joined_columns(N), kMeetings = N / kOnce;
  const LanesTiling& tiling = work.policy.lanes;
  const int all = divided(row, tiling.abreast), down = row - all * tiling.abreast;
  const int rank = divided(all, tiling.rounds), round = all - rank * tiling.rounds;
  const int before = static_cast<int>(slab.first) & (N - 1), vector = (column + before) / N;
  const int slot = down * tiling.slots + vector, e = vector == 0 ? column : (column + before) % N;
  const int meeting = round * kMeetings + e / kOnce;
  std::byte* const memory = blocks_of_team(work) == 1 ? shared_memory() : peer_memory(rank);
  return Found<T>(work, memory)[(meeting * tiling.width + slot) * kOnce + e % kOnce];
}

/// What is known of one of a team's statistics, as a K. Each block of the team has a copy in its shared memory.
template <class K> NORMKIT_DEVICE K known_in_team(const Work& work, std::int64_t place) {
  return reinterpret_cast<const K*>(shared_memory() + work.policy.lanes.known_at)[place];
}

/// Goes through the columns of a strand, and gives the place of each one's statistic for known_in_team().
template <class X> NORMKIT_DEVICE Cycle columns_in_team(const Work& work, const Slab& slab, const Strand& s) {
  const std::int64_t outer = s.at.o - quotient(slab.row, work.policy.lanes.tiles);
  return Cycle(outer * slab.columns + (s.at.i - slab.first), work.task.geometry.run, kAllBytes);
}

/// Calls f(place, o, lane, meeting) for the statistics of a team that fall to this thread: each goes to Policy::meeting threads of
/// one block.
template <class F> NORMKIT_DEVICE void for_statistics(const Work& work, const Slab& slab, F f) {
  const Geometry& g = work.task.geometry;
  const LanesTiling& tiling = work.policy.lanes;
  const int blocks = blocks_of_team(work), shift = log2_of(work.policy.meeting);
  const int lanes = divided(slab.columns, static_cast<int>(g.run));
  const std::int64_t o = quotient(slab.row, tiling.tiles), first = quotient(slab.first, g.run), left = g.outer - o;
  const int outers = divided(static_cast<int>(tiling.rows), static_cast<int>(tiling.tiles));
  const int statistics = (left < outers ? static_cast<int>(left) : outers) * lanes;
  NORMKIT_ROLL
  for (int k = slab.rank + blocks * (thread_index() >> shift); k < statistics;
       k += blocks * (block_threads() >> shift)) {
    const int outer = divided(k, lanes);
    f(k, o + outer, first + (k - outer * lanes), Group::of(work.policy.meeting));
  }
}

/// Has each statistic of a team solved by one of its blocks, which tells all blocks: solve(r, meeting, found) makes a K
/// of what the tiles found, found(unit, tile). All threads of the team come here.
template <class X, class T, class K, class Solve>
NORMKIT_DEVICE void solve_team(const Work& work, Solve solve) {
  const Slab slab = own_slab<X>(work);
  const int blocks = blocks_of_team(work);
  meet_team(blocks);
  for_statistics(work, slab, [&](int place, std::int64_t o, std::int64_t lane, Group meeting) {
    const std::int64_t tiles = work.policy.lanes.tiles;
    const int row = static_cast<int>(o * tiles - slab.row),
              column = static_cast<int>(lane * work.task.geometry.run - slab.first);
    const K known = solve(o * work.task.geometry.lanes + lane, meeting, [&](std::int64_t unit, std::int64_t tile) {
      return found_of<X, T>(work, slab, row + static_cast<int>(tile), column + static_cast<int>(unit));
    });
    tell(meeting, 0, blocks, work.policy.lanes.known_at + place * static_cast<int>(sizeof(K)), known);
  });
  meet_team(blocks);  // no block leaves before all have read what it found
}

/// The index of the partial result of column e of a strand's tile.
NORMKIT_DEVICE std::int64_t partial_index(const Work& work, const Strand& s, int e) {
  return (s.at.o * work.policy.lanes.tiles + s.tile) * work.task.geometry.columns() + s.at.i + e;
}

// ---- forward -----------------------------------------------------------------------------------------------------

/// The moments of one column of a strand, taken again in double and in two passes, about a member of it.
template <class X>
NORMKIT_DEVICE Moments<double> careful_strand(const Task& t, const Strand& s, int e, double first, double n) {
  double pivot = t.centered ? first : 0;
  NORMKIT_ROLL
  for (int pass = 0;; ++pass) {
    double sum = 0, squares = 0;
    NORMKIT_ROLL
    for (int j = 0; j < s.steps; ++j) {
      Place p = s[j];
      p.i = e, p.n = 1;
      if (!members_of(t, p)) continue;
      const double d = static_cast<double>(value_of(read_x<X>(t, p)[0])) - pivot;
      sum += d, squares = mul_add(d, d, squares);
    }
    if (!t.centered) return moments_of<double>(0, 0, squares, n);
    const Moments<double> m = from_pivot<double>(pivot, sum, squares, n);
    if (pass == 1) return m;
    pivot = m.mean;
  }
}

/// The parameters of the columns of a strand. A reader takes the first, which moves behind the others, and so goes once
/// round.
template <class S, int N> struct ColumnParameters {
  S weight[N], bias[N];

  NORMKIT_DEVICE static ColumnParameters of(const Work& work, const Strand& s) {
    ColumnParameters own;
    if (work.constant) {
      Place p = s[0];
      p.row = 0, p.tile.phase = phase_of(work.task.geometry, p.tile);
      read_parameters(work, p, true, own.weight, own.bias);
    } else {
      NORMKIT_UNROLL
      for (int e = 0; e < N; ++e) own.weight[e] = 1, own.bias[e] = 0;
    }
    return own;
  }
};

/// What the columns of a strand are made with, whose statistics are statistic_at(k) for the numbers that `statistic` goes through.
template <class X, class At>
NORMKIT_DEVICE Factors<ComputeOf<X>, kVector<X>> factors_of(const Strand& s, Cycle statistic,
                                                            const ColumnParameters<ComputeOf<X>, kVector<X>>& own,
                                                            At statistic_at) {
  Factors<ComputeOf<X>, kVector<X>> factors;  // parameters first, then in the place of each what it becomes
  NORMKIT_UNROLL
  for (int e = 0; e < kVector<X>; ++e)
    factors.mean[e] = 0, factors.scale[e] = own.weight[e], factors.shift[e] = own.bias[e];
  NORMKIT_ROLL
  for (int e = 0; e < kVector<X>; ++e) {
    factors.append(statistic_at(statistic.index), factors.scale[0], factors.shift[0]);
    if (e + 1 < s.n) statistic.next();
  }
  return factors;
}
NORMKIT_DEVICE Cycle given_columns(const Work& work, const Strand& s) {
  const Geometry& g = work.task.geometry;
  const Given& given = work.task.given;
  return Cycle(s.at.o * g.columns() + s.at.i, g.run * given.stride, given.count);
}

/// Stage::all: statistics, then y. Stage::sums: the moments of every column of every tile. Stage::rest: y, with given statistics.
/// kSpecial: what special_of() says.
template <class X, Special kSpecial> struct LanesForward {
  static constexpr const char* kName = "LanesForward";
  static constexpr int kBlocks = kSpecial != Special::none ? sizeof(X) == 2 ? 1 : 2 : sizeof(X) == 4 ? 3 : 2;
  Work given;

  NORMKIT_DEVICE void operator()() const {
    using S = ComputeOf<X>;
    const Work work = known_as<kSpecial>(given);
    const Task& t = work.task;
    if (holds(work))
      fetch_all<X>(work, [&](int round, const Strand& s) {
        const Slots<X> x = held_of<X, kSingleSlots>(work, round, 0);
        return [&work, s, x, from = Column<X>(t.x, s)](int j) {
          if (work.forms_x) x[j] = form_x<X>(work.task, s[j]);
          else from.fetch(x, j, j);
        };
      });
    const int rounds = work.policy.lanes.rounds;
    if (work.stage != Stage::rest) {
      NORMKIT_ROLL
      for (int round = 0; round < rounds; ++round) sum(work, round);
    }
    if (work.stage == Stage::sums) return;
    if (has_teams(work))
      solve_team<X, Moments<S>, Statistic<S>>(work, [&](std::int64_t r, Group meeting, auto found) {
        const Finished<S> s = finish_forward<S>(work, r, meeting, found);
        return statistic_of(s.moments, s.rstd);
      });
    if (t.phase == Phase::reduce) return;
    NORMKIT_ROLL
    for (int round = 0; round < rounds; ++round) {
      Strand s = own_strand<X>(work, round);
      if (s.steps == 0) continue;
      if (!work.constant) s.at.phase = phase_of(t.geometry, s.at);
      const auto own = ColumnParameters<S, kVector<X>>::of(work, s);
      const Cycle columns = has_teams(work) ? columns_in_team<X>(work, own_slab<X>(work), s) : given_columns(work, s);
      const Factors<S, kVector<X>> factors = factors_of<X>(s, columns, own, [&](std::int64_t k) {
        return has_teams(work) ? known_in_team<Statistic<S>>(work, k) : given_at<S>(t, k);
      });
      const Column<X> to(t.y, s);
      for_x(work, s, round, work.stage == Stage::rest, [&](const Place& p, int j, const Vector<X>& v) {
        S y[kVector<X>];
        Piece<S> none;  // parameters that vary do so from column to column
        make_y<X>(work, factors, p, none, v, y);
        if (like_x<X>(t)) to.put(j, y);
        else store(at<S>(t.y, p), y, s.n);
      });
    }
  }

 private:
  /// Calls f(place, j, x) for the places of a strand. `forms`: an x that is not held is still to be formed from a sum.
  template <class F>
  NORMKIT_DEVICE static void for_x(const Work& work, const Strand& s, int round, bool forms, F f) {
    const Task& t = work.task;
    const Slots<X> x = held_of<X, kSingleSlots>(work, round, 0);
    const Column<X> from(t.x, s);
    for_steps<kSingleSlots>(work, s, round, [&](int slot, int j) {
      if (!work.forms_x) from.fetch(x, slot, j);
    }, [&](int slot, int j) {
      const Place p = s[j];
      const Vector<X> v = !work.forms_x || holds(work) ? x[slot] : forms ? form_x<X>(t, p) : read_x<X>(t, p);
      f(p, j, v);
    });
  }

  /// Sums about the first member of each column. A strand is short: its sums need no more care than that.
  NORMKIT_DEVICE static void sum(const Work& work, int round) {
    using S = ComputeOf<X>;
    constexpr int N = kVector<X>;
    const Task& t = work.task;
    const Strand s = own_strand<X>(work, round);
    const bool masked = t.where.data;
    Vector<X> pivot = zeros<X>();
    S sum[N], squares[N], n[N];
    NORMKIT_UNROLL
    for (int e = 0; e < N; ++e) sum[e] = squares[e] = n[e] = 0;
    for_x(work, s, round, true, [&](const Place& p, int, const Vector<X>& v) {
      const unsigned members = members_of(t, p);
      if (t.centered && !masked && p.row == s.strand) pivot = v;
      NORMKIT_UNROLL
      for (int e = 0; e < N; ++e) {
        const bool member = !masked || (members >> e & 1) != 0;
        if (t.centered && masked && member && n[e] == 0) pivot.put(e, v[e]);
        const S d = member ? value_of(v[e]) - value_of(pivot[e]) : S(0);
        sum[e] += d, squares[e] = mul_add(d, d, squares[e]);
        if (masked) n[e] += member ? S(1) : S(0);
      }
    });
    int column = 0;
    const auto own = [&]() -> Moments<S> {
      const double first = static_cast<double>(value_of(pivot.take())), all = static_cast<double>(take(sum)),
                   q = static_cast<double>(take(squares)), some = static_cast<double>(take(n));
      const double count = masked ? some : s.steps;
      const int e = column++;
      if (count > 0 && e < s.n && !trustworthy<S>(t.centered ? all : 0, q, count))
        return moments_of<S>(careful_strand<X>(t, own_strand<X>(work, round), e, first, count));
      return t.centered ? from_pivot<S>(first, all, q, count) : moments_of<S>(0, 0, q, count);
    };
    join_strands<X, Moments<S>>(work, round, own, [](Moments<S> a, Moments<S> b) { return merged(a, b); },
                                [&](int slot, int e, int place, const Moments<S>& m) {
      if (has_teams(work)) return Found<Moments<S>>(work, shared_memory()).put(place, m);
      const Strand of = strand_of<X>(work, own_slab<X>(work), round, slot);
      if (e < of.n) put_moments(m, work.partials + kMomentDoubles<S> * partial_index(work, of, e));
    });
  }
};

// ---- backward ----------------------------------------------------------------------------------------------------

/// Stage::all: sums, then dx. Stage::sums: the sums of every column of every tile. Stage::rest: dx, of statistics that
/// are solved. kSpecial: what special_of() says.
template <class X, Special kSpecial> struct LanesBackward {
  static constexpr const char* kName = "LanesBackward";
  static constexpr int kBlocks = kSpecial == Special::none ? 2 : 1;
  Work given;

  NORMKIT_DEVICE void operator()() const {
    using S = ComputeOf<X>;
    constexpr int N = kVector<X>;
    const Work work = known_as<kSpecial>(given);
    const Task& t = work.task;
    if (holds(work))
      fetch_all<X>(work, [&](int round, const Strand& s) {
        const Slots<X> x = held_of<X, kPairSlots>(work, round, 0), dy = held_of<X, kPairSlots>(work, round, 1);
        return [x, dy, x_from = Column<X>(t.x, s), dy_from = Column<X>(t.dy, s)](int j) {
          x_from.fetch(x, j, j), dy_from.fetch(dy, j, j);
        };
      });
    const int rounds = work.policy.lanes.rounds;
    const bool wanted = t.phase != Phase::reduce && (t.dx.data || work.elementwise);
    NORMKIT_ROLL
    for (int pass = work.stage == Stage::rest ? 1 : 0; pass < 2; ++pass) {  // the sums, then dx
      if (pass == 1) {
        if (work.stage == Stage::sums) return;
        if (has_teams(work)) solve_all(work);
        if (!wanted) return;
      }
      NORMKIT_ROLL
      for (int round = 0; round < rounds; ++round) {
        Strand s = own_strand<X>(work, round);
        if (!work.constant && s.steps) s.at.phase = phase_of(t.geometry, s.at);
        ColumnParameters<S, N> own;
        Factors<S, N> given;
        if (s.steps) own = ColumnParameters<S, N>::of(work, s);
        if (s.steps && (pass == 0 || t.activation.kind != ActivationKind::none))
          given = factors_of<X>(s, given_columns(work, s), own, [&](std::int64_t k) { return given_at<S>(t, k); });
        if (pass == 0) sum(work, s, round, given);
        else if (s.steps) put_dx(work, s, round, given, own);
      }
    }
  }

 private:
  /// Calls f(place, j, x, dy) for the places of a strand.
  template <class F> NORMKIT_DEVICE static void for_pairs(const Work& work, const Strand& s, int round, F f) {
    const Slots<X> x = held_of<X, kPairSlots>(work, round, 0), dy = held_of<X, kPairSlots>(work, round, 1);
    const Column<X> x_from(work.task.x, s), dy_from(work.task.dy, s);
    for_steps<kPairSlots>(work, s, round, [&](int slot, int j) {
      x_from.fetch(x, slot, j), dy_from.fetch(dy, slot, j);
    }, [&](int slot, int j) {
      const Vector<X> vx = x[slot], vdy = dy[slot];
      f(s[j], j, vx, vdy);
    });
  }

  NORMKIT_DEVICE static void solve_all(const Work& work) {
    solve_team<X, Reduced, Solved<ComputeOf<X>>>(work, [&](std::int64_t r, Group meeting, auto found) {
      return finish_backward<ComputeOf<X>>(work, r, meeting, found);
    });
  }

  NORMKIT_DEVICE static void put_dx(const Work& work, const Strand& s, int round,
                                    const Factors<ComputeOf<X>, kVector<X>>& given,
                                    const ColumnParameters<ComputeOf<X>, kVector<X>>& own) {
    using S = ComputeOf<X>;
    constexpr int N = kVector<X>;
    const Known<S, N> known = known_of(work, s, own);
    const Column<X> to(work.task.dx, s);
    for_pairs(work, s, round, [&](const Place& p, int j, const Vector<X>& x, const Vector<X>& dy) {
      S dx[N];
      make_dx<X>(work, known, p, Incoming<S, N>(work, given, p, x, dy), dx);
      if (work.task.dx.data) to.put(j, dx);
    });
  }

  NORMKIT_DEVICE static Known<ComputeOf<X>, kVector<X>> known_of(
      const Work& work, const Strand& s, const ColumnParameters<ComputeOf<X>, kVector<X>>& own) {
    using S = ComputeOf<X>;
    const Geometry& g = work.task.geometry;
    Cycle statistic = has_teams(work) ? columns_in_team<X>(work, own_slab<X>(work), s)
                                      : Cycle(s.at.o * g.columns() + s.at.i, g.run, g.statistics());
    Known<ComputeOf<X>, kVector<X>> known;  // a begins as the weight
    NORMKIT_UNROLL
    for (int e = 0; e < kVector<X>; ++e)
      known.a[e] = own.weight[e], known.mean[e] = known.b[e] = known.c[e] = known.unit[e] = known.origin[e] = 0;
    NORMKIT_ROLL
    for (int e = 0; e < kVector<X>; ++e) {
      known.append(
          has_teams(work) ? known_in_team<Solved<S>>(work, statistic.index) : solved_at<S>(work, statistic.index),
          known.a[0]);
      if (e + 1 < s.n) statistic.next();
    }
    return known;
  }

  NORMKIT_DEVICE static void sum(const Work& work, const Strand& s, int round,
                                 const Factors<ComputeOf<X>, kVector<X>>& given) {
    using S = ComputeOf<X>;
    constexpr int N = kVector<X>;
    const Task& t = work.task;
    const bool gaps = has_gaps(t), masked = t.where.data;
    Sums<S> sums[N];
    S n[N];
    NORMKIT_UNROLL
    for (int e = 0; e < N; ++e) sums[e] = {0, 0, 0}, n[e] = 0;
    for_pairs(work, s, round, [&](const Place& p, int, const Vector<X>& x, const Vector<X>& dy) {
      const Incoming<S, N> in(work, given, p, x, dy);
      const unsigned members = members_of(t, p);
      NORMKIT_UNROLL
      for (int e = 0; e < N; ++e) {
        const bool member = !masked || (members >> e & 1) != 0;
        add(sums[e], in, e, given.mean[e], gaps, member);
        if (masked) n[e] += member ? S(1) : S(0);
      }
    });
    join_strands<X, Reduced>(work, round, [&]() -> Reduced {
      const double some = static_cast<double>(take(n));
      return reduced(take(sums), masked ? some : s.steps);
    }, [](Reduced a, Reduced b) { return a + b; }, [&](int slot, int e, int place, Reduced r) {
      if (has_teams(work)) return Found<Reduced>(work, shared_memory()).put(place, r);
      const Strand of = strand_of<X>(work, own_slab<X>(work), round, slot);
      if (e < of.n) put(r, work.partials + 4 * partial_index(work, of, e));
    });
  }
};

}  // namespace normkit::cuda
