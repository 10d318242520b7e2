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

#include "elements.cuh"

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
  const LanesTiling& tiling = work.lanes;
  const std::int64_t row = quotient(block, tiling.slabs), slab = block - row * tiling.slabs;
  const std::int64_t index = row * (kSlots / tiling.slots) + slot / tiling.slots;
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

constexpr std::int64_t lanes_blocks(const Work& work) {
  return ceil_div(work.task.geometry.outer * work.lanes.tiles, kSlots / work.lanes.slots) * work.lanes.slabs;
}

/// Calls f(block) for this block and those that it takes over from the ones that were not launched.
template <class F> NORMKIT_DEVICE void for_blocks(const Work& work, F f) {
  const std::int64_t blocks = lanes_blocks(work);
  for (std::int64_t b = block_index(); b < blocks; b += block_count()) f(b);
}

inline constexpr int kPairs = kStrands / 2;

/// Bytes of shared memory in which pairs of strands meet: a value of T for each column of each.
template <class X, class T> constexpr int kMeetingBytes = kPairs * kSlots * kVector<X> * static_cast<int>(sizeof(T));

/// Joins what the strands of a block found for their columns, strand by strand, and calls put(strand of the column's slot,
/// column within it, value). All threads of the block come here.
template <class X, class T, class Join, class Put>
NORMKIT_DEVICE void join_strands(const Work& work, std::int64_t block, const T (&own)[kVector<X>], Join join, Put put) {
  constexpr int N = kVector<X>;
  const int thread = thread_index(), lane = thread % kWarp;
  T* const meeting = reinterpret_cast<T*>(shared_memory());
  NORMKIT_UNROLL
  for (int e = 0; e < N; ++e) {
    const T other = shuffle(own[e], lane ^ kSlots, ~0u);
    if (lane < kSlots) meeting[(thread / kWarp * kSlots + lane) * N + e] = join(own[e], other);
  }
  sync_block();
  for (int column = thread; column < kSlots * N; column += block_threads()) {
    const Strand s = strand_of<X>(work, block, column / N);
    if (column % N >= s.n) continue;
    T all = meeting[column];
    for (int pair = 1; pair < kPairs; ++pair) all = join(all, meeting[pair * kSlots * N + column]);
    put(s, column % N, all);
  }
  sync_block();  // shared memory may be written again
}

/// Where the partial result of a column of a tile belongs.
NORMKIT_DEVICE std::int64_t partial_index(const Work& work, const Strand& s, int e) {
  return (s.o * work.lanes.tiles + s.tile) * work.task.geometry.columns() + s.column + e;
}

// ---- forward -----------------------------------------------------------------------------------------------------

/// One column of a strand again, in double and in two passes, about a member of it.
template <class X>
NORMKIT_DEVICE Moments careful_strand(const Task& t, const Strand& s, int e, double first, double n) {
  const auto sums_about = [&](double pivot) {
    double sum = 0, squares = 0;
    for (int j = 0; j < s.steps; ++j) {
      Place p = s[j];
      p.i += e, p.n = 1;
      if (!members_of(t, p)) continue;
      const double d = static_cast<double>(value_of(*at<X>(t.x, p))) - pivot;
      sum += d, squares = mul_add(d, d, squares);
    }
    return from_pivot(pivot, sum, squares, n);
  };
  if (!t.centered) {
    const Moments m = sums_about(0);
    return {0, mul_add(m.mean * m.mean, n, m.m2), n};
  }
  return sums_about(sums_about(first).mean);
}

/// The moments of every column of every tile.
template <class X> struct LanesSums {
  static constexpr const char* kName = "LanesSums";
  static constexpr int kBlocks = kVector<X> < 8 ? 2 : 1;
  Work work;

  NORMKIT_DEVICE void operator()() const {
    for_blocks(work, [&](std::int64_t block) {
      Moments own[kVector<X>];
      strand_moments(strand_of<X>(work, block, thread_index() % kSlots), own);
      join_strands<X>(work, block, own, [](Moments a, Moments b) {
        return merge(a, b);
      }, [&](const Strand& s, int e, Moments m) { put(m, work.partials + 3 * partial_index(work, s, e)); });
    });
  }

 private:
  /// About the first member of each column. A strand is short: its sums need no more care than that.
  NORMKIT_DEVICE void strand_moments(const Strand& s, Moments (&own)[kVector<X>]) const {
    using S = ComputeOf<X>;
    constexpr int N = kVector<X>;
    const Task& t = work.task;
    S pivot[N], sum[N], squares[N], n[N];
    NORMKIT_UNROLL
    for (int e = 0; e < N; ++e) pivot[e] = sum[e] = squares[e] = n[e] = 0;
    for (int j = 0; j < (s.n ? s.steps : 0); ++j) {
      const Vector<X> v = read_x<X>(t, s[j]);
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
    unsigned doubtful = 0;
    NORMKIT_UNROLL
    for (int e = 0; e < N; ++e) {
      const double all = static_cast<double>(sum[e]), q = static_cast<double>(squares[e]),
                   count = static_cast<double>(n[e]);
      own[e] = t.centered ? from_pivot(static_cast<double>(pivot[e]), all, q, count) : Moments{0, q, count};
      if (e < s.n && count > 0 && !trustworthy<S>(all, q, count, t.centered)) doubtful |= 1u << e;
    }
    NORMKIT_UNROLL
    for (int e = 0; e < N; ++e)
      if (doubtful >> e & 1)
        own[e] = careful_strand<X>(t, s, e, static_cast<double>(pivot[e]), static_cast<double>(n[e]));
  }
};

/// What the columns of a strand are made with.
template <class X> NORMKIT_DEVICE Factors<ComputeOf<X>, kVector<X>> given_factors(const Work& work, const Strand& s) {
  const Task& t = work.task;
  const Geometry& g = t.geometry;
  Factors<ComputeOf<X>, kVector<X>> factors;
  NORMKIT_UNROLL
  for (int e = 0; e < kVector<X>; ++e) {
    const std::int64_t column = s.column + (e < s.n ? e : 0);
    const Statistic<ComputeOf<X>> known = given_statistic<ComputeOf<X>>(t, s.o * g.lanes + quotient(column, g.run));
    const std::int64_t own = parameter(g, s.o, g.offset(s.o, 0, 0, column));
    factors.set(e, known, work.constant ? element(t.weight, own, 1) : 1, work.constant ? element(t.bias, own, 0) : 0);
  }
  return factors;
}

template <class X, class Y> struct LanesApply {
  static constexpr const char* kName = "LanesApply";
  static constexpr int kBlocks = 2;
  Work work;

  NORMKIT_DEVICE void operator()() const {
    for_blocks(work, [&](std::int64_t block) {
      const Strand s = strand_of<X>(work, block, thread_index() % kSlots);
      if (s.n == 0 || s.steps == 0) return;
      const Factors<ComputeOf<X>, kVector<X>> factors = given_factors<X>(work, s);
      NORMKIT_ROLL
      for (int j = 0; j < s.steps; ++j) write_y<X, Y>(work, factors, s[j], read_x<X>(work.task, s[j]));
    });
  }
};

// ---- backward ----------------------------------------------------------------------------------------------------

template <class X> struct LanesBackwardSums {
  static constexpr const char* kName = "LanesBackwardSums";
  static constexpr int kBlocks = 1;
  Work work;

  NORMKIT_DEVICE void operator()() const {
    for_blocks(work, [&](std::int64_t block) {
      Reduced own[kVector<X>];
      strand_sums(strand_of<X>(work, block, thread_index() % kSlots), own);
      join_strands<X>(work, block, own, [](Reduced a, Reduced b) {
        return a + b;
      }, [&](const Strand& s, int e, Reduced r) { put(r, work.partials + 4 * partial_index(work, s, e)); });
    });
  }

 private:
  NORMKIT_DEVICE void strand_sums(const Strand& s, Reduced (&own)[kVector<X>]) const {
    using S = ComputeOf<X>;
    constexpr int N = kVector<X>;
    const Task& t = work.task;
    const bool gaps = has_gaps(t);
    Sums<S> sums[N];
    S n[N];
    NORMKIT_UNROLL
    for (int e = 0; e < N; ++e) sums[e] = {0, 0, 0}, n[e] = 0;
    const int steps = s.n ? s.steps : 0;
    Factors<S, N> factors;
    if (steps) factors = given_factors<X>(work, s);
    for (int j = 0; j < steps; ++j) {
      const Place p = s[j];
      S x[N], g[N], weight[N];
      widened(load(at<X>(t.x, p), p.n), x);
      widened(load(at<X>(t.dy, p), p.n), g);
      incoming(work, factors, p, x, g, weight);
      const unsigned members = members_of(t, p);
      NORMKIT_UNROLL
      for (int e = 0; e < N; ++e) {
        const S d = x[e] - factors.mean[e], weighted = g[e] * weight[e];
        const bool member = members >> e & 1;
        sums[e].g += weighted;
        sums[e].gx = mul_add(weighted, gaps && weighted == 0 ? S(0) : d, sums[e].gx);
        sums[e].d += member ? d : S(0);
        n[e] += member ? S(1) : S(0);
      }
    }
    NORMKIT_UNROLL
    for (int e = 0; e < N; ++e)
      own[e] = {{static_cast<double>(sums[e].g), static_cast<double>(sums[e].gx), static_cast<double>(sums[e].d)},
                static_cast<double>(n[e])};
  }
};

template <class X> struct LanesBackwardApply {
  static constexpr const char* kName = "LanesBackwardApply";
  static constexpr int kBlocks = 1;
  Work work;

  NORMKIT_DEVICE void operator()() const {
    using S = ComputeOf<X>;
    constexpr int N = kVector<X>;
    for_blocks(work, [&](std::int64_t block) {
      const Strand s = strand_of<X>(work, block, thread_index() % kSlots);
      if (s.n == 0 || s.steps == 0) return;
      const Task& t = work.task;
      const Geometry& g = t.geometry;
      const Factors<S, N> given = given_factors<X>(work, s);
      Known<S, N> known;
      NORMKIT_UNROLL
      for (int e = 0; e < N; ++e) {
        const std::int64_t column = s.column + (e < s.n ? e : 0);
        const std::int64_t own = parameter(g, s.o, g.offset(s.o, 0, 0, column));
        known.set(e, work, s.o * g.lanes + quotient(column, g.run), work.constant ? element(t.weight, own, 1) : 1);
      }
      NORMKIT_ROLL
      for (int j = 0; j < s.steps; ++j) write_dx<X>(work, given, known, s[j]);
    });
  }
};

}  // namespace normkit::cuda
