// The gradient of a backward, in both traversals. Sums are doubles; results are computed in the compute type X, float or double,
// as those of a backward are. All types with one X have one loop: half types are read and written through buffers.
// An activation has its derivatives in buffers beside the elements, and dy times the first of them in the place of dy. Short rows go
// in batches, whose buffers hold from their sums to their results. What is neither a loop over elements nor done for each short row
// is marked as cold, which makes it small.
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

/// Elements of a row, one after another, and of other rows, which are so far apart. Through an activation f, once it was reached, dy
/// is f'(z) * dy, `slope` f'(z), and `bend`, where f is bent, f''(z) * dy; else these two are null.
template <class X> struct SecondRow {
  const X *x, *dy, *v;
  X *d_dy, *d_x;
  std::int64_t x_row, dy_row, v_row, d_dy_row, d_x_row;
  const X *slope = nullptr, *bend = nullptr;

  NORMKIT_LOCAL void next() {
    x += x_row, dy += dy_row, v += v_row, d_dy += d_dy_row, d_x += d_x_row;
    if (slope) slope += dy_row;
    if (bend) bend += dy_row;
  }
};
/// Numbers that buffers of elements have room for.
constexpr std::int64_t kSecondRoom = 1024;
/// Elements of a run from element `begin` on, in one row or in those of several lanes; or, from `column` on in tables, columns in one
/// row or in several, each of one step or, of few columns, of `steps` that lie side by side.
struct SecondPlace { std::int64_t o, step, lane, begin, n, rows = 1, steps = 1, column = 0; };
/// From one lane (runs) or step (lanes) to the next.
NORMKIT_LOCAL std::int64_t second_stride(const Task& t, const Operand& a) {
  return t.traversal == Traversal::runs ? a.strides.lane : a.strides.step;
}

NORMKIT_LOCAL std::byte* second_address(const Operand& a, const SecondPlace& p) {
  return a.data + (index_at(a, p.o, p.step, p.lane) + p.begin) * size_of(a.dtype);
}
template <class X> NORMKIT_LOCAL SecondRow<X> second_in_place(const Task& t, const SecondPlace& p) {
  const auto where = [&](const Operand& a) { return a.data ? at<X>(second_address(a, p), 0) : nullptr; };
  const auto apart = [&](const Operand& a) { return p.steps * second_stride(t, a); };
  return {where(t.x), where(t.dy), where(t.ddx), where(t.d_dy), where(t.dx),
          apart(t.x), apart(t.dy), apart(t.ddx), apart(t.d_dy), apart(t.dx)};
}

/// What is known of elements, of all of them or of each column: quantities that are `apart` numbers from each other. The first
/// three make z of x, the others are for results. `line` is for parameters that do not follow the elements, rp and g for others;
/// `rp` for the terms of d_weight as well.
template <class X> struct SecondKnown {
  static constexpr int kMean = 0, kScale = 1, kShift = 2, kRstd = 3, kOrigin = 4, kG = 5, kRp = 6, kThrough = 9,
                       kLine = 12, kWeight = 16, kCount = 17;
  const X* of;
  std::int64_t apart;
};
/// The quantities as registers. What all elements share is read once: to write results might change it, for all that a compiler knows.
template <bool kColumns, class R, class X> struct SecondQuantities {
  SecondKnown<X> known;
  R same[kColumns ? 1 : kSecondTable];

  NORMKIT_LOCAL explicit SecondQuantities(SecondKnown<X> from) : known(from) {
    if constexpr (!kColumns)
      for (int k = 0; k < kSecondTable; ++k) same[k] = broadcast<R>(from.of[k]);
  }
  template <class P> NORMKIT_LOCAL R at(P place, int k) const {
    if constexpr (kColumns) return place.load(known.of + k * known.apart);
    else return same[k];
  }
};
static_assert(kSecondTable == SecondKnown<double>::kCount);
static_assert(sizeof(SecondGradient<double>) == kSecondSolved * sizeof(double));

/// Parameters along the elements.
template <class X> struct SecondParams {
  const X *weight, *bias, *ddweight, *ddbias;
  bool has_ddweight;
};
template <class X> struct SecondParamBuffers {
  ParamBuffer<X, kSecondRoom> weights, biases, ddweights, ddbiases;

  SecondParams<X> read(const Task& t, std::int64_t parameter, std::int64_t n) {
    return {weights.read(t.weight, parameter, n, 1), biases.read(t.bias, parameter, n, 0),
            ddweights.read(t.ddweight, parameter, n, 0), ddbiases.read(t.ddbias, parameter, n, 0),
            t.ddweight.data != nullptr};
  }
};

/// Fetches what is read so many bytes after element i of x and dy, and of v. Where that is 0 nothing is gained, but to ask would cost
/// more.
template <class X>
NORMKIT_LOCAL void fetch_second(const SecondRow<X>& row, std::int64_t i, std::int64_t ahead, std::int64_t ahead_of_v) {
  for (const X* from : {row.x, row.dy}) prefetch_second(reinterpret_cast<const char*>(from + i) + ahead);
  prefetch_second(reinterpret_cast<const char*>(row.v + i) + ahead_of_v);
}

/// Writes z and dy of rows of n elements one after another; kKinked: f'(z) and f'(z) * dy of a kink instead. kColumns: what is known
/// follows the elements. p: parameters that do, or null. Where dy is 0 so are products, even where z is NaN, as that of no member may
/// be.
template <bool kColumns, bool kKinked, class X>
[[gnu::noinline, gnu::hot]] void second_inputs(SecondRow<X> row, std::int64_t n, std::int64_t steps,
                                               SecondKnown<X> known, SecondParams<X> p, double below,
                                               std::int64_t ahead, X* z, X* dy) {
  using R = RegisterOf<X>;
  using Known = SecondKnown<X>;
  const SecondQuantities<kColumns, R, X> quantities(known);
  for_registers<R>(0, n, kRegLanes<R>, [&](auto place) NORMKIT_INLINE_LAMBDA {
    const R mean = quantities.at(place, Known::kMean), scale = quantities.at(place, Known::kScale),
            shift = quantities.at(place, Known::kShift);
    SecondRow<X> from = row;
    for (std::int64_t step = 0; step < (kColumns ? steps : 1); ++step, from.next()) {
      fetch_second(from, place.i, ahead, 0);
      R here = forward(place.load(from.x), mean, scale, shift), reaching = place.load(from.dy);
      if (p.weight) here = mul_add(here, place.load(p.weight), place.load(p.bias));
      if constexpr (kKinked) here = kink_slope(here, below), reaching = where(reaching, reaching * here);
      place.store(z + step * n, here), place.store(dy + step * n, reaching);
    }
  });
}

/// Results that go past the caches.
template <class X> struct SecondStreamers { Streamer<X> d_dy, d_x; };

/// Elements of some rows: where they lie, or in buffers, which hold kSecondRoom of them; zeros in the place of a ddx that is not
/// there.
template <class X> class SecondElements {
 public:
  SecondRow<X> row;  // the first

  [[gnu::noinline, gnu::hot]] SecondElements(const Task& t, const SecondPlace& p) {
    row = second_in_place<X>(t, p);
    if (!lie(t)) {
      row.x = read(t, t.x, p, room_[0]), row.dy = read(t, t.dy, p, room_[1]);
      if (t.ddx.data) row.v = read(t, t.ddx, p, room_[2]);
      row.x_row = row.dy_row = row.v_row = p.n;
    }
    if (!results_lie(t)) row.d_dy = room_[3], row.d_x = room_[4], row.d_dy_row = row.d_x_row = p.n;
    if (!t.ddx.data) row.v = kZeros<X>.value, row.v_row = 0;
  }
  /// The first row, reached through an activation. `apart`: numbers from what is known of one row
  /// to the next; kColumns: it follows the elements, and is the same in all rows.
  template <bool kColumns>
  [[gnu::noinline]] SecondRow<X> reach(const Task& t, const SecondPlace& p, SecondKnown<X> known, std::int64_t apart,
                                       SecondParams<X> each, std::int64_t ahead) {
    const bool kinked = has_kink(t.activation);
    X* const to = room_[kinked ? 5 : 6];
    const auto read = [&](const SecondRow<X>& from, std::int64_t rows, SecondKnown<X> of, std::int64_t at) {
      const auto inputs = kinked ? second_inputs<kColumns, true, X> : second_inputs<kColumns, false, X>;
      inputs(from, p.n, rows, of, each, slope_below(t.activation), ahead, to + at, room_[7] + at);
    };
    SecondRow<X> from = row;
    if constexpr (kColumns) read(from, p.rows, known, 0);
    else
      for (std::int64_t k = 0; k < p.rows; ++k, from.next(), known.of += apart) read(from, 1, known, k * p.n);
    if (!kinked) multiply_by_slopes<X>(t.activation, nullptr, to, room_[7], p.rows * p.n, room_[5], room_[6]);
    SecondRow<X> reached = row;
    reached.dy = room_[7], reached.dy_row = p.n, reached.slope = room_[5];
    if (is_bent(t.activation.kind)) reached.bend = room_[6];
    return reached;
  }
  /// How many rows of `columns` columns can be taken at once: more are far from each other, or have no room.
  static std::int64_t most_rows(const Task& t, std::int64_t columns) {
    return results_lie(t) && !has_activation(t) ? 16 : least(16, kBuffer / whole_vectors(columns));
  }
  /// Writes results that are in buffers.
  void write(const Task& t, const SecondPlace& p, SecondStreamers<X>& streamers) const {
    if (!results_lie(t)) write_rows(t, p, streamers);
  }

 private:
  static bool lie(const Task& t) { return t.x.dtype == kDtypeOf<X>; }
  static bool results_lie(const Task& t) { return lie(t) && !t.walk.stream_stores; }
  [[gnu::noinline, gnu::hot]] void write_rows(const Task& t, const SecondPlace& p,
                                              SecondStreamers<X>& streamers) const {
    for (const bool of_dy : {true, false}) {
      const Operand& out = of_dy ? t.d_dy : t.dx;
      Streamer<X>* const streamer = t.walk.stream_stores ? &(of_dy ? streamers.d_dy : streamers.d_x) : nullptr;
      const Pieces pieces = pieces_of(t, out, p);
      for (std::int64_t k = 0; k < pieces.count; ++k) {
        std::byte* const to = second_address(out, p) + k * second_stride(t, out) * size_of(out.dtype);
        const X* const from = room_[of_dy ? 3 : 4] + k * pieces.n;
        if (out.dtype == kDtypeOf<X>) put_all(from, at<X>(to, 0), pieces.n, streamer, Fetch{});
        if constexpr (sizeof(X) == 4) {
          if (out.dtype == Dtype::float16) put_all(from, at<Half>(to, 0), pieces.n, kPlain<Half>, Fetch{});
          if (out.dtype == Dtype::bfloat16) put_all(from, at<Bfloat>(to, 0), pieces.n, kPlain<Bfloat>, Fetch{});
        }
      }
    }
  }
  [[gnu::noinline]] static const X* read(const Task& t, const Operand& a, const SecondPlace& p, X* to) {
    const Pieces pieces = pieces_of(t, a, p);
    for (std::int64_t k = 0; k < pieces.count; ++k)
      read_all(second_address(a, p) + k * second_stride(t, a) * size_of(a.dtype), a.dtype, pieces.n, to + k * pieces.n);
    return to;
  }
  /// What of a place lies together in an array: each lane or step, or all.
  struct Pieces { std::int64_t count, n; };
  static Pieces pieces_of(const Task& t, const Operand& a, const SecondPlace& p) {
    const Pieces apart{p.rows * p.steps, p.n / p.steps};
    return second_stride(t, a) == apart.n ? Pieces{1, p.rows * p.n} : apart;
  }
  // Each begins at lines of memory of its own: what is read and written at once would leave the first-level cache else.
  alignas(64) X room_[8][kSecondRoom + 512 / sizeof(X)];
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
    g = dy * place.load(p.weight);
    if (p.has_ddweight) {
      const R64 q = dy * place.load(p.ddweight);
      s.q = s.q + q, s.qd = times(q, s.qd);
    }
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
[[gnu::noinline, gnu::hot]] void second_row_sums(SecondRow<X> a, std::int64_t n, double mean, SecondParams<X> p,
                                                 Members members, std::int64_t ahead, SecondSums<double>& to) {
  const R64 m = broadcast<R64>(mean), zero = broadcast<R64>(0.0);
  SecondSums<F64> s;
  const std::int64_t ahead_of_v = ahead;
  if (a.slope) ahead = 0;  // second_inputs() fetched those
  for (int k = 0; k < kRegsOf<F64>; ++k) {
    SecondSums<R64> part{zero, zero, zero, zero, zero, zero, zero, zero};
    for_registers<R64>(k * kLanes64, n, kLanes<F64>, [&](auto place) NORMKIT_INLINE_LAMBDA {
      if (k == 0) fetch_second(a, place.i, ahead, ahead_of_v);
      add_second<kWeighted>(part, place, a, m, p, members);
    });
    s.v.r[k] = part.v.r[0], s.vd.r[k] = part.vd.r[0], s.g.r[k] = part.g.r[0], s.gd.r[k] = part.gd.r[0];
    s.vg.r[k] = part.vg.r[0], s.q.r[k] = part.q.r[0], s.qd.r[k] = part.qd.r[0], s.d.r[k] = part.d.r[0];
  }
  if constexpr (!kWeighted) s.q = s.g, s.qd = s.gd;
  const F64 each[] = {s.v, s.vd, s.g, s.gd, s.vg, s.q, s.qd, s.d};
  store(&to.v, sums_of(each));
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

/// Where terms of d_weight and d_bias go, one for each element, or null; added to what is there already, where `adds`.
struct SecondTerms {
  double *weight = nullptr, *bias = nullptr;
  bool adds = false;
};
template <class X> [[gnu::noinline]] void put_some_terms(double* to, const X* terms, int n, bool adds) {
  for (int i = 0; i < n; ++i) to[i] = adds ? static_cast<double>(terms[i]) + to[i] : static_cast<double>(terms[i]);
}
template <class R, class P> NORMKIT_LOCAL void put_second_term(P place, double* to, R term, bool adds) {
  using X = typename R::Lane;
  if constexpr (__is_same(P, PartOfRegister<R>)) {
    X terms[kRegLanes<R>];
    WholeRegister<R>{0}.store(terms, term);
    put_some_terms(to + place.i, terms, place.n, adds);
  } else {
    for (int k = 0; k < kRegLanes<R> / kLanes64; ++k) {
      const WholeRegister<R64> at{place.i + k * kLanes64};
      R64 v;
      if constexpr (sizeof(X) == 8) v = term;
      else v = {{widen_piece(term.r, k)}};
      at.store(to, adds ? v + at.load(to) : v);
    }
  }
}

/// Which loop writes results: of elements without a mask or frozen statistics, if there is no activation, or one with a kink, whose
/// slopes are found once more; else of any, which are reached.
enum class SecondMode { plain, kinked, any };

/// Writes d_dy and d_x, and the terms of d_weight and d_bias. kColumns: what is known follows the elements; kEach: parameters do.
/// Only columns may have several rows.
template <bool kColumns, bool kEach, SecondMode kMode, class X>
[[gnu::noinline, gnu::hot]] void second_row(const Task& t, SecondRow<X> a, std::int64_t n, std::int64_t steps,
                                            SecondKnown<X> known, SecondParams<X> p, Masked members,
                                            SecondTerms terms) {
  using R = RegisterOf<X>;
  using Form = SecondForm<R>;
  using Known = SecondKnown<X>;
  constexpr bool kAny = kMode == SecondMode::any, kKinked = kMode == SecondMode::kinked;
  const bool moves = !kAny || !t.frozen, needs_x = moves || t.ddweight.data;
  const double below = slope_below(t.activation);
  const SecondQuantities<kColumns, R, X> quantities(known);
  for_registers<R>(0, n, kRegLanes<R>, [&](auto place) NORMKIT_INLINE_LAMBDA {
    const auto of = [&](int k) NORMKIT_INLINE_LAMBDA { return quantities.at(place, k); };
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
      if constexpr (kColumns && !kAny) fetch_second(row, place.i, kFarAhead, kFarAhead);
      const R x = place.load(row.x), v = place.load(row.v), x_hat = forward(x, mean, rstd, origin);
      R dy = place.load(row.dy), slope;
      if constexpr (kKinked) {
        R z = forward(x, mean, of(Known::kScale), of(Known::kShift));
        if constexpr (kEach) z = mul_add(z, place.load(p.weight), place.load(p.bias));
        slope = kink_slope(z, below);
        dy = where(dy, dy * slope);
      }
      R d_dy = line.d_dy.constant, d_x = dy * line.dy;
      if (needs_x) d_dy = mul_add(x_hat, line.d_dy.of_x, d_dy);
      if (moves) {
        const R through = second_form(v, x_hat, f.of_v, f.of_x, f.constant);
        d_x = mul_add(dy, line.dy, kAny ? members.only(place, through) : through);
      }
      d_dy = mul_add(v, line.d_dy.of_v, d_dy);
      R dz = zero;
      if constexpr (kKinked) d_dy = d_dy * slope;
      if constexpr (kAny) {
        if (row.bend) {
          const R bend = place.load(row.bend);
          dz = where(bend, bend * d_dy);
          if constexpr (kEach) d_x = mul_add(dz, place.load(p.weight), d_x);
          else d_x = mul_add(dz, of(Known::kWeight), d_x);
        }
        if (row.slope) d_dy = d_dy * place.load(row.slope);
      }
      place.store(row.d_dy, d_dy), place.store(row.d_x, rstd * d_x);
      if (!terms.weight && !terms.bias) continue;
      const Form rp = form(Known::kRp);
      const R of_dy = moves ? second_form(v, x_hat, rp.of_v, rp.of_x, rp.constant) : v * rp.of_v;
      // From a zero on: the sign of a term that is none does not depend on a mask.
      R term = mul_add(dy, of_dy, zero);
      if constexpr (kKinked) term = where(dy, term);
      if constexpr (kAny) term = where(dy, term) + where(dz, dz * x_hat);
      if (kMode != SecondMode::plain && terms.bias) put_second_term(place, terms.bias, dz, terms.adds);
      if (terms.weight) put_second_term(place, terms.weight, term, terms.adds);
    }
  });
}
/// True where terms are wanted of elements: their sums over a piece or over rows, or each by itself.
NORMKIT_LOCAL bool has_second_terms(const Task& t) {
  return t.kind == ParamKind::piece || t.kind == ParamKind::row || t.kind == ParamKind::element;
}
/// Where the terms of elements from `offset` on in x, which begin with element `begin` of a run, go: to the sums of rows, or each to
/// its place.
NORMKIT_LOCAL SecondTerms second_terms(const Task& t, std::int64_t o, std::int64_t lane, std::int64_t offset,
                                       std::int64_t begin) {
  const Geometry& g = t.geometry;
  if (t.kind == ParamKind::row) {
    double* const sums = t.dparams + 2 * (o * row_groups(g) + lane / kRowGroup) * g.run + begin;
    return {sums, is_bent(t.activation.kind) ? sums + g.run : nullptr, true};
  }
  if (t.kind != ParamKind::element) return {};
  const auto to = [&](std::byte* out) { return out ? at<double>(out, offset) : nullptr; };
  return {to(t.dweight_out), has_activation(t) ? to(t.dbias_out) : nullptr};
}

/// The sum of n terms.
NORMKIT_LOCAL double second_total(const double* terms, std::int64_t n) {
  F64 all = broadcast<F64>(0.0);
  for_positions<F64>(n, [&](auto place) NORMKIT_INLINE_LAMBDA { all = all + place.load(terms); });
  return sum(all);
}

/// Calls f with the SecondMode of elements. Doubles, and columns whose elements have parameters, are rare; registers that hold little
/// gain nothing from a loop for kinks.
template <SecondMode kValue> struct SecondModeOf { static constexpr SecondMode value = kValue; };
template <class X, bool kRare, class F> NORMKIT_LOCAL void with_mode(const Task& t, F f) {
  if constexpr (sizeof(X) == 4 && !kRare) {
    if (!t.where.data && !t.frozen && !has_activation(t)) return f(SecondModeOf<SecondMode::plain>{});
    if constexpr (kWide)
      if (!t.where.data && !t.frozen && has_kink(t.activation)) return f(SecondModeOf<SecondMode::kinked>{});
  }
  f(SecondModeOf<SecondMode::any>{});
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

/// Statistics of runs, one thread's: their sums, what is known of their elements, and results.
template <class X> class SecondRuns {
 public:
  static constexpr int kRows = 8;

  explicit SecondRuns(const Task& task) : t(task) {}

  /// Does statistics [first, last), fused.
  void fuse(std::int64_t first, std::int64_t last) {
    const Geometry& g = t.geometry;
    for (std::int64_t r = first; r < last;) {
      const std::int64_t most = is_short() ? least(kRows, kSecondRoom / g.run) : 1;
      begin(r, least(most, least(last - r, g.lanes - r % g.lanes)));
      is_short() ? fuse_rows() : fuse_statistic();
      r += rows_;
    }
  }
  /// Adds a span to the sums of a statistic.
  void sum_span(std::int64_t r, std::int64_t span, SecondReduced& sums, WeightedBends* bends) {
    begin(r, 1);
    add_span(span);
    sums = sums + sums_[0];
    if (bends) *bends = *bends + bends_[0];
  }
  /// What is known of a statistic from its sums.
  SecondGradient<double> solve(std::int64_t r, const SecondReduced& sums, const WeightedBends& bends) {
    begin(r, 1);
    sums_[0] = sums, bends_[0] = bends;
    return solve(0);
  }
  /// Writes the results of a span.
  void write_span(std::int64_t r, std::int64_t span, const SecondGradient<double>& known) {
    begin(r, 1);
    gradient_[0] = known;
    write_pieces(span);
  }

  const Task& t;

 private:
  using Known = SecondKnown<X>;

  /// True where statistics are one row of one piece.
  bool is_short() const {
    const Geometry& g = t.geometry;
    return g.steps == 1 && g.run <= kSecondRoom && (constant_in_statistic(g) || weighs_elements(g));
  }
  [[gnu::noinline]] void begin(std::int64_t r, std::int64_t rows) {
    const Geometry& g = t.geometry;
    first_ = r, rows_ = rows, o_ = r / g.lanes, lane_ = r % g.lanes;
    given_statistics(t, r, static_cast<int>(rows), given_);
    if (constant_in_statistic(g)) share_rows();
    for (std::int64_t k = 0; k < rows; ++k) known_[k][Known::kMean] = static_cast<X>(given_.mean[k]), sums_[k] = {};
    if (is_bent(t.activation.kind))
      for (std::int64_t k = 0; k < rows; ++k) bends_[k] = kNoBends;
  }
  [[gnu::noinline]] void share_rows() {
    const int rows = static_cast<int>(rows_);
    row_parameters(t, t.weight, first_, rows, 1, weight_);
    row_parameters(t, t.ddweight, first_, rows, 0, ddweight_);
    row_parameters(t, t.ddbias, first_, rows, 0, ddbias_);
    if (has_activation(t)) row_parameters(t, t.bias, first_, rows, 0, bias_);
  }
  /// Finds what the elements of a piece share, which the next piece may not.
  [[gnu::cold]] void share(const Piece& piece) {
    if (constant_in_statistic(t.geometry)) return;
    const auto of = [&](const Param& p, double absent) {
      return piece.linear ? absent : element(p, piece.parameter, absent);
    };
    weight_[0] = of(t.weight, 1), bias_[0] = of(t.bias, 0);
    ddweight_[0] = of(t.ddweight, 0), ddbias_[0] = of(t.ddbias, 0);
  }
  SecondShared shared(std::int64_t k) const { return {weight_[k], ddweight_[k], ddbias_[k]}; }
  WeightedBends* bends(std::int64_t k) { return second_bends(t, &bends_[k]); }

  /// Reads elements; through an activation, what z is made of is known before.
  struct Place : SecondPlace {
    Piece piece;
    SecondParams<X> params;
  };
  [[gnu::noinline]] Place place_of(std::int64_t step, const Piece& piece) {
    share(piece);
    return {{o_, step, lane_, piece.begin, piece.n, rows_},
            piece,
            piece.linear ? params_.read(t, piece.parameter, piece.n) : SecondParams<X>{}};
  }
  /// The first row of elements, which an activation was reached through.
  [[gnu::noinline]] SecondRow<X> reach(SecondElements<X>& a, const Place& p, std::int64_t ahead) {
    if (!has_activation(t)) return a.row;
    know(p);
    return a.template reach<false>(t, p, {known_[0], 1}, kSecondTable, p.params, ahead);
  }
  /// Finds what makes z of x.
  [[gnu::noinline, gnu::cold]] void know(const Place& p) {
    for (std::int64_t k = 0; k < rows_; ++k) {
      const Affine<X> affine = forward_affine(given_.template at<X>(static_cast<int>(k)),
                                              p.piece.linear ? 1 : weight_[k], p.piece.linear ? 0 : bias_[k]);
      known_[k][Known::kScale] = affine.scale, known_[k][Known::kShift] = affine.shift;
    }
  }

  /// Adds elements to the sums of their statistics. Where a statistic has one parameter, they are to be weighted yet.
  [[gnu::noinline]] void add(SecondRow<X> row, const Place& p, std::int64_t ahead) {
    const bool shares = constant_in_statistic(t.geometry), each = p.piece.linear && !shares;
    for (std::int64_t k = 0; k < rows_; ++k, row.next()) {
      SecondReduced part;
      const double mean = static_cast<double>(known_[k][Known::kMean]);
      with_members(t, o_, p.step, lane_ + k, p.begin, [&](auto members) NORMKIT_INLINE_LAMBDA {
        part.n = members.count(1, p.n);
        each ? second_row_sums<true>(row, p.n, mean, p.params, members, ahead, part.sums)
             : second_row_sums<false>(row, p.n, mean, {}, members, ahead, part.sums);
      });
      if (!each && !shares) part.sums = second_weighted(shared(0), part.sums);
      sums_[k] = sums_[k] + part;
      if (row.bend) add_bends(k, row, p, each, shares);
    }
  }
  [[gnu::noinline, gnu::cold]] void add_bends(std::int64_t k, const SecondRow<X>& row, const Place& p, bool each,
                                              bool shares) {
    const auto sums = [&](const X* a, const X* b) {
      return bend_row_sums(row, p.n, static_cast<double>(known_[k][Known::kMean]), a, b);
    };
    const X* const w = p.params.weight;
    if (each) {
      bends_[k] = bends_[k] + WeightedBends{sums(w, w), sums(w, p.params.ddweight), sums(w, p.params.ddbias)};
      return;
    }
    const BendSums<double> plain = sums(kOnes<X>.value, kOnes<X>.value);
    if (shares) bends_[k].weight = bends_[k].weight + plain;
    else bends_[k] = bends_[k] + second_weighted(shared(0), plain);
  }

  /// Makes of the sums of a whole statistic what is known of its elements, and its share of d_weight and d_bias.
  [[gnu::noinline]] SecondGradient<double> solve(std::int64_t k) {
    const SecondSums<double> sums = sums_[k].sums;
    const bool shares = constant_in_statistic(t.geometry);
    const BendSums<double> plain = bends(k) ? bends_[k].weight : kNoBends.weight;
    if (shares) sums_[k].sums = second_weighted(shared(k), sums);
    if (shares && bends(k)) bends_[k] = second_weighted(shared(k), plain);
    const SecondGradient<double> known =
        second_known(t, given_.template at<X>(static_cast<int>(k)), sums_[k], bends(k));
    if (t.kind == ParamKind::statistic)
      put_second_dparams(known, shared(k), sums, bends(k) ? &plain : nullptr, t.dparams + 2 * (first_ + k));
    return known;
  }

  /// Writes the results of elements, which were reached already if `reached` is not null.
  void write(SecondElements<X>& a, const Place& p, const SecondRow<X>* reached) {
    for (std::int64_t k = 0; k < rows_; ++k) {
      const auto put = [&](int first, auto... values) NORMKIT_INLINE_LAMBDA {
        for (const double value : {values...}) known_[k][first++] = static_cast<X>(value);
      };
      put_second(gradient_[k], put);
      if (!p.piece.linear) put_second_line(gradient_[k], shared(k), put);
    }
    with_mode<X, false>(t, [&](auto mode) {
      SecondRow<X> row = a.row;
      if constexpr (mode.value == SecondMode::any) row = reached ? *reached : reach(a, p, 0);
      if (mode.value == SecondMode::kinked && !reached) know(p);
      p.piece.linear ? write_rows<true, mode.value>(row, p) : write_rows<false, mode.value>(row, p);
    });
    a.write(t, p, streamers_);
  }
  template <bool kEach, SecondMode kMode> void write_rows(SecondRow<X> row, const Place& p) {
    for (std::int64_t k = 0; k < rows_; ++k, row.next()) {
      Masked members = masked(Everyone{});
      if constexpr (kMode == SecondMode::any) members = members_at(t, o_, p.step, lane_ + k, p.begin);
      const SecondTerms terms = has_second_terms(t) ? terms_of(p, lane_ + k) : SecondTerms{};
      second_row<false, kEach, kMode>(t, row, p.n, 1, {known_[k], 1}, p.params, members, terms);
      if (t.kind == ParamKind::piece) add_terms(p, lane_ + k);
    }
  }
  /// Where the terms of d_weight and d_bias of a row go.
  [[gnu::noinline]] SecondTerms terms_of(const Place& p, std::int64_t lane) {
    const std::int64_t offset = t.geometry.offset(o_, p.step, lane, p.begin);
    if (t.kind == ParamKind::piece) return {terms_[0], is_bent(t.activation.kind) ? terms_[1] : nullptr};
    return second_terms(t, o_, lane, offset, p.begin);
  }
  /// Adds up the terms of a piece.
  [[gnu::noinline]] void add_terms(const Place& p, std::int64_t lane) {
    double* const to = t.dparams + 2 * (t.geometry.offset(o_, p.step, lane, p.begin) / t.geometry.params.stride);
    to[0] += second_total(terms_[0], p.n);
    if (is_bent(t.activation.kind)) to[1] += second_total(terms_[1], p.n);
  }

  void fuse_rows() {
    const Geometry& g = t.geometry;
    const Place p = place_of(0, piece_at(g, o_, g.offset(o_, 0, lane_, 0), 0, g.run, g.run));
    SecondElements<X> a(t, p);
    const SecondRow<X> reached = reach(a, p, t.walk.far_bytes);
    if (!knows()) add(reached, p, t.walk.far_bytes);
    for (std::int64_t k = 0; k < rows_; ++k) gradient_[k] = solve(k);
    write(a, p, &reached);
  }
  [[gnu::cold]] void fuse_statistic() {
    SecondReduced total;
    const std::int64_t spans = chunks_of(t.geometry, t.traversal).spans;
    WeightedBends all = kNoBends;
    for (std::int64_t span = 0; span < spans; ++span) sum_span(first_, span, total, bends(0) ? &all : nullptr);
    const SecondGradient<double> known = solve(first_, total, all);
    for_spans(t, 0, spans, [&](std::int64_t span) { write_span(first_, span, known); });
  }
  /// True where no sums are needed.
  bool knows() const { return t.frozen && t.kind != ParamKind::statistic; }

  /// Calls f(place) for the pieces of a span.
  template <class F> void for_pieces_of(std::int64_t span, F f) {
    for_ranges(t.geometry, chunks_of(t.geometry, t.traversal), span,
               [&](std::int64_t step, std::int64_t begin, std::int64_t end) {
      for_pieces(t, o_, t.geometry.offset(o_, step, lane_, 0), begin, end, kSecondRoom,
                 [&](Piece piece) { f(place_of(step, piece)); });
    });
  }
  [[gnu::cold]] void add_span(std::int64_t span) {
    if (knows()) return;
    for_pieces_of(span, [&](const Place& p) {
      SecondElements<X> a(t, p);
      add(reach(a, p, t.walk.far_bytes), p, t.walk.far_bytes);
    });
  }
  [[gnu::cold]] void write_pieces(std::int64_t span) {
    for_pieces_of(span, [&](const Place& p) {
      SecondElements<X> a(t, p);
      write(a, p, nullptr);
    });
  }

  std::int64_t first_ = 0, rows_ = 0, o_ = 0, lane_ = 0;
  RowStatistics<kRows> given_;
  // What the elements of a piece share, and sums, of each row.
  alignas(64) double weight_[kRows], bias_[kRows], ddweight_[kRows], ddbias_[kRows];
  SecondReduced sums_[kRows];
  WeightedBends bends_[kRows];
  SecondGradient<double> gradient_[kRows];
  alignas(64) X known_[kRows][kSecondTable];
  alignas(64) double terms_[2][kSecondRoom];
  SecondParamBuffers<X> params_;
  SecondStreamers<X> streamers_;
};

// ---- columns -----------------------------------------------------------------------------------------------------

/// Sums of columns, or what is known of them: arrays of numbers that are `apart`, one a quantity. Of few columns there are copies, see
/// second_copies().
template <class S> struct SecondColumns {
  S* memory;
  std::int64_t columns, copies, apart;
  SecondColumns(const Geometry& g, double* from)
      : memory(reinterpret_cast<S*>(from)),
        columns(g.columns()),
        copies(second_copies(g)),
        apart(whole_vectors(copies * columns)) {}
  NORMKIT_LOCAL S* array(int k) const { return memory + k * apart; }
  NORMKIT_LOCAL void put(int j, std::int64_t k, double value) const {
    for (std::int64_t copy = 0; copy < copies; ++copy) array(j)[copy * columns + k] = static_cast<S>(value);
  }
  /// Quantity j of column k, of all copies.
  NORMKIT_LOCAL S sum(int j, std::int64_t k) const {
    S sum = array(j)[k];
    for (std::int64_t copy = 1; copy < copies; ++copy) sum += array(j)[copy * columns + k];
    return sum;
  }
};
using SecondColumnSums = SecondColumns<double>;

/// The sums of column k.
NORMKIT_LOCAL SecondReduced second_column(const SecondColumnSums& s, std::int64_t k) {
  const auto at = [&](int j) { return s.sum(j, k); };
  return {{at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7)}, at(8)};
}
NORMKIT_LOCAL BendSums<double> bend_column(const SecondColumnSums& s, int set, std::int64_t k) {
  const auto at = [&](int j) { return s.sum(kSecondDoubles + set * kBendDoubles + j, k); };
  return {at(0), at(1), at(2), at(3), at(4)};
}

/// Adds rows of some columns, one after another.
template <bool kWeighted, class Members, class X>
[[gnu::noinline, gnu::hot]] void add_second_columns(SecondRow<X> a, const SecondPlace& columns, const X* mean,
                                                    SecondParams<X> p, Members members, const SecondColumnSums& to) {
  const std::int64_t k = columns.column, rows = columns.rows;
  for_registers<R64>(0, columns.n, kLanes64, [&](auto place) NORMKIT_INLINE_LAMBDA {
    const auto sum = [&](int j)
                         NORMKIT_INLINE_LAMBDA { return place.load(static_cast<const double*>(to.array(j)) + k); };
    const R64 m = place.load(mean + k);
    SecondSums<R64> s{sum(0), sum(1), sum(2), sum(3), sum(4), sum(5), sum(6), sum(7)};
    R64 count = sum(8);
    SecondRow<X> row = a;
    for (std::int64_t j = 0; j < rows; ++j) {
      add_second<kWeighted>(s, place, row, m, p, members);
      fetch_second(row, place.i, row.slope ? 0 : kFarAhead, kFarAhead);
      if constexpr (!Members::kAll) count = count + members.only(place, broadcast<R64>(1.0));
      row.next();
    }
    if constexpr (Members::kAll) count = count + broadcast<R64>(static_cast<double>(rows));
    if constexpr (!kWeighted) s.q = s.g, s.qd = s.gd;
    const R64 all[] = {s.v, s.vd, s.g, s.gd, s.vg, s.q, s.qd, s.d, count};
    for (int j = 0; j < kSecondDoubles; ++j) place.store(to.array(j) + k, all[j]);
  });
}
/// The same for sums of bends, which are the `set`th.
template <class X>
[[gnu::noinline, gnu::hot]] void add_bend_columns(SecondRow<X> row, const SecondPlace& columns, const X* mean,
                                                  const X* a, const X* b, const SecondColumnSums& to, int set) {
  const std::int64_t k = columns.column;
  for_registers<R64>(0, columns.n, kLanes64, [&](auto place) NORMKIT_INLINE_LAMBDA {
    const auto array = [&](int j)
                           NORMKIT_INLINE_LAMBDA { return to.array(kSecondDoubles + set * kBendDoubles + j) + k; };
    const auto sum = [&](int j) NORMKIT_INLINE_LAMBDA { return place.load(static_cast<const double*>(array(j))); };
    BendSums<R64> s{sum(0), sum(1), sum(2), sum(3), sum(4)};
    SecondRow<X> here = row;
    for (std::int64_t j = 0; j < columns.rows; ++j, here.next()) add_bends(s, place, here, place.load(mean + k), a, b);
    const R64 all[] = {s.hv, s.hvd, s.h, s.hd, s.hdd};
    for (int j = 0; j < kBendDoubles; ++j) place.store(array(j), all[j]);
  });
}

/// Calls f(place) for the columns of a span, some at a time, and several rows of them where there is nothing but to compute.
template <class X, class F>
NORMKIT_LOCAL void for_second_columns(const Task& t, std::int64_t o, std::int64_t span, F f) {
  const Geometry& g = t.geometry;
  const std::int64_t columns = g.columns(), end = span_end(g, span), copies = second_copies(g);
  const bool several = !t.where.data && constant_in_column(g);
  const std::int64_t steps = several ? copies : 1, n = steps * columns;
  const std::int64_t most = several ? SecondElements<X>::most_rows(t, least(kBuffer, n)) : 1;
  for (std::int64_t step = span_begin(span); step < end;) {
    const std::int64_t rows = least(most, (end - step) / steps);
    const std::int64_t last = rows > 0 ? 0 : end - step;  // steps that do not fill a row
    for (std::int64_t k = 0; k < columns; k += kBuffer) {
      const std::int64_t column = step % copies / steps * columns + k, width = least(kBuffer, columns - k);
      if (rows > 0) f(SecondPlace{o, step, 0, k, steps * width, rows, steps, column});
      else f(SecondPlace{o, step, 0, k, last * width, 1, last, column});
    }
    step += rows > 0 ? rows * steps : last;
  }
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
    const SecondKnown<X> known{table.memory + place.column, table.apart};
    const SecondRow<X> row = has_activation(t) ? a.template reach<true>(t, place, known, 0, p, kFarAhead) : a.row;
    with_members(t, o, place.step, 0, place.begin, [&](auto members) {
      if (each) add_second_columns<true>(row, place, mean, p, masked(members), to);  // which is rare
      else add_second_columns<false>(row, place, mean, {}, members, to);
    });
    if (!row.bend) return;
    add_bend_columns(row, place, mean, each ? p.weight : one, each ? p.weight : one, to, 0);
    if (!each) return;
    add_bend_columns(row, place, mean, p.weight, p.ddweight, to, 1);
    add_bend_columns(row, place, mean, p.weight, p.ddbias, to, 2);
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
      const Affine<X> affine = column_affine(t, parameter, s);
      table.put(Known::kMean, k, s.mean);
      table.put(Known::kScale, k, affine.scale), table.put(Known::kShift, k, affine.shift);
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
        for (const double value : {values...}) table.put(first++, k, value);
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

/// Writes the results of a span.
template <class X>
[[gnu::cold]] void second_column_span(const Task& t, std::int64_t o, std::int64_t span, const SecondColumns<X>& table,
                                      SecondStreamers<X>& streamers) {
  const Geometry& g = t.geometry;
  SecondParamBuffers<X> buffers;
  for_second_columns<X>(t, o, span, [&](const SecondPlace& p) {
    const SecondKnown<X> known{table.memory + p.column, table.apart};
    SecondElements<X> a(t, p);
    const SecondTerms terms = second_terms(t, o, 0, g.offset(o, p.step, 0, 0) + p.begin, p.begin);
    const auto write = [&](auto each, const SecondParams<X>& params) {
      with_mode<X, each.value>(t, [&](auto mode) {
        SecondRow<X> row = a.row;
        if (mode.value == SecondMode::any && has_activation(t))
          row = a.template reach<true>(t, p, known, 0, params, kFarAhead);
        second_row<true, each.value, mode.value>(t, row, p.n, p.rows, known, params,
                                                 members_at(t, o, p.step, 0, p.begin), terms);
      });
    };
    if (constant_in_column(g)) write(Count<false>{}, {});
    else write(Count<true>{}, buffers.read(t, second_parameter(g, p), p.n));
    a.write(t, p, streamers);
  });
}

// ---- entry points ------------------------------------------------------------------------------------------------

/// Clears the sums of columns.
SecondColumnSums second_cleared(const Task& t, double* memory) {
  const SecondColumnSums sums(t.geometry, memory);
  const std::int64_t count = second_doubles(t) * sums.apart;
  for (std::int64_t k = 0; k < count; ++k) memory[k] = 0;
  return sums;
}
void add_second_parts(const Task& t, const SecondColumnSums& to, const SecondColumnSums& part) {
  const std::int64_t count = second_doubles(t) * to.apart;
  for (std::int64_t k = 0; k < count; ++k) to.memory[k] += part.memory[k];
}

template <class X>
[[gnu::cold]] void second_sums(const Task& t, std::int64_t begin, std::int64_t end, double* scratch) {
  const std::int64_t spans = chunks_of(t.geometry, t.traversal).spans;
  SecondRuns<X> runs(t);
  for (std::int64_t unit = begin; unit < end; ++unit) {
    double* const part = t.partials + partial_doubles(t, true) * unit;
    if (t.traversal == Traversal::runs) {
      auto& sums = *reinterpret_cast<SecondReduced*>(part) = {};
      WeightedBends* const bends = second_bends(t, reinterpret_cast<WeightedBends*>(part + kSecondDoubles));
      if (bends) *bends = kNoBends;
      runs.sum_span(unit / spans, unit % spans, sums, bends);
      continue;
    }
    const SecondColumns<X> table(t.geometry, scratch);
    second_know(t, unit / spans, table);
    second_column_sums(t, unit / spans, unit % spans, table, second_cleared(t, part));
  }
}

template <class X> [[gnu::cold]] void second_finish(const Task& t, std::int64_t begin, std::int64_t end) {
  const std::int64_t spans = chunks_of(t.geometry, t.traversal).spans, each = partial_doubles(t, true);
  SecondRuns<X> runs(t);
  for (std::int64_t unit = begin; unit < end; ++unit) {
    double *const part = t.partials + each * unit * spans, *const solved = t.solved + solved_doubles(t) * unit;
    if (t.traversal == Traversal::runs) {
      SecondReduced reduced;
      WeightedBends bends = kNoBends;
      for (std::int64_t span = 0; span < spans; ++span) {
        reduced = reduced + *reinterpret_cast<SecondReduced*>(part + each * span);
        if (second_bends(t, &bends))
          bends = bends + *reinterpret_cast<WeightedBends*>(part + each * span + kSecondDoubles);
      }
      *reinterpret_cast<SecondGradient<double>*>(solved) = runs.solve(unit, reduced, bends);
      continue;
    }
    for (std::int64_t span = 1; span < spans; ++span)
      add_second_parts(t, {t.geometry, part}, {t.geometry, part + each * span});
    second_know<X>(t, unit, {t.geometry, solved});
    second_solve_columns<X>(t, unit, {t.geometry, part}, {t.geometry, solved});
  }
}

template <class X> [[gnu::cold]] void second_apply(const Task& t, std::int64_t begin, std::int64_t end) {
  const std::int64_t spans = chunks_of(t.geometry, t.traversal).spans;
  SecondRuns<X> runs(t);
  SecondStreamers<X> streamers;
  for_spans(t, begin, end, [&](std::int64_t unit) {
    const auto solved = [&](std::int64_t k) { return t.solved + solved_doubles(t) * k; };
    if (t.traversal == Traversal::lanes)
      return second_column_span<X>(t, unit / spans, unit % spans, {t.geometry, solved(unit / spans)}, streamers);
    const Rows rows = rows_of(t, unit / spans);
    for (std::int64_t r = rows.first; r < rows.last; ++r)
      runs.write_span(r, unit % spans, *reinterpret_cast<SecondGradient<double>*>(solved(r)));
  });
}

template <class X>
[[gnu::cold]] void second_fused(const Task& t, std::int64_t begin, std::int64_t end, double* scratch) {
  if (t.traversal == Traversal::runs) return SecondRuns<X>(t).fuse(rows_of(t, begin).first, rows_of(t, end - 1).last);
  const std::int64_t spans = chunks_of(t.geometry, t.traversal).spans;
  SecondStreamers<X> streamers;
  const SecondColumns<X> table(t.geometry, scratch);
  scratch += kSecondTable * table.apart;
  for (std::int64_t unit = begin; unit < end; ++unit) {
    const SecondColumnSums sums = second_cleared(t, scratch);
    second_know(t, unit, table);
    for (std::int64_t span = 0; span < spans; ++span) {
      const SecondColumnSums own = span == 0 ? sums : second_cleared(t, scratch + second_doubles(t) * sums.apart);
      second_column_sums(t, unit, span, table, own);
      if (span > 0) add_second_parts(t, sums, own);
    }
    second_solve_columns(t, unit, sums, table);
    for_spans(t, 0, spans, [&](std::int64_t span) { second_column_span(t, unit, span, table, streamers); });
  }
}

}  // namespace
}  // namespace normkit
