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

/// What a thread has: a vector of n columns of the tile that starts at `step`, and in it every 16th step from `strand` on.
/// n = 0: nothing.
struct Strand {
  std::int64_t o, tile, column, step;
  int n, strand, steps;

  /// Its place j, j < steps.
  NORMKIT_DEVICE Place operator[](int j) const { return {o, step + strand + j * kStrands, 0, column, n}; }
};

/// That of slot `slot` in the block with index `block`.
template <class X> NORMKIT_DEVICE Strand strand_of(const Work& work, std::int64_t block, int slot) {
  const Geometry& g = work.task.geometry;
  const LanesTiling& tiling = work.policy.lanes;
  const std::int64_t row = quotient(block, tiling.slabs), slab = block - row * tiling.slabs;
  const std::int64_t index = row * tiling.abreast() + slot / tiling.slots;
  Strand s;
  s.o = quotient(index, tiling.tiles), s.tile = index - s.o * tiling.tiles;
  s.column = (slab * tiling.slots + slot % tiling.slots) * kVector<X>;
  s.step = s.tile * kTileSteps, s.strand = thread_index() / kSlots;
  const std::int64_t left = g.columns() - s.column, below = g.steps - s.step - s.strand;
  s.n = s.o >= g.outer || left <= 0 ? 0 : left < kVector<X> ? static_cast<int>(left) : kVector<X>;
  s.steps = below <= 0                      ? 0
            : below > kTileSteps - kStrands ? kStrandSteps
                                            : static_cast<int>((below + kStrands - 1) / kStrands);
  return s;
}

/// What is left when statistics are known goes backwards, since what was summed last is still in the cache.
NORMKIT_DEVICE std::int64_t own_block(const Work& work) {
  return work.stage == Stage::rest ? block_count() - 1 - block_index() : block_index();
}

/// Calls f(statistic, group) for the statistics of a block which has all of each, Policy::meeting threads to each.
template <class X, class F> NORMKIT_DEVICE void for_statistics(const Work& work, std::int64_t block, F f) {
  const Geometry& g = work.task.geometry;
  const LanesTiling& tiling = work.policy.lanes;
  const int size = work.policy.meeting, slab_columns = tiling.slots * kVector<X>;
  const std::int64_t row = quotient(block, tiling.slabs), first = (block - row * tiling.slabs) * slab_columns;
  const std::int64_t left = g.columns() - first, o = row * tiling.abreast();
  const std::int64_t lanes = quotient(left < slab_columns ? left : slab_columns, g.run);
  const std::int64_t outers = g.outer - o < tiling.abreast() ? g.outer - o : tiling.abreast();
  for (std::int64_t k = thread_index() / size; k < outers * lanes; k += block_threads() / size) {
    const std::int64_t down = quotient(k, lanes);
    f((o + down) * g.lanes + quotient(first, g.run) + (k - down * lanes), Group::of(size));
  }
}

inline constexpr int kPairs = kStrands / 2;

/// Joins what the strands of a block found, strand by strand: own() is what this thread has of its first column, then of its
/// second, and so on. Calls put(strand of the column's slot, column within it, value). All threads of the block come here, and
/// what was put is there for all of them afterwards.
template <class X, class T, class Own, class Join, class Put>
NORMKIT_DEVICE void join_strands(const Work& work, std::int64_t block, Own own, Join join, Put put) {
  constexpr int N = kVector<X>;
  const int thread = thread_index(), lane = thread % kWarp;
  T* const meeting = reinterpret_cast<T*>(shared_memory());
  NORMKIT_ROLL
  for (int e = 0; e < N; ++e) {
    const T v = own(), other = shuffle(v, lane ^ kSlots, ~0u);
    if (lane < kSlots) meeting[(thread / kWarp * kSlots + lane) * N + e] = join(v, other);
  }
  sync_block();
  NORMKIT_ROLL
  for (int column = thread; column < kSlots * N; column += block_threads()) {
    const Strand s = strand_of<X>(work, block, column / N);
    if (column % N >= s.n) continue;
    T all = meeting[column];
    NORMKIT_ROLL
    for (int pair = 1; pair < kPairs; ++pair) all = join(all, meeting[pair * kSlots * N + column]);
    put(s, column % N, all);
  }
  sync_block();  // shared memory may be written again
}

/// Where the partial result of a column of a tile belongs.
NORMKIT_DEVICE std::int64_t partial_index(const Work& work, const Strand& s, int e) {
  return (s.o * work.policy.lanes.tiles + s.tile) * work.task.geometry.columns() + s.column + e;
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
      p.i += e, p.n = 1;
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

/// What the columns of a strand are made with.
template <class X> NORMKIT_DEVICE Factors<ComputeOf<X>, kVector<X>> given_factors(const Work& work, const Strand& s) {
  const Task& t = work.task;
  const Geometry& g = t.geometry;
  Cycle given(s.o * g.columns() + s.column, g.run * t.given.stride, t.given.count);
  Cycle own(g.offset(s.o, 0, 0, s.column), g.params.stride, g.params.count);
  Factors<ComputeOf<X>, kVector<X>> factors;
  NORMKIT_UNROLL
  for (int e = 0; e < kVector<X>; ++e) {
    const std::int64_t parameter = s.o * g.params.outer + own.index;
    const double weight = work.constant ? element(t.weight, parameter, 1) : 1;
    const double bias = work.constant ? element(t.bias, parameter, 0) : 0;
    factors.set(e, given_at<ComputeOf<X>>(t, given.index), weight, bias);
    if (e + 1 < s.n) given.next(), own.next();
  }
  return factors;
}

/// Stage::all: statistics of one tile, then y. Stage::sums: the moments of every column of every tile. Stage::rest: y, with
/// given statistics.
template <class X> struct LanesForward {
  static constexpr const char* kName = "LanesForward";
  static constexpr int kBlocks = 2;
  Work work;

  NORMKIT_DEVICE void operator()() const {
    using S = ComputeOf<X>;
    const std::int64_t block = own_block(work);
    const Strand s = strand_of<X>(work, block, thread_index() % kSlots);
    if (work.stage != Stage::rest) sum(block, s);
    if (work.stage == Stage::all) {
      for_statistics<X>(work, block, [&](std::int64_t r, Group meeting) { finish_forward<S>(work, r, meeting); });
      sync_block();
    }
    if (work.stage == Stage::sums || work.task.phase == Phase::reduce || s.n == 0 || s.steps == 0) return;
    const Factors<S, kVector<X>> factors = given_factors<X>(work, s);
    NORMKIT_ROLL
    for (int j = 0; j < s.steps; ++j)
      write_y<X>(work, factors, s[j],
                 work.stage == Stage::all ? read_x<X>(work.task, s[j]) : form_x<X>(work.task, s[j]));
  }

 private:
  /// About the first member of each column. A strand is short: its sums need no more care than that.
  NORMKIT_DEVICE void sum(std::int64_t block, const Strand& s) const {
    using S = ComputeOf<X>;
    constexpr int N = kVector<X>;
    const Task& t = work.task;
    S pivot[N], sum[N], squares[N], n[N];
    NORMKIT_UNROLL
    for (int e = 0; e < N; ++e) pivot[e] = sum[e] = squares[e] = n[e] = 0;
    for (int j = 0; j < (s.n ? s.steps : 0); ++j) {
      const Vector<X> v = form_x<X>(t, s[j]);
      const unsigned members = members_of(t, s[j]);
      NORMKIT_UNROLL
      for (int e = 0; e < N; ++e) {
        const S x = value_of(v[e]);
        const bool member = members >> e & 1;
        if (t.centered && member && n[e] == 0) pivot[e] = x;
        const S d = member ? x - pivot[e] : S(0);
        sum[e] += d, squares[e] = mul_add(d, d, squares[e]);
        n[e] += member ? S(1) : S(0);
      }
    }
    int column = 0;
    const auto own = [&]() -> Moments {
      const double first = static_cast<double>(take(pivot)), all = static_cast<double>(take(sum)),
                   q = static_cast<double>(take(squares)), count = static_cast<double>(take(n));
      const int e = column++;
      if (count > 0 && !trustworthy<S>(all, q, count, t.centered)) return careful_strand<X>(t, s, e, first, count);
      return t.centered ? from_pivot(first, all, q, count) : Moments{0, q, count};
    };
    join_strands<X, Moments>(work, block, own, [](Moments a, Moments b) {
      return merge(a, b);
    }, [&](const Strand& of, int e, Moments m) { put(m, work.partials + 3 * partial_index(work, of, e)); });
  }
};

// ---- backward ----------------------------------------------------------------------------------------------------

/// Stage::all: sums of one tile, then dx. Stage::sums: those of every column of every tile. Stage::rest: dx, of statistics that
/// are solved.
template <class X> struct LanesBackward {
  static constexpr const char* kName = "LanesBackward";
  static constexpr int kBlocks = 1;
  Work work;

  NORMKIT_DEVICE void operator()() const {
    using S = ComputeOf<X>;
    constexpr int N = kVector<X>;
    const Task& t = work.task;
    const std::int64_t block = own_block(work);
    const Strand s = strand_of<X>(work, block, thread_index() % kSlots);
    const int steps = s.n ? s.steps : 0;
    Factors<S, N> given;
    if (steps) given = given_factors<X>(work, s);
    if (work.stage != Stage::rest) sum(block, s, given);
    if (work.stage == Stage::all) {
      for_statistics<X>(work, block, [&](std::int64_t r, Group meeting) { finish_backward<S>(work, r, meeting); });
      sync_block();
    }
    const bool wanted = t.phase != Phase::reduce && (t.dx.data || t.kind == ParamKind::element);
    if (work.stage == Stage::sums || !wanted || steps == 0) return;
    const Known<S, N> known = known_of(s);
    NORMKIT_ROLL
    for (int j = 0; j < steps; ++j)
      write_dx<X>(work, given, known, s[j], load(at<X>(t.x, s[j]), s.n), load(at<X>(t.dy, s[j]), s.n));
  }

 private:
  NORMKIT_DEVICE Known<ComputeOf<X>, kVector<X>> known_of(const Strand& s) const {
    const Geometry& g = work.task.geometry;
    Cycle statistic(s.o * g.columns() + s.column, g.run, g.statistics());
    Cycle own(g.offset(s.o, 0, 0, s.column), g.params.stride, g.params.count);
    Known<ComputeOf<X>, kVector<X>> known;
    NORMKIT_UNROLL
    for (int e = 0; e < kVector<X>; ++e) {
      const double weight = work.constant ? element(work.task.weight, s.o * g.params.outer + own.index, 1) : 1;
      known.set(e, solved_at(work, statistic.index), weight);
      if (e + 1 < s.n) statistic.next(), own.next();
    }
    return known;
  }

  NORMKIT_DEVICE void sum(std::int64_t block, const Strand& s, const Factors<ComputeOf<X>, kVector<X>>& given) const {
    using S = ComputeOf<X>;
    constexpr int N = kVector<X>;
    const Task& t = work.task;
    const bool gaps = has_gaps(t);
    Sums<S> sums[N];
    S n[N];
    NORMKIT_UNROLL
    for (int e = 0; e < N; ++e) sums[e] = {0, 0, 0}, n[e] = 0;
    for (int j = 0; j < (s.n ? s.steps : 0); ++j) {
      const Place p = s[j];
      S x[N], g[N], weight[N];
      widened(load(at<X>(t.x, p), p.n), x);
      widened(load(at<X>(t.dy, p), p.n), g);
      incoming(work, given, p, x, g, weight);
      const unsigned members = members_of(t, p);
      NORMKIT_UNROLL
      for (int e = 0; e < N; ++e) {
        const S d = x[e] - given.mean[e], weighted = g[e] * weight[e];
        const bool member = members >> e & 1;
        sums[e].g += weighted;
        sums[e].gx = mul_add(weighted, gaps && weighted == 0 ? S(0) : d, sums[e].gx);
        sums[e].d += member ? d : S(0);
        n[e] += member ? S(1) : S(0);
      }
    }
    const auto own = [&]() -> Reduced {
      const Sums<S> all = take(sums);
      return {{static_cast<double>(all.g), static_cast<double>(all.gx), static_cast<double>(all.d)},
              static_cast<double>(take(n))};
    };
    join_strands<X, Reduced>(work, block, own, [](Reduced a, Reduced b) {
      return a + b;
    }, [&](const Strand& of, int e, Reduced r) { put(r, work.partials + 4 * partial_index(work, of, e)); });
  }
};

}  // namespace normkit::cuda
