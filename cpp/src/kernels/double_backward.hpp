// The gradient of a backward, in both traversals. Sums are doubles; results are computed in the compute type X, float or double,
// as those of a backward are. All types with one X have one loop: half types are read and written through buffers.
// What is not a loop over elements is marked as cold, which makes it small.
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
template <class X> [[gnu::noinline, gnu::cold, maybe_unused]] void copy_few(const X* from, int n, X* to) {
  for (int k = 0; k < n; ++k) to[k] = from[k];
}
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
      copy_few(p + i, n, part);
      return WholeRegister<R>{0}.load(part);
    }
  }
  template <class X> NORMKIT_LOCAL void store(X* p, R v) const {
    if constexpr (kMaskedParts) {
      reg_store_part(p + i, v.r[0], n);
    } else {
      X part[kRegLanes<R>];
      WholeRegister<R>{0}.store(part, v);
      copy_few(part, n, p + i);
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

/// Elements of a step, one after another, and of other steps, which are so far apart.
template <class X> struct SecondRow {
  const X *x, *dy, *v;
  X *d_dy, *d_x;
  std::int64_t x_step, dy_step, v_step, d_dy_step, d_x_step;

  NORMKIT_LOCAL void next() { x += x_step, dy += dy_step, v += v_step, d_dy += d_dy_step, d_x += d_x_step; }
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
  static bool lie(const Task& t) { return t.x.dtype == kDtypeOf<X>; }
  static bool results_lie(const Task& t) { return lie(t) && !t.walk.stream_stores; }
  /// How many steps of `columns` columns can be taken at once: more are far from each other, or have no room.
  static std::int64_t most_steps(const Task& t, std::int64_t columns) {
    return results_lie(t) ? 16 : least(16, kBuffer / whole_vectors(columns));
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
  static const X* read(const Operand& a, const SecondPlace& p, X* to) {
    for (std::int64_t step = 0; step < p.steps; ++step)
      read_all(second_address(a, p) + step * a.strides.step * size_of(a.dtype), a.dtype, p.n, to + step * p.n);
    return to;
  }
  alignas(64) X room_[5][kBuffer];
};

/// Weight, ddweight and ddbias along the elements.
template <class X> struct SecondParams { const X *weight, *ddweight, *ddbias; };
template <class X> struct SecondParamBuffers {
  ParamBuffer<X> weights, ddweights, ddbiases;

  SecondParams<X> read(const Task& t, std::int64_t parameter, std::int64_t n) {
    return {weights.read(t.weight, parameter, n, 1), ddweights.read(t.ddweight, parameter, n, 0),
            ddbiases.read(t.ddbias, parameter, n, 0)};
  }
};

// ---- sums --------------------------------------------------------------------------------------------------------

/// Sums over a part of a statistic, and its members.
struct SecondReduced {
  SecondSums<double> sums{0, 0, 0, 0, 0, 0, 0, 0};
  double n = 0;
};
NORMKIT_LOCAL SecondReduced operator+(SecondReduced a, SecondReduced b) { return {a.sums + b.sums, a.n + b.n}; }
static_assert(sizeof(SecondReduced) == kSecondDoubles * sizeof(double));

/// Sums in which dy stands for g and for q, times the weight and ddweight that all their elements share.
NORMKIT_LOCAL SecondSums<double> second_weighted(const Task& t, std::int64_t parameter, SecondSums<double> s) {
  const double weight = element(t.weight, parameter, 1), ddweight = element(t.ddweight, parameter, 0);
  return {s.v, s.vd, weight * s.g, weight * s.gd, weight * s.vg, ddweight * s.q, ddweight * s.qd, s.d};
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

/// Fetches what is read long after element i of each array.
template <class X> NORMKIT_LOCAL void fetch_second(const SecondRow<X>& row, std::int64_t i) {
  for (const X* from : {row.x, row.dy, row.v}) prefetch_second(reinterpret_cast<const char*>(from + i) + kFarAhead);
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
      if (k == 0 && fetches) fetch_second(a, place.i);
      add_second<kWeighted>(part, place, a, m, p, members);
    });
    s.v.r[k] = part.v.r[0], s.vd.r[k] = part.vd.r[0], s.g.r[k] = part.g.r[0], s.gd.r[k] = part.gd.r[0];
    s.vg.r[k] = part.vg.r[0], s.q.r[k] = part.q.r[0], s.qd.r[k] = part.qd.r[0], s.d.r[k] = part.d.r[0];
  }
  SecondSums<double> sums{sum(s.v), sum(s.vd), sum(s.g), sum(s.gd), sum(s.vg), sum(s.q), sum(s.qd), sum(s.d)};
  if constexpr (!kWeighted) sums.q = sums.g, sums.qd = sums.gd;
  return sums;
}

/// Calls f(step, piece) for the pieces of a span of a statistic of runs.
template <class F>
NORMKIT_LOCAL void for_second_pieces(const Task& t, std::int64_t o, std::int64_t lane, Chunks c, std::int64_t span,
                                     F f) {
  for_ranges(t.geometry, c, span, [&](std::int64_t step, std::int64_t begin, std::int64_t end) {
    for_pieces(t, o, t.geometry.offset(o, step, lane, 0), begin, end, kBuffer, [&](Piece piece) { f(step, piece); });
  });
}

/// The sums over a span of a statistic. Where the statistic has one parameter, they are to be weighted yet.
template <class X>
[[gnu::cold]] SecondReduced second_span_sums(const Task& t, std::int64_t r, Chunks c, std::int64_t span) {
  const std::int64_t o = r / t.geometry.lanes, lane = r % t.geometry.lanes;
  const bool shares = constant_in_statistic(t.geometry), fetches = t.walk.far_bytes > 0;
  const double mean = given_statistic<X>(t, r).mean;
  SecondParamBuffers<X> params;
  SecondReduced total;
  if (t.frozen && t.kind != ParamKind::statistic) return total;
  for_second_pieces(t, o, lane, c, span, [&](std::int64_t step, Piece piece) {
    const SecondElements<X> a(t, {o, step, lane, piece.begin, piece.n});
    const bool each = piece.linear && !shares;
    SecondReduced part;
    with_members(t, o, step, lane, piece.begin, [&](auto members) {
      part.n = members.count(1, piece.n);
      part.sums =
          each ? second_row_sums<true>(a.row, piece.n, mean, params.read(t, piece.parameter, piece.n), members, fetches)
               : second_row_sums<false>(a.row, piece.n, mean, {}, members, fetches);
    });
    if (!each && !shares) part.sums = second_weighted(t, piece.parameter, part.sums);
    total = total + part;
  });
  return total;
}

// ---- results -----------------------------------------------------------------------------------------------------

/// What is known of elements, of all of them or of each column: quantities that are `apart` numbers from each other. `line` is for
/// parameters that do not follow the elements, rp and g for others; `rp` for the terms of d_weight as well.
template <class X> struct SecondKnown {
  static constexpr int kMean = 0, kRstd = 1, kOrigin = 2, kG = 3, kRp = 4, kThrough = 7, kLine = 10, kCount = 14;
  const X* of;
  std::int64_t apart;
};
static_assert(kSecondTable == SecondKnown<double>::kCount);
static_assert(sizeof(SecondGradient<double>) == kSecondSolved * sizeof(double));

/// Calls put(place of the first, values...) with what is known of a statistic.
template <class X, class F> NORMKIT_LOCAL void put_second(X mean, const SecondGradient<double>& known, F put) {
  const auto& [rstd, origin, g, rp, through] = known;
  put(0, static_cast<double>(mean), rstd, origin, g, rp.of_v, rp.of_x, rp.constant, through.of_v, through.of_x,
      through.constant);
}
/// With the parameters that the elements share.
template <class F>
NORMKIT_LOCAL void put_second_line(const SecondGradient<double>& k, double weight, double ddweight, double ddbias,
                                   F put) {
  const SecondLine<double> line = second_line(k.g, k.rp, weight, ddweight, ddbias);
  put(SecondKnown<double>::kLine, line.d_dy.of_v, line.d_dy.of_x, line.d_dy.constant, line.dy);
}

/// Writes d_dy and d_x, and the terms of d_weight, dy * rp, where `terms` is not null. kColumns: what is known follows the
/// elements; kEach: parameters do. kPlain: there is no mask, and statistics are functions of x. Only plain columns may have
/// several steps.
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
      if constexpr (kColumns) return place.load(known.of + k * known.apart);
      else return broadcast<R>(all[k]);
    };
    const auto form = [&](int k) NORMKIT_INLINE_LAMBDA { return Form{of(k), of(k + 1), of(k + 2)}; };
    SecondLine<R> line;
    if constexpr (kEach)
      line = second_line(of(Known::kG), form(Known::kRp), place.load(p.weight), place.load(p.ddweight),
                         place.load(p.ddbias));
    else line = {form(Known::kLine), of(Known::kLine + 3)};
    const R mean = of(Known::kMean), rstd = of(Known::kRstd), origin = of(Known::kOrigin);
    const Form f = form(Known::kThrough);
    SecondRow<X> row = a;
    for (std::int64_t step = 0; step < (kColumns && kPlain ? steps : 1); ++step, row.next()) {
      if constexpr (kColumns && kPlain) fetch_second(row, place.i);
      const R dy = place.load(row.dy), v = place.load(row.v), x_hat = forward(place.load(row.x), mean, rstd, origin);
      R d_dy = line.d_dy.constant, d_x = dy * line.dy;
      if (needs_x) d_dy = mul_add(x_hat, line.d_dy.of_x, d_dy);
      if (moves) {
        const R through = second_form(v, x_hat, f.of_v, f.of_x, f.constant);
        d_x = mul_add(dy, line.dy, kPlain ? through : members.only(place, through));
      }
      place.store(row.d_dy, mul_add(v, line.d_dy.of_v, d_dy)), place.store(row.d_x, rstd * d_x);
      if (!terms) continue;
      const Form rp = form(Known::kRp);
      const R of_dy = moves ? second_form(v, x_hat, rp.of_v, rp.of_x, rp.constant) : v * rp.of_v;
      // From a zero on: the sign of a term that is none does not depend on a mask.
      R term = mul_add(dy, of_dy, broadcast<R>(X(0)));
      if constexpr (!kPlain) term = where(dy, term);
      place.store(terms, term);
    }
  });
}
/// True where nothing is masked and nothing is frozen.
NORMKIT_LOCAL bool second_is_plain(const Task& t) { return !t.where.data && !t.frozen; }

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
      second_row<kColumns, follows.value, plain.value>(t, a.row, p.n, p.steps, known, params, members, terms);
    };
    const auto any = [&](auto follows) {
      second_is_plain(t) ? rows(follows, Count<true>{}) : rows(follows, Count<false>{});
    };
    each ? any(Count<true>{}) : any(Count<false>{});
    a.write(t, p, streamers_);
  }

  const Task& t;

 private:
  SecondParamBuffers<X> params_;
  SecondStreamers<X> streamers_;
};

/// Where terms of d_weight go: added up over a piece, or over rows, or one for each element of x.
template <class X>
[[gnu::noinline, gnu::hot]] void put_second_terms(const Task& t, std::int64_t o, std::int64_t lane, std::int64_t offset,
                                                  Piece piece, const X* terms) {
  const Geometry& g = t.geometry;
  alignas(64) double wide[kBuffer];
  for (std::int64_t i = 0; i < piece.n; ++i) wide[i] = terms[i];
  if (t.kind == ParamKind::piece) {
    F64 all = broadcast<F64>(0.0);
    for_positions<F64>(piece.n, [&](auto place) NORMKIT_INLINE_LAMBDA { all = all + place.load(wide); });
    t.dparams[2 * (offset / g.params.stride)] += sum(all);
  } else if (t.kind == ParamKind::row) {
    double* const sums = t.dparams + 2 * (o * row_groups(g) + lane / kRowGroup) * g.run + piece.begin;
    for (std::int64_t i = 0; i < piece.n; ++i) sums[i] += wide[i];
  } else {
    copy(wide, piece.n, at<double>(t.dweight_out, offset));
  }
}

bool has_second_terms(const Task& t) {
  return t.kind == ParamKind::piece || t.kind == ParamKind::row || (t.kind == ParamKind::element && t.dweight_out);
}

// ---- runs --------------------------------------------------------------------------------------------------------

/// Sums of a whole statistic, weighted, as what is known of its elements.
template <class X>
NORMKIT_LOCAL SecondGradient<double> second_known(const Task& t, Statistic<X> s, const SecondReduced& weighted) {
  const double shift = mean_shift(t, s, weighted.sums.d, t.frozen ? 1 : weighted.n);
  return second_gradient_of(s.rstd, shift, recenter(weighted.sums, shift), t.frozen ? 0 : weighted.n, t.centered);
}

/// Makes of the sums of a whole statistic the coefficients of its elements, and its share of d_weight.
template <class X>
[[gnu::cold]] SecondGradient<double> second_solve(const Task& t, std::int64_t r, SecondReduced reduced) {
  const Geometry& g = t.geometry;
  const std::int64_t o = r / g.lanes, lane = r % g.lanes;
  const SecondSums<double> sums = reduced.sums;
  if (constant_in_statistic(g)) reduced.sums = second_weighted(t, g.parameter(o, g.offset(o, 0, lane, 0)), sums);
  const SecondGradient<double> known = second_known(t, given_statistic<X>(t, r), reduced);
  if (t.kind == ParamKind::statistic) t.dparams[2 * r] = second_dweight(known, sums);
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
  put_second(given_statistic<X>(t, r).mean, k, put);
  alignas(64) X terms[kBuffer];
  X* const to = has_second_terms(t) ? terms : nullptr;
  for_second_pieces(t, o, lane, c, span, [&](std::int64_t step, Piece piece) {
    if (!piece.linear)
      put_second_line(k, element(t.weight, piece.parameter, 1), element(t.ddweight, piece.parameter, 0),
                      element(t.ddbias, piece.parameter, 0), put);
    writer.template write<false>({o, step, lane, piece.begin, piece.n}, {of, 1}, piece.linear, piece.parameter, to);
    if (to) put_second_terms(t, o, lane, t.geometry.offset(o, step, lane, piece.begin), piece, terms);
  });
}

// ---- columns -----------------------------------------------------------------------------------------------------

/// Sums of columns, or what is known of them: arrays of numbers, one a quantity.
template <class S, int kArrays> struct SecondColumns {
  S* array[kArrays];
  SecondColumns(double* memory, std::int64_t columns) {
    for (int k = 0; k < kArrays; ++k) array[k] = reinterpret_cast<S*>(memory) + k * columns;
  }
};
using SecondColumnSums = SecondColumns<double, kSecondDoubles>;
template <class X> using SecondTable = SecondColumns<X, kSecondTable>;

NORMKIT_LOCAL SecondReduced second_column(const SecondColumnSums& s, std::int64_t k) {
  const auto& a = s.array;
  return {{a[0][k], a[1][k], a[2][k], a[3][k], a[4][k], a[5][k], a[6][k], a[7][k]}, a[8][k]};
}

/// Adds steps of some columns, one after another.
template <bool kWeighted, class Members, class X>
[[gnu::noinline, gnu::hot]] void add_second_columns(SecondRow<X> a, const SecondPlace& columns, const double* mean,
                                                    SecondParams<X> p, Members members, const SecondColumnSums& to) {
  const std::int64_t k = columns.begin, steps = columns.steps;
  for_registers<R64>(0, columns.n, kLanes64, [&](auto place) NORMKIT_INLINE_LAMBDA {
    const auto sum = [&](int j)
                         NORMKIT_INLINE_LAMBDA { return place.load(static_cast<const double*>(to.array[j]) + k); };
    const R64 m = place.load(mean + k);
    SecondSums<R64> s{sum(0), sum(1), sum(2), sum(3), sum(4), sum(5), sum(6), sum(7)};
    R64 count = sum(8);
    SecondRow<X> row = a;
    for (std::int64_t step = 0; step < steps; ++step) {
      add_second<kWeighted>(s, place, row, m, p, members);
      fetch_second(row, place.i);
      if constexpr (!Members::kAll) count = count + members.only(place, broadcast<R64>(1.0));
      row.next();
    }
    if constexpr (Members::kAll) count = count + broadcast<R64>(static_cast<double>(steps));
    if constexpr (!kWeighted) s.q = s.g, s.qd = s.gd;
    const R64 all[] = {s.v, s.vd, s.g, s.gd, s.vg, s.q, s.qd, s.d, count};
    for (int j = 0; j < kSecondDoubles; ++j) place.store(to.array[j] + k, all[j]);
  });
}

/// Calls f(place) for the columns of a span, some at a time, and several steps of them where there is nothing but to compute.
template <class X, class F>
NORMKIT_LOCAL void for_second_columns(const Task& t, std::int64_t o, std::int64_t span, F f) {
  const std::int64_t columns = t.geometry.columns(), end = span_end(t.geometry, span);
  const bool several = second_is_plain(t) && constant_in_column(t.geometry);
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
[[gnu::cold]] void second_column_sums(const Task& t, std::int64_t o, std::int64_t span, const double* mean,
                                      SecondColumnSums to) {
  SecondParamBuffers<X> params;
  for_second_columns<X>(t, o, span, [&](const SecondPlace& p) {
    const SecondElements<X> a(t, p);
    with_members(t, o, p.step, 0, p.begin, [&](auto members) {
      if (constant_in_column(t.geometry)) return add_second_columns<false>(a.row, p, mean, {}, members, to);
      add_second_columns<true>(a.row, p, mean, params.read(t, second_parameter(t.geometry, p), p.n), members, to);
    });
  });
}

/// The given means, for each column.
template <class X> [[gnu::cold]] void second_means(const Task& t, std::int64_t o, double* mean) {
  const Geometry& g = t.geometry;
  for (std::int64_t lane = 0; lane < g.lanes; ++lane)
    for (std::int64_t k = lane * g.run; k < (lane + 1) * g.run; ++k)
      mean[k] = given_statistic<X>(t, o * g.lanes + lane).mean;
}

/// Makes of the sums of columns the table that is known of them, and their shares of d_weight.
template <class X>
[[gnu::cold]] void second_solve_columns(const Task& t, std::int64_t o, const SecondColumnSums& sums,
                                        const SecondTable<X>& table) {
  const Geometry& g = t.geometry;
  ColumnParameter parameter(t, o), folded = parameter;
  for (std::int64_t lane = 0; lane < g.lanes; ++lane) {
    SecondReduced all;
    for (std::int64_t k = lane * g.run; k < (lane + 1) * g.run; ++k, folded.next()) {
      SecondReduced column = second_column(sums, k);
      if (constant_in_column(g)) column.sums = second_weighted(t, folded.index(), column.sums);
      all = all + column;
    }
    const Statistic<X> s = given_statistic<X>(t, o * g.lanes + lane);
    const SecondGradient<double> known = second_known(t, s, all);
    for (std::int64_t k = lane * g.run; k < (lane + 1) * g.run; ++k, parameter.next()) {
      const auto put = [&](int first, auto... values) {
        for (const double value : {values...}) table.array[first++][k] = static_cast<X>(value);
      };
      put_second(s.mean, known, put);
      put_second_line(known, parameter.of(t.weight, 1), parameter.of(t.ddweight, 0), parameter.of(t.ddbias, 0), put);
      if (t.kind == ParamKind::column)
        t.dparams[2 * (o * g.columns() + k)] = second_dweight(known, second_column(sums, k).sums);
    }
  }
}

template <class X>
[[gnu::cold]] void second_column_span(SecondWriter<X>& writer, std::int64_t o, std::int64_t span,
                                      const SecondTable<X>& table) {
  const Task& t = writer.t;
  const Geometry& g = t.geometry;
  const bool each = !constant_in_column(g);
  alignas(64) X terms[kBuffer];
  X* const to = has_second_terms(t) ? terms : nullptr;
  for_second_columns<X>(t, o, span, [&](const SecondPlace& p) {
    const SecondKnown<X> known{table.array[0] + p.begin, table.array[1] - table.array[0]};
    writer.template write<true>(p, known, each, each ? second_parameter(g, p) : 0, to);
    if (to) put_second_terms(t, o, 0, g.offset(o, p.step, 0, 0) + p.begin, {p.begin, p.n, 0, true}, terms);
  });
}

// ---- entry points ------------------------------------------------------------------------------------------------

/// Clears the sums of columns.
NORMKIT_LOCAL SecondColumnSums second_cleared(double* memory, std::int64_t columns) {
  for (std::int64_t k = 0; k < kSecondDoubles * columns; ++k) memory[k] = 0;
  return {memory, columns};
}
NORMKIT_LOCAL void add_second_parts(const SecondColumnSums& to, const SecondColumnSums& part, std::int64_t columns) {
  for (int j = 0; j < kSecondDoubles; ++j)
    for (std::int64_t k = 0; k < columns; ++k) to.array[j][k] += part.array[j][k];
}

template <class X>
[[gnu::cold]] void second_sums(const Task& t, std::int64_t begin, std::int64_t end, double* scratch) {
  const Chunks c = chunks_of(t.geometry, t.traversal);
  const std::int64_t columns = whole_vectors(t.geometry.columns());
  for (std::int64_t unit = begin; unit < end; ++unit) {
    double* const part = t.partials + partial_doubles(t, true) * unit;
    if (t.traversal == Traversal::runs) {
      *reinterpret_cast<SecondReduced*>(part) = second_span_sums<X>(t, unit / c.spans, c, unit % c.spans);
      continue;
    }
    second_means<X>(t, unit / c.spans, scratch);
    second_column_sums<X>(t, unit / c.spans, unit % c.spans, scratch, second_cleared(part, columns));
  }
}

template <class X> [[gnu::cold]] void second_finish(const Task& t, std::int64_t begin, std::int64_t end) {
  const std::int64_t spans = chunks_of(t.geometry, t.traversal).spans, each = partial_doubles(t, true);
  const std::int64_t columns = whole_vectors(t.geometry.columns());
  for (std::int64_t unit = begin; unit < end; ++unit) {
    double *const part = t.partials + each * unit * spans, *const solved = t.solved + solved_doubles(t) * unit;
    if (t.traversal == Traversal::runs) {
      SecondReduced reduced;
      for (std::int64_t span = 0; span < spans; ++span)
        reduced = reduced + *reinterpret_cast<SecondReduced*>(part + each * span);
      *reinterpret_cast<SecondGradient<double>*>(solved) = second_solve<X>(t, unit, reduced);
      continue;
    }
    for (std::int64_t span = 1; span < spans; ++span)
      add_second_parts({part, columns}, {part + each * span, columns}, t.geometry.columns());
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
      // The means are where the table will be, which is made of sums alone.
      const SecondTable<X> table(scratch, columns);
      const SecondColumnSums sums = second_cleared(scratch + kSecondTable * columns, columns);
      second_means<X>(t, unit, scratch);
      for (std::int64_t span = 0; span < c.spans; ++span) {
        double* const part = scratch + (kSecondTable + kSecondDoubles) * columns;
        const SecondColumnSums own = span == 0 ? sums : second_cleared(part, columns);
        second_column_sums<X>(t, unit, span, scratch, own);
        if (span > 0) add_second_parts(sums, own, t.geometry.columns());
      }
      second_solve_columns(t, unit, sums, table);
      for_spans(t, 0, c.spans, [&](std::int64_t span) { second_column_span(writer, unit, span, table); });
      continue;
    }
    const Rows rows = rows_of(t, unit);
    for (std::int64_t r = rows.first; r < rows.last; ++r) {
      SecondReduced reduced;
      for (std::int64_t span = 0; span < c.spans; ++span) reduced = reduced + second_span_sums<X>(t, r, c, span);
      const SecondGradient<double> known = second_solve<X>(t, r, reduced);
      for_spans(t, 0, c.spans, [&](std::int64_t span) { second_span(writer, r, c, span, known); });
    }
  }
}

}  // namespace
}  // namespace normkit
