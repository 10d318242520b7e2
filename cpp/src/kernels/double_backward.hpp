// The gradient of a backward, in both traversals. All is computed in double: float32 and float64 are read where they lie,
// what has 16 bits by way of a buffer.
#pragma once

namespace normkit {
namespace {

// ---- elements as doubles -----------------------------------------------------------------------------------------

/// Positions that load and store vectors of doubles, V, from and to float as well as double: a whole vector, or less than 8.
template <class Vector> struct Doubles {
  using V = Vector;
  std::int64_t i;

  NORMKIT_LOCAL V load(const double* p) const {
    V v;
    for (int k = 0; k < kRegsOf<V>; ++k) v.r[k] = reg_load(p + i + k * kLanes64);
    return v;
  }
  NORMKIT_LOCAL V load(const float* p) const {
    V v;
    for (int k = 0; k < kRegsOf<V>; ++k) v.r[k] = reg_load_wide(p + i + k * kLanes64);
    return v;
  }
  NORMKIT_LOCAL void store(double* p, V v) const {
    for (int k = 0; k < kRegsOf<V>; ++k) reg_store(p + i + k * kLanes64, v.r[k]);
  }
  NORMKIT_LOCAL void store(float* p, V v) const {
    for (int k = 0; k < kRegsOf<V>; ++k) reg_store_narrow(p + i + k * kLanes64, v.r[k]);
  }
  template <class U> NORMKIT_LOCAL U flags(const std::uint8_t* p) const {
    return ::normkit::flags<U>(p + i, kLanes<U>);
  }
  NORMKIT_LOCAL V keep(V v) const { return v; }
};
struct PartOfDoubles {
  using V = F64;
  std::int64_t i;
  int n;

  template <class X> NORMKIT_LOCAL V load(const X* p) const {
    X part[kLanes<V>] = {};
    for (int k = 0; k < n; ++k) part[k] = p[i + k];
    return Doubles<V>{0}.load(part);
  }
  template <class X> NORMKIT_LOCAL void store(X* p, V v) const {
    X part[kLanes<V>];
    Doubles<V>{0}.store(part, v);
    for (int k = 0; k < n; ++k) p[i + k] = part[k];
  }
  template <class U> NORMKIT_LOCAL U flags(const std::uint8_t* p) const { return ::normkit::flags<U>(p + i, n); }
  NORMKIT_LOCAL V keep(V v) const { return ::normkit::keep(v, n); }
};
template <class V, class F> NORMKIT_LOCAL void for_doubles(std::int64_t n, F f) {
  constexpr std::int64_t kWidth = kRegsOf<V> * kLanes64;
  std::int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) f(Doubles<V>{i});
  if (i < n) f(PartOfDoubles{i, static_cast<int>(n - i)});
}

/// Zeros and ones in the place of arrays that are not there.
alignas(64) constexpr double kNothing[kBuffer] = {};
struct Ones {
  float value[kBuffer];
  constexpr Ones() : value() {
    for (float& v : value) v = 1;
  }
};
alignas(64) constexpr Ones kAllOnes;
constexpr const float* kOnes = kAllOnes.value;

/// Elements of a step, one after another, and of others `step` apart.
template <class X> struct SecondRow {
  const X *x, *dy, *v;
  X *d_dy, *d_x;
  Strides x_step, dy_step, v_step;
};
struct SecondRoom { alignas(64) double x[kBuffer], dy[kBuffer], v[kBuffer], d_dy[kBuffer], d_x[kBuffer]; };

/// Calls f with n <= kBuffer elements from element `begin` of a run on, or of the columns; one step where these are
/// halves.
template <class F>
NORMKIT_LOCAL void with_row(const Task& t, std::int64_t o, std::int64_t step, std::int64_t lane, std::int64_t begin,
                            std::int64_t n, bool writes, F f) {
  const auto where = [&](const Operand& a) { return a.data + (index_at(a, o, step, lane) + begin) * size_of(a.dtype); };
  const auto direct = [&](auto type) {
    using X = typename decltype(type)::type;
    const bool has_v = t.ddx.data;
    f(SecondRow<X>{at<X>(where(t.x), 0), at<X>(where(t.dy), 0),
                   has_v ? at<X>(where(t.ddx), 0) : reinterpret_cast<const X*>(kNothing),
                   writes ? at<X>(where(t.d_dy), 0) : nullptr, writes ? at<X>(where(t.dx), 0) : nullptr, t.x.strides,
                   t.dy.strides, has_v ? t.ddx.strides : Strides{}});
  };
  if (t.x.dtype == Dtype::float32) return direct(Type<float>{});
  if (t.x.dtype == Dtype::float64) return direct(Type<double>{});
  SecondRoom room;
  read_doubles(where(t.x), t.x.dtype, n, room.x), read_doubles(where(t.dy), t.dy.dtype, n, room.dy);
  if (t.ddx.data) read_doubles(where(t.ddx), t.ddx.dtype, n, room.v);
  f(SecondRow<double>{room.x, room.dy, t.ddx.data ? room.v : kNothing, room.d_dy, room.d_x, {}, {}, {}});
  if (!writes) return;
  const auto put = [&](const Operand& out, const double* values) {
    alignas(64) float rounded[kBuffer];
    for (std::int64_t i = 0; i < n; ++i) rounded[i] = static_cast<float>(values[i]);
    if (out.dtype == Dtype::float16) put_all(rounded, at<Half>(where(out), 0), n, kPlain<Half>, Fetch{});
    else put_all(rounded, at<Bfloat>(where(out), 0), n, kPlain<Bfloat>, Fetch{});
  };
  put(t.d_dy, room.d_dy), put(t.dx, room.d_x);
}

/// Weight, ddweight and ddbias: W is float or double.
template <class W> struct SecondParams { const W *weight, *ddweight, *ddbias; };

/// Calls f(parameters) with one for all elements.
template <class F> NORMKIT_LOCAL void with_param(const Task& t, std::int64_t parameter, F f) {
  const double weight = element(t.weight, parameter, 1), ddweight = element(t.ddweight, parameter, 0),
               ddbias = element(t.ddbias, parameter, 0);
  f(SecondParams<double>{&weight, &ddweight, &ddbias});
}
/// Calls f(parameters) with those of n <= kBuffer elements, one for each: where they lie, or else as doubles in a buffer.
template <class F> NORMKIT_LOCAL void with_params(const Task& t, std::int64_t parameter, std::int64_t n, F f) {
  const auto lies = [](const Param& p) { return !p.data || (p.dtype == Dtype::float32 && p.offset == 0); };
  if (lies(t.weight) && lies(t.ddweight) && lies(t.ddbias)) {
    const auto in_place = [&](const Param& p, const float* absent) {
      return p.data ? at<float>(p.data, parameter) : absent;
    };
    const float* const zeros = reinterpret_cast<const float*>(kNothing);
    return f(SecondParams<float>{in_place(t.weight, kOnes), in_place(t.ddweight, zeros), in_place(t.ddbias, zeros)});
  }
  alignas(64) double room[3][kBuffer];
  const auto read = [&](const Param& p, double absent, double* to) {
    if (p.data) read_doubles(p.data + parameter * size_of(p.dtype), p.dtype, n, to);
    const double offset = p.data ? p.offset : absent;
    for (std::int64_t i = 0; i < n; ++i) to[i] = p.data ? to[i] + offset : offset;
    return to;
  };
  f(SecondParams<double>{read(t.weight, 1, room[0]), read(t.ddweight, 0, room[1]), read(t.ddbias, 0, room[2])});
}

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

NORMKIT_LOCAL void clear(SecondSums<F64>& s) {
  s.v = s.vd = s.g = s.gd = s.vg = s.q = s.qd = s.d = broadcast<F64>(0.0);
}

/// Adds a vector of elements. kWeighted: weight and ddweight follow the elements; else dy stands for g and for q, whose
/// sums are left alone.
template <bool kWeighted, class Members, class P, class X, class W>
NORMKIT_LOCAL void add_second(SecondSums<F64>& s, P place, SecondRow<X> a, F64 mean, SecondParams<W> p,
                              const Members& members) {
  const F64 dy = place.load(a.dy), v = place.load(a.v), d = place.load(a.x) - mean, of_v = members.only(place, v);
  // What is no member may be NaN, where no gradient reaches it.
  const auto times = [&](F64 f, F64 total)
                         NORMKIT_INLINE_LAMBDA { return mul_add(f, Members::kAll ? d : where(f, d), total); };
  F64 g = dy;
  if constexpr (kWeighted) {
    const F64 q = dy * place.load(p.ddweight);
    g = dy * place.load(p.weight);
    s.q = s.q + q, s.qd = times(q, s.qd);
  }
  s.v = s.v + of_v, s.g = s.g + g, s.d = s.d + members.keep(place, d);
  s.vd = times(of_v, s.vd), s.gd = times(g, s.gd), s.vg = mul_add(v, g, s.vg);
}

template <bool kWeighted, class Members, class X, class W>
[[gnu::noinline]] SecondSums<double> second_row_sums(SecondRow<X> a, std::int64_t n, double mean, SecondParams<W> p,
                                                     Members members) {
  const F64 m = broadcast<F64>(mean);
  SecondSums<F64> s;
  clear(s);
  for_doubles<F64>(n, [&](auto place) NORMKIT_INLINE_LAMBDA { add_second<kWeighted>(s, place, a, m, p, members); });
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
SecondReduced second_span_sums(const Task& t, std::int64_t r, Chunks c, std::int64_t span) {
  const std::int64_t o = r / t.geometry.lanes, lane = r % t.geometry.lanes;
  const bool shares = constant_in_statistic(t.geometry);
  const double mean = given_statistic<double>(t, r).mean;
  SecondReduced total;
  if (t.frozen && t.kind != ParamKind::statistic) return total;
  for_second_pieces(t, o, lane, c, span, [&](std::int64_t step, Piece piece) {
    with_row(t, o, step, lane, piece.begin, piece.n, false, [&](auto row) {
      with_members(t, o, step, lane, piece.begin, [&](auto members) {
        SecondReduced part;
        part.n = members.count(1, piece.n);
        if (piece.linear && !shares) {
          with_params(t, piece.parameter, piece.n,
                      [&](auto p) { part.sums = second_row_sums<true>(row, piece.n, mean, p, members); });
        } else {
          part.sums = second_row_sums<false>(row, piece.n, mean, SecondParams<double>{}, members);
          if (!shares) part.sums = second_weighted(t, piece.parameter, part.sums);
        }
        total = total + part;
      });
    });
  });
  return total;
}

// ---- results -----------------------------------------------------------------------------------------------------

/// What is known of elements: of all of them, or of each column. The names are those of SecondGradient.
struct SecondKnown { const double *mean, *rstd, *origin, *along, *constant, *v, *g, *x, *c; };

/// Writes d_dy and d_x, and the terms of d_weight, dy * rp, where `terms` is not null. kColumns: what is known follows the
/// elements; kEach: parameters do. kPlain: there is no mask, and statistics are functions of x.
template <bool kColumns, bool kEach, bool kPlain, class X, class W>
[[gnu::noinline]] void second_row(const Task& t, SecondRow<X> a, std::int64_t n, SecondKnown known, SecondParams<W> p,
                                  Masked members, double* terms) {
  using V = std::conditional_t<kPlain, R64, F64>;  // one register at a time where there are many constants
  const bool moves = kPlain || !t.frozen, masked = !kPlain && t.where.data, has_ddweight = t.ddweight.data;
  const auto one = [](bool each, const auto* p) NORMKIT_INLINE_LAMBDA { return each ? 0.0 : double{*p}; };
  const double mean = one(kColumns, known.mean), rstd = one(kColumns, known.rstd), origin = one(kColumns, known.origin),
               along = one(kColumns, known.along), constant_part = one(kColumns, known.constant),
               of_v = one(kColumns, known.v), of_g = one(kColumns, known.g), of_x = one(kColumns, known.x),
               c = one(kColumns, known.c), w = one(kEach, p.weight), ddw = one(kEach, p.ddweight),
               ddb = one(kEach, p.ddbias);
  for_doubles<V>(n, [&](auto place) NORMKIT_INLINE_LAMBDA {
    using U = typename decltype(place)::V;
    const auto of = [&](bool each, const auto* from, double all)
                        NORMKIT_INLINE_LAMBDA { return each ? place.load(from) : broadcast<U>(all); };
    const U dy = place.load(a.dy), v = place.load(a.v), r = of(kColumns, known.rstd, rstd);
    const U x_hat = forward(place.load(a.x), of(kColumns, known.mean, mean), r, of(kColumns, known.origin, origin));
    const U weight_v = of(kEach, p.weight, w), ddweight_v = of(kEach, p.ddweight, ddw);
    U rp = v * r, d_dy = of(kEach, p.ddbias, ddb), d_x = dy * (ddweight_v * r);
    if (has_ddweight) d_dy = mul_add(ddweight_v, x_hat, d_dy);
    if (moves) {
      const U through =
          second_through(v, x_hat, of(kColumns, known.v, of_v), of(kColumns, known.x, of_x), of(kColumns, known.c, c));
      rp = rp + second_along(x_hat, of(kColumns, known.along, along), of(kColumns, known.constant, constant_part));
      d_x = mul_add(dy, weight_v * of(kColumns, known.g, of_g), d_x);
      if constexpr (kPlain) d_x = d_x + through;
      else d_x = d_x + (masked ? members.only(place, through) : through);
    }
    place.store(a.d_dy, mul_add(weight_v, rp, d_dy)), place.store(a.d_x, d_x);
    if (terms) place.store(terms, masked ? where(dy, dy * rp) : dy * rp);
  });
}

template <bool kColumns, bool kEach, class X, class W>
void second_row(const Task& t, SecondRow<X> row, std::int64_t n, SecondKnown known, SecondParams<W> p, Masked members,
                double* terms) {
  if (!t.frozen && !t.where.data) second_row<kColumns, kEach, true>(t, row, n, known, p, members, terms);
  else second_row<kColumns, kEach, false>(t, row, n, known, p, members, terms);
}

/// Where terms of d_weight go: added up over a piece, or over rows, or one for each element of x.
void put_second_terms(const Task& t, std::int64_t o, std::int64_t lane, std::int64_t offset, Piece piece,
                      const double* terms) {
  const Geometry& g = t.geometry;
  if (t.kind == ParamKind::piece) {
    F64 all = broadcast<F64>(0.0);
    for_doubles<F64>(piece.n, [&](auto place) NORMKIT_INLINE_LAMBDA { all = all + place.load(terms); });
    t.dparams[2 * (offset / g.params.stride)] += sum(all);
  } else if (t.kind == ParamKind::row) {
    double* const sums = t.dparams + 2 * (o * row_groups(g) + lane / kRowGroup) * g.run + piece.begin;
    for (std::int64_t i = 0; i < piece.n; ++i) sums[i] += terms[i];
  } else {
    copy(terms, piece.n, at<double>(t.dweight_out, offset));
  }
}

bool has_second_terms(const Task& t) {
  return t.kind == ParamKind::piece || t.kind == ParamKind::row || (t.kind == ParamKind::element && t.dweight_out);
}

// ---- runs --------------------------------------------------------------------------------------------------------

/// Makes of the sums of a whole statistic the coefficients of its elements, and its share of d_weight.
SecondGradient<double> second_solve(const Task& t, std::int64_t r, SecondReduced reduced) {
  const Geometry& g = t.geometry;
  const std::int64_t o = r / g.lanes, lane = r % g.lanes;
  const Statistic<double> s = given_statistic<double>(t, r);
  const double shift = mean_shift(t, s, reduced.sums.d, reduced.n);
  const SecondSums<double> sums = recenter(reduced.sums, shift);
  const bool shares = constant_in_statistic(g);
  const SecondSums<double> weighted = shares ? second_weighted(t, g.parameter(o, g.offset(o, 0, lane, 0)), sums) : sums;
  const SecondGradient<double> known =
      second_gradient_of(s.rstd, shift, weighted, t.frozen ? 0 : reduced.n, t.centered);
  if (t.kind == ParamKind::statistic) t.dparams[2 * r] = second_dweight(known, sums);
  return known;
}

void second_span(const Task& t, std::int64_t r, Chunks c, std::int64_t span, const SecondGradient<double>& k) {
  const std::int64_t o = r / t.geometry.lanes, lane = r % t.geometry.lanes;
  const double mean = given_statistic<double>(t, r).mean;
  const SecondKnown known{&mean, &k.rstd, &k.origin, &k.along, &k.constant, &k.v, &k.g, &k.x, &k.c};
  const bool has_terms = has_second_terms(t);
  alignas(64) double terms[kBuffer];
  for_second_pieces(t, o, lane, c, span, [&](std::int64_t step, Piece piece) {
    const Masked members = members_at(t, o, step, lane, piece.begin);
    with_row(t, o, step, lane, piece.begin, piece.n, true, [&](auto row) {
      double* const to = has_terms ? terms : nullptr;
      if (piece.linear)
        with_params(t, piece.parameter, piece.n,
                    [&](auto p) { second_row<false, true>(t, row, piece.n, known, p, members, to); });
      else
        with_param(t, piece.parameter,
                   [&](auto p) { second_row<false, false>(t, row, piece.n, known, p, members, to); });
    });
    if (has_terms) put_second_terms(t, o, lane, t.geometry.offset(o, step, lane, piece.begin), piece, terms);
  });
}

// ---- columns -----------------------------------------------------------------------------------------------------

/// Sums of columns, or what is known of them: arrays of doubles, one a quantity.
template <int kArrays> struct SecondColumns {
  double* array[kArrays];
  SecondColumns(double* memory, std::int64_t columns) {
    for (double*& a : array) a = memory, memory += columns;
  }
};
using SecondColumnSums = SecondColumns<kSecondDoubles>;
using SecondTable = SecondColumns<kSecondTable>;

NORMKIT_LOCAL SecondReduced second_column(const SecondColumnSums& s, std::int64_t k) {
  const auto& a = s.array;
  return {{a[0][k], a[1][k], a[2][k], a[3][k], a[4][k], a[5][k], a[6][k], a[7][k]}, a[8][k]};
}

/// Adds `rows` steps of n columns from column k on.
template <bool kWeighted, class Members, class X, class W>
[[gnu::noinline]] void add_second_columns(SecondRow<X> a, std::int64_t rows, std::int64_t k, std::int64_t n,
                                          const double* mean, SecondParams<W> p, Members members,
                                          const SecondColumnSums& to) {
  for_doubles<F64>(n, [&](auto place) NORMKIT_INLINE_LAMBDA {
    const F64 m = place.load(mean + k), one = broadcast<F64>(1.0);
    SecondSums<F64> s;
    clear(s);
    F64 count = broadcast<F64>(0.0);
    SecondRow<X> row = a;
    Members here = members;
    for (std::int64_t step = 0; step < rows; ++step, here.next_row()) {
      add_second<kWeighted>(s, place, row, m, p, here);
      if constexpr (!Members::kAll) count = count + here.only(place, one);
      row.x += row.x_step.step, row.dy += row.dy_step.step, row.v += row.v_step.step;
    }
    if constexpr (!kWeighted) s.q = s.g, s.qd = s.gd;
    if constexpr (Members::kAll) count = broadcast<F64>(static_cast<double>(rows));
    const F64 all[] = {s.v, s.vd, s.g, s.gd, s.vg, s.q, s.qd, s.d, count};
    for (int j = 0; j < kSecondDoubles; ++j)
      place.store(to.array[j] + k, place.load(static_cast<const double*>(to.array[j]) + k) + all[j]);
  });
}

/// Adds a span to the sums of columns.
void second_column_sums(const Task& t, std::int64_t o, std::int64_t span, const double* mean, SecondColumnSums to) {
  const Geometry& g = t.geometry;
  const bool each = !constant_in_column(g), direct = size_of(t.x.dtype) > 2;
  const std::int64_t end = span_end(g, span), most = each || !direct ? 1 : 16;
  for (std::int64_t step = span_begin(span); step < end; step += most)
    for (std::int64_t k = 0; k < g.columns(); k += kBuffer) {
      const std::int64_t rows = least(most, end - step), n = least(kBuffer, g.columns() - k);
      with_row(t, o, step, 0, k, n, false, [&](auto row) {
        with_members(t, o, step, 0, k, [&](auto members) {
          if (!each) return add_second_columns<false>(row, rows, k, n, mean, SecondParams<double>{}, members, to);
          with_params(t, g.parameter(o, g.offset(o, step, 0, 0)) + k, n,
                      [&](auto p) { add_second_columns<true>(row, rows, k, n, mean, p, members, to); });
        });
      });
    }
}

/// The given means, for each column.
void second_means(const Task& t, std::int64_t o, double* mean) {
  const Geometry& g = t.geometry;
  for (std::int64_t lane = 0; lane < g.lanes; ++lane)
    for (std::int64_t k = lane * g.run; k < (lane + 1) * g.run; ++k)
      mean[k] = given_statistic<double>(t, o * g.lanes + lane).mean;
}

/// Makes of the sums of columns the table that is known of them, and their shares of d_weight.
void second_solve_columns(const Task& t, std::int64_t o, const SecondColumnSums& sums, const SecondTable& table) {
  const Geometry& g = t.geometry;
  ColumnParameter parameter(t, o), folded = parameter;
  for (std::int64_t lane = 0; lane < g.lanes; ++lane) {
    const Statistic<double> s = given_statistic<double>(t, o * g.lanes + lane);
    SecondReduced all;
    for (std::int64_t k = lane * g.run; k < (lane + 1) * g.run; ++k, folded.next()) {
      SecondReduced column = second_column(sums, k);
      if (constant_in_column(g)) column.sums = second_weighted(t, folded.index(), column.sums);
      all = all + column;
    }
    const double shift = mean_shift(t, s, all.sums.d, all.n);
    const SecondGradient<double> known =
        second_gradient_of(s.rstd, shift, recenter(all.sums, shift), t.frozen ? 0 : all.n, t.centered);
    for (std::int64_t k = lane * g.run; k < (lane + 1) * g.run; ++k, parameter.next()) {
      const double values[] = {s.mean,
                               known.rstd,
                               known.origin,
                               known.along,
                               known.constant,
                               known.v,
                               known.g,
                               known.x,
                               known.c,
                               parameter.of(t.weight, 1),
                               parameter.of(t.ddweight, 0),
                               parameter.of(t.ddbias, 0)};
      for (int j = 0; j < kSecondTable; ++j) table.array[j][k] = values[j];
      if (t.kind == ParamKind::column)
        t.dparams[2 * (o * g.columns() + k)] = second_dweight(known, recenter(second_column(sums, k).sums, shift));
    }
  }
}

void second_column_span(const Task& t, std::int64_t o, std::int64_t span, const SecondTable& table) {
  const Geometry& g = t.geometry;
  const bool each = !constant_in_column(g), has_terms = has_second_terms(t);
  alignas(64) double terms[kBuffer];
  for (std::int64_t step = span_begin(span); step < span_end(g, span); ++step)
    for (std::int64_t k = 0; k < g.columns(); k += kBuffer) {
      const std::int64_t n = least(kBuffer, g.columns() - k), offset = g.offset(o, step, 0, 0) + k;
      const auto of = [&](int j) { return table.array[j] + k; };
      const SecondKnown known{of(0), of(1), of(2), of(3), of(4), of(5), of(6), of(7), of(8)};
      with_row(t, o, step, 0, k, n, true, [&](auto row) {
        const auto write = [&](auto p) {
          second_row<true, true>(t, row, n, known, p, members_at(t, o, step, 0, k), has_terms ? terms : nullptr);
        };
        if (!each) write(SecondParams<double>{of(9), of(10), of(11)});
        else with_params(t, g.parameter(o, offset - k) + k, n, write);
      });
      if (has_terms) put_second_terms(t, o, 0, offset, {k, n, 0, true}, terms);
    }
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

void second_sums(const Task& t, std::int64_t begin, std::int64_t end, double* scratch) {
  const Chunks c = chunks_of(t.geometry, t.traversal);
  const std::int64_t columns = whole_vectors(t.geometry.columns());
  for (std::int64_t unit = begin; unit < end; ++unit) {
    double* const part = t.partials + partial_doubles(t, true) * unit;
    if (t.traversal == Traversal::runs) {
      *reinterpret_cast<SecondReduced*>(part) = second_span_sums(t, unit / c.spans, c, unit % c.spans);
      continue;
    }
    second_means(t, unit / c.spans, scratch);
    second_column_sums(t, unit / c.spans, unit % c.spans, scratch, second_cleared(part, columns));
  }
}

void second_finish(const Task& t, std::int64_t begin, std::int64_t end) {
  const std::int64_t spans = chunks_of(t.geometry, t.traversal).spans, each = partial_doubles(t, true);
  const std::int64_t columns = whole_vectors(t.geometry.columns());
  for (std::int64_t unit = begin; unit < end; ++unit) {
    double *const part = t.partials + each * unit * spans, *const solved = t.solved + solved_doubles(t) * unit;
    if (t.traversal == Traversal::runs) {
      SecondReduced reduced;
      for (std::int64_t span = 0; span < spans; ++span)
        reduced = reduced + *reinterpret_cast<SecondReduced*>(part + each * span);
      *reinterpret_cast<SecondGradient<double>*>(solved) = second_solve(t, unit, reduced);
      continue;
    }
    for (std::int64_t span = 1; span < spans; ++span)
      add_second_parts({part, columns}, {part + each * span, columns}, t.geometry.columns());
    second_solve_columns(t, unit, {part, columns}, {solved, columns});
  }
}

void second_apply(const Task& t, std::int64_t begin, std::int64_t end) {
  const Chunks c = chunks_of(t.geometry, t.traversal);
  for_spans(t, begin, end, [&](std::int64_t unit) {
    double* const solved = t.solved;
    if (t.traversal == Traversal::lanes)
      return second_column_span(t, unit / c.spans, unit % c.spans,
                                {solved + solved_doubles(t) * (unit / c.spans), whole_vectors(t.geometry.columns())});
    const Rows rows = rows_of(t, unit / c.spans);
    for (std::int64_t r = rows.first; r < rows.last; ++r)
      second_span(t, r, c, unit % c.spans, *reinterpret_cast<SecondGradient<double>*>(solved + solved_doubles(t) * r));
  });
}

void second_fused(const Task& t, std::int64_t begin, std::int64_t end, double* scratch) {
  const Chunks c = chunks_of(t.geometry, t.traversal);
  const std::int64_t columns = whole_vectors(t.geometry.columns());
  for (std::int64_t unit = begin; unit < end; ++unit) {
    if (t.traversal == Traversal::lanes) {
      const SecondTable table(scratch, columns);
      const SecondColumnSums sums = second_cleared(scratch + kSecondTable * columns, columns);
      second_means(t, unit, table.array[0]);
      for (std::int64_t span = 0; span < c.spans; ++span) {
        double* const part = scratch + (kSecondTable + kSecondDoubles) * columns;
        const SecondColumnSums own = span == 0 ? sums : second_cleared(part, columns);
        second_column_sums(t, unit, span, table.array[0], own);
        if (span > 0) add_second_parts(sums, own, t.geometry.columns());
      }
      second_solve_columns(t, unit, sums, table);
      for_spans(t, 0, c.spans, [&](std::int64_t span) { second_column_span(t, unit, span, table); });
      continue;
    }
    const Rows rows = rows_of(t, unit);
    for (std::int64_t r = rows.first; r < rows.last; ++r) {
      SecondReduced reduced;
      for (std::int64_t span = 0; span < c.spans; ++span) reduced = reduced + second_span_sums(t, r, c, span);
      const SecondGradient<double> known = second_solve(t, r, reduced);
      for_spans(t, 0, c.spans, [&](std::int64_t span) { second_span(t, r, c, span, known); });
    }
  }
}

}  // namespace
}  // namespace normkit
