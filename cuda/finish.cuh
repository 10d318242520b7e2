// Small kernels on small arrays, which make statistics, gradients of parameters and running statistics of what tiles
// found. A few threads or a warp take a statistic, a channel or a parameter: they take its partial results in turn,
// then merge as a tree.
#pragma once

#include "elements.cuh"

namespace normkit::cuda {

inline Grid grid_for_items(std::int64_t items, int size) {
  return {ceil_div(items, kBlockThreads / size), kBlockThreads, 0, 1};
}

/// Where the partial result of tile `tile` of unit `unit` of statistic r lies: unit by unit (runs), or a row of columns for
/// each tile (lanes).
NORMKIT_DEVICE std::int64_t partial_of(const Work& work, std::int64_t r, std::int64_t unit, std::int64_t tile) {
  const Geometry& g = work.task.geometry;
  const Policy& policy = work.policy;
  if (policy.traversal == Traversal::runs) return (r * policy.units + unit) * policy.runs.tiles + tile;
  const std::int64_t o = quotient(r, g.lanes), lane = r - o * g.lanes;
  return (o * policy.lanes.tiles + tile) * g.columns() + lane * policy.units + unit;
}

// ---- statistics --------------------------------------------------------------------------------------------------

/// A statistic as forward finds it.
template <class S> struct Finished {
  Moments<S> moments;
  double rstd;
};

/// Makes a statistic of what its tiles found, found(unit, tile), and writes it to the arrays that were asked for. All
/// threads that meet come here, and know it then.
template <class S, int kAhead = 1, class F>
NORMKIT_DEVICE Finished<S> finish_forward(const Work& work, std::int64_t r, Group meeting, F found) {
  const Task& t = work.task;
  const std::int64_t tiles = work.policy.tiles();
  const Moments<S> m = joined<Moments<S>, kAhead>(meeting, work.policy.units * tiles, [&](std::int64_t k) {
    const std::int64_t unit = quotient(k, tiles);
    return found(unit, k - unit * tiles);
  }, [](Moments<S> a, Moments<S> b) { return merged(a, b); });
  const double rstd = solved_rstd(m, t.denominator);
  if (meeting.rank == 0) publish(t, r, m, rstd);
  return {m, rstd};
}

/// Makes a statistic's gradient of what its tiles found, sums_of(unit, tile), and the gradients of its units'
/// parameters. `s`: the statistic as it was given; weight_of(unit): the weight that all of a unit share.
/// Policy::sharing threads put a unit together, units next to each other. All threads that meet come here; they write
/// where `leads` is true.
template <class S, int kAhead = 1, class Weight, class F>
NORMKIT_DEVICE Solved<S> solve(const Work& work, std::int64_t r, Statistic<S> s, Group meeting, bool leads,
                               Weight weight_of, F sums_of) {
  const Task& t = work.task;
  const std::int64_t units = work.policy.units;
  const Group sharing{meeting.rank & (work.policy.sharing - 1), work.policy.sharing};
  const int abreast = divided(meeting.size, sharing.size), first = divided(meeting.rank, sharing.size);
  const bool collects = t.dparams && t.kind != ParamKind::row && leads && sharing.rank == 0;
  Reduced total;
  NORMKIT_ROLL
  for (std::int64_t unit = first; unit < (work.summed ? units : 0); unit += abreast) {
    const Reduced part = joined<Reduced, kAhead>(sharing, work.policy.tiles(), [&](std::int64_t tile) {
      return sums_of(unit, tile);
    }, [](Reduced a, Reduced b) { return a + b; });
    const double weight = weight_of(unit);
    if (sharing.rank == 0 || abreast == 1)
      total = total + Reduced{{weight * part.sums.g, weight * part.sums.gx, part.sums.d}, part.n};
    if (!collects) continue;
    double* const pair = t.dparams + 2 * (r * units + unit);
    pair[0] = part.sums.gx, pair[1] = part.sums.g;
  }
  // Where there is nothing to sum the threads of other statistics may have left.
  if (abreast > 1 && work.summed) total = all_sum(meeting, total);
  const bool writes = leads && meeting.rank == 0;
  if (t.phase == Phase::reduce) {
    if (writes) t.sums[3 * r] = total.sums.g, t.sums[3 * r + 1] = total.sums.gx, t.sums[3 * r + 2] = total.sums.d;
    return {};
  }
  if (t.phase == Phase::apply) total = {{t.sums[3 * r], t.sums[3 * r + 1], t.sums[3 * r + 2]}, t.counts[r]};

  // The sums are about the high part of the given mean: its low part, or the distance to the mean of the data, is still to come.
  double shift = 0, mean = static_cast<double>(s.mean) + static_cast<double>(s.mean_low);
  if (t.centered && total.n > 0) shift = t.frozen ? static_cast<double>(s.mean_low) : total.sums.d / total.n;
  if (t.centered && !t.frozen) mean = static_cast<double>(s.mean) + shift, s = shifted(s, shift);
  const Sums<double> sums = recenter(total.sums, shift);
  const Gradient<S> gradient =
      t.frozen ? Gradient<S>{0, 0, 0} : gradient_of(s, sums, total.n, t.centered, t.denominator);
  Solved<S> solved{mean, s.rstd, static_cast<double>(gradient.b), static_cast<double>(gradient.c)};
  if constexpr (sizeof(S) == 8) solved.mean = s.mean, solved.mean_low = s.mean_low;
  if (writes && work.solved) for_solved(work, r, solved, [](double v, double& to) { to = v; });
  NORMKIT_ROLL
  for (std::int64_t unit = first; unit < (collects ? units : 0); unit += abreast) {
    double* const pair = t.dparams + 2 * (r * units + unit);
    pair[0] = s.rstd * mul_add(-shift, pair[1], pair[0]);
  }
  return solved;
}

/// Calls solve() with the statistic as it was given and the weights of its units, all from memory.
template <class S, int kAhead = 1, class F>
NORMKIT_DEVICE Solved<S> finish_backward(const Work& work, std::int64_t r, Group meeting, F sums_of) {
  const std::int64_t o = quotient(r, work.task.geometry.lanes), lane = r - o * work.task.geometry.lanes;
  const auto weight_of = [&](std::int64_t unit) { return UnitParameters::of(work, o, lane, unit).weight; };
  const Statistic<S> s = given_statistic<S>(work.task, r);
  return solve<S, kAhead>(work, r, s, meeting, true, weight_of, sums_of);
}

/// Threads that meet, for each statistic.
inline Grid grid_for_statistics(const Work& work) {
  Grid grid = grid_for_items(work.task.geometry.statistics(), work.policy.meeting);
  grid.shared_bytes = kGroupBytes;
  return grid;
}

/// Partial results that a thread has on their way from memory.
inline constexpr int kFinishAhead = 4;

template <class S> struct ForwardFinish {
  static constexpr const char* kName = "ForwardFinish";
  static constexpr int kBlocks = 2;
  Work work;

  NORMKIT_DEVICE void operator()() const {
    const Group meeting = Group::of(work.policy.meeting);
    const std::int64_t r = own_item(meeting.size);
    if (r >= work.task.geometry.statistics()) return;
    const Finished<S> s = finish_forward<S, kFinishAhead>(work, r, meeting, [&](std::int64_t unit, std::int64_t tile) {
      return moments_at<S>(work.partials + kMomentDoubles<S> * partial_of(work, r, unit, tile));
    });
    if (meeting.rank != 0) return;
    const std::int64_t all = work.task.geometry.statistics();
    work.solved[r] = s.moments.mean, work.solved[all + r] = s.rstd;
    if constexpr (sizeof(S) == 8) work.solved[2 * all + r] = s.moments.mean_low;
  }
};

template <class S> struct BackwardFinish {
  static constexpr const char* kName = "BackwardFinish";
  static constexpr int kBlocks = 2;
  Work work;

  NORMKIT_DEVICE void operator()() const {
    const Group meeting = Group::of(work.policy.meeting);
    const std::int64_t r = own_item(meeting.size);
    if (r >= work.task.geometry.statistics()) return;
    finish_backward<S, kFinishAhead>(work, r, meeting, [&](std::int64_t unit, std::int64_t tile) {
      return reduced_at(work.partials + 4 * partial_of(work, r, unit, tile));
    });
  }
};

// ---- gradients of parameters -------------------------------------------------------------------------------------

/// Says which units share parameter p: (repeat * count + p) * inner + k for all repeats and all k < inner.
struct Share { std::int64_t repeats = 1, count = 1, inner = 1; };

/// Adds up dweight and dbias from the pairs that their units left, in one order and in double.
struct Totals {
  static constexpr const char* kName = "Totals";
  static constexpr int kBlocks = 2;
  const double* pairs;
  Share share;  // within an outer index where these have parameters of their own
  std::int64_t parameters, outer_units;  // units of one such outer index
  ParamGradient dweight, dbias;

  NORMKIT_DEVICE void operator()() const {
    const Group warp = Group::of(kWarp);
    const std::int64_t p = own_item(kWarp);
    if (p >= parameters) return;
    const std::int64_t o = quotient(p, share.count), within = p - o * share.count;
    const double* const own = pairs + 2 * o * outer_units;
    Sums<double> sums{0, 0, 0};  // g is that of dbias, gx of dweight
    for (std::int64_t k = warp.rank; k < share.repeats * share.inner; k += kWarp) {
      const std::int64_t repeat = quotient(k, share.inner);
      const double* const pair = own + 2 * ((repeat * share.count + within) * share.inner + (k - repeat * share.inner));
      sums.gx += pair[0], sums.g += pair[1];
    }
    sums = all_sum(warp, sums);
    if (warp.rank != 0) return;
    const double dw[1] = {sums.gx}, db[1] = {sums.g};
    if (dweight.data) put_elements(dweight, p, dw, 1);
    if (dbias.data) put_elements(dbias, p, db, 1);
  }
};

/// Adds up dweight and dbias where rows share them, from what row groups left for each element of a run: sums of
/// `blocks` blocks, one after another. The threads of a warp take neighboring parameters, and each adds up some of the
/// groups; then warps meet.
template <class S> struct RowTotals {
  static constexpr const char* kName = "RowTotals";
  static constexpr int kBlocks = 2;
  static constexpr int kStrands = kBlockThreads / kWarp;
  const S* sums;
  std::int64_t groups, run, parameters;  // groups that share a run of parameters
  int blocks;
  ParamGradient dweight, dbias;

  Grid grid() const { return {ceil_div(parameters, kWarp), kBlockThreads, kBlockThreads * 2 * int{sizeof(double)}, 1}; }

  NORMKIT_DEVICE void operator()() const {
    double (*const meeting)[2] = reinterpret_cast<double (*)[2]>(shared_memory());
    const int lane = thread_index() % kWarp, strand = thread_index() / kWarp;
    const std::int64_t p = block_index() * kWarp + lane, o = quotient(p, run), i = p - o * run;
    double total[2] = {0, 0};
    NORMKIT_UNROLL_BY(4)  // so that many loads are on their way
    for (std::int64_t group = p < parameters ? strand : groups; group < groups; group += kStrands) {
      const S* const own = sums + ((o * groups + group) * blocks * 2) * run + i;
      NORMKIT_UNROLL
      for (int which = 0; which < 2; ++which) {
        S all = own[which * run];
        NORMKIT_UNROLL
        for (int b = 1; b < kMostRowBlocks; ++b)
          if (b < blocks) all += own[(2 * b + which) * run];
        total[which] += static_cast<double>(all);
      }
    }
    NORMKIT_UNROLL
    for (int which = 0; which < 2; ++which) meeting[thread_index()][which] = total[which];
    sync_block();
    if (strand > 0 || p >= parameters) return;
    NORMKIT_UNROLL
    for (int which = 0; which < 2; ++which) {
      double all[1] = {total[which]};
      NORMKIT_ROLL
      for (int k = 1; k < kStrands; ++k) all[0] += meeting[k * kWarp + lane][which];
      const ParamGradient out = which == 0 ? dweight : dbias;
      if (out.data) put_elements(out, p, all, 1);
    }
  }
};

// ---- running statistics ------------------------------------------------------------------------------------------

/// Channel c of running statistics, which may have any stride.
NORMKIT_DEVICE double running_value(const std::byte* data, Dtype dtype, std::int64_t stride, std::int64_t c) {
  return element(data + c * stride, dtype, 0);
}

/// The update that cpu.cpp's update_running() makes, channel by channel: the average over all statistics of a channel, the
/// variance unbiased. A statistic of fewer than two members, which a mask may leave, has no unbiased variance and stays
/// out.
struct UpdateRunning {
  static constexpr const char* kName = "UpdateRunning";
  static constexpr int kBlocks = 2;
  const double* moments;
  std::int64_t statistics;
  Running running;

  NORMKIT_DEVICE void operator()() const {
    const Group warp = Group::of(kWarp);
    const std::int64_t c = own_item(kWarp);
    if (c >= running.count) return;
    const Running& r = running;
    using M = Moments<float>;
    M sum;  // of means and variances, and how many there are
    for (std::int64_t k = warp.rank; k < statistics / r.count; k += kWarp) {
      const std::int64_t turn = quotient(k, r.stride);
      const M m = moments_at<float>(moments +
                                    kMomentDoubles<double> * ((turn * r.count + c) * r.stride + (k - turn * r.stride)));
      if (m.n >= 2) sum = {sum.mean + m.mean, sum.m2 + m.m2 / (m.n - 1), sum.n + 1};
    }
    sum = all_join(warp, sum, [](M a, M b) -> M { return {a.mean + b.mean, a.m2 + b.m2, a.n + b.n}; });
    if (warp.rank != 0 || sum.n == 0) return;
    put(r.mean + c * r.mean_stride, r.mean_dtype, sum.mean / sum.n);
    put(r.var + c * r.var_stride, r.var_dtype, sum.m2 / sum.n);
  }

 private:
  NORMKIT_DEVICE void put(std::byte* at, Dtype dtype, double statistic) const {
    const double v[1] = {normkit::running(element(at, dtype, 0), statistic, running.momentum)};
    put_elements(ParamGradient{at, dtype}, 0, v, 1);
  }
};

/// Running statistics as dense doubles: means, then variances.
struct ReadRunning {
  static constexpr const char* kName = "ReadRunning";
  static constexpr int kBlocks = 2;
  Running running;
  double* given;

  NORMKIT_DEVICE void operator()() const {
    const Running& r = running;
    const std::int64_t c = own_item(1);
    if (c >= r.count) return;
    given[c] = running_value(r.mean, r.mean_dtype, r.mean_stride, c);
    given[r.count + c] = running_value(r.var, r.var_dtype, r.var_stride, c);
  }
};

/// Writes the given statistics to the arrays that the caller asked for, one element for each statistic.
template <class S> struct CopyGiven {
  static constexpr const char* kName = "CopyGiven";
  static constexpr int kBlocks = 2;
  Task task;

  NORMKIT_DEVICE void operator()() const {
    const std::int64_t r = own_item(1);
    if (r >= task.geometry.statistics()) return;
    const Given& given = task.given;
    const std::int64_t index = remainder(quotient(r, given.stride), given.count);
    const double scale = element(given.scale, given.scale_dtype, index);
    if (task.mean) *at<S>(task.mean, r) = static_cast<S>(element(given.mean, given.mean_dtype, index));
    if (task.rstd)
      *at<S>(task.rstd, r) = static_cast<S>(given.is_variance ? rstd_of(scale, task.denominator.eps) : scale);
  }
};

}  // namespace normkit::cuda
