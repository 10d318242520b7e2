// The lanes traversal, backward.
#pragma once

namespace normkit {
namespace {

/// Sums of backward over columns, one array a quantity.
struct ColumnSums {
  double *g, *gx, *d, *n;
  ColumnSums(double* memory, std::int64_t columns)
      : g(memory), gx(memory + columns), d(memory + 2 * columns), n(memory + 3 * columns) {}
  NORMKIT_LOCAL Reduced at(std::int64_t k) const { return {{g[k], gx[k], d[k]}, n[k]}; }
};

NORMKIT_LOCAL void add_columns(ColumnSums into, ColumnSums more, std::int64_t n) {
  for (std::int64_t k = 0; k < n; ++k)
    into.g[k] += more.g[k], into.gx[k] += more.gx[k], into.d[k] += more.d[k], into.n[k] += more.n[k];
}

/// What is known of columns before the sums: their given mean, which sums are taken about, the factors of z, and slopes of prelu.
template <class S> struct Known { const S *mean, *scale, *shift, *slope; };

/// What more than dy and x the sums of columns look at: a kink alone, a mask alone, or anything, weights that follow the elements too.
enum class Detail : std::uint8_t { none, kink, mask, all };

/// Adds one block of one tile to the sums of columns k and on.
template <Detail kDetail, class X, int kVectors>
NORMKIT_LOCAL void add_block(const Task& t, std::int64_t o, std::int64_t step, std::int64_t rows, std::int64_t k,
                             std::int64_t n, Known<ScalarOf<X>> known, Count<kVectors> vectors, ColumnSums out) {
  using V = VectorOf<X>;
  using S = ScalarOf<X>;
  constexpr bool kDetailed = kDetail == Detail::all;
  const double below = slope_below(t.activation);
  const Geometry& g = t.geometry;
  const bool by_column = !kDetailed || constant_in_column(g);
  const bool masked = kDetail == Detail::mask || (kDetailed && t.where.data);
  const bool curved = kDetailed && has_curved_slope(t.activation), active = kDetailed && has_activation(t);
  ParamBuffer<S> weights, biases, slopes;
  alignas(64) S reaching[kVectors * kLanes<V>], z_value[kVectors * kLanes<V>];
  const V zero = broadcast<V>(S(0)), one = broadcast<V>(S(1));
  V m[kVectors], count[kVectors];
  Sums<V> s[kVectors];
  for (int j = 0; j < kVectors; ++j) {
    m[j] = load(known.mean + k + j * kLanes<V>);
    s[j].g = s[j].gx = s[j].d = count[j] = zero;
  }
  Masked members = members_at(t, o, step, 0, k);
  const std::int64_t x_ahead = block_ahead<X>(g, t.x), dy_ahead = block_ahead<X>(g, t.dy);
  for (std::int64_t row = step; row < step + rows; ++row) {
    const X *x = at<X>(t.x, o, row, 0) + k, *dy = at<X>(t.dy, o, row, 0) + k;
    prefetch_tile(vectors, x, x_ahead), prefetch_tile(vectors, dy, dy_ahead);
    const std::int64_t parameter = by_column ? 0 : g.parameter(o, g.offset(o, row, 0, 0)) + k;
    const S* weight = by_column ? nullptr : weights.read(t.weight, parameter, n, 1);
    const S* bias = by_column || !active ? nullptr : biases.read(t.bias, parameter, n, 0);
    const auto z_of = [=](V mean, auto place) NORMKIT_INLINE_LAMBDA {
      return Preactivation<X>{mean, place.load(known.scale + k), place.load(known.shift + k), weight, bias};
    };
    if (curved) {
      for_vectors<V>(vectors, n, [&](int j, auto place) NORMKIT_INLINE_LAMBDA {
        store(z_value + place.i, z_of(m[j], place).at(place, place.load(x)));
        store(reaching + place.i, place.load(dy));
      });
      multiply_by_slopes(t.activation, walk_slopes(t, known.slope + k, parameter, n, slopes), z_value, reaching, n);
    }
    for_vectors<V>(vectors, n, [&](int j, auto place) NORMKIT_INLINE_LAMBDA {
      const V x_v = place.load(x);
      V d = x_v - m[j], dz;
      if constexpr (kDetail == Detail::kink) dz = Kinked<X>{below, z_of(m[j], place)}(place, dy, x_v);
      else if (curved) dz = place.load(static_cast<const S*>(reaching));
      else if (active) dz = incoming(t, z_of(m[j], place), place, dy, x_v);
      else dz = place.load(dy);
      if (!by_column) dz = dz * place.load(weight);
      s[j].g = s[j].g + dz;
      s[j].gx = mul_add(dz, masked ? where(dz, d) : d, s[j].gx);
      if (masked) {
        d = members.only(place, d);
        count[j] = count[j] + members.only(place, one);
      }
      s[j].d = s[j].d + d;
    });
    if (masked) members.next_row();
  }
  for (int j = 0; j < kVectors; ++j) {
    const std::int64_t column = k + j * kLanes<V>;
    add_to(out.g + column, s[j].g), add_to(out.gx + column, s[j].gx), add_to(out.d + column, s[j].d);
    if (masked) add_to(out.n + column, count[j]);
  }
}

/// Adds blocks of n columns, few, to their sums. kKinked: through an activation with a kink, `below` which its slope is that.
template <bool kKinked, class S, class Members>
[[gnu::noinline]] void add_turned(const Turned<S>& x, const Turned<S>& dy, std::int64_t n, Known<S> known, double below,
                                  const Members& members, ColumnSums out) {
  using V = VectorOf<S>;
  TurnedSums<S> all_g, all_gx, all_d, all_n;
  for (std::int64_t k = 0; k < n; ++k) {
    const V m = broadcast<V>(known.mean[k]), zero = broadcast<V>(S(0)), one = broadcast<V>(S(1));
    const V scale = broadcast<V>(known.scale[k]), shift = broadcast<V>(known.shift[k]);
    Sums<V> s{zero, zero, zero};
    V count = zero;
    for (std::int64_t step = 0; step < kBlockSteps; ++step) {
      const V x_v = x.at(step, k, n), d = x_v - m;
      V dz = dy.at(step, k, n);
      if constexpr (kKinked) dz = dz * kink_slope(forward(x_v, m, scale, shift), below);
      s.g = s.g + dz;
      s.gx = mul_add(dz, Members::kAll ? d : where(dz, d), s.gx);
      s.d = s.d + members.only(step, k, d);
      if constexpr (!Members::kAll) count = count + members.only(step, k, one);
    }
    all_g.set(k, s.g), all_gx.set(k, s.gx), all_d.set(k, s.d), all_n.set(k, count);
  }
  all_g.add_to(out.g, n), all_gx.add_to(out.gx, n), all_d.add_to(out.d, n);
  if constexpr (!Members::kAll) all_n.add_to(out.n, n);
}

/// Makes of blocks of dy, of n columns, what reaches z through any activation.
template <class S>
[[gnu::noinline]] void reach_turned(const Task& t, const Turned<S>& x, std::int64_t n, Known<S> known, Turned<S>& dy) {
  using V = VectorOf<S>;
  const bool kinked = has_kink(t.activation), own = t.slopes.data;
  const double below = slope_below(t.activation);
  Turned<S> z;
  for (std::int64_t k = 0; k < n; ++k) {
    const V mean = broadcast<V>(known.mean[k]), scale = broadcast<V>(known.scale[k]);
    const V shift = broadcast<V>(known.shift[k]), slope = broadcast<V>(own ? known.slope[k] : static_cast<S>(below));
    for (std::int64_t step = 0; step < kBlockSteps; ++step) {
      const V z_v = forward(x.at(step, k, n), mean, scale, shift), g = dy.at(step, k, n);
      z.set(step, k, n, z_v);
      if (kinked || own) dy.set(step, k, n, where(g, g * prelu_slope(z_v, slope)));
    }
  }
  if (!kinked && !own) multiply_by_slopes<S>(t.activation, nullptr, z.value, dy.value, Turned<S>::kSteps * n);
}

/// Sums over one span.
template <class X>
void span_column_sums(const Task& t, std::int64_t o, std::int64_t span, Known<ScalarOf<X>> known, ColumnSums sums) {
  const Geometry& g = t.geometry;
  const std::int64_t begin = span_begin(span), end = span_end(g, span);
  const F64 zero = broadcast<F64>(0.0), steps = broadcast<F64>(static_cast<double>(end - begin));
  for (std::int64_t k = 0; k < whole_vectors(g.columns()); k += kLanes<F64>)
    store(sums.g + k, zero), store(sums.gx + k, zero), store(sums.d + k, zero),
        store(sums.n + k, t.where.data ? zero : steps);
  const bool detailed = has_detailed_sums(t) || !constant_in_column(g);
  const bool kinked = has_kink_alone(t) && constant_in_column(g);
  const bool masked = t.where.data && !has_activation(t) && constant_in_column(g);
  std::int64_t first = begin;
  if (constant_in_column(g) && turns_columns(t)) {
    using T = Turned<ScalarOf<X>>;
    T x, dy;
    for (; end - first >= T::kSteps; first += T::kSteps) {
      read_turned(at<X>(t.x, o, first, 0), t.x.strides.step, g.columns(), x);
      read_turned(at<X>(t.dy, o, first, 0), t.dy.strides.step, g.columns(), dy);
      if constexpr (kHasKinked<X>)
        if (kinked) {
          add_turned<true>(x, dy, g.columns(), known, slope_below(t.activation), TurnedEveryone{}, sums);
          continue;
        }
      if (has_activation(t)) reach_turned(t, x, g.columns(), known, dy);
      with_members(t, o, first, 0, 0, [&](const auto& members) {
        with_turned<ScalarOf<X>>(members, g.columns(), [&](const auto& those) {
          add_turned<false>(x, dy, g.columns(), known, 0, those, sums);
        });
      });
    }
  }
  for_blocks(first, end, [&](std::int64_t step, std::int64_t rows) {
    for_tiles<X>(g.columns(), [&](auto vectors, std::int64_t k, std::int64_t n) {
      if constexpr (kHasKinked<X>)
        if (kinked) return add_block<Detail::kink, X>(t, o, step, rows, k, n, known, vectors, sums);
      if constexpr (kHasKinked<X>)
        if (masked) return add_block<Detail::mask, X>(t, o, step, rows, k, n, known, vectors, sums);
      if (detailed) add_block<Detail::all, X>(t, o, step, rows, k, n, known, vectors, sums);
      else add_block<Detail::none, X>(t, o, step, rows, k, n, known, vectors, sums);
    });
  });
}

/// Fills in what is known of the columns of one outer index.
template <class S> void know_columns(const Task& t, std::int64_t o, S* mean, S* scale, S* shift, S* slope) {
  const Geometry& g = t.geometry;
  const bool active = has_activation(t);
  ColumnParameter parameter(t, o);
  for (std::int64_t lane = 0; lane < g.lanes; ++lane) {
    const Statistic<S> s = given_statistic<S>(t, o * g.lanes + lane);
    const std::int64_t begin = lane * g.run;
    fill(mean + begin, g.run, s.mean);
    for (std::int64_t k = begin; active && k < begin + g.run; ++k, parameter.next()) {
      const Affine<S> affine = column_affine(t, parameter, s);
      scale[k] = affine.scale, shift[k] = affine.shift, slope[k] = static_cast<S>(parameter.of(t.slopes, 1));
    }
  }
  if (active) repeat_columns(g, {mean, scale, shift, slope});
}

/// The sums of statistics that are solved side by side.
struct ReducedLanes { alignas(64) double g[kSolved], gx[kSolved], d[kSolved], n[kSolved]; };
/// These statistics: as they are given, their sums, and what solved_of() finds.
template <class S> struct SolvedLanes : ReducedLanes {
  RowStatistics<kSolved> given;
  alignas(64) double shift[kSolved];
  alignas(64) S mean[kSolved], b[kSolved], c[kSolved], unit[kSolved], origin[kSolved];

  NORMKIT_LOCAL void take(int j, const Reduced& sums) {
    g[j] = sums.sums.g, gx[j] = sums.sums.gx, d[j] = sums.sums.d, n[j] = sums.n;
  }
  NORMKIT_LOCAL void set(int j, double distance, const Solved<S>& known) {
    const Affine<S> standard = forward_affine(known.statistic, 1, 0);
    shift[j] = distance, mean[j] = known.statistic.mean, b[j] = known.gradient.b, c[j] = known.gradient.c;
    unit[j] = standard.scale, origin[j] = standard.shift;
  }
};

/// The sums of `count` statistics from `lane` on, each of `run` columns, from those of their columns, times their weights; where a
/// column has several weights, its sums were taken with them. `parameter`: that of the first column, and then of the first
/// one behind them. The compiler makes vectors of loops if it knows how long they are: kCount and kRun are 0 where it does not.
template <int kCount, int kRun>
[[gnu::noinline]] void fold_column_sums(const Task& t, std::int64_t lane, int count, std::int64_t run,
                                        ColumnSums columns, ColumnParameter& parameter, ReducedLanes& lanes) {
  if constexpr (kCount > 0) count = kCount;
  if constexpr (kRun > 0) run = kRun;
  alignas(64) double weight[kSolved], g[kSolved] = {}, gx[kSolved] = {}, d[kSolved] = {}, n[kSolved] = {};
  const auto add = [&](int j, std::int64_t i, double w) NORMKIT_INLINE_LAMBDA {
    const Reduced column = columns.at((lane + j) * run + i);
    g[j] += w * column.sums.g, gx[j] += w * column.sums.gx, d[j] += column.sums.d, n[j] += column.n;
  };
  if (kCount > 0 || parameter.is_of_lanes(t.geometry)) {
    parameter.of_lanes(t.geometry, count, t.weight, 1, weight), parameter.skip_lanes(t.geometry, count);
    for (std::int64_t i = 0; i < run; ++i)
      for (int j = 0; j < count; ++j) add(j, i, weight[j]);
  } else {
    for (int j = 0; j < count; ++j)
      for (std::int64_t i = 0; i < run; ++i, parameter.next()) add(j, i, parameter.of(t.weight, 1));
  }
  for (int j = 0; j < kSolved; ++j) lanes.g[j] = g[j], lanes.gx[j] = gx[j], lanes.d[j] = d[j], lanes.n[j] = n[j];
}

template <class S> [[gnu::noinline]] void solve_lanes(const Task& t, SolvedLanes<S>& lanes) {
  const auto solve = [&](int j, double shift, double n, bool centered, Denominator d) NORMKIT_INLINE_LAMBDA {
    const Reduced reduced{{lanes.g[j], lanes.gx[j], lanes.d[j]}, n};
    lanes.set(j, shift, solved_of(lanes.given.template at<S>(j), reduced, shift, 1, centered, d));
  };
  if (t.frozen || t.where.data || t.phase == Phase::apply) {
    for (int j = 0; j < kSolved; ++j) {
      const Statistic<S> given = lanes.given.template at<S>(j);
      const double shift = mean_shift(t, given, lanes.d[j], lanes.n[j]);
      if (t.frozen) lanes.set(j, shift, {given, {}});
      else solve(j, shift, lanes.n[j], t.centered, t.denominator);
    }
    return;
  }
  solve_side_by_side(t, t.geometry.members(), [&](int j, double n, bool centered, Denominator d) NORMKIT_INLINE_LAMBDA {
    solve(j, centered ? lanes.d[j] / n : 0, n, centered, d);
  }, kSolved);
}

/// Makes of the sums of columns the statistics, their gradients, the gradients of parameters, and the table that apply
/// reads.
template <class S> void lanes_solve(const Task& t, std::int64_t o, ColumnSums column_sums, Table<S> table) {
  const Geometry& g = t.geometry;
  ColumnParameter parameter(t, o), folded = parameter;
  for (std::int64_t lane = 0; lane < g.lanes; lane += kSolved) {
    const int count = static_cast<int>(least(kSolved, g.lanes - lane));
    const std::int64_t first = o * g.lanes + lane;
    SolvedLanes<S> lanes;
    given_statistics(t, first, count, lanes.given);
    if (count < kSolved || !folded.is_of_lanes(g))
      fold_column_sums<0, 0>(t, lane, count, g.run, column_sums, folded, lanes);
    else if (g.run == 1) fold_column_sums<kSolved, 1>(t, lane, count, 1, column_sums, folded, lanes);
    else fold_column_sums<kSolved, 0>(t, lane, count, g.run, column_sums, folded, lanes);
    for (int j = 0; j < count; ++j) {
      if (t.phase == Phase::apply) lanes.take(j, given_sums(t, first + j));
      if (t.phase == Phase::reduce) put_sums(t, first + j, {lanes.g[j], lanes.gx[j], lanes.d[j]}, 1);
    }
    if (t.phase == Phase::reduce) continue;
    solve_lanes(t, lanes);
    put_lanes(g, lane, count, lanes.mean, table.mean), put_lanes(g, lane, count, lanes.b, table.b);
    put_lanes(g, lane, count, lanes.c, table.c);
    if (writes_element_gradients(t))
      put_lanes(g, lane, count, lanes.unit, table.unit), put_lanes(g, lane, count, lanes.origin, table.origin);
    if (parameter.is_of_lanes(g)) {
      alignas(64) double weight[kSolved];
      alignas(64) S a[kSolved];
      parameter.of_lanes(g, count, t.weight, 1, weight), parameter.skip_lanes(g, count);
      for (int j = 0; j < kSolved; ++j) a[j] = static_cast<S>(lanes.given.rstd[j] * weight[j]);
      put_lanes(g, lane, count, a, table.a);
    } else {
      for (std::int64_t k = lane * g.run; k < (lane + count) * g.run; ++k, parameter.next())
        table.a[k] = static_cast<S>(lanes.given.rstd[k / g.run - lane] * parameter.of(t.weight, 1));
    }
    if (t.kind != ParamKind::column) continue;
    double* d = t.dparams + 2 * (o * g.columns() + lane * g.run);
    for (int j = 0; j < count; ++j)
      for (std::int64_t k = (lane + j) * g.run; k < (lane + j + 1) * g.run; ++k, d += 2)
        d[0] = lanes.given.rstd[j] * mul_add(-lanes.shift[j], column_sums.g[k], column_sums.gx[k]),
        d[1] = column_sums.g[k];
  }
  repeat_columns(g, {table.mean, table.a, table.b, table.c, table.unit, table.origin});
}

/// Calls f(position) for the vectors of a row, and stores what f returns in dx, if that is wanted.
template <class X, class F> NORMKIT_LOCAL void map_or_walk(X* dx, std::int64_t n, Streamer<X>* streamer, F f) {
  constexpr std::int64_t kWidth = kLanes<VectorOf<X>>;
  if (dx) return map(dx, n, streamer, Fetch{}, f);
  std::int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) f(Full{i});
  if (i < n) f(Part{i, static_cast<int>(n - i)});
}

/// Columns of which the compiler knows how many bytes it writes.
constexpr std::int64_t kFewColumns = 16;
/// A mask that has one byte for each step of `columns` columns, as one that has a byte for each of n <= kBuffer elements. Of a few
/// columns more are written than there are, and those of the next step over them.
[[gnu::noinline]] Masked spread_mask(Masked members, std::int64_t columns, std::int64_t n, std::uint8_t* bytes) {
  const std::uint8_t* from = members.byte;
  for (std::int64_t i = 0; columns <= kFewColumns && i < n; i += columns, from += members.row_stride)
    __builtin_memset(bytes + i, *from, kFewColumns);
  for (std::int64_t i = 0; columns > kFewColumns && i < n; i += columns, from += members.row_stride)
    __builtin_memset(bytes + i, *from, static_cast<std::size_t>(columns));
  return {bytes, 0, false};
}

template <class X>
void lanes_backward_span(const Task& t, std::int64_t o, std::int64_t span, Table<ScalarOf<X>> table,
                         Streamer<X>* streamer, bool last) {
  using V = VectorOf<X>;
  using S = ScalarOf<X>;
  const Geometry& g = t.geometry;
  const bool by_column = constant_in_column(g), active = has_activation(t);
  const bool simple = by_column && t.kind != ParamKind::element && t.dx.data && !t.residual.data;
  const bool plain = simple && !has_detailed_sums(t), kinked = simple && has_kink_alone(t);
  const bool masked_alone = simple && !active;
  const double below = slope_below(t.activation);
  const NextSteps fetch = fetch_for<X>(t, o, span, last);
  ParamBuffer<S> weights, biases, slopes;
  const bool masked = t.where.data, follows = masked && t.where.strides.run != 0;
  for_walks(g, span_begin(span), span_end(g, span),
            one_walk(g, {&t.x, &t.dy, &t.dx, &t.residual}) && (!follows || t.where.strides.step == g.columns()),
            masked || has_curved_slope(t.activation) || !by_column,
            [&](std::int64_t step, std::int64_t k, std::int64_t n) NORMKIT_INLINE_LAMBDA {
    const X *x = at<X>(t.x, o, step, 0) + k, *dy = at<X>(t.dy, o, step, 0) + k;
    const X* x_ahead = at<X>(t.x, fetch.o, step + fetch.shift, 0) + k;
    const X* dy_ahead = at<X>(t.dy, fetch.o, step + fetch.shift, 0) + k;
    X* const dx = t.dx.data ? at<X>(t.dx, o, step, 0) + k : nullptr;
    Round round{table_period(g)};
    const auto through = [=](auto column, V x_v) NORMKIT_INLINE_LAMBDA {
      return through_statistics(x_v, column.load(table.mean + k), column.load(table.b + k), column.load(table.c + k));
    };
    // reaching_in: a column to the gradient that reaches z there.
    alignas(64) std::uint8_t bytes[kBuffer + kFewColumns];
    const bool spread = masked && !follows && n > g.columns();
    const Masked own = members_at(t, o, step, 0, k), members = spread ? spread_mask(own, g.columns(), n, bytes) : own;
    const auto write = [&](const auto& those, auto reaching_in) NORMKIT_INLINE_LAMBDA {
      map(dx, n, streamer, Fetch{}, [=] [[gnu::always_inline]] (auto place) mutable {
        prefetch_place(x_ahead, place), prefetch_place(dy_ahead, place);
        const auto column = round(place);
        const V x_v = place.load(x);
        return backward(reaching_in(column)(place, dy, x_v), column.load(table.a + k),
                        those.only(place, through(column, x_v)));
      });
    };
    const auto straight = [](auto) NORMKIT_INLINE_LAMBDA { return Straight<X>{}; };
    if (plain) return write(Everyone{}, straight);
    if constexpr (kHasKinked<X>)
      if (masked_alone) return write(members, straight);
    const auto z_of = [=](auto column) NORMKIT_INLINE_LAMBDA {
      return Preactivation<X>{column.load(table.z_mean + k), column.load(table.z_scale + k),
                              column.load(table.z_shift + k)};
    };
    if constexpr (kHasKinked<X>)
      if (kinked)
        return write(Everyone{}, [=](auto column) NORMKIT_INLINE_LAMBDA { return Kinked<X>{below, z_of(column)}; });
    const X* residual = t.residual.data ? at<X>(t.residual, o, step, 0) + k : nullptr;
    const std::int64_t offset = g.offset(o, step, 0, 0) + k;
    S* const dweight = t.dweight_out ? at<S>(t.dweight_out, offset) : nullptr;
    S* const dbias = t.dbias_out ? at<S>(t.dbias_out, offset) : nullptr;
    const std::int64_t parameter = by_column ? 0 : g.parameter(o, offset - k) + k;
    const S* weight = by_column ? nullptr : weights.read(t.weight, parameter, n, 1);
    const bool curved = has_curved_slope(t.activation);
    const S* bias = by_column || !active ? nullptr : biases.read(t.bias, parameter, n, 0);
    const auto weighted_z_of = [=](auto column) NORMKIT_INLINE_LAMBDA {
      Preactivation<X> z = z_of(column);
      z.weight = weight, z.bias = bias;
      return z;
    };
    alignas(64) S reaching[kBuffer], z_value[kBuffer];
    if (curved) {
      map(reaching, n, kPlain<S>, Fetch{}, [=](auto place) NORMKIT_INLINE_LAMBDA { return place.load(dy); });
      map(z_value, n, kPlain<S>, Fetch{}, [=] [[gnu::always_inline]] (auto place) mutable {
        return weighted_z_of(round(place)).at(place, place.load(x));
      });
      multiply_by_slopes(t.activation, walk_slopes(t, table.slope + k, parameter, n, slopes), z_value, reaching, n);
    }
    const S* const reached = reaching;
    map_or_walk(dx, n, streamer, [=, &t] [[gnu::always_inline]] (auto place) mutable {
      prefetch_place(x_ahead, place), prefetch_place(dy_ahead, place);
      const auto column = round(place);
      const V x_v = place.load(x);
      V dz;
      if (curved) dz = place.load(reached);
      else if (active) dz = incoming(t, weighted_z_of(column), place, dy, x_v);
      else dz = place.load(dy);
      if (dweight) {
        const V x_hat =
            forward(x_v, column.load(table.mean + k), column.load(table.unit + k), column.load(table.origin + k));
        place.store(dweight, mul_add(masked ? where(dz, x_hat) : x_hat, dz, broadcast<V>(S(0))));  // as add() has it
      }
      if (dbias) place.store(dbias, dz);
      V v = backward(by_column ? dz : dz * place.load(weight), column.load(table.a + k),
                     members.only(place, through(column, x_v)));
      if (residual) v = v + place.load(residual);
      return v;
    });
  });
}

/// What is known, of the columns that a table describes.
template <class S> NORMKIT_LOCAL Known<S> know(const Task& t, std::int64_t o, Table<S> table) {
  know_columns(t, o, table.z_mean, table.z_scale, table.z_shift, table.slope);
  return {table.z_mean, table.z_scale, table.z_shift, table.slope};
}

template <class X> void lanes_backward(const Task& t, std::int64_t begin, std::int64_t end, double* scratch) {
  const Chunks c = chunks_of(t.geometry, Traversal::lanes);
  const std::int64_t columns = array_of_columns(t.geometry);
  const ColumnSums sums(scratch, columns), part(scratch + 4 * columns, columns);
  const Table<ScalarOf<X>> table(scratch + 12 * columns, columns);
  Streamer<X> streamer;
  for (std::int64_t o = begin; o < end; ++o) {
    const Known<ScalarOf<X>> known = know(t, o, table);
    for (std::int64_t span = 0; span < (t.phase == Phase::apply ? 0 : c.spans); ++span) {
      span_column_sums<X>(t, o, span, known, span == 0 ? sums : part);
      if (span > 0) add_columns(sums, part, t.geometry.columns());
    }
    lanes_solve(t, o, sums, table);
    if (has_second_pass(t))
      for_spans(t, 0, c.spans, [&](std::int64_t span) {
        lanes_backward_span<X>(t, o, span, table, t.walk.stream_stores ? &streamer : nullptr, o + 1 == end);
      });
  }
}

template <class X>
void lanes_backward_sums(const Task& t, std::int64_t begin, std::int64_t end, double* scratch) {
  const Chunks c = chunks_of(t.geometry, Traversal::lanes);
  const std::int64_t columns = array_of_columns(t.geometry), of_part = whole_vectors(t.geometry.columns());
  for (std::int64_t unit = begin; unit < end; ++unit)
    span_column_sums<X>(t, unit / c.spans, unit % c.spans,
                        know(t, unit / c.spans, Table<ScalarOf<X>>(scratch, columns)),
                        ColumnSums(t.partials + 4 * of_part * unit, of_part));
}

template <class X> void lanes_backward_finish(const Task& t, std::int64_t begin, std::int64_t end) {
  const Chunks c = chunks_of(t.geometry, Traversal::lanes);
  const std::int64_t columns = array_of_columns(t.geometry), of_part = whole_vectors(t.geometry.columns());
  for (std::int64_t o = begin; o < end; ++o) {
    double* part = t.partials + 4 * of_part * o * c.spans;
    const ColumnSums sums(part, of_part);
    for (std::int64_t span = 1; span < (t.phase == Phase::apply ? 0 : c.spans); ++span)
      add_columns(sums, ColumnSums(part + 4 * of_part * span, of_part), t.geometry.columns());
    const Table<ScalarOf<X>> table(t.solved + kTableColumns * columns * o, columns);
    know(t, o, table);
    lanes_solve(t, o, sums, table);
  }
}

template <class X> void lanes_backward_apply(const Task& t, std::int64_t begin, std::int64_t end) {
  const Chunks c = chunks_of(t.geometry, Traversal::lanes);
  const std::int64_t columns = array_of_columns(t.geometry);
  Streamer<X> streamer;
  for_spans(t, begin, end, [&](std::int64_t unit) {
    const std::int64_t o = unit / c.spans;
    lanes_backward_span<X>(t, o, unit % c.spans, Table<ScalarOf<X>>(t.solved + kTableColumns * columns * o, columns),
                           t.walk.stream_stores ? &streamer : nullptr, true);
  });
}

}  // namespace
}  // namespace normkit
