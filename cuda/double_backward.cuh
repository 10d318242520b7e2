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
  double* partials;  // numbers() of each tile, or of each column and tile
  SecondKnown* solved;  // of each statistic
  ParamGradient dweight, dbias;

  /// How many numbers of a SecondReduced are looked at.
  constexpr int numbers() const { return kSecondDoubles + (is_bent(task.activation.kind) ? 3 * kBendDoubles : 0); }

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

/// The first two derivatives of an activation. The compiler knows its kind and so takes what they share once.
struct SecondSlopes { double slope, curvature; };
template <int kKind = 1> NORMKIT_DEVICE SecondSlopes second_slopes(Activation a, double z) {
  if constexpr (kKind < static_cast<int>(ActivationKind::prelu)) {
    constexpr ActivationKind kind{kKind};
    if (a.kind != kind) return second_slopes<kKind + 1>(a, z);
    return {activation_slope({kind, a.parameter}, z), activation_curvature({kind, a.parameter}, z)};
  }
  return {1, 0};
}
NORMKIT_CALLED SecondSlopes second_slopes_at(Activation a, double z) { return second_slopes(a, z); }

/// What an activation f makes of dy: f'(z), its product with dy, and that of f''(z) and dy. Where dy is 0 products are, even where z
/// is NaN, as that of no member may be.
struct SecondReached {
  double slope = 1, dy, bend = 0;

  NORMKIT_DEVICE static SecondReached of(const Task& t, std::int64_t parameter, double dy, double x,
                                         Statistic<double> s) {
    SecondReached r{1, dy, 0};
    if (t.activation.kind == ActivationKind::none) return r;
    const Affine<double> affine = forward_affine(s, element(t.weight, parameter, 1), element(t.bias, parameter, 0));
    const double z = forward(x, s.mean, affine.scale, affine.shift);
    const SecondSlopes f = second_slopes_at(t.activation, z);
    r.slope = f.slope;
    if (dy != 0) r.dy = f.slope * dy, r.bend = f.curvature * dy;
    return r;
  }
};

/// Sums over elements, their members, and sums of bends.
struct SecondReduced {
  SecondSums<double> sums{0, 0, 0, 0, 0, 0, 0, 0};
  double n = 0;
  WeightedBends bends{{0, 0, 0, 0, 0}, {0, 0, 0, 0, 0}, {0, 0, 0, 0, 0}};

  /// Adds one element. What is no member may be NaN, where no gradient reaches it.
  NORMKIT_DEVICE void add(const Task& t, const SecondPlace& p, Statistic<double> s) {
    const Geometry& g = t.geometry;
    const std::int64_t parameter = second_parameter(g, p.o, g.offset(p.o, p.step, p.lane, p.i));
    const double weight = element(t.weight, parameter, 1), ddweight = element(t.ddweight, parameter, 0);
    const double v = p.read(t.ddx), x = p.read(t.x), d = x - s.mean;
    const SecondReached reached = SecondReached::of(t, parameter, p.read(t.dy), x, s);
    const double of_g = reached.dy * weight, q = reached.dy * ddweight;
    sums.g += of_g, sums.vg = mul_add(v, of_g, sums.vg), sums.q += q;
    if (of_g != 0) sums.gd = mul_add(of_g, d, sums.gd);
    if (q != 0) sums.qd = mul_add(q, d, sums.qd);
    if (const double h = reached.bend; h != 0)
      bends = bends + weighted_bends(weight, ddweight, element(t.ddbias, parameter, 0),
                                     {h * v, h * v * d, h, h * d, h * d * d});
    if (!p.is_member(t)) return;
    sums.v += v, sums.vd = mul_add(v, d, sums.vd), sums.d += d, n += 1;
  }
  /// Calls f with each of the numbers, which stay in registers as no index is looked up; with sums of bends where they are wanted.
  template <class F> NORMKIT_DEVICE void each(bool is_bent, F f) {
    f(sums.v), f(sums.vd), f(sums.g), f(sums.gd), f(sums.vg), f(sums.q), f(sums.qd), f(sums.d), f(n);
    if (!is_bent) return;
    const auto five = [&](BendSums<double>& b) { f(b.hv), f(b.hvd), f(b.h), f(b.hd), f(b.hdd); };
    five(bends.weight), five(bends.ddweight), five(bends.ddbias);
  }
};
static_assert(sizeof(SecondReduced) == (kSecondDoubles + 3 * kBendDoubles) * sizeof(double));

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
    const bool bends = is_bent(t.activation.kind);
    for (std::int64_t k = warp.rank; k < tiles * across; k += kWarp) {
      const std::int64_t tile = quotient(k, across), column = lane * g.run + (k - tile * across);
      const double* from =
          work.partials +
          work.numbers() * (work.has_columns() ? (o * tiles + tile) * g.columns() + column : r * tiles + k);
      all.each(bends, [&](double& v) { v += *from++; });
    }
    all.each(bends, [](double& v) { v = second_warp_sum(v); });
    if (warp.rank != 0) return;
    const Statistic<double> s = given_statistic<double>(t, r);
    const double shift = t.centered && !t.frozen && all.n > 0 ? all.sums.d / all.n : 0;
    const double n = t.frozen ? 0 : all.n;
    const SecondGradient<double> known = second_gradient_of(s.rstd, shift, recenter(all.sums, shift), n, t.centered);
    work.solved[r] = {s.mean, bends ? bent(known, all.bends, n, t.centered) : known};
  }
};

/// An element, and what it gives: d_weight and d_bias have terms of it.
struct SecondElement {
  double d_dy, d_x, of_weight, of_bias = 0;

  NORMKIT_DEVICE static SecondElement of(const SecondWork& work, const SecondPlace& p, std::int64_t parameter) {
    const Task& t = work.task;
    const SecondKnown known = work.solved[p.o * t.geometry.lanes + p.lane];
    const SecondGradient<double>& k = known.gradient;
    const double weight = element(t.weight, parameter, 1), v = p.read(t.ddx), x = p.read(t.x);
    const SecondLine<double> line =
        second_line(k.g, k.rp, weight, element(t.ddweight, parameter, 0), element(t.ddbias, parameter, 0));
    const double x_hat = forward(x, known.mean, k.rstd, k.origin);
    const Statistic<double> given = given_statistic<double>(t, p.o * t.geometry.lanes + p.lane);
    const auto [slope, dy, bend] = SecondReached::of(t, parameter, p.read(t.dy), x, given);
    double d_dy = line.d_dy.constant, d_x = dy * line.dy, rp = v * k.rp.of_v;
    if (!t.frozen || t.ddweight.data) d_dy = mul_add(x_hat, line.d_dy.of_x, d_dy);
    d_dy = mul_add(v, line.d_dy.of_v, d_dy);
    if (!t.frozen) {
      rp = second_form(v, x_hat, k.rp.of_v, k.rp.of_x, k.rp.constant);
      if (p.is_member(t))
        d_x = mul_add(dy, line.dy, second_form(v, x_hat, k.through.of_v, k.through.of_x, k.through.constant));
    }
    const double dz = bend != 0 ? bend * d_dy : 0;
    if (dz != 0) d_x = mul_add(dz, weight, d_x);
    return {d_dy * slope, k.rstd * d_x, (dy != 0 ? dy * rp : 0) + (dz != 0 ? dz * x_hat : 0), dz};
  }
};

/// What goes over elements, in one kernel: each would have its own copy of all activations. First come the sums of tiles, then, when
/// SecondFinish has been, d_dy and d_x, a thread for each element, and d_weight and d_bias.
struct SecondPass {
  static constexpr const char* kName = "SecondPass";
  static constexpr int kBlocks = 2;
  enum class Part : std::uint8_t { sums, results, params };
  SecondWork work;
  Part part;

  Grid grid() const { return part == Part::sums ? grid_of_sums() : grid_of_results(); }
  NORMKIT_DEVICE void operator()() const { part == Part::sums ? add_up() : finish(); }

 private:
  constexpr bool adds() const { return part == Part::params; }
  Grid grid_of_sums() const {
    const Geometry& g = work.task.geometry;
    const std::int64_t rows = g.outer * work.tiles();
    return {work.has_columns() ? rows * ceil_div(g.columns(), kWarp) : work.partial_count(), kBlockThreads,
            kBlockThreads * int{sizeof(double)}, 1};
  }
  /// The sums of a tile. A block takes it: its threads go along the members, or its warps along steps of 32 columns.
  NORMKIT_DEVICE void add_up() const {
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
    Statistic<double> statistic{};
    if (at < end) statistic = given_statistic<double>(t, o * g.lanes + lane);
    NORMKIT_ROLL
    for (; at < end; at += apart) {
      const std::int64_t step = has_columns ? at : quotient(at, g.run);
      reduced.add(t, {o, step, lane, has_columns ? i : at - step * g.run}, statistic);
    }
    const int abreast = work.has_columns() ? kWarp : 1;
    double* to = work.partials + work.numbers() * entry;
    reduced.each(is_bent(t.activation.kind), [&](double& v) {
      const double sum = second_joined(v, abreast);
      if (writes) *to = sum;
      ++to;
    });
  }

  constexpr int abreast() const { return work.task.geometry.params.stride == 1 ? kWarp : 1; }
  Grid grid_of_results() const {
    const Geometry& g = work.task.geometry;
    return {adds() ? ceil_div(g.parameters(), abreast()) : ceil_div(g.size(), kBlockThreads), kBlockThreads,
            adds() ? kBlockThreads * int{sizeof(double)} : 0, 1};
  }
  /// d_dy and d_x of an element; or, where it adds, d_weight and d_bias: a block for each parameter, or for 32 where neighbors in
  /// memory have different ones.
  NORMKIT_DEVICE void finish() const {
    const Task& t = work.task;
    const Geometry& g = t.geometry;
    const ParamMap& map = g.params;
    const int rank = thread_index(), width = adds() ? abreast() : kBlockThreads;
    const std::int64_t item = block_index() * width + rank % width;
    const std::int64_t slice = map.outer ? g.steps * g.columns() : g.size();
    const std::int64_t o = adds() && map.outer ? quotient(item, map.count) : 0, own = item - o * map.count;
    const std::int64_t end = item >= (adds() ? g.parameters() : g.size()) ? 0 : adds() ? quotient(slice, map.count) : 1;
    double of_weight = 0, of_bias = 0;
    NORMKIT_ROLL
    for (std::int64_t k = divided(rank, width); k < end; k += divided(kBlockThreads, width)) {
      const std::int64_t turn = quotient(k, map.stride);
      const std::int64_t offset =
          adds() ? o * slice + (turn * map.count + own) * map.stride + (k - turn * map.stride) : item;
      const SecondPlace p = SecondPlace::of(g, offset);
      const SecondElement e = SecondElement::of(work, p, adds() ? item : second_parameter(g, p.o, offset));
      if (adds()) {
        of_weight += e.of_weight, of_bias += e.of_bias;
        continue;
      }
      const double d_dy[1] = {e.d_dy}, d_x[1] = {e.d_x};
      put_elements({t.d_dy.data, t.d_dy.dtype}, p.index(t.d_dy.strides), d_dy, 1);
      put_elements({t.dx.data, t.dx.dtype}, p.index(t.dx.strides), d_x, 1);
    }
    if (!adds()) return;
    const bool writes = rank < width && item < g.parameters();
    const double weight[1] = {second_joined(of_weight, width)}, bias[1] = {second_joined(of_bias, width)};
    if (writes && work.dweight.data) put_elements(work.dweight, item, weight, 1);
    if (writes && work.dbias.data) put_elements(work.dbias, item, bias, 1);
  }
};

}  // namespace normkit::cuda
