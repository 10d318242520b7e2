// The gradient of a backward: sums of tiles, what is known of statistics, results, and gradients of weights, in four launches. All
// is in double, and elements of any dtype are read one at a time: what few ask for is small and has one kernel for all.
#pragma once

#include "finish.cuh"

namespace normkit::cuda {

/// How a statistic is cut into tiles: a part of its members (runs), or some steps of 32 columns (lanes).
inline constexpr int kSecondTile = 4096, kSecondStrands = kBlockThreads / kWarp, kSecondSteps = 16 * kSecondStrands;

/// What the kernels are told.
struct SecondWork {
  Task task;
  double* partials;  // kSecondDoubles of each tile, or of each column and tile
  double* solved;  // a SecondGradient of each statistic
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
NORMKIT_DEVICE double second_joined(double v, int abreast) {
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
    SecondReduced reduced;
    std::int64_t entry = block_index();
    bool writes = rank == 0;
    if (work.has_columns()) {
      const std::int64_t across = ceil_div(g.columns(), kWarp), row = quotient(entry, across);
      const std::int64_t o = quotient(row, tiles), k = (entry - row * across) * kWarp + rank % kWarp;
      const std::int64_t first = (row - o * tiles) * kSecondSteps, lane = quotient(k, g.run);
      writes = rank < kWarp && k < g.columns(), entry = row * g.columns() + k;
      const double mean = k < g.columns() ? given_statistic<double>(t, o * g.lanes + lane).mean : 0;
      for (std::int64_t step = first + rank / kWarp; step < first + kSecondSteps; step += kSecondStrands)
        if (k < g.columns() && step < g.steps) reduced.add(t, {o, step, lane, k - lane * g.run}, mean);
    } else {
      const std::int64_t r = quotient(entry, tiles), o = quotient(r, g.lanes),
                         begin = (entry - r * tiles) * kSecondTile;
      const std::int64_t members = g.members(), end = begin + kSecondTile < members ? begin + kSecondTile : members;
      const double mean = given_statistic<double>(t, r).mean;
      for (std::int64_t m = begin + rank; m < end; m += kBlockThreads) {
        const std::int64_t step = quotient(m, g.run);
        reduced.add(t, {o, step, r - o * g.lanes, m - step * g.run}, mean);
      }
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
    all.each([&](double& v) { v = all_sum(warp, v); });
    if (warp.rank != 0) return;
    const double rstd = given_statistic<double>(t, r).rstd;
    const double shift = t.centered && !t.frozen && all.n > 0 ? all.sums.d / all.n : 0;
    reinterpret_cast<SecondGradient<double>*>(work.solved)[r] =
        second_gradient_of(rstd, shift, recenter(all.sums, shift), t.frozen ? 0 : all.n, t.centered);
  }
};

/// An element, and what it gives.
struct SecondElement {
  double dy, d_dy, d_x, rp;

  NORMKIT_DEVICE static SecondElement of(const SecondWork& work, const SecondPlace& p, std::int64_t parameter) {
    const Task& t = work.task;
    const std::int64_t r = p.o * t.geometry.lanes + p.lane;
    const SecondGradient<double> k = reinterpret_cast<const SecondGradient<double>*>(work.solved)[r];
    const double weight = element(t.weight, parameter, 1), ddweight = element(t.ddweight, parameter, 0);
    const double dy = p.read(t.dy), v = p.read(t.ddx);
    const double x_hat = forward(p.read(t.x), given_statistic<double>(t, r).mean, k.rstd, k.origin);
    SecondElement e{dy, element(t.ddbias, parameter, 0), dy * (ddweight * k.rstd), v * k.rstd};
    if (t.ddweight.data) e.d_dy = mul_add(ddweight, x_hat, e.d_dy);
    if (!t.frozen) {
      e.rp += second_along(x_hat, k.along, k.constant), e.d_x = mul_add(dy, weight * k.g, e.d_x);
      if (p.is_member(t)) e.d_x += second_through(v, x_hat, k.v, k.x, k.c);
    }
    e.d_dy = mul_add(weight, e.rp, e.d_dy);
    return e;
  }
};

/// d_dy and d_x: a thread for each element.
struct SecondResults {
  static constexpr const char* kName = "SecondResults";
  static constexpr int kBlocks = 2;
  SecondWork work;

  NORMKIT_DEVICE void operator()() const {
    const Task& t = work.task;
    const std::int64_t offset = own_item(1);
    if (offset >= t.geometry.size()) return;
    const SecondPlace p = SecondPlace::of(t.geometry, offset);
    const SecondElement e = SecondElement::of(work, p, second_parameter(t.geometry, p.o, offset));
    const double d_dy[1] = {e.d_dy}, d_x[1] = {e.d_x};
    put_elements({t.d_dy.data, t.d_dy.dtype}, p.index(t.d_dy.strides), d_dy, 1);
    put_elements({t.dx.data, t.dx.dtype}, p.index(t.dx.strides), d_x, 1);
  }
};

/// d_weight: a block for each parameter, or for 32 where neighbors in memory have different ones.
struct SecondDweight {
  static constexpr const char* kName = "SecondDweight";
  static constexpr int kBlocks = 2;
  SecondWork work;

  constexpr int abreast() const { return work.task.geometry.params.stride == 1 ? kWarp : 1; }
  Grid grid() const {
    return {ceil_div(work.task.geometry.parameters(), abreast()), kBlockThreads, kBlockThreads * int{sizeof(double)},
            1};
  }
  NORMKIT_DEVICE void operator()() const {
    const Geometry& g = work.task.geometry;
    const ParamMap& map = g.params;
    const int rank = thread_index(), width = abreast(), strands = divided(kBlockThreads, width);
    const std::int64_t p = block_index() * width + rank % width;
    const std::int64_t o = map.outer ? quotient(p, map.count) : 0, own = p - o * map.count;
    const std::int64_t slice = map.outer ? g.steps * g.columns() : g.size(), each = quotient(slice, map.count);
    double sum = 0;
    for (std::int64_t k = divided(rank, width); k < (p < g.parameters() ? each : 0); k += strands) {
      const std::int64_t turn = quotient(k, map.stride);
      const std::int64_t offset = o * slice + (turn * map.count + own) * map.stride + (k - turn * map.stride);
      const SecondElement e = SecondElement::of(work, SecondPlace::of(g, offset), p);
      if (e.dy != 0) sum = mul_add(e.dy, e.rp, sum);
    }
    const double total[1] = {second_joined(sum, width)};
    if (rank < width && p < g.parameters()) put_elements(work.dweight, p, total, 1);
  }
};

}  // namespace normkit::cuda
