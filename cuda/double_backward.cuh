// The gradient of a backward: sums of tiles, what is known of statistics, results, and gradients of weights, in four launches. All
// is in double, and elements of any dtype are read one at a time: what few ask for is small and has one kernel for all.
#pragma once

#include "finish.cuh"

namespace normkit::cuda {

/// How a statistic is cut into tiles: a part of its members (runs), or some steps of 32 columns (lanes).
inline constexpr int kSecondTile = 4096, kSecondStrands = kBlockThreads / kWarp, kSecondSteps = 16 * kSecondStrands;

/// What is known of a statistic, beside the given mean.
struct SecondKnown {
  double mean;
  SecondGradient<double> gradient;
};

/// What the kernels are told.
struct SecondWork {
  Task task;
  double* partials;  // kSecondDoubles of each tile, or of each column and tile
  SecondKnown* solved;  // of each statistic
  ParamGradient dweight;

  constexpr bool has_columns() const { return task.traversal == Traversal::lanes; }
  /// Tiles of a statistic (runs) or of an outer index (lanes).
  constexpr std::int64_t tiles() const {
    const Geometry& g = task.geometry;
    return has_columns() ? ceil_div(g.steps, kSecondSteps) : ceil_div(g.members(), kSecondTile);
  }
  constexpr std::int64_t partial_count() const {
    const Geometry& g = task.geometry;
    return has_columns() ? g.outer * tiles() * g.columns() : g.statistics() * tiles();
  }
};

/// Where an element lies.
struct SecondPlace {
  std::int64_t o, step, lane, i;

  NORMKIT_DEVICE static SecondPlace of(const Geometry& g, std::int64_t offset) {
    const std::int64_t run = quotient(offset, g.run), row = quotient(run, g.lanes), o = quotient(row, g.steps);
    return {o, row - o * g.steps, run - row * g.lanes, offset - run * g.run};
  }
  NORMKIT_DEVICE std::int64_t index(const Strides& s) const {
    return o * s.outer + step * s.step + lane * s.lane + i * s.run;
  }
  NORMKIT_DEVICE double read(const Operand& a) const { return a.data ? element(a.data, a.dtype, index(a.strides)) : 0; }
  NORMKIT_DEVICE bool is_member(const Task& t) const {
    return !t.where.data || *at<std::uint8_t>(t.where.data, index(t.where.strides)) != 0;
  }
};

NORMKIT_DEVICE std::int64_t second_parameter(const Geometry& g, std::int64_t o, std::int64_t offset) {
  return o * g.params.outer + remainder(quotient(offset, g.params.stride), g.params.count);
}

/// Sums over elements, and their members.
struct SecondReduced {
  SecondSums<double> sums{0, 0, 0, 0, 0, 0, 0, 0};
  double n = 0;

  /// Adds one element. What is no member may be NaN, where no gradient reaches it.
  NORMKIT_DEVICE void add(const Task& t, const SecondPlace& p, double mean) {
    const Geometry& g = t.geometry;
    const std::int64_t parameter = second_parameter(g, p.o, g.offset(p.o, p.step, p.lane, p.i));
    const double dy = p.read(t.dy), v = p.read(t.ddx), d = p.read(t.x) - mean;
    const double of_g = dy * element(t.weight, parameter, 1), q = dy * element(t.ddweight, parameter, 0);
    sums.g += of_g, sums.vg = mul_add(v, of_g, sums.vg), sums.q += q;
    if (of_g != 0) sums.gd = mul_add(of_g, d, sums.gd);
    if (q != 0) sums.qd = mul_add(q, d, sums.qd);
    if (!p.is_member(t)) return;
    sums.v += v, sums.vd = mul_add(v, d, sums.vd), sums.d += d, n += 1;
  }
  /// Calls f with each of the numbers.
  template <class F> NORMKIT_DEVICE void each(F f) {
    f(sums.v), f(sums.vd), f(sums.g), f(sums.gd), f(sums.vg), f(sums.q), f(sums.qd), f(sums.d), f(n);
  }
};
static_assert(sizeof(SecondReduced) == kSecondDoubles * sizeof(double));

/// The sum of what the threads of a block have whose numbers are alike modulo `abreast`, in the first `abreast` threads.
NORMKIT_CALLED double second_joined(double v, int abreast) {
  double* const all = reinterpret_cast<double*>(shared_memory());
  const int rank = thread_index();
  all[rank] = v;
  NORMKIT_ROLL
  for (int half = block_threads() / 2; half >= abreast; half /= 2) {
    sync_block();
    if (rank < half) all[rank] += all[rank + half];
  }
  v = all[rank];
  sync_block();
  return v;
}

/// The sum over a warp, in all its threads.
NORMKIT_CALLED double second_warp_sum(double v) { return all_sum(Group::of(kWarp), v); }

/// The sums of a tile. A block takes it: its threads go along the members, or its warps along steps of 32 columns.
struct SecondTileSums {
  static constexpr const char* kName = "SecondTileSums";
  static constexpr int kBlocks = 2;
  SecondWork work;

  Grid grid() const {
    const Geometry& g = work.task.geometry;
    const std::int64_t rows = g.outer * work.tiles();
    return {work.has_columns() ? rows * ceil_div(g.columns(), kWarp) : work.partial_count(), kBlockThreads,
            kBlockThreads * int{sizeof(double)}, 1};
  }
  NORMKIT_DEVICE void operator()() const {
    const Task& t = work.task;
    const Geometry& g = t.geometry;
    const int rank = thread_index();
    const std::int64_t tiles = work.tiles();
    const bool has_columns = work.has_columns();
    // The elements of this thread: steps of a column, or members of a statistic.
    std::int64_t entry = block_index(), o, lane, i = 0, at, end, apart = kBlockThreads;
    bool writes = rank == 0;
    if (has_columns) {
      const std::int64_t across = ceil_div(g.columns(), kWarp), row = quotient(entry, across);
      const std::int64_t k = (entry - row * across) * kWarp + rank % kWarp,
                         first = remainder(row, tiles) * kSecondSteps;
      o = quotient(row, tiles), lane = quotient(k, g.run), i = k - lane * g.run;
      at = first + rank / kWarp, end = k < g.columns() ? first + kSecondSteps : 0, apart = kSecondStrands;
      end = end < g.steps ? end : g.steps, writes = rank < kWarp && k < g.columns(), entry = row * g.columns() + k;
    } else {
      const std::int64_t r = quotient(entry, tiles), begin = (entry - r * tiles) * kSecondTile;
      o = quotient(r, g.lanes), lane = r - o * g.lanes, at = begin + rank;
      end = begin + kSecondTile < g.members() ? begin + kSecondTile : g.members();
    }
    SecondReduced reduced;
    const double mean = at < end ? given_statistic<double>(t, o * g.lanes + lane).mean : 0;
    NORMKIT_ROLL
    for (; at < end; at += apart) {
      const std::int64_t step = has_columns ? at : quotient(at, g.run);
      reduced.add(t, {o, step, lane, has_columns ? i : at - step * g.run}, mean);
    }
    const int abreast = work.has_columns() ? kWarp : 1;
    double* to = work.partials + kSecondDoubles * entry;
    reduced.each([&](double& v) {
      const double sum = second_joined(v, abreast);
      if (writes) *to = sum;
      ++to;
    });
  }
};

/// Makes of the sums of all tiles of a statistic what is known of its elements; a warp for each.
struct SecondFinish {
  static constexpr const char* kName = "SecondFinish";
  static constexpr int kBlocks = 2;
  SecondWork work;

  NORMKIT_DEVICE void operator()() const {
    const Task& t = work.task;
    const Geometry& g = t.geometry;
    const Group warp = Group::of(kWarp);
    const std::int64_t r = own_item(kWarp), tiles = work.tiles();
    if (r >= g.statistics()) return;
    const std::int64_t o = quotient(r, g.lanes), lane = r - o * g.lanes;
    const std::int64_t across = work.has_columns() ? g.run : 1;
    SecondReduced all;
    for (std::int64_t k = warp.rank; k < tiles * across; k += kWarp) {
      const std::int64_t tile = quotient(k, across), column = lane * g.run + (k - tile * across);
      const double* from =
          work.partials +
          kSecondDoubles * (work.has_columns() ? (o * tiles + tile) * g.columns() + column : r * tiles + k);
      all.each([&](double& v) { v += *from++; });
    }
    all.each([](double& v) { v = second_warp_sum(v); });
    if (warp.rank != 0) return;
    const Statistic<double> s = given_statistic<double>(t, r);
    const double shift = t.centered && !t.frozen && all.n > 0 ? all.sums.d / all.n : 0;
    work.solved[r] = {s.mean,
                      second_gradient_of(s.rstd, shift, recenter(all.sums, shift), t.frozen ? 0 : all.n, t.centered)};
  }
};

/// An element, and what it gives.
struct SecondElement {
  double dy, d_dy, d_x, rp;

  NORMKIT_DEVICE static SecondElement of(const SecondWork& work, const SecondPlace& p, std::int64_t parameter) {
    const Task& t = work.task;
    const SecondKnown known = work.solved[p.o * t.geometry.lanes + p.lane];
    const SecondGradient<double>& k = known.gradient;
    const SecondLine<double> line = second_line(k.g, k.rp, element(t.weight, parameter, 1),
                                                element(t.ddweight, parameter, 0), element(t.ddbias, parameter, 0));
    const double dy = p.read(t.dy), v = p.read(t.ddx), x_hat = forward(p.read(t.x), known.mean, k.rstd, k.origin);
    SecondElement e{dy, line.d_dy.constant, k.rstd * (dy * line.dy), v * k.rp.of_v};
    if (!t.frozen || t.ddweight.data) e.d_dy = mul_add(x_hat, line.d_dy.of_x, e.d_dy);
    e.d_dy = mul_add(v, line.d_dy.of_v, e.d_dy);
    if (t.frozen) return e;
    e.rp = second_form(v, x_hat, k.rp.of_v, k.rp.of_x, k.rp.constant);
    if (p.is_member(t))
      e.d_x = k.rstd * mul_add(dy, line.dy, second_form(v, x_hat, k.through.of_v, k.through.of_x, k.through.constant));
    return e;
  }
};

/// d_dy and d_x, a thread for each element; or, where `adds`, d_weight: a block for each parameter, or for 32 where neighbors
/// in memory have different ones.
struct SecondRest {
  static constexpr const char* kName = "SecondRest";
  static constexpr int kBlocks = 2;
  SecondWork work;
  bool adds;

  constexpr int abreast() const { return work.task.geometry.params.stride == 1 ? kWarp : 1; }
  Grid grid() const {
    const Geometry& g = work.task.geometry;
    return {adds ? ceil_div(g.parameters(), abreast()) : ceil_div(g.size(), kBlockThreads), kBlockThreads,
            adds ? kBlockThreads * int{sizeof(double)} : 0, 1};
  }
  NORMKIT_DEVICE void operator()() const {
    const Task& t = work.task;
    const Geometry& g = t.geometry;
    const ParamMap& map = g.params;
    const int rank = thread_index(), width = adds ? abreast() : kBlockThreads;
    const std::int64_t item = block_index() * width + rank % width;
    const std::int64_t slice = map.outer ? g.steps * g.columns() : g.size();
    const std::int64_t o = adds && map.outer ? quotient(item, map.count) : 0, own = item - o * map.count;
    const std::int64_t end = item >= (adds ? g.parameters() : g.size()) ? 0 : adds ? quotient(slice, map.count) : 1;
    double sum = 0;
    NORMKIT_ROLL
    for (std::int64_t k = divided(rank, width); k < end; k += divided(kBlockThreads, width)) {
      const std::int64_t turn = quotient(k, map.stride);
      const std::int64_t offset =
          adds ? o * slice + (turn * map.count + own) * map.stride + (k - turn * map.stride) : item;
      const SecondPlace p = SecondPlace::of(g, offset);
      const SecondElement e = SecondElement::of(work, p, adds ? item : second_parameter(g, p.o, offset));
      if (adds) {
        if (e.dy != 0) sum = mul_add(e.dy, e.rp, sum);
        continue;
      }
      const double d_dy[1] = {e.d_dy}, d_x[1] = {e.d_x};
      put_elements({t.d_dy.data, t.d_dy.dtype}, p.index(t.d_dy.strides), d_dy, 1);
      put_elements({t.dx.data, t.dx.dtype}, p.index(t.dx.strides), d_x, 1);
    }
    if (!adds) return;
    const double total[1] = {second_joined(sum, width)};
    if (rank < width && item < g.parameters()) put_elements(work.dweight, item, total, 1);
  }
};

}  // namespace normkit::cuda
