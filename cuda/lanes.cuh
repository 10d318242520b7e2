// The lanes traversal, forward and backward: a statistic is reduced across steps; its columns are neighbors in memory.
//
//     a tile = 256 steps = 16 strands of every 16th step       a block = 16 strands x 16 slots = 256 threads
//     slot   = one vector of columns of one tile: neighbors of a row first, then, where rows are short, tiles
//
//     slot    0 1 2 .. 15  (memory: one row, 256 bytes)
//     step 0  strand 0
//     step 1  strand 1          each thread walks down its strand, 16 steps, with a set of sums for each of its columns;
//      ..                       strands merge by pairs in a warp, then in shared memory, always in the same order
//     step 16 strand 0
//
// Which columns share a block is left out of that order, so a column's bits do not depend on its neighbors.
#pragma once

#include "finish.cuh"

namespace normkit::cuda {

/// What a thread has: a vector of n columns of a tile, and in it every 16th step from `strand` on. n = 0: nothing.
struct Strand {
  std::int64_t tile;
  Origin at;  // the first step of the tile, the first column of the vector
  int n, strand, steps;

  /// Its place j, j < steps.
  NORMKIT_DEVICE Place operator[](int j) const { return {at, strand + j * kStrands, 0, n}; }
};

/// That of slot `slot` in the block with index `block`.
template <class X> NORMKIT_DEVICE Strand strand_of(const Work& work, std::int64_t block, int slot) {
  const Geometry& g = work.task.geometry;
  const LanesTiling& tiling = work.policy.lanes;
  const std::int64_t row = quotient(block, tiling.slabs), slab = block - row * tiling.slabs;
  const std::int64_t index = row * tiling.abreast() + slot / tiling.slots;
  Strand s;
  s.at.o = quotient(index, tiling.tiles), s.tile = index - s.at.o * tiling.tiles;
  const std::int64_t first = slab * tiling.columns, before = first % kVector<X>,
                     begin = first - before + slot % tiling.slots * kVector<X>;
  s.at.i = begin < first ? first : begin;
  s.at.step = s.tile * kTileSteps, s.strand = thread_index() / kSlots;
  std::int64_t end = first + tiling.columns < g.columns() ? first + tiling.columns : g.columns();
  if (end > begin + kVector<X>) end = begin + kVector<X>;
  const std::int64_t below = g.steps - s.at.step - s.strand;
  s.n = s.at.o >= g.outer || end <= s.at.i ? 0 : static_cast<int>(end - s.at.i);
  s.steps = s.n == 0 || below <= 0          ? 0
            : below > kTileSteps - kStrands ? kStrandSteps
                                            : static_cast<int>((below + kStrands - 1) / kStrands);
  return s;
}

/// The place of the first column of a strand among those of its block, slot by slot.
template <class X> NORMKIT_DEVICE int place_in_block(const Strand& s, int slot) {
  return slot * kVector<X> + static_cast<int>(s.at.i) % kVector<X>;
}

/// What is left when statistics are known goes backwards, since what was summed last is still in the cache.
NORMKIT_DEVICE std::int64_t own_block(const Work& work) {
  return work.stage == Stage::rest ? block_count() - 1 - block_index() : block_index();
}

/// What a block that has all of its statistics keeps in shared memory, where nobody streams meanwhile: what each of its columns
/// found, then statistics, each in the place of its first column.
template <class T> NORMKIT_DEVICE T* found_in_block() { return reinterpret_cast<T*>(shared_memory()); }
template <class X> NORMKIT_DEVICE Solved* solved_in_block() {
  static_assert(sizeof(Moments) <= sizeof(Reduced) &&
                kSlots * kVector<X> * int{sizeof(Reduced) + sizeof(Solved)} <= kStreamBytes);
  return reinterpret_cast<Solved*>(shared_memory() + kSlots * kVector<X> * sizeof(Reduced));
}

/// Calls f(statistic, the place of its first column, group) for the statistics of a block which has all of each,
/// Policy::meeting threads to each.
template <class X, class F> NORMKIT_DEVICE void for_statistics(const Work& work, std::int64_t block, F f) {
  const Geometry& g = work.task.geometry;
  const LanesTiling& tiling = work.policy.lanes;
  const int size = work.policy.meeting;
  const std::int64_t row = quotient(block, tiling.slabs), first = (block - row * tiling.slabs) * tiling.columns;
  const std::int64_t left = g.columns() - first, o = row * tiling.abreast();
  const std::int64_t lanes = quotient(left < tiling.columns ? left : tiling.columns, g.run);
  const std::int64_t outers = g.outer - o < tiling.abreast() ? g.outer - o : tiling.abreast();
  for (std::int64_t k = thread_index() / size; k < outers * lanes; k += block_threads() / size) {
    const std::int64_t down = quotient(k, lanes);
    const std::int64_t lane = k - down * lanes;
    const std::int64_t place = down * tiling.slots * kVector<X> + first % kVector<X> + lane * g.run;
    f((o + down) * g.lanes + quotient(first, g.run) + lane, static_cast<int>(place), Group::of(size));
  }
}

/// The statistics of the columns of a thread's strand, one column after the other, in a block that has solved them.
template <class X> struct OwnSolved {
  int place, within, run;  // of the statistic; column of it; columns that it has

  NORMKIT_DEVICE OwnSolved(const Work& work, const Strand& s) : run(static_cast<int>(work.task.geometry.run)) {
    within = static_cast<int>(remainder(s.at.i, run));
    place = place_in_block<X>(s, thread_index() % kSlots) - within;
  }
  NORMKIT_DEVICE const Solved& operator*() const { return solved_in_block<X>()[place]; }
  NORMKIT_DEVICE void next() {
    if (++within < run) return;
    place += run, within = 0;
  }
};

inline constexpr int kPairs = kStrands / 2;

/// Joins what the strands of a block found, strand by strand: own() is what this thread has of its first column, then of its
/// second, and so on. Calls put(strand of the column's slot, column within it, value), or where the block has all of its statistics,
/// keeps the value. All threads of the block come here, and what was put or kept is there for all of them afterwards.
template <class X, class T, class Own, class Join, class Put>
NORMKIT_DEVICE void join_strands(const Work& work, std::int64_t block, const Strand& mine, Own own, Join join,
                                 Put put) {
  constexpr int N = kVector<X>;
  const int thread = thread_index(), lane = thread % kWarp, first = place_in_block<X>(mine, thread % kSlots);
  T* const meeting = found_in_block<T>();
  sync_block();  // others may still read what they had fetched there
  NORMKIT_ROLL
  for (int e = 0; e < N; ++e) {
    const T v = own(), other = shuffle(v, lane ^ kSlots, ~0u);
    if (lane < kSlots && e < mine.n) meeting[thread / kWarp * kSlots * N + first + e] = join(v, other);
  }
  sync_block();
  NORMKIT_ROLL
  for (int place = thread; place < kSlots * N; place += block_threads()) {
    const Strand s = strand_of<X>(work, block, place / N);
    const int e = place - place_in_block<X>(s, place / N);
    if (e < 0 || e >= s.n) continue;
    T all = meeting[place];
    NORMKIT_ROLL
    for (int pair = 1; pair < kPairs; ++pair) all = join(all, meeting[pair * kSlots * N + place]);
    if (work.stage == Stage::all) meeting[place] = all;
    else put(s, e, all);
  }
  sync_block();  // shared memory may be written again
}

/// Where the partial result of a column of a tile belongs.
NORMKIT_DEVICE std::int64_t partial_index(const Work& work, const Strand& s, int e) {
  return (s.at.o * work.policy.lanes.tiles + s.tile) * work.task.geometry.columns() + s.at.i + e;
}

// ---- forward -----------------------------------------------------------------------------------------------------

/// One column of a strand again, in double and in two passes, about a member of it.
template <class X>
NORMKIT_DEVICE Moments careful_strand(const Task& t, const Strand& s, int e, double first, double n) {
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
    if (!t.centered) return {0, squares, n};
    const Moments m = from_pivot(pivot, sum, squares, n);
    if (pass == 1) return m;
    pivot = m.mean;
  }
}

/// The parameters of the columns of a strand. Who reads them turns them once round.
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

/// What the columns of a strand are made with: of statistics that are given, or that the block has found.
template <class X>
NORMKIT_DEVICE Factors<ComputeOf<X>, kVector<X>> factors_of(const Work& work, const Strand& s,
                                                            ColumnParameters<ComputeOf<X>, kVector<X>>& own,
                                                            bool found) {
  using S = ComputeOf<X>;
  const Task& t = work.task;
  const Geometry& g = t.geometry;
  Cycle given(s.at.o * g.columns() + s.at.i, g.run * t.given.stride, t.given.count);
  OwnSolved<X> solved(work, s);
  Factors<S, kVector<X>> factors;
  NORMKIT_ROLL
  for (int e = 0; e < kVector<X>; ++e) {
    const Statistic<S> statistic =
        found ? statistic_of<S>((*solved).mean, (*solved).rstd) : given_at<S>(t, given.index);
    factors.append(statistic, turn(own.weight), turn(own.bias));
    if (e + 1 < s.n) given.next(), solved.next();
  }
  return factors;
}

/// Stage::all: statistics of one tile, then y. Stage::sums: the moments of every column of every tile. Stage::rest: y, with
/// given statistics. kSpecial: what special_of() says.
template <class X, Special kSpecial> struct LanesForward {
  static constexpr const char* kName = "LanesForward";
  static constexpr int kBlocks = kSpecial == Special::none && sizeof(X) == 4 ? 3 : 2;
  Work given;

  NORMKIT_DEVICE void operator()() const {
    using S = ComputeOf<X>;
    const Work work = known_as<kSpecial>(given);
    const std::int64_t block = own_block(work);
    Strand s = strand_of<X>(work, block, thread_index() % kSlots);
    if (work.stage != Stage::rest) sum(work, block, s);
    const bool all = work.stage == Stage::all;
    if (all) {
      for_statistics<X>(work, block, [&](std::int64_t r, int place, Group meeting) {
        const Solved solved = finish_forward<S>(
            work, r, meeting, [&](std::int64_t unit, std::int64_t) { return found_in_block<Moments>()[place + unit]; });
        if (meeting.rank == 0) solved_in_block<X>()[place] = solved;
      });
      sync_block();
    }
    if (work.stage == Stage::sums || work.task.phase == Phase::reduce) return;
    Factors<S, kVector<X>> factors;
    if (s.steps) {
      if (!work.constant) s.at.phase = phase_of(work.task.geometry, s.at);
      auto own = ColumnParameters<S, kVector<X>>::of(work, s);
      factors = factors_of<X>(work, s, own, all);
    }
    if (all) sync_block();  // before anybody streams again
    if (s.steps == 0) return;
    Piece<S> piece;
    for_x(work, s, work.stage == Stage::rest, [&](const Place& p, const Vector<X>& v) {
      S y[kVector<X>];
      make_y<X>(work, factors, p, piece, v, y);
      store_y<X>(work, p, y);
    });
  }

 private:
  /// Calls f(place, x). `forms`: x is still to be made of a sum.
  template <class F> NORMKIT_DEVICE static void for_x(const Work& work, const Strand& s, bool forms, F f) {
    const Task& t = work.task;
    const Slots<X> x(shared_memory(), 0, kSingleSlots);
    streamed<kSingleSlots>(s.steps, [&](int slot, int j) {
      if (!work.forms_x) x.fetch(slot, at<X>(t.x, s[j]), s.n);
    }, [&](int slot, int j) {
      const Place p = s[j];
      f(p, !work.forms_x ? x[slot] : forms ? form_x<X>(t, p) : read_x<X>(t, p));
    });
  }

  /// About the first member of each column. A strand is short: its sums need no more care than that.
  NORMKIT_DEVICE static void sum(const Work& work, std::int64_t block, const Strand& s) {
    using S = ComputeOf<X>;
    constexpr int N = kVector<X>;
    const Task& t = work.task;
    const bool masked = t.where.data;
    S pivot[N], sum[N], squares[N], n[N];
    NORMKIT_UNROLL
    for (int e = 0; e < N; ++e) pivot[e] = sum[e] = squares[e] = n[e] = 0;
    for_x(work, s, true, [&](const Place& p, const Vector<X>& v) {
      const unsigned members = members_of(t, p);
      const bool begins = p.row == s.strand;
      NORMKIT_UNROLL
      for (int e = 0; e < N; ++e) {
        const S x = value_of(v[e]);
        const bool member = !masked || (members >> e & 1) != 0;
        if (t.centered && (masked ? member && n[e] == 0 : begins)) pivot[e] = x;
        const S d = member ? x - pivot[e] : S(0);
        sum[e] += d, squares[e] = mul_add(d, d, squares[e]);
        if (masked) n[e] += member ? S(1) : S(0);
      }
    });
    int column = 0;
    const auto own = [&]() -> Moments {
      const double first = static_cast<double>(take(pivot)), all = static_cast<double>(take(sum)),
                   q = static_cast<double>(take(squares)), some = static_cast<double>(take(n));
      const double count = masked ? some : s.steps;
      const int e = column++;
      if (count > 0 && e < s.n && !trustworthy<S>(t.centered ? all : 0, q, count))
        return careful_strand<X>(t, s, e, first, count);
      return t.centered ? from_pivot(first, all, q, count) : Moments{0, q, count};
    };
    join_strands<X, Moments>(work, block, s, own, [](Moments a, Moments b) {
      return merge(a, b);
    }, [&](const Strand& of, int e, Moments m) { put(m, work.partials + 3 * partial_index(work, of, e)); });
  }
};

// ---- backward ----------------------------------------------------------------------------------------------------

/// Stage::all: sums of one tile, then dx. Stage::sums: those of every column of every tile. Stage::rest: dx, of statistics that
/// are solved. kSpecial: what special_of() says.
template <class X, Special kSpecial> struct LanesBackward {
  static constexpr const char* kName = "LanesBackward";
  static constexpr int kBlocks = kSpecial == Special::none ? 2 : 1;
  Work given_work;

  NORMKIT_DEVICE void operator()() const {
    using S = ComputeOf<X>;
    constexpr int N = kVector<X>;
    const Work work = known_as<kSpecial>(given_work);
    const Task& t = work.task;
    const std::int64_t block = own_block(work);
    Strand s = strand_of<X>(work, block, thread_index() % kSlots);
    if (!work.constant && s.steps) s.at.phase = phase_of(t.geometry, s.at);
    ColumnParameters<S, N> own;
    Factors<S, N> given;
    if (s.steps) own = ColumnParameters<S, N>::of(work, s), given = factors_of<X>(work, s, own, false);
    if (work.stage != Stage::rest) sum(work, block, s, given);
    const bool all = work.stage == Stage::all;
    if (all) {
      for_statistics<X>(work, block, [&](std::int64_t r, int place, Group meeting) {
        const Solved solved = finish_backward<S>(
            work, r, meeting, [&](std::int64_t unit, std::int64_t) { return found_in_block<Reduced>()[place + unit]; });
        if (meeting.rank == 0) solved_in_block<X>()[place] = solved;
      });
      sync_block();
    }
    const bool wanted = t.phase != Phase::reduce && (t.dx.data || work.elementwise);
    if (work.stage == Stage::sums || !wanted) return;
    Known<S, N> known;
    if (s.steps) known = known_of(work, s, own);
    if (all) sync_block();  // before anybody streams again
    if (s.steps == 0) return;
    for_pairs(work, s, [&](const Place& p, const Vector<X>& x, const Vector<X>& dy) {
      S dx[N];
      make_dx<X>(work, known, p, Incoming<S, N>(work, given, p, x, dy), dx);
      if (t.dx.data) store(at<X>(t.dx, p), dx, p.n);
    });
  }

 private:
  /// Calls f(place, x, dy).
  template <class F> NORMKIT_DEVICE static void for_pairs(const Work& work, const Strand& s, F f) {
    const Slots<X> x(shared_memory(), 0, kPairSlots), dy(shared_memory(), 1, kPairSlots);
    streamed<kPairSlots>(s.steps, [&](int slot, int j) {
      x.fetch(slot, at<X>(work.task.x, s[j]), s.n), dy.fetch(slot, at<X>(work.task.dy, s[j]), s.n);
    }, [&](int slot, int j) { f(s[j], x[slot], dy[slot]); });
  }

  NORMKIT_DEVICE static Known<ComputeOf<X>, kVector<X>> known_of(const Work& work, const Strand& s,
                                                                 ColumnParameters<ComputeOf<X>, kVector<X>>& own) {
    const Geometry& g = work.task.geometry;
    Cycle statistic(s.at.o * g.columns() + s.at.i, g.run, g.statistics());
    OwnSolved<X> own_solved(work, s);
    Known<ComputeOf<X>, kVector<X>> known;
    NORMKIT_ROLL
    for (int e = 0; e < kVector<X>; ++e) {
      known.append(work.stage == Stage::all ? *own_solved : solved_at(work, statistic.index), turn(own.weight));
      if (e + 1 < s.n) statistic.next(), own_solved.next();
    }
    return known;
  }

  NORMKIT_DEVICE static void sum(const Work& work, std::int64_t block, const Strand& s,
                                 const Factors<ComputeOf<X>, kVector<X>>& given) {
    using S = ComputeOf<X>;
    constexpr int N = kVector<X>;
    const Task& t = work.task;
    const bool gaps = has_gaps(t), masked = t.where.data;
    Sums<S> sums[N];
    S n[N];
    NORMKIT_UNROLL
    for (int e = 0; e < N; ++e) sums[e] = {0, 0, 0}, n[e] = 0;
    for_pairs(work, s, [&](const Place& p, const Vector<X>& x, const Vector<X>& dy) {
      const Incoming<S, N> in(work, given, p, x, dy);
      const unsigned members = members_of(t, p);
      NORMKIT_UNROLL
      for (int e = 0; e < N; ++e) {
        const bool member = !masked || (members >> e & 1) != 0;
        add(sums[e], in, e, given.mean[e], gaps, member);
        if (masked) n[e] += member ? S(1) : S(0);
      }
    });
    join_strands<X, Reduced>(work, block, s, [&]() -> Reduced {
      const double some = static_cast<double>(take(n));
      return reduced(take(sums), masked ? some : s.steps);
    }, [](Reduced a, Reduced b) { return a + b; }, [&](const Strand& of, int e, Reduced r) {
      put(r, work.partials + 4 * partial_index(work, of, e));
    });
  }
};

}  // namespace normkit::cuda
