// The runs traversal, forward and backward: a statistic is reduced along its contiguous runs.
//
//     statistic = steps x run elements = tiles; a tile = rows x width elements = vectors, which the threads of a group take
//     in turn:  thread 0 1 2 .. G-1 0 1 2 ..
//
//     teams:  memory -> shared memory, where each thread keeps its own vectors -> sums of each tile -> the statistic -> y or
//             dx from shared memory, so that all is read once. A team is a group with one tile, or the blocks of a cluster,
//             which tell each other what their tiles found.
//     others: the sums of each tile in one launch; y or dx in another, when statistics are known (finish.cuh)
#pragma once

#include "finish.cuh"

namespace normkit::cuda {

/// Rows [step, step + rows) and elements [begin, begin + width) of each, of unit `unit` of the whole task. Tiles have a
/// number, unit by unit.
struct Tile {
  std::int64_t index, unit, o, lane, step, begin;
  int rows, width, vectors;  // vectors of a row
};

template <class X> NORMKIT_DEVICE Tile tile_at(const Work& work, std::int64_t index) {
  const Geometry& g = work.task.geometry;
  const Policy& policy = work.policy;
  const Tiling& tiling = policy.runs;
  Tile t;
  t.index = index, t.unit = quotient(index, tiling.tiles);
  const std::int64_t within = index - t.unit * tiling.tiles, r = quotient(t.unit, policy.units);
  t.o = quotient(r, g.lanes), t.lane = r - t.o * g.lanes;
  t.begin = (t.unit - r * policy.units) * policy.unit_run;
  if (tiling.per_run == 1) {
    t.step = within * tiling.rows;
    t.rows = g.steps - t.step < tiling.rows ? static_cast<int>(g.steps - t.step) : tiling.rows;
    t.width = tiling.width;
  } else {
    t.step = quotient(within, tiling.per_run);
    const std::int64_t part = (within - t.step * tiling.per_run) * tiling.width, left = policy.unit_run - part;
    t.rows = 1, t.width = left < tiling.width ? static_cast<int>(left) : tiling.width;
    t.begin += part;
  }
  t.vectors = (t.width + kVector<X> - 1) / kVector<X>;
  return t;
}

template <class X> NORMKIT_DEVICE Place place_of(const Tile& t, int vector) {
  const int row = t.rows == 1 ? 0 : vector / t.vectors, first = (vector - row * t.vectors) * kVector<X>;
  const int left = t.width - first;
  return {t.o, t.step + row, t.lane, t.begin + first, left < kVector<X> ? left : kVector<X>};
}

/// Calls f(k, place) for this thread's vectors of a tile, k = 0, 1, ...
template <class X, class F> NORMKIT_DEVICE void for_own(const Tile& t, Group group, F f) {
  NORMKIT_ROLL
  for (int k = 0, v = group.rank; v < t.rows * t.vectors; ++k, v += group.size) f(k, place_of<X>(t, v));
}

/// The tiles of a group: `count` from `first` on, all of one unit, whose tile number `place` the first is.
struct Turn {
  std::int64_t first;
  int count, place;
};

/// What falls to this group. What is left when statistics are known goes backwards, since what was summed last is still in the
/// cache.
NORMKIT_DEVICE Turn own_turn(const Work& work, Group group) {
  const Policy& policy = work.policy;
  const std::int64_t tiles = policy.runs.tiles, all = work.task.geometry.statistics() * policy.units * tiles;
  const int cluster = kHasClusters ? work.cluster() : 1;
  if (cluster > 1) {
    const int place = cluster_rank() * policy.team.tiles, left = static_cast<int>(tiles) - place;
    return {quotient(block_index(), cluster) * tiles + place, left < policy.team.tiles ? left : policy.team.tiles,
            place};
  }
  const std::int64_t k = own_item(group.size);
  if (k >= all) return {0, 0, 0};
  return {work.stage == Stage::rest ? all - 1 - k : k, 1, 0};
}

// ---- forward -----------------------------------------------------------------------------------------------------

inline constexpr int kInFlight = 4;  // vectors that a thread has on their way at a time

/// The vectors of a tile in shared memory, in the place with number `place` of those that its group has there. Every thread
/// reads only what it has put there itself: no barrier.
template <class X> struct Held {
  Vector<X>* first;
  int stride;

  NORMKIT_DEVICE Held(const Work& work, Group group, int place) : stride(group.size) {
    const int number = place * (block_threads() / group.size) + thread_index() / group.size;
    const int vectors = work.policy.runs.held(kVector<X>) * group.size;
    first = reinterpret_cast<Vector<X>*>(shared_memory() + kHeadBytes) + number * vectors + group.rank;
  }
  NORMKIT_DEVICE Vector<X>& operator[](int k) const { return first[k * stride]; }

  NORMKIT_DEVICE void read(const Work& work, const Tile& tile, Group group) const {
    const Task& task = work.task;
    const int vectors = tile.rows * tile.vectors;
    if (work.forms_x) {
      for_own<X>(tile, group, [&](int k, Place p) { (*this)[k] = form_x<X>(task, p); });
      return;
    }
    for (int k = 0, v = group.rank; v < vectors; k += kInFlight, v += kInFlight * stride) {
      Vector<X> x[kInFlight];
      NORMKIT_UNROLL
      for (int j = 0; j < kInFlight; ++j) {
        const Place p = place_of<X>(tile, v + j * stride);
        if (v + j * stride < vectors) x[j] = load(at<X>(task.x, p), p.n);
      }
      NORMKIT_UNROLL
      for (int j = 0; j < kInFlight; ++j)
        if (v + j * stride < vectors) (*this)[k + j] = x[j];
    }
  }
};

struct PivotSums { double sum, squares; };
NORMKIT_DEVICE PivotSums operator+(PivotSums a, PivotSums b) { return {a.sum + b.sum, a.squares + b.squares}; }

/// A member of a tile: the first of the thread that has one and comes first; and how many members there are.
struct FirstMember { double value, n; };

/// A tile that is held, as far as its moments are concerned.
template <class X> struct HeldTile {
  const Task& task;
  const Tile& tile;
  Group group;
  Held<X> held;

  /// Calls f(v, is a member) for this thread's elements: fast, or in little code.
  template <class F> NORMKIT_DEVICE void for_elements(F f) const {
    for_own<X>(tile, group, [&](int k, Place p) {
      const Vector<X> v = held[k];
      const unsigned members = members_of(task, p);
      NORMKIT_UNROLL
      for (int e = 0; e < kVector<X>; ++e) f(value_of(v[e]), (members >> e & 1) != 0);
    });
  }
  template <class F> NORMKIT_DEVICE void for_elements_in_turn(F f) const {
    for_own<X>(tile, group, [&](int k, Place p) {
      const unsigned members = members_of(task, p);
      NORMKIT_ROLL
      for (int e = 0; e < p.n; ++e)
        f(value_of(at<X>(reinterpret_cast<const std::byte*>(&held[k]), 0)[e]), (members >> e & 1) != 0);
    });
  }

  NORMKIT_DEVICE FirstMember first_member() const {
    if (!task.where.data) {
      const double first = group.rank == 0 ? static_cast<double>(value_of(held[0][0])) : 0;
      return {from_first(group, first), static_cast<double>(tile.rows) * tile.width};
    }
    FirstMember own{0, 0};
    for_elements_in_turn([&](ComputeOf<X> v, bool member) {
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
    for_elements([&](S v, bool member) {
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
      PivotSums own{0, 0};
      double others = 0;
      for_elements_in_turn([&](ComputeOf<X> v, bool member) {
        const double d = member ? static_cast<double>(v) - pivot : 0;
        own = {own.sum + d, mul_add(d, d, own.squares)};
        others += member && !(static_cast<double>(v) == first.value);
      });
      const PivotSums sums = all_sum(group, own);
      if (!centered) return {0, sums.squares, first.n};
      if (all_sum(group, others) == 0) return {first.value, 0, first.n};
      const Moments m = from_pivot(pivot, sums.sum, sums.squares, first.n);
      if (pass == 1) return m;
      pivot = m.mean;
    }
  }

  NORMKIT_DEVICE Moments moments() const {
    using S = ComputeOf<X>;
    const FirstMember first = first_member();
    const S pivot = task.centered ? static_cast<S>(first.value) : S(0);
    if (first.n == 0) return {0, 0, 0};
    const PivotSums sums = sums_about(pivot);
    if (!trustworthy<S>(sums.sum, sums.squares, first.n, task.centered)) return careful_moments(first, task.centered);
    if (!task.centered) return {0, sums.squares, first.n};
    return from_pivot(static_cast<double>(pivot), sums.sum, sums.squares, first.n);
  }
};

/// Stage::all: statistics, then y. Stage::sums: the moments of every tile. Stage::rest: y, with given statistics.
/// kPlain: as is_plain() says.
template <class X, bool kPlain> struct RunsForward {
  static constexpr const char* kName = "RunsForward";
  static constexpr int kBlocks = kPlain ? 3 : 2;
  Work given;

  NORMKIT_DEVICE void operator()() const {
    using S = ComputeOf<X>;
    const Work work = kPlain ? made_plain(given) : given;
    const Task& t = work.task;
    const int cluster = kHasClusters ? work.cluster() : 1;
    const Group group = Group::of(work.policy.runs.group);
    const Turn turn = own_turn(work, group);
    if (turn.count == 0) return;
    if (cluster > 1) arrive_at_cluster();  // this block runs
    Tile tile;
    for (int k = 0; k < turn.count; ++k) {
      tile = tile_at<X>(work, turn.first + k);
      Held<X>(work, group, k).read(work, tile, group);
    }
    if (NORMKIT_PLANTED(early_return) && group.rank >= tile.rows * tile.vectors % group.size) return;
    Moments m;
    for (int k = 0; k < turn.count && work.stage != Stage::rest; ++k) {
      tile = tile_at<X>(work, turn.first + k);
      m = HeldTile<X>{t, tile, group, Held<X>(work, group, k)}.moments();
      if (cluster == 1) continue;
      if (k == 0 && !NORMKIT_PLANTED(early_post)) wait_for_cluster();
      Board<Moments>::post(group, cluster, turn.place + k, m);
    }
    if (work.stage == Stage::sums) {
      if (group.rank == 0) put(m, work.partials + 3 * tile.index);
      return;
    }
    const bool leads = group.rank == 0 && turn.place == 0;
    Statistic<S> s;
    if (work.stage == Stage::rest) {
      s = given_statistic<S>(t, tile.unit);
    } else {
      if (cluster > 1) m = meet(work);
      if (leads) publish<S>(t, tile.unit, m);
      s = statistic_of<S>(m.mean, rstd_of(m, t.eps));
    }
    if (t.phase == Phase::reduce) return;
    const std::int64_t first = parameter(t.geometry, tile.o, t.geometry.offset(tile.o, 0, tile.lane, 0));
    Factors<S, kVector<X>> factors;
    if (work.constant) factors.set_all(s, element(t.weight, first, 1), element(t.bias, first, 0));
    else factors.set_all(s, 1, 0);
    for (int k = 0; k < turn.count; ++k) {
      tile = tile_at<X>(work, turn.first + k);
      const Held<X> held(work, group, k);
      for_own<X>(tile, group, [&](int v, Place p) { write_y<X>(work, factors, p, held[v]); });
    }
  }

 private:
  /// The moments of all tiles of the team.
  NORMKIT_DEVICE static Moments meet(const Work& work) {
    if (!NORMKIT_PLANTED(missing_cluster_barrier)) arrive_at_cluster(), wait_for_cluster();
    return joined<Moments>(Group::of(work.policy.meeting), work.policy.runs.tiles, [](std::int64_t k) {
      return Board<Moments>::read(static_cast<int>(k));
    }, [](Moments a, Moments b) { return merge(a, b); });
  }
};

// ---- backward ----------------------------------------------------------------------------------------------------

/// What z of a tile was made with; the first element of a tile has its unit's parameter.
template <class X> NORMKIT_DEVICE Factors<ComputeOf<X>, kVector<X>> given_factors(const Work& work, const Tile& tile) {
  const Task& t = work.task;
  const std::int64_t r = quotient(tile.unit, work.policy.units);
  const std::int64_t first = parameter(t.geometry, tile.o, t.geometry.offset(tile.o, tile.step, tile.lane, tile.begin));
  Factors<ComputeOf<X>, kVector<X>> factors;
  const Statistic<ComputeOf<X>> s = given_statistic<ComputeOf<X>>(t, r);
  if (work.constant) factors.set_all(s, element(t.weight, first, 1), element(t.bias, first, 0));
  else factors.set_all(s, 1, 0);
  return factors;
}

/// Stage::all: sums about the given mean, without the weight where it is constant, then dx. Stage::sums: those of every tile.
/// Stage::rest: dx, of statistics that are solved, or that need no sums.
template <class X> struct RunsBackward {
  static constexpr const char* kName = "RunsBackward";
  static constexpr int kBlocks = 2;
  Work work;

  NORMKIT_DEVICE void operator()() const {
    using S = ComputeOf<X>;
    const Task& t = work.task;
    const int cluster = kHasClusters ? work.cluster() : 1;
    const Group group = Group::of(work.policy.runs.group);
    const Turn turn = own_turn(work, group);
    if (turn.count == 0) return;
    if (cluster > 1) arrive_at_cluster();  // as in forward
    const Tile tile = tile_at<X>(work, turn.first);
    const std::int64_t r = quotient(tile.unit, work.policy.units);
    const Factors<S, kVector<X>> given = given_factors<X>(work, tile);
    const Held<X> x(work, group, 0), dy(work, group, 1);
    Reduced sums;
    if (work.stage != Stage::rest) {
      sums = sums_of(tile, group, given, x, dy);
      if (work.stage == Stage::sums) {
        if (group.rank == 0) put(sums, work.partials + 4 * tile.index);
        return;
      }
      if (cluster > 1) {
        wait_for_cluster();
        Board<Reduced>::post(group, cluster, turn.place, sums);
        arrive_at_cluster();
        wait_for_cluster();
      }
    }
    Solved solved;
    if (work.stage == Stage::rest && work.summed) {
      solved = solved_at(work, r);
    } else {
      const bool leads = group.rank == 0 && tile.index == r * work.policy.units * work.policy.runs.tiles;
      solved = solve<S>(work, r, Group::of(work.policy.meeting), leads, [&](std::int64_t, std::int64_t k) {
        return cluster > 1 ? Board<Reduced>::read(static_cast<int>(k)) : sums;
      });
    }
    if (t.phase == Phase::reduce || (!t.dx.data && t.kind != ParamKind::element)) return;
    const std::int64_t first =
        parameter(t.geometry, tile.o, t.geometry.offset(tile.o, tile.step, tile.lane, tile.begin));
    Known<S, kVector<X>> known;
    known.set_all(solved, work.constant ? element(t.weight, first, 1) : 1);
    for_own<X>(tile, group, [&](int k, Place p) {
      const bool held = work.stage == Stage::all;
      write_dx<X>(work, given, known, p, held ? x[k] : load(at<X>(t.x, p), p.n),
                  held ? dy[k] : load(at<X>(t.dy, p), p.n));
    });
  }

 private:
  /// The sums of a tile, which in Stage::all is held from then on.
  NORMKIT_DEVICE Reduced sums_of(const Tile& tile, Group group, const Factors<ComputeOf<X>, kVector<X>>& given,
                                 const Held<X>& held_x, const Held<X>& held_dy) const {
    using S = ComputeOf<X>;
    constexpr int N = kVector<X>;
    const Task& t = work.task;
    const bool gaps = has_gaps(t);
    Sums<S> sums{0, 0, 0};
    int count = 0;
    for_own<X>(tile, group, [&](int k, Place p) {
      const Vector<X> vx = load(at<X>(t.x, p), p.n), vdy = load(at<X>(t.dy, p), p.n);
      if (work.stage == Stage::all) held_x[k] = vx, held_dy[k] = vdy;
      S x[N], g[N], weight[N];
      widened(vx, x);
      widened(vdy, g);
      incoming(work, given, p, x, g, weight);
      const unsigned members = members_of(t, p);
      NORMKIT_UNROLL
      for (int e = 0; e < N; ++e) {
        if (e >= p.n) continue;
        const S d = x[e] - given.mean[e], weighted = g[e] * weight[e];
        const bool member = members >> e & 1;
        sums.g += weighted;
        sums.gx = mul_add(weighted, gaps && weighted == 0 ? S(0) : d, sums.gx);
        sums.d += member ? d : S(0);
        count += member;
      }
    });
    return all_sum(group,
                   Reduced{{static_cast<double>(sums.g), static_cast<double>(sums.gx), static_cast<double>(sums.d)},
                           static_cast<double>(count)});
  }
};

/// ParamKind::row: sums of dz * x_hat and of dz over 64 rows at a time, for each element of a run.
///
///     thread = one vector of elements of the runs of one group of rows, which it walks down
template <class X> struct RowGradients {
  static constexpr const char* kName = "RowGradients";
  static constexpr int kBlocks = 2;
  Work work;

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
    S dweight[N], dbias[N];
    NORMKIT_UNROLL
    for (int e = 0; e < N; ++e) dweight[e] = dbias[e] = 0;
    for (std::int64_t lane = row; lane < g.lanes && lane < row + kRowGroup; ++lane)
      add_row({o, 0, lane, i, n}, dweight, dbias);
    double* const out = t.dparams + 2 * (group * g.run + i);
    NORMKIT_UNROLL
    for (int e = 0; e < N; ++e)
      if (e < n) out[2 * e] = static_cast<double>(dweight[e]), out[2 * e + 1] = static_cast<double>(dbias[e]);
  }

 private:
  template <class S, int N> NORMKIT_DEVICE void add_row(Place p, S (&dweight)[N], S (&dbias)[N]) const {
    const Task& t = work.task;
    const std::int64_t r = p.o * t.geometry.lanes + p.lane;
    Known<S, 1> known;
    known.set(0, solved_at(work, r), 1);
    Factors<S, N> given;
    given.set_all(given_statistic<S>(t, r), 1, 0);
    S x[N], dz[N], weight[N];
    widened(load(at<X>(t.x, p), p.n), x);
    widened(load(at<X>(t.dy, p), p.n), dz);
    incoming(work, given, p, x, dz, weight);
    NORMKIT_UNROLL
    for (int e = 0; e < N; ++e) {
      const S x_hat = standardized(t, dz[e], x[e], known.mean[0], known.unit[0], known.origin[0]);
      dweight[e] = mul_add(x_hat, dz[e], dweight[e]), dbias[e] += dz[e];
    }
  }
};

}  // namespace normkit::cuda
