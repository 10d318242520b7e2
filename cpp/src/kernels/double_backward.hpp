// The gradient of a backward, in both traversals. Sums are doubles; results are computed in the compute type X, float or double,
// as those of a backward are. All types with one X have one loop: half types are read and written through buffers.
// An activation has its derivatives in buffers beside the elements, and dy times the first of them in the place of dy. What is not
// a loop over elements is marked as cold, which makes it small.
#pragma once

namespace normkit {
namespace {

// ---- elements ----------------------------------------------------------------------------------------------------

/// Positions of one register, and of less: sums and coefficients of more would not stay in registers. Doubles are loaded from
/// floats, too.
template <class R> struct WholeRegister {
  static constexpr int kWidth = kRegLanes<R>;
  std::int64_t i;

  template <class X> NORMKIT_LOCAL R load(const X* p) const {
    if constexpr (sizeof(X) == sizeof(typename R::Lane)) return {{reg_load(p + i)}};
    else return {{reg_load_wide(p + i)}};
  }
  NORMKIT_LOCAL void store(typename R::Lane* p, R v) const { reg_store(p + i, v.r[0]); }
  NORMKIT_LOCAL R where(const std::uint8_t* p, R v) const { return ::normkit::where(p + i, kWidth, v); }
  NORMKIT_LOCAL R keep(R v) const { return v; }
};
template <class R> struct PartOfRegister {
  std::int64_t i;
  int n;

  template <class X> NORMKIT_LOCAL R load(const X* p) const {
    if constexpr (requires { reg_load_part(p, n); }) {
      const auto part = reg_load_part(p + i, n);
      if constexpr (sizeof(X) == sizeof(typename R::Lane)) return {{part}};
      else return {{widen_piece(&part, 0)}};
    } else {
      X part[kRegLanes<R>] = {};
      copy_part(p + i, n * static_cast<int>(sizeof(X)), part);
      return WholeRegister<R>{0}.load(part);
    }
  }
  template <class X> NORMKIT_LOCAL void store(X* p, R v) const {
    if constexpr (kMaskedParts) {
      reg_store_part(p + i, v.r[0], n);
    } else {
      X part[kRegLanes<R>];
      WholeRegister<R>{0}.store(part, v);
      copy_part(part, n * static_cast<int>(sizeof(X)), p + i);
    }
  }
  NORMKIT_LOCAL R where(const std::uint8_t* p, R v) const { return ::normkit::where(p + i, n, v); }
  NORMKIT_LOCAL R keep(R v) const { return ::normkit::keep(v, n); }
};
/// Calls f for every `stride`-th element and those that fill a register R with it.
template <class R, class F>
NORMKIT_LOCAL void for_registers(std::int64_t begin, std::int64_t end, std::int64_t stride, F f) {
  std::int64_t i = begin;
  for (; i + kRegLanes<R> <= end; i += stride) f(WholeRegister<R>{i});
  if (i < end) f(PartOfRegister<R>{i, static_cast<int>(end - i)});
}

/// Elements of a step, one after another, and of other steps, which are so far apart. Through an activation f dy is f'(z) * dy,
/// `slope` f'(z), and `bend`, where f is bent, f''(z) * dy; else these two are null.
template <class X> struct SecondRow {
  const X *x, *dy, *v;
  X *d_dy, *d_x;
  std::int64_t x_step, dy_step, v_step, d_dy_step, d_x_step;
  const X *slope = nullptr, *bend = nullptr;

  NORMKIT_LOCAL void next() {
    x += x_step, dy += dy_step, v += v_step, d_dy += d_dy_step, d_x += d_x_step;
    if (slope) slope += dy_step;
    if (bend) bend += dy_step;
  }
};
/// n <= kBuffer elements of a run from element `begin` on, or columns of one step or several.
struct SecondPlace { std::int64_t o, step, lane, begin, n, steps = 1; };

NORMKIT_LOCAL std::byte* second_address(const Operand& a, const SecondPlace& p) {
  return a.data + (index_at(a, p.o, p.step, p.lane) + p.begin) * size_of(a.dtype);
}
template <class X> NORMKIT_LOCAL SecondRow<X> second_in_place(const Task& t, const SecondPlace& p) {
  const auto where = [&](const Operand& a) { return a.data ? at<X>(second_address(a, p), 0) : nullptr; };
  return {where(t.x),       where(t.dy),       where(t.ddx),       where(t.d_dy),       where(t.dx),
          t.x.strides.step, t.dy.strides.step, t.ddx.strides.step, t.d_dy.strides.step, t.dx.strides.step};
}

/// What is known of elements, of all of them or of each column: quantities that are `apart` numbers from each other. The first
/// three make z of x, the others are for results. `line` is for parameters that do not follow the elements, rp and g for others;
/// `rp` for the terms of d_weight as well.
template <class X> struct SecondKnown {
  static constexpr int kMean = 0, kScale = 1, kShift = 2, kRstd = 3, kOrigin = 4, kG = 5, kRp = 6, kThrough = 9,
                       kLine = 12, kWeight = 16, kCount = 17;
  const X* of;
  std::int64_t apart;

  /// Quantity k at a place.
  template <bool kColumns, class R, class P> NORMKIT_LOCAL R at(P place, int k) const {
    if constexpr (kColumns) return place.load(of + k * apart);
    else return broadcast<R>(of[k]);
  }
};
static_assert(kSecondTable == SecondKnown<double>::kCount);
static_assert(sizeof(SecondGradient<double>) == kSecondSolved * sizeof(double));

/// Parameters along the elements.
template <class X> struct SecondParams { const X *weight, *bias, *ddweight, *ddbias; };
template <class X> struct SecondParamBuffers {
  ParamBuffer<X> weights, biases, ddweights, ddbiases;

  SecondParams<X> read(const Task& t, std::int64_t parameter, std::int64_t n) {
    return {weights.read(t.weight, parameter, n, 1), biases.read(t.bias, parameter, n, 0),
            ddweights.read(t.ddweight, parameter, n, 0), ddbiases.read(t.ddbias, parameter, n, 0)};
  }
};

/// Fetches what is read long after element i of each array.
template <class X> NORMKIT_LOCAL void fetch_second(const SecondRow<X>& row, std::int64_t i) {
  for (const X* from : {row.x, row.dy, row.v}) prefetch_second(reinterpret_cast<const char*>(from + i) + kFarAhead);
}

/// Writes z and dy of rows of n elements one after another; kKinked: f'(z) and f'(z) * dy of a kink instead. kColumns: what is known
/// follows the elements. p: parameters that do, or null. Where dy is 0 so are products, even where z is NaN, as that of no member may
/// be.
template <bool kColumns, bool kKinked, class X>
[[gnu::noinline, gnu::hot]] void second_inputs(SecondRow<X> row, std::int64_t n, std::int64_t steps,
                                               SecondKnown<X> known, SecondParams<X> p, double below, bool fetches,
                                               X* z, X* dy) {
  using R = RegisterOf<X>;
  using Known = SecondKnown<X>;
  for_registers<R>(0, n, kRegLanes<R>, [&](auto place) NORMKIT_INLINE_LAMBDA {
    const R mean = known.template at<kColumns, R>(place, Known::kMean),
            scale = known.template at<kColumns, R>(place, Known::kScale),
            shift = known.template at<kColumns, R>(place, Known::kShift);
    SecondRow<X> from = row;
    for (std::int64_t step = 0; step < (kColumns ? steps : 1); ++step, from.next()) {
      if (fetches) fetch_second(from, place.i);
      R here = forward(place.load(from.x), mean, scale, shift), reaching = place.load(from.dy);
      if (p.weight) here = mul_add(here, place.load(p.weight), place.load(p.bias));
      if constexpr (kKinked) here = kink_slope(here, below), reaching = where(reaching, reaching * here);
      place.store(z + step * n, here), place.store(dy + step * n, reaching);
    }
  });
}

/// Results that go past the caches.
template <class X> struct SecondStreamers { Streamer<X> d_dy, d_x; };

/// Elements: where they lie, or in buffers; zeros in the place of a ddx that is not there.
template <class X> class SecondElements {
 public:
  SecondRow<X> row;

  [[gnu::noinline, gnu::hot]] SecondElements(const Task& t, const SecondPlace& p) {
    if (lie(t)) {
      row = second_in_place<X>(t, p);
    } else {
      row.x = read(t.x, p, room_[0]), row.dy = read(t.dy, p, room_[1]);
      if (t.ddx.data) row.v = read(t.ddx, p, room_[2]);
      row.x_step = row.dy_step = row.v_step = p.n;
    }
    if (!results_lie(t)) row.d_dy = room_[3], row.d_x = room_[4], row.d_dy_step = row.d_x_step = p.n;
    if (!t.ddx.data) row.v = kZeros<X>.value, row.v_step = 0;
  }
  /// Has what an activation makes of dy in the place of dy, and what it needs beside.
  template <bool kColumns> [[gnu::cold]] void reach(const Task& t, const SecondPlace& p, SecondKnown<X> known,
                                                    SecondParams<X> each, bool fetches) {
    const auto read = [&](auto kinked, X* z) {
      second_inputs<kColumns, kinked.value>(row, p.n, p.steps, known, each, slope_below(t.activation), fetches, z,
                                            room_[1]);
    };
    if (has_kink(t.activation)) {
      read(Count<true>{}, room_[5]);
    } else {
      read(Count<false>{}, room_[6]);
      multiply_by_slopes<X>(t.activation, nullptr, room_[6], room_[1], p.steps * p.n, room_[5], room_[6]);
    }
    row.dy = room_[1], row.dy_step = p.n, row.slope = room_[5];
    if (is_bent(t.activation.kind)) row.bend = room_[6];
  }
  static bool lie(const Task& t) { return t.x.dtype == kDtypeOf<X>; }
  static bool results_lie(const Task& t) { return lie(t) && !t.walk.stream_stores; }
  /// How many steps of `columns` columns can be taken at once: more are far from each other, or have no room.
  static std::int64_t most_steps(const Task& t, std::int64_t columns) {
    return results_lie(t) && !has_activation(t) ? 16 : least(16, kBuffer / whole_vectors(columns));
  }
  /// Writes results that are in buffers.
  [[gnu::noinline, gnu::hot]] void write(const Task& t, const SecondPlace& p, SecondStreamers<X>& streamers) const {
    if (results_lie(t)) return;
    for (const bool of_dy : {true, false}) {
      const Operand& out = of_dy ? t.d_dy : t.dx;
      Streamer<X>* const streamer = t.walk.stream_stores ? &(of_dy ? streamers.d_dy : streamers.d_x) : nullptr;
      const bool dense = out.strides.step == p.n;
      const std::int64_t rows = dense ? 1 : p.steps, n = dense ? p.steps * p.n : p.n;
      for (std::int64_t row = 0; row < rows; ++row) {
        std::byte* const to = second_address(out, p) + row * out.strides.step * size_of(out.dtype);
        const X* const from = room_[of_dy ? 3 : 4] + row * n;
        if (lie(t)) put_all(from, at<X>(to, 0), n, streamer, Fetch{});
        if constexpr (sizeof(X) == 4) {
          if (out.dtype == Dtype::float16) put_all(from, at<Half>(to, 0), n, kPlain<Half>, Fetch{});
          if (out.dtype == Dtype::bfloat16) put_all(from, at<Bfloat>(to, 0), n, kPlain<Bfloat>, Fetch{});
        }
      }
    }
  }

 private:
  [[gnu::noinline]] static const X* read(const Operand& a, const SecondPlace& p, X* to) {
    for (std::int64_t step = 0; step < p.steps; ++step)
      read_all(second_address(a, p) + step * a.strides.step * size_of(a.dtype), a.dtype, p.n, to + step * p.n);
    return to;
  }
  alignas(64) X room_[7][kBuffer];
};

// ---- sums --------------------------------------------------------------------------------------------------------

/// Sums over a part of a statistic, and its members.
struct SecondReduced {
  SecondSums<double> sums{0, 0, 0, 0, 0, 0, 0, 0};
  double n = 0;
};
NORMKIT_LOCAL SecondReduced operator+(SecondReduced a, SecondReduced b) { return {a.sums + b.sums, a.n + b.n}; }
static_assert(sizeof(SecondReduced) == kSecondDoubles * sizeof(double));

/// Sums of bends over a part of a statistic, beside SecondReduced where the activation is bent: a pointer to them is null elsewhere.
/// Those of elements that share parameters may lie in `weight` until these are known.
constexpr WeightedBends kNoBends{{0, 0, 0, 0, 0}, {0, 0, 0, 0, 0}, {0, 0, 0, 0, 0}};
static_assert(sizeof(WeightedBends) == 3 * kBendDoubles * sizeof(double));
NORMKIT_LOCAL WeightedBends* second_bends(const Task& t, WeightedBends* bends) {
  return is_bent(t.activation.kind) ? bends : nullptr;
}

/// The weight, ddweight and ddbias that elements share.
struct SecondShared {
  double weight, ddweight, ddbias;
  [[gnu::noinline, gnu::cold]] static SecondShared of(const Task& t, std::int64_t parameter) {
    return {element(t.weight, parameter, 1), element(t.ddweight, parameter, 0), element(t.ddbias, parameter, 0)};
  }
  [[gnu::noinline, gnu::cold]] static SecondShared of(const Task& t, const ColumnParameter& p) {
    return {p.of(t.weight, 1), p.of(t.ddweight, 0), p.of(t.ddbias, 0)};
  }
};

/// Sums in which dy stands for g and for q, times what all their elements share.
NORMKIT_LOCAL SecondSums<double> second_weighted(const SecondShared& p, const SecondSums<double>& s) {
  return {s.v, s.vd, p.weight * s.g, p.weight * s.gd, p.weight * s.vg, p.ddweight * s.q, p.ddweight * s.qd, s.d};
}
NORMKIT_LOCAL WeightedBends second_weighted(const SecondShared& p, const BendSums<double>& b) {
  return weighted_bends(p.weight, p.ddweight, p.ddbias, b);
}

/// Adds a register of elements. kWeighted: weight and ddweight follow the elements; else dy stands for g and for q, whose
/// sums are left alone.
template <bool kWeighted, class Members, class P, class X>
NORMKIT_LOCAL void add_second(SecondSums<R64>& s, P place, SecondRow<X> a, R64 mean, SecondParams<X> p,
                              const Members& members) {
  const R64 dy = place.load(a.dy), v = place.load(a.v), d = place.load(a.x) - mean, of_v = members.only(place, v);
  // What is no member may be NaN, where no gradient reaches it.
  const auto times = [&](R64 f, R64 total)
                         NORMKIT_INLINE_LAMBDA { return mul_add(f, Members::kAll ? d : where(f, d), total); };
  R64 g = dy;
  if constexpr (kWeighted) {
    const R64 q = dy * place.load(p.ddweight);
    g = dy * place.load(p.weight);
    s.q = s.q + q, s.qd = times(q, s.qd);
  }
  s.v = s.v + of_v, s.g = s.g + g, s.d = s.d + members.keep(place, d);
  s.vd = times(of_v, s.vd), s.gd = times(g, s.gd), s.vg = mul_add(v, g, s.vg);
}

/// Adds a register of elements to sums of bends, whose h is bend * a * b.
template <class P, class X>
NORMKIT_LOCAL void add_bends(BendSums<R64>& s, P place, SecondRow<X> row, R64 mean, const X* a, const X* b) {
  const R64 h = place.load(row.bend) * place.load(a) * place.load(b);
  const R64 d = where(h, place.load(row.x) - mean), hv = h * place.load(row.v), hd = h * d;
  s.hv = s.hv + hv, s.hvd = mul_add(hv, d, s.hvd), s.h = s.h + h, s.hd = s.hd + hd, s.hdd = mul_add(hd, d, s.hdd);
}

/// Sums as vectors of all registers give them, whatever the width of one.
template <bool kWeighted, class Members, class X>
[[gnu::noinline, gnu::hot]] SecondSums<double> second_row_sums(SecondRow<X> a, std::int64_t n, double mean,
                                                               SecondParams<X> p, Members members, bool fetches) {
  const R64 m = broadcast<R64>(mean), zero = broadcast<R64>(0.0);
  SecondSums<F64> s;
  for (int k = 0; k < kRegsOf<F64>; ++k) {
    SecondSums<R64> part{zero, zero, zero, zero, zero, zero, zero, zero};
    for_registers<R64>(k * kLanes64, n, kLanes<F64>, [&](auto place) NORMKIT_INLINE_LAMBDA {
      if (k == 0 && fetches && !a.slope) fetch_second(a, place.i);
      add_second<kWeighted>(part, place, a, m, p, members);
    });
    s.v.r[k] = part.v.r[0], s.vd.r[k] = part.vd.r[0], s.g.r[k] = part.g.r[0], s.gd.r[k] = part.gd.r[0];
    s.vg.r[k] = part.vg.r[0], s.q.r[k] = part.q.r[0], s.qd.r[k] = part.qd.r[0], s.d.r[k] = part.d.r[0];
  }
  SecondSums<double> sums{sum(s.v), sum(s.vd), sum(s.g), sum(s.gd), sum(s.vg), sum(s.q), sum(s.qd), sum(s.d)};
  if constexpr (!kWeighted) sums.q = sums.g, sums.qd = sums.gd;
  return sums;
}

template <class X>
[[gnu::noinline, gnu::hot]] BendSums<double> bend_row_sums(SecondRow<X> row, std::int64_t n, double mean, const X* a,
                                                           const X* b) {
  const R64 m = broadcast<R64>(mean), zero = broadcast<R64>(0.0);
  BendSums<F64> s;
  for (int k = 0; k < kRegsOf<F64>; ++k) {
    BendSums<R64> part{zero, zero, zero, zero, zero};
    for_registers<R64>(k * kLanes64, n, kLanes<F64>,
                       [&](auto place) NORMKIT_INLINE_LAMBDA { add_bends(part, place, row, m, a, b); });
    s.hv.r[k] = part.hv.r[0], s.hvd.r[k] = part.hvd.r[0], s.h.r[k] = part.h.r[0], s.hd.r[k] = part.hd.r[0];
    s.hdd.r[k] = part.hdd.r[0];
  }
  return {sum(s.hv), sum(s.hvd), sum(s.h), sum(s.hd), sum(s.hdd)};
}

/// What makes z of the elements of a piece.
template <class X> NORMKIT_LOCAL void put_second_z(const Task& t, Statistic<X> s, Piece piece, X* known) {
  using Known = SecondKnown<X>;
  const Affine<X> affine = forward_affine(s, piece.linear ? 1 : element(t.weight, piece.parameter, 1),
                                          piece.linear ? 0 : element(t.bias, piece.parameter, 0));
  known[Known::kMean] = s.mean, known[Known::kScale] = affine.scale, known[Known::kShift] = affine.shift;
}

/// Calls f(step, piece) for the pieces of a span of a statistic of runs.
template <class F>
NORMKIT_LOCAL void for_second_pieces(const Task& t, std::int64_t o, std::int64_t lane, Chunks c, std::int64_t span,
                                     F f) {
  for_ranges(t.geometry, c, span, [&](std::int64_t step, std::int64_t begin, std::int64_t end) {
    for_pieces(t, o, t.geometry.offset(o, step, lane, 0), begin, end, kBuffer, [&](Piece piece) { f(step, piece); });
  });
}

/// Adds the bends of a piece, times the parameters that follow it, those that it has, or, where a statistic has one, none yet.
template <class X>
[[gnu::cold]] void add_piece_bends(const Task& t, SecondRow<X> row, Piece piece, double mean, const SecondParams<X>* p,
                                   WeightedBends& to) {
  const auto sums = [&](const X* a, const X* b) { return bend_row_sums(row, piece.n, mean, a, b); };
  if (p) {
    to = to + WeightedBends{sums(p->weight, p->weight), sums(p->weight, p->ddweight), sums(p->weight, p->ddbias)};
    return;
  }
  const BendSums<double> plain = sums(kOnes<X>.value, kOnes<X>.value);
  if (constant_in_statistic(t.geometry)) to.weight = to.weight + plain;
  else to = to + second_weighted(SecondShared::of(t, piece.parameter), plain);
}

/// Adds the sums over a span of a statistic. Where the statistic has one parameter, they are to be weighted yet.
template <class X>
[[gnu::cold]] SecondReduced second_span_sums(const Task& t, std::int64_t r, Chunks c, std::int64_t span,
                                             WeightedBends* bends) {
  const std::int64_t o = r / t.geometry.lanes, lane = r % t.geometry.lanes;
  const bool shares = constant_in_statistic(t.geometry), fetches = t.walk.far_bytes > 0;
  const Statistic<X> statistic = given_statistic<X>(t, r);
  const double mean = statistic.mean;
  SecondParamBuffers<X> params;
  SecondReduced total;
  WeightedBends own;  // of this span: sums of spans are added up alike wherever they are taken
  if (bends) own = kNoBends;
  X known[kSecondTable];
  if (t.frozen && t.kind != ParamKind::statistic) return total;
  for_second_pieces(t, o, lane, c, span, [&](std::int64_t step, Piece piece) {
    const SecondPlace place{o, step, lane, piece.begin, piece.n};
    SecondElements<X> a(t, place);
    const bool each = piece.linear && !shares;
    const SecondParams<X> p = piece.linear ? params.read(t, piece.parameter, piece.n) : SecondParams<X>{};
    if (has_activation(t))
      put_second_z(t, statistic, piece, known), a.template reach<false>(t, place, {known, 1}, p, fetches);
    SecondReduced part;
    with_members(t, o, step, lane, piece.begin, [&](auto members) {
      part.n = members.count(1, piece.n);
      part.sums = each ? second_row_sums<true>(a.row, piece.n, mean, p, members, fetches)
                       : second_row_sums<false>(a.row, piece.n, mean, {}, members, fetches);
    });
    if (!each && !shares) part.sums = second_weighted(SecondShared::of(t, piece.parameter), part.sums);
    if (bends) add_piece_bends(t, a.row, piece, mean, each ? &p : nullptr, own);
    total = total + part;
  });
  if (bends) *bends = *bends + own;
  return total;
}

// ---- results -----------------------------------------------------------------------------------------------------

/// Calls put(place of the first, values...) with what is known of a statistic.
template <class F> NORMKIT_LOCAL void put_second(const SecondGradient<double>& known, F put) {
  const auto& [rstd, origin, g, rp, through] = known;
  put(SecondKnown<double>::kRstd, rstd, origin, g, rp.of_v, rp.of_x, rp.constant, through.of_v, through.of_x,
      through.constant);
}
/// With the parameters that the elements share.
template <class F>
NORMKIT_LOCAL void put_second_line(const SecondGradient<double>& k, SecondShared p, F put) {
  const SecondLine<double> line = second_line(k.g, k.rp, p.weight, p.ddweight, p.ddbias);
  put(SecondKnown<double>::kLine, line.d_dy.of_v, line.d_dy.of_x, line.d_dy.constant, line.dy, p.weight);
}

/// Writes d_dy and d_x, and the terms of d_weight and, kBuffer numbers behind, of d_bias, where `terms` is not null. kColumns: what
/// is known follows the elements; kEach: parameters do. kPlain: see second_is_plain(). Only columns may have several steps.
template <bool kColumns, bool kEach, bool kPlain, class X>
[[gnu::noinline, gnu::hot]] void second_row(const Task& t, SecondRow<X> a, std::int64_t n, std::int64_t steps,
                                            SecondKnown<X> known, SecondParams<X> p, Masked members, X* terms) {
  using R = RegisterOf<X>;
  using Form = SecondForm<R>;
  using Known = SecondKnown<X>;
  const bool moves = kPlain || !t.frozen, needs_x = moves || t.ddweight.data;
  X all[kSecondTable];
  for (int k = 0; k < kSecondTable; ++k) all[k] = kColumns ? 0 : known.of[k];
  for_registers<R>(0, n, kRegLanes<R>, [&](auto place) NORMKIT_INLINE_LAMBDA {
    const auto of = [&](int k) NORMKIT_INLINE_LAMBDA {
      return SecondKnown<X>{kColumns ? known.of : all, known.apart}.template at<kColumns, R>(place, k);
    };
    const auto form = [&](int k) NORMKIT_INLINE_LAMBDA { return Form{of(k), of(k + 1), of(k + 2)}; };
    SecondLine<R> line;
    if constexpr (kEach)
      line = second_line(of(Known::kG), form(Known::kRp), place.load(p.weight), place.load(p.ddweight),
                         place.load(p.ddbias));
    else line = {form(Known::kLine), of(Known::kLine + 3)};
    const R mean = of(Known::kMean), rstd = of(Known::kRstd), origin = of(Known::kOrigin);
    const Form f = form(Known::kThrough);
    const R zero = broadcast<R>(X(0));
    SecondRow<X> row = a;
    for (std::int64_t step = 0; step < (kColumns ? steps : 1); ++step, row.next()) {
      if constexpr (kColumns && kPlain) fetch_second(row, place.i);
      const R dy = place.load(row.dy), v = place.load(row.v), x_hat = forward(place.load(row.x), mean, rstd, origin);
      R d_dy = line.d_dy.constant, d_x = dy * line.dy;
      if (needs_x) d_dy = mul_add(x_hat, line.d_dy.of_x, d_dy);
      if (moves) {
        const R through = second_form(v, x_hat, f.of_v, f.of_x, f.constant);
        d_x = mul_add(dy, line.dy, kPlain ? through : members.only(place, through));
      }
      d_dy = mul_add(v, line.d_dy.of_v, d_dy);
      R dz = zero;
      if constexpr (!kPlain) {
        if (row.bend) {
          const R bend = place.load(row.bend);
          dz = where(bend, bend * d_dy);
          if constexpr (kEach) d_x = mul_add(dz, place.load(p.weight), d_x);
          else d_x = mul_add(dz, of(Known::kWeight), d_x);
        }
        if (row.slope) d_dy = d_dy * place.load(row.slope);
      }
      place.store(row.d_dy, d_dy), place.store(row.d_x, rstd * d_x);
      if (!terms) continue;
      const Form rp = form(Known::kRp);
      const R of_dy = moves ? second_form(v, x_hat, rp.of_v, rp.of_x, rp.constant) : v * rp.of_v;
      // From a zero on: the sign of a term that is none does not depend on a mask.
      R term = mul_add(dy, of_dy, zero);
      if constexpr (!kPlain) {
        term = where(dy, term) + where(dz, dz * x_hat);
        place.store(terms + kBuffer, dz);
      }
      place.store(terms, term);
    }
  });
}
/// True where nothing is masked, nothing is frozen, and there is no activation.
NORMKIT_LOCAL bool second_is_plain(const Task& t) { return !t.where.data && !t.frozen && !has_activation(t); }

/// The results of one thread.
template <class X> class SecondWriter {
 public:
  explicit SecondWriter(const Task& task) : t(task) {}

  /// Writes rows of elements whose parameters follow them, where `each`, or are part of what is known.
  template <bool kColumns>
  void write(const SecondPlace& p, SecondKnown<X> known, bool each, std::int64_t parameter, X* terms) {
    SecondElements<X> a(t, p);
    const Masked members = members_at(t, p.o, p.step, p.lane, p.begin);
    const auto rows = [&](auto follows, auto plain) {
      const SecondParams<X> params = follows.value ? params_.read(t, parameter, p.n) : SecondParams<X>{};
      if (has_activation(t)) a.template reach<kColumns>(t, p, known, params, kColumns);
      second_row<kColumns, follows.value, plain.value>(t, a.row, p.n, p.steps, known, params, members, terms);
    };
    const auto any = [&](auto follows) {
      if constexpr (sizeof(X) == 4 && (!kColumns || !follows.value))  // others are rare
        if (second_is_plain(t)) return rows(follows, Count<true>{});
      rows(follows, Count<false>{});
    };
    each ? any(Count<true>{}) : any(Count<false>{});
    a.write(t, p, streamers_);
  }

  const Task& t;

 private:
  SecondParamBuffers<X> params_;
  SecondStreamers<X> streamers_;
};

/// Where terms of d_weight and, kBuffer numbers behind, of d_bias go: added up over a piece, or over rows, or one for each element
/// of x.
template <class X>
[[gnu::noinline, gnu::hot]] void put_second_terms(const Task& t, std::int64_t o, std::int64_t lane, std::int64_t offset,
                                                  Piece piece, const X* terms) {
  const Geometry& g = t.geometry;
  alignas(64) double wide[kBuffer];
  for (int k = 0; k < (has_activation(t) ? 2 : 1); ++k, terms += kBuffer) {
    for (std::int64_t i = 0; i < piece.n; ++i) wide[i] = terms[i];
    if (t.kind == ParamKind::piece) {
      F64 all = broadcast<F64>(0.0);
      for_positions<F64>(piece.n, [&](auto place) NORMKIT_INLINE_LAMBDA { all = all + place.load(wide); });
      t.dparams[2 * (offset / g.params.stride) + k] += sum(all);
    } else if (t.kind == ParamKind::row) {
      double* const sums = t.dparams + (2 * (o * row_groups(g) + lane / kRowGroup) + k) * g.run + piece.begin;
      for (std::int64_t i = 0; i < piece.n; ++i) sums[i] += wide[i];
    } else if (std::byte* const to = k == 0 ? t.dweight_out : t.dbias_out) {
      copy(wide, piece.n, at<double>(to, offset));
    }
  }
}

bool has_second_terms(const Task& t) {
  return t.kind == ParamKind::piece || t.kind == ParamKind::row ||
         (t.kind == ParamKind::element && (t.dweight_out || t.dbias_out));
}

// ---- runs --------------------------------------------------------------------------------------------------------

/// Sums of a whole statistic, weighted, as what is known of its elements.
template <class X>
NORMKIT_LOCAL SecondGradient<double> second_known(const Task& t, Statistic<X> s, const SecondReduced& weighted,
                                                  const WeightedBends* bends) {
  const double shift = mean_shift(t, s, weighted.sums.d, t.frozen ? 1 : weighted.n), n = t.frozen ? 0 : weighted.n;
  const SecondGradient<double> known = second_gradient_of(s.rstd, shift, recenter(weighted.sums, shift), n, t.centered);
  return bends ? bent(known, *bends, n, t.centered) : known;
}

/// The share of elements with one parameter in d_weight and d_bias, from sums that are not weighted.
NORMKIT_LOCAL void put_second_dparams(const SecondGradient<double>& known, const SecondShared& p,
                                      const SecondSums<double>& sums, const BendSums<double>* bends, double* to) {
  to[0] = second_dweight(known, sums);
  if (!bends) return;
  const SecondLine<double> line = second_line(known.g, known.rp, p.weight, p.ddweight, p.ddbias);
  const BendGradient more = bend_gradient(known.rstd, known.origin, line.d_dy, *bends);
  to[0] += more.weight, to[1] = more.bias;
}

/// Makes of the sums of a whole statistic the coefficients of its elements, and its share of d_weight and d_bias.
template <class X>
[[gnu::cold]] SecondGradient<double> second_solve(const Task& t, std::int64_t r, SecondReduced reduced,
                                                  WeightedBends* bends) {
  const Geometry& g = t.geometry;
  const std::int64_t o = r / g.lanes, lane = r % g.lanes;
  const SecondSums<double> sums = reduced.sums;
  const BendSums<double> plain = bends ? bends->weight : kNoBends.weight;
  SecondShared shared{};
  if (constant_in_statistic(g)) {
    shared = SecondShared::of(t, g.parameter(o, g.offset(o, 0, lane, 0)));
    reduced.sums = second_weighted(shared, sums);
    if (bends) *bends = second_weighted(shared, plain);
  }
  const SecondGradient<double> known = second_known(t, given_statistic<X>(t, r), reduced, bends);
  if (t.kind == ParamKind::statistic)
    put_second_dparams(known, shared, sums, bends ? &plain : nullptr, t.dparams + 2 * r);
  return known;
}

template <class X>
[[gnu::cold]] void second_span(SecondWriter<X>& writer, std::int64_t r, Chunks c, std::int64_t span,
                               const SecondGradient<double>& k) {
  const Task& t = writer.t;
  const std::int64_t o = r / t.geometry.lanes, lane = r % t.geometry.lanes;
  X of[kSecondTable] = {};
  const auto put = [&](int first, auto... values) {
    for (const double value : {values...}) of[first++] = static_cast<X>(value);
  };
  const Statistic<X> statistic = given_statistic<X>(t, r);
  of[SecondKnown<X>::kMean] = statistic.mean, put_second(k, put);
  alignas(64) X terms[2 * kBuffer];
  X* const to = has_second_terms(t) ? terms : nullptr;
  for_second_pieces(t, o, lane, c, span, [&](std::int64_t step, Piece piece) {
    if (has_activation(t)) put_second_z(t, statistic, piece, of);
    if (!piece.linear) put_second_line(k, SecondShared::of(t, piece.parameter), put);
    writer.template write<false>({o, step, lane, piece.begin, piece.n}, {of, 1}, piece.linear, piece.parameter, to);
    if (to) put_second_terms(t, o, lane, t.geometry.offset(o, step, lane, piece.begin), piece, terms);
  });
}

// ---- columns -----------------------------------------------------------------------------------------------------

/// Sums of columns, or what is known of them: arrays of numbers that are `apart`, one a quantity.
template <class S> struct SecondColumns {
  S* memory;
  std::int64_t apart;
  SecondColumns(double* from, std::int64_t columns) : memory(reinterpret_cast<S*>(from)), apart(columns) {}
  NORMKIT_LOCAL S* array(int k) const { return memory + k * apart; }
};
using SecondColumnSums = SecondColumns<double>;

/// The sums of column k.
NORMKIT_LOCAL SecondReduced second_column(const SecondColumnSums& s, std::int64_t k) {
  const auto at = [&](int j) { return s.array(j)[k]; };
  return {{at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7)}, at(8)};
}
NORMKIT_LOCAL BendSums<double> bend_column(const SecondColumnSums& s, int set, std::int64_t k) {
  const auto at = [&](int j) { return s.array(kSecondDoubles + set * kBendDoubles + j)[k]; };
  return {at(0), at(1), at(2), at(3), at(4)};
}

/// Adds steps of some columns, one after another.
template <bool kWeighted, class Members, class X>
[[gnu::noinline, gnu::hot]] void add_second_columns(SecondRow<X> a, const SecondPlace& columns, const X* mean,
                                                    SecondParams<X> p, Members members, const SecondColumnSums& to) {
  const std::int64_t k = columns.begin, steps = columns.steps;
  for_registers<R64>(0, columns.n, kLanes64, [&](auto place) NORMKIT_INLINE_LAMBDA {
    const auto sum = [&](int j)
                         NORMKIT_INLINE_LAMBDA { return place.load(static_cast<const double*>(to.array(j)) + k); };
    const R64 m = place.load(mean + k);
    SecondSums<R64> s{sum(0), sum(1), sum(2), sum(3), sum(4), sum(5), sum(6), sum(7)};
    R64 count = sum(8);
    SecondRow<X> row = a;
    for (std::int64_t step = 0; step < steps; ++step) {
      add_second<kWeighted>(s, place, row, m, p, members);
      if (!row.slope) fetch_second(row, place.i);
      if constexpr (!Members::kAll) count = count + members.only(place, broadcast<R64>(1.0));
      row.next();
    }
    if constexpr (Members::kAll) count = count + broadcast<R64>(static_cast<double>(steps));
    if constexpr (!kWeighted) s.q = s.g, s.qd = s.gd;
    const R64 all[] = {s.v, s.vd, s.g, s.gd, s.vg, s.q, s.qd, s.d, count};
    for (int j = 0; j < kSecondDoubles; ++j) place.store(to.array(j) + k, all[j]);
  });
}
/// The same for sums of bends, which are the `set`th.
template <class X>
[[gnu::noinline, gnu::hot]] void add_bend_columns(SecondRow<X> row, const SecondPlace& columns, const X* mean,
                                                  const X* a, const X* b, const SecondColumnSums& to, int set) {
  const std::int64_t k = columns.begin;
  for_registers<R64>(0, columns.n, kLanes64, [&](auto place) NORMKIT_INLINE_LAMBDA {
    const auto array = [&](int j)
                           NORMKIT_INLINE_LAMBDA { return to.array(kSecondDoubles + set * kBendDoubles + j) + k; };
    const auto sum = [&](int j) NORMKIT_INLINE_LAMBDA { return place.load(static_cast<const double*>(array(j))); };
    BendSums<R64> s{sum(0), sum(1), sum(2), sum(3), sum(4)};
    SecondRow<X> here = row;
    for (std::int64_t step = 0; step < columns.steps; ++step, here.next())
      add_bends(s, place, here, place.load(mean + k), a, b);
    const R64 all[] = {s.hv, s.hvd, s.h, s.hd, s.hdd};
    for (int j = 0; j < kBendDoubles; ++j) place.store(array(j), all[j]);
  });
}

/// Calls f(place) for the columns of a span, some at a time, and several steps of them where there is nothing but to compute.
template <class X, class F>
NORMKIT_LOCAL void for_second_columns(const Task& t, std::int64_t o, std::int64_t span, F f) {
  const std::int64_t columns = t.geometry.columns(), end = span_end(t.geometry, span);
  const bool several = !t.where.data && constant_in_column(t.geometry);
  const std::int64_t most = several ? SecondElements<X>::most_steps(t, least(kBuffer, columns)) : 1;
  for (std::int64_t step = span_begin(span); step < end; step += most)
    for (std::int64_t k = 0; k < columns; k += kBuffer)
      f(SecondPlace{o, step, 0, k, least(kBuffer, columns - k), least(most, end - step)});
}
/// The parameter of the first column of a place, where each element has its own.
NORMKIT_LOCAL std::int64_t second_parameter(const Geometry& g, const SecondPlace& p) {
  return g.parameter(p.o, g.offset(p.o, p.step, 0, 0)) + p.begin;
}

/// Adds a span to the sums of columns.
template <class X>
[[gnu::cold]] void second_column_sums(const Task& t, std::int64_t o, std::int64_t span, const SecondColumns<X>& table,
                                      SecondColumnSums to) {
  SecondParamBuffers<X> params;
  const bool each = !constant_in_column(t.geometry);
  const X *const mean = table.array(SecondKnown<X>::kMean), *const one = kOnes<X>.value;
  for_second_columns<X>(t, o, span, [&](const SecondPlace& place) {
    SecondElements<X> a(t, place);
    const SecondParams<X> p = each ? params.read(t, second_parameter(t.geometry, place), place.n) : SecondParams<X>{};
    if (has_activation(t)) a.template reach<true>(t, place, {table.memory + place.begin, table.apart}, p, true);
    with_members(t, o, place.step, 0, place.begin, [&](auto members) {
      if (each) add_second_columns<true>(a.row, place, mean, p, masked(members), to);  // which is rare
      else add_second_columns<false>(a.row, place, mean, {}, members, to);
    });
    if (!a.row.bend) return;
    add_bend_columns(a.row, place, mean, each ? p.weight : one, each ? p.weight : one, to, 0);
    if (!each) return;
    add_bend_columns(a.row, place, mean, p.weight, p.ddweight, to, 1);
    add_bend_columns(a.row, place, mean, p.weight, p.ddbias, to, 2);
  });
}

/// What is known of columns before their sums are: what makes z of x.
template <class X> [[gnu::cold]] void second_know(const Task& t, std::int64_t o, const SecondColumns<X>& table) {
  using Known = SecondKnown<X>;
  const Geometry& g = t.geometry;
  ColumnParameter parameter(t, o);
  for (std::int64_t lane = 0; lane < g.lanes; ++lane) {
    const Statistic<X> s = given_statistic<X>(t, o * g.lanes + lane);
    for (std::int64_t k = lane * g.run; k < (lane + 1) * g.run; ++k, parameter.next()) {
      table.array(Known::kMean)[k] = s.mean;
      if (!has_activation(t)) continue;
      const Affine<X> affine = column_affine(t, parameter, s);
      table.array(Known::kScale)[k] = affine.scale, table.array(Known::kShift)[k] = affine.shift;
    }
  }
}

/// Makes of the sums of columns the table that is known of them, and their shares of d_weight.
template <class X>
[[gnu::cold]] void second_solve_columns(const Task& t, std::int64_t o, const SecondColumnSums& sums,
                                        const SecondColumns<X>& table) {
  const Geometry& g = t.geometry;
  ColumnParameter parameter(t, o), folded = parameter;
  for (std::int64_t lane = 0; lane < g.lanes; ++lane) {
    SecondReduced all;
    WeightedBends all_bends = kNoBends, *const bends = second_bends(t, &all_bends);
    for (std::int64_t k = lane * g.run; k < (lane + 1) * g.run; ++k, folded.next()) {
      SecondReduced column = second_column(sums, k);
      const SecondShared shared = SecondShared::of(t, folded);
      if (constant_in_column(g)) column.sums = second_weighted(shared, column.sums);
      all = all + column;
      if (!bends) continue;
      const BendSums<double> plain = bend_column(sums, 0, k);
      *bends =
          *bends + (constant_in_column(g) ? second_weighted(shared, plain)
                                          : WeightedBends{plain, bend_column(sums, 1, k), bend_column(sums, 2, k)});
    }
    const Statistic<X> s = given_statistic<X>(t, o * g.lanes + lane);
    const SecondGradient<double> known = second_known(t, s, all, bends);
    for (std::int64_t k = lane * g.run; k < (lane + 1) * g.run; ++k, parameter.next()) {
      const auto put = [&](int first, auto... values) {
        for (const double value : {values...}) table.array(first++)[k] = static_cast<X>(value);
      };
      const SecondShared shared = SecondShared::of(t, parameter);
      put_second(known, put), put_second_line(known, shared, put);
      if (t.kind != ParamKind::column) continue;
      const BendSums<double> plain = bends ? bend_column(sums, 0, k) : kNoBends.weight;
      put_second_dparams(known, shared, second_column(sums, k).sums, bends ? &plain : nullptr,
                         t.dparams + 2 * (o * g.columns() + k));
    }
  }
}

template <class X>
[[gnu::cold]] void second_column_span(SecondWriter<X>& writer, std::int64_t o, std::int64_t span,
                                      const SecondColumns<X>& table) {
  const Task& t = writer.t;
  const Geometry& g = t.geometry;
  const bool each = !constant_in_column(g);
  alignas(64) X terms[2 * kBuffer];
  X* const to = has_second_terms(t) ? terms : nullptr;
  for_second_columns<X>(t, o, span, [&](const SecondPlace& p) {
    const SecondKnown<X> known{table.memory + p.begin, table.apart};
    writer.template write<true>(p, known, each, each ? second_parameter(g, p) : 0, to);
    if (to) put_second_terms(t, o, 0, g.offset(o, p.step, 0, 0) + p.begin, {p.begin, p.n, 0, true}, terms);
  });
}

// ---- entry points ------------------------------------------------------------------------------------------------

/// Clears the sums of columns.
[[gnu::cold, maybe_unused]] SecondColumnSums second_cleared(const Task& t, double* memory, std::int64_t columns) {
  for (std::int64_t k = 0; k < second_doubles(t) * columns; ++k) memory[k] = 0;
  return {memory, columns};
}
[[gnu::cold, maybe_unused]] void add_second_parts(const Task& t, const SecondColumnSums& to,
                                                  const SecondColumnSums& part) {
  for (int j = 0; j < second_doubles(t); ++j)
    for (std::int64_t k = 0; k < t.geometry.columns(); ++k) to.array(j)[k] += part.array(j)[k];
}

template <class X>
[[gnu::cold]] void second_sums(const Task& t, std::int64_t begin, std::int64_t end, double* scratch) {
  const Chunks c = chunks_of(t.geometry, t.traversal);
  const std::int64_t columns = whole_vectors(t.geometry.columns());
  for (std::int64_t unit = begin; unit < end; ++unit) {
    double* const part = t.partials + partial_doubles(t, true) * unit;
    if (t.traversal == Traversal::runs) {
      WeightedBends* const bends = second_bends(t, reinterpret_cast<WeightedBends*>(part + kSecondDoubles));
      if (bends) *bends = kNoBends;
      *reinterpret_cast<SecondReduced*>(part) = second_span_sums<X>(t, unit / c.spans, c, unit % c.spans, bends);
      continue;
    }
    const SecondColumns<X> table(scratch, columns);
    second_know(t, unit / c.spans, table);
    second_column_sums(t, unit / c.spans, unit % c.spans, table, second_cleared(t, part, columns));
  }
}

template <class X> [[gnu::cold]] void second_finish(const Task& t, std::int64_t begin, std::int64_t end) {
  const std::int64_t spans = chunks_of(t.geometry, t.traversal).spans, each = partial_doubles(t, true);
  const std::int64_t columns = whole_vectors(t.geometry.columns());
  for (std::int64_t unit = begin; unit < end; ++unit) {
    double *const part = t.partials + each * unit * spans, *const solved = t.solved + solved_doubles(t) * unit;
    if (t.traversal == Traversal::runs) {
      SecondReduced reduced;
      WeightedBends room = kNoBends, *const bends = second_bends(t, &room);
      for (std::int64_t span = 0; span < spans; ++span) {
        reduced = reduced + *reinterpret_cast<SecondReduced*>(part + each * span);
        if (bends) *bends = *bends + *reinterpret_cast<WeightedBends*>(part + each * span + kSecondDoubles);
      }
      *reinterpret_cast<SecondGradient<double>*>(solved) = second_solve<X>(t, unit, reduced, bends);
      continue;
    }
    for (std::int64_t span = 1; span < spans; ++span)
      add_second_parts(t, {part, columns}, {part + each * span, columns});
    second_know<X>(t, unit, {solved, columns});
    second_solve_columns<X>(t, unit, {part, columns}, {solved, columns});
  }
}

template <class X> [[gnu::cold]] void second_apply(const Task& t, std::int64_t begin, std::int64_t end) {
  SecondWriter<X> writer(t);
  const Chunks c = chunks_of(t.geometry, t.traversal);
  for_spans(t, begin, end, [&](std::int64_t unit) {
    double* const solved = t.solved;
    if (t.traversal == Traversal::lanes)
      return second_column_span<X>(
          writer, unit / c.spans, unit % c.spans,
          {solved + solved_doubles(t) * (unit / c.spans), whole_vectors(t.geometry.columns())});
    const Rows rows = rows_of(t, unit / c.spans);
    for (std::int64_t r = rows.first; r < rows.last; ++r)
      second_span(writer, r, c, unit % c.spans,
                  *reinterpret_cast<SecondGradient<double>*>(solved + solved_doubles(t) * r));
  });
}

template <class X>
[[gnu::cold]] void second_fused(const Task& t, std::int64_t begin, std::int64_t end, double* scratch) {
  SecondWriter<X> writer(t);
  const Chunks c = chunks_of(t.geometry, t.traversal);
  const std::int64_t columns = whole_vectors(t.geometry.columns());
  for (std::int64_t unit = begin; unit < end; ++unit) {
    if (t.traversal == Traversal::lanes) {
      const SecondColumns<X> table(scratch, columns);
      const SecondColumnSums sums = second_cleared(t, scratch + kSecondTable * columns, columns);
      second_know(t, unit, table);
      for (std::int64_t span = 0; span < c.spans; ++span) {
        double* const part = scratch + (kSecondTable + second_doubles(t)) * columns;
        const SecondColumnSums own = span == 0 ? sums : second_cleared(t, part, columns);
        second_column_sums(t, unit, span, table, own);
        if (span > 0) add_second_parts(t, sums, own);
      }
      second_solve_columns(t, unit, sums, table);
      for_spans(t, 0, c.spans, [&](std::int64_t span) { second_column_span(writer, unit, span, table); });
      continue;
    }
    const Rows rows = rows_of(t, unit);
    WeightedBends room, *const bends = second_bends(t, &room);
    for (std::int64_t r = rows.first; r < rows.last; ++r) {
      SecondReduced reduced;
      if (bends) *bends = kNoBends;
      for (std::int64_t span = 0; span < c.spans; ++span) reduced = reduced + second_span_sums<X>(t, r, c, span, bends);
      const SecondGradient<double> known = second_solve<X>(t, r, reduced, bends);
      for_spans(t, 0, c.spans, [&](std::int64_t span) { second_span(writer, r, c, span, known); });
    }
  }
}

}  // namespace
}  // namespace normkit
