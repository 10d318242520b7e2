// The runs traversal, backward. What the sums of a statistic hold decides dx; where parameters are constant over a statistic
// or over pieces of it, the same sums are their gradients.
#pragma once

namespace normkit {
namespace {

/// Sums of backward over a part of a statistic, and its members.
struct Reduced {
  Sums<double> sums{0, 0, 0};
  double n = 0;
};
NORMKIT_LOCAL Reduced operator+(Reduced a, Reduced b) { return {a.sums + b.sums, a.n + b.n}; }
NORMKIT_LOCAL void put(Reduced r, double* to) { to[0] = r.sums.g, to[1] = r.sums.gx, to[2] = r.sums.d, to[3] = r.n; }
NORMKIT_LOCAL Reduced reduced_at(const double* from) { return {{from[0], from[1], from[2]}, from[3]}; }

/// True where a mask or an activation asks more of the sums than the plain loops do; writing dx has a gradient to add, too.
NORMKIT_LOCAL bool has_detailed_sums(const Task& t) { return t.where.data || has_activation(t); }
NORMKIT_LOCAL bool has_detailed_ranges(const Task& t) { return t.residual.data || has_detailed_sums(t); }

/// Types that have loops for what is no more than a kink: float64, and registers that hold little, do without.
template <class X> constexpr bool kHasKinked = kWide && sizeof(X) < 8;
NORMKIT_LOCAL bool has_kink_alone(const Task& t) { return !t.where.data && has_kink(t.activation); }
/// True where the plain loop over dx takes a kink along.
template <class X> NORMKIT_LOCAL bool takes_kink(const Task& t) {
  return kHasKinked<X> && has_kink_alone(t) && t.dx.data && !t.residual.data && !follows_elements(t.geometry);
}

/// How many bytes fetches run ahead of a walk: those into the first-level cache, and those into the second.
struct Ahead {
  std::int64_t near = 0, far_x = 0, far_dy = 0;

  NORMKIT_LOCAL Ahead() = default;
  NORMKIT_LOCAL Ahead(const Walk& walk, std::int64_t near_bytes, std::int64_t far_bytes)
      : near(near_bytes), far_x(far_or_next(far_bytes, walk.next_x)), far_dy(far_or_next(far_bytes, walk.next_dy)) {}
};
/// Fetches for a walk over dy and x.
struct FetchBoth {
  const char *x, *dy;
  Ahead ahead;

  template <class X> FetchBoth(const X* x_now, const X* dy_now, Ahead bytes)
      : x(reinterpret_cast<const char*>(x_now)), dy(reinterpret_cast<const char*>(dy_now)), ahead(bytes) {}
  NORMKIT_LOCAL void near_line(std::int64_t byte) const {
    prefetch_first(x + ahead.near + byte), prefetch_first(dy + ahead.near + byte);
  }
  NORMKIT_LOCAL void far_line(std::int64_t byte) const {
    prefetch_second(x + ahead.far_x + byte), prefetch_second(dy + ahead.far_dy + byte);
  }
};

/// The sums of backward of each lane in two halves, of even and of odd vectors, to which segments of x and dy are added
/// one after another. A segment that is a multiple of 4 vectors leaves them as if the next one belonged to it.
template <class X> struct LaneSums {
  using V = VectorOf<X>;
  Sums<V> half[2];

  LaneSums() {
    for (auto& part : half) part.g = part.gx = part.d = broadcast<V>(ScalarOf<X>(0));
  }
  Sums<V> all() const { return half[0] + half[1]; }
  Sums<double> total() const {
    const Sums<V> s = all();
    return {static_cast<double>(sum(s.g)), static_cast<double>(sum(s.gx)), static_cast<double>(sum(s.d))};
  }
};

/// The gradient that reaches z = x_hat * weight + bias: dy. Through an activation an element that no gradient reaches adds nothing to
/// sums, even where it is NaN.
template <class X> struct Straight {
  template <class P> NORMKIT_LOCAL VectorOf<X> operator()(P place, const X* dy, VectorOf<X>) const {
    return place.load(dy);
  }
};

/// The slope below its kink of an activation that has one.
NORMKIT_LOCAL double slope_below(const Activation& a) { return is_relu(a) ? 0 : a.parameter; }

/// The gradient that reaches z through such an activation, where a run has one weight and one bias.
template <class X> struct Kinked {
  double below;
  Preactivation<X> z;

  template <class P> NORMKIT_LOCAL VectorOf<X> operator()(P place, const X* dy, VectorOf<X> x) const {
    return place.load(dy) * kink_slope(z.constant(x), below);
  }
};

/// The gradient that reaches z, unless it is that through a curved activation.
template <class X, class P>
NORMKIT_LOCAL VectorOf<X> incoming(const Task& t, const Preactivation<X>& z, P place, const X* dy, VectorOf<X> x) {
  const VectorOf<X> g = place.load(dy);
  return has_kink(t.activation) ? where(g, g * kink_slope(z.at(place, x), slope_below(t.activation))) : g;
}

/// Adds `rows` segments of n elements of dy and x to s. kWeighted: what reaches z is multiplied by `weight`, which has one factor
/// for each element. x - mean is summed over `members` of one segment, or over Everyone.
template <class X, bool kWeighted, class Beside, class Reaching = Straight<X>, class Members = Everyone>
NORMKIT_LOCAL void add_segments(LaneSums<X>& sums, const X* dy, std::int64_t dy_stride, const X* x,
                                std::int64_t x_stride, std::int64_t rows, std::int64_t n, ScalarOf<X> mean,
                                const ScalarOf<X>* weight, Ahead ahead, Beside& beside, Reaching reaching = {},
                                Members members = {}) {
  using V = VectorOf<X>;
  constexpr int kWidth = kLanes<V>;
  const V m = broadcast<V>(mean);
  Sums<V>(&s)[2] = sums.half;
  const auto add = [&](Sums<V>& part, auto place) NORMKIT_INLINE_LAMBDA {
    constexpr bool kStraight = __is_same(Reaching, Straight<X>);
    const V x_v = place.load(x), d = place.keep(x_v - m);
    V g = reaching(place, dy, x_v);
    if constexpr (!kStraight) g = place.keep(g);
    if constexpr (kWeighted) g = g * place.load(weight);
    part.g = part.g + g;
    part.gx = mul_add(g, kStraight ? d : where(g, d), part.gx);
    if constexpr (Members::kAll) part.d = part.d + d;
    else part.d = part.d + members.keep(place, d);
  };
  for (std::int64_t row = 0; row < rows; ++row, x += x_stride, dy += dy_stride) {
    const FetchBoth fetch(x, dy, ahead);
    std::int64_t i = 0;
    Sums<V> even = s[0], odd = s[1];  // copies, which stay in registers whatever is done beside
    for (; i + 4 * kWidth <= n; i += 4 * kWidth) {
      for (std::int64_t line = 0; line < 4 * kWidth * static_cast<std::int64_t>(sizeof(X)); line += 64) {
        const std::int64_t byte = i * static_cast<std::int64_t>(sizeof(X)) + line;
        if constexpr (!__is_same(Beside, Nothing)) fetch.near_line(byte), fetch.far_line(byte);
        else if (ahead.near) fetch.near_line(byte);
        else if (ahead.far_x) fetch.far_line(byte);
      }
      beside.block();
      add(even, Full{i}), add(odd, Full{i + kWidth});
      add(even, Full{i + 2 * kWidth}), add(odd, Full{i + 3 * kWidth});
    }
    s[0] = even, s[1] = odd;
    for (; i + kWidth <= n; i += kWidth) add(s[0], Full{i});
    if (i < n) add(s[1], Part{i, static_cast<int>(n - i)});
  }
}

template <class X, class Beside, class Reaching = Straight<X>>
[[gnu::noinline]] Sums<double> chunk_sums(const X* dy, std::int64_t dy_stride, const X* x, std::int64_t x_stride,
                                          std::int64_t rows, std::int64_t n, ScalarOf<X> mean, Ahead ahead,
                                          Beside& beside, const Reaching& reaching = {}) {
  LaneSums<X> sums;
  add_segments<X, false>(sums, dy, dy_stride, x, x_stride, rows, n, mean, nullptr, ahead, beside, reaching);
  return sums.total();
}

/// The gradient that reaches z through any activation, for n <= kBuffer elements from element `begin` of a piece on.
template <class X>
[[gnu::noinline]] void reach(const Task& t, const Preactivation<X>& z, const X* dy, const X* x, std::int64_t begin,
                             std::int64_t n, ScalarOf<X>* reaching) {
  using S = ScalarOf<X>;
  map(reaching, n, kPlain<S>, Fetch{}, [&](auto place) NORMKIT_INLINE_LAMBDA {
    const auto here = place.back(-begin);
    return incoming(t, z, here, dy, here.load(x));
  });
  if (!has_curved_slope(t.activation)) return;
  alignas(64) S z_value[kBuffer];
  map(z_value, n, kPlain<S>, Fetch{}, [&](auto place) NORMKIT_INLINE_LAMBDA {
    const auto here = place.back(-begin);
    return z.at(here, here.load(x));
  });
  multiply_by_slopes(z.activation, z.slopes ? z.slopes + begin : nullptr, z_value, reaching, n);
}

/// add_segments() where a mask or a curved activation has its say. An element that no gradient reaches adds nothing, even where
/// it is NaN, as an element that is no member may be.
template <class X>
[[gnu::noinline]] void add_detailed(LaneSums<X>& sums, const Task& t, const X* dy, const X* x, std::int64_t rows,
                                    std::int64_t n, ScalarOf<X> mean, const Preactivation<X>& z, Masked members) {
  using V = VectorOf<X>;
  using S = ScalarOf<X>;
  constexpr int kWidth = kLanes<V>;
  const V m = broadcast<V>(mean);
  const bool curved = has_curved_slope(t.activation);
  const std::int64_t in_turn = n / (4 * kWidth) * (4 * kWidth), whole = n / kWidth * kWidth;
  alignas(64) S reaching[kBuffer];
  for (std::int64_t row = 0; row < rows; ++row, x += t.x.strides.step, dy += t.dy.strides.step, members.next_row())
    for (std::int64_t begin = 0; begin < n; begin += kBuffer) {
      const std::int64_t count = least(n - begin, kBuffer);
      if (curved) reach(t, z, dy, x, begin, count, reaching);
      for_positions<V>(count, [&](auto place) NORMKIT_INLINE_LAMBDA {
        const auto here = place.back(-begin);
        prefetch_both(reinterpret_cast<const char*>(x + here.i) + kAhead);
        prefetch_both(reinterpret_cast<const char*>(dy + here.i) + kAhead);
        const V x_v = here.load(x), d = x_v - m;
        V g;
        if (curved) g = place.load(static_cast<const S*>(reaching));
        else g = incoming(t, z, here, dy, x_v);
        if (z.weight) g = g * here.load(z.weight);
        Sums<V>& s = sums.half[here.i < in_turn ? here.i / kWidth % 2 : here.i >= whole];
        s.g = s.g + place.keep(g);
        s.gx = mul_add(place.keep(g), where(g, d), s.gx);
        s.d = s.d + members.keep(here, d);
      });
    }
}

/// How many bytes ahead sums fetch: fewer if outputs are written beside them.
NORMKIT_LOCAL Ahead ahead_while_summing(const Task& t, Nothing) { return {t.walk, 0, kFarAhead}; }
template <class Beside> NORMKIT_LOCAL Ahead ahead_while_summing(const Task& t, const Beside&) {
  const std::int64_t near = near_ahead(t.geometry.run * size_of(t.x.dtype));
  return {t.walk, near, near + t.walk.far_bytes};
}

/// One range of a run of a statistic, or several whole runs, and the place where it lies.
struct Range { std::int64_t o, step, lane, rows, begin, end; };

/// The sums of a range in which one parameter holds, or in which weights follow the elements.
template <class X, class Beside>
Sums<double> piece_sums(const Task& t, Range range, Piece piece, Statistic<ScalarOf<X>> s,
                        ParamBuffers<ScalarOf<X>>& params, Beside& beside) {
  const X* x = at<X>(t.x, range.o, range.step, range.lane) + piece.begin;
  const X* dy = at<X>(t.dy, range.o, range.step, range.lane) + piece.begin;
  if (has_detailed_sums(t)) {
    LaneSums<X> sums;
    const Preactivation<X> z = activation_input<X>(t, piece, s, params);
    if constexpr (kHasKinked<X>) {
      Nothing alone;
      if (has_kink_alone(t))
        return chunk_sums(dy, t.dy.strides.step, x, t.x.strides.step, range.rows, piece.n, s.mean,
                          ahead_while_summing(t, alone), alone, Kinked<X>{slope_below(t.activation), z});
    }
    const Masked members = members_at(t, range.o, range.step, range.lane, piece.begin);
    add_detailed(sums, t, dy, x, range.rows, piece.n, s.mean, z, members);
    return sums.total();
  }
  return chunk_sums(dy, t.dy.strides.step, x, t.x.strides.step, range.rows, piece.n, s.mean,
                    ahead_while_summing(t, beside), beside);
}

/// The sums of a range of one run along which weights lie, or would if there were any: one sum, however many buffers the
/// weights take, as batches have it.
template <class X>
[[gnu::noinline]] Sums<double> sums_along(const Task& t, Range range, Statistic<ScalarOf<X>> s, Nothing& beside) {
  const X* x = at<X>(t.x, range.o, range.step, range.lane);
  const X* dy = at<X>(t.dy, range.o, range.step, range.lane);
  const Ahead ahead = ahead_while_summing(t, beside);
  const std::int64_t n = range.end - range.begin;
  const bool detailed = has_detailed_sums(t);
  if (!t.weight.data && !detailed)
    return chunk_sums(dy + range.begin, 0, x + range.begin, 0, 1, n, s.mean, ahead, beside);
  ParamBuffers<ScalarOf<X>> params;
  LaneSums<X> sums;
  const std::int64_t offset = t.geometry.offset(range.o, range.step, range.lane, 0);
  for_pieces(t, range.o, offset, range.begin, range.end, kBuffer, [&](Piece piece) {
    if (detailed)
      return add_detailed(sums, t, dy + piece.begin, x + piece.begin, 1, piece.n, s.mean,
                          activation_input<X>(t, piece, s, params),
                          members_at(t, range.o, range.step, range.lane, piece.begin));
    add_segments<X, true>(sums, dy + piece.begin, 0, x + piece.begin, 0, 1, piece.n, s.mean,
                          params.weights.read(t.weight, piece.parameter, piece.n, 1), ahead, beside);
  });
  return sums.total();
}

/// The sums of a range of one run whose parameters change within a statistic: each piece has its own weight. What a
/// piece adds to the gradients of its parameters goes to `dparams`.
template <class X, class Beside>
Sums<double> piecewise_sums(const Task& t, Range range, Statistic<ScalarOf<X>> s, Beside& beside) {
  const Geometry& g = t.geometry;
  if constexpr (__is_same(Beside, Nothing))  // what has weights along a run is never overlapped, see overlaps()
    if (follows_elements(g)) return sums_along<X>(t, range, s, beside);
  ParamBuffers<ScalarOf<X>> params;
  Sums<double> total{0, 0, 0};
  const std::int64_t offset = g.offset(range.o, range.step, range.lane, 0);
  for_pieces(t, range.o, offset, range.begin, range.end, follows_elements(g) ? kBuffer : range.end, [&](Piece piece) {
    const Sums<double> sums = piece_sums<X>(t, range, piece, s, params, beside);
    const double w = piece.linear ? 1 : element(t.weight, piece.parameter, 1);
    total = total + Sums<double>{w * sums.g, w * sums.gx, sums.d};
    if (t.kind == ParamKind::piece) {
      double* d = t.dparams + 2 * ((offset + piece.begin) / g.params.stride);
      d[0] += sums.gx, d[1] += sums.g;
    }
  });
  return total;
}

/// The sums of one span of a statistic. Where the statistic has one weight, the sums are taken without it.
template <class X, class Beside>
Reduced span_sums(const Task& t, std::int64_t o, std::int64_t lane, Chunks c, std::int64_t span,
                  Statistic<ScalarOf<X>> s, Beside& beside) {
  const Geometry& g = t.geometry;
  const bool constant = constant_in_statistic(g);
  const std::int64_t parameter = constant ? g.parameter(o, g.offset(o, 0, lane, 0)) : 0;
  const std::int64_t first = span * kSpanChunks, last = least(c.count, first + kSpanChunks);
  ParamBuffers<ScalarOf<X>> unused;
  Reduced total;
  for_chunks(g, c, first, last, [&](std::int64_t step, std::int64_t rows, std::int64_t begin, std::int64_t end) {
    total.n +=
        with_members(t, o, step, lane, begin, [&](const auto& members) { return members.count(rows, end - begin); });
    if (constant) {
      const Piece piece{begin, end - begin, parameter, false};
      total.sums = total.sums + piece_sums<X>(t, {o, step, lane, rows, begin, end}, piece, s, unused, beside);
      return;
    }
    for (std::int64_t row = step; row < step + rows; ++row)
      total.sums = total.sums + piecewise_sums<X>(t, {o, row, lane, 1, begin, end}, s, beside);
  });
  return total;
}

/// The distance from the mean that sums of backward were taken about to the mean that they are wanted about: a given
/// mean with its low part where statistics are frozen; else, since a given mean is rounded, the mean of the data.
template <class S> NORMKIT_LOCAL double mean_shift(const Task& t, Statistic<S> given, double sum_d, double n) {
  if (!t.centered || n == 0) return 0;
  return t.frozen ? static_cast<double>(given.mean_low) : sum_d / n;
}

/// The pairs of `dparams` that belong to the pieces of one statistic.
template <class F> NORMKIT_LOCAL void for_own_dparams(const Task& t, std::int64_t o, std::int64_t lane, F f) {
  if (t.kind != ParamKind::piece) return;
  const Geometry& g = t.geometry;
  const std::int64_t first = g.offset(o, 0, lane, 0) / g.params.stride;
  for (std::int64_t k = 0; k < g.run / g.params.stride; ++k) f(t.dparams + 2 * (first + k));
}

/// True where the sums of a statistic are needed. Frozen statistics have no part in dx: their sums are taken only where
/// gradients of parameters are collected from them.
NORMKIT_LOCAL bool needs_sums(const Task& t) {
  const bool collects = t.kind == ParamKind::statistic || t.kind == ParamKind::piece;
  return collects || t.phase == Phase::reduce || (!t.frozen && has_second_pass(t));
}

/// The weight that all of a statistic shares; 1 where it has several weights, with which its sums were taken.
NORMKIT_LOCAL double common_weight(const Task& t, std::int64_t o, std::int64_t lane) {
  const Geometry& g = t.geometry;
  return constant_in_statistic(g) ? element(t.weight, g.parameter(o, g.offset(o, 0, lane, 0)), 1) : 1;
}

/// The share of dweight and dbias of a statistic with one weight.
NORMKIT_LOCAL void put_dparams(const Task& t, std::int64_t r, double rstd, Sums<double> sums) {
  t.dparams[2 * r] = rstd * sums.gx, t.dparams[2 * r + 1] = sums.g;
}

/// Makes of the sums of a whole statistic the coefficients of its gradient. The sums are about s.mean: the low part of a given
/// mean, or the distance to the mean of the data, is still to come. They are weighted before they are recentered, as sums that
/// are given have been: the two phases have the bits of one call.
template <class S>
NORMKIT_LOCAL Solved<S> solved_of(Statistic<S> s, Reduced reduced, double shift, double weight, bool centered,
                                  Denominator d) {
  if (centered) s = shifted(s, shift);
  const Sums<double> weighted{weight * reduced.sums.g, weight * reduced.sums.gx, reduced.sums.d};
  return {s, gradient_of(s, recenter(weighted, shift), reduced.n, centered, d)};
}

/// Calls solve(k, members, centered, denominator) for statistics of so many members that are solved side by side. The compiler makes
/// vectors of the loop, as it knows what is done about means and denominators, and that the members are some.
template <class F>
NORMKIT_LOCAL void solve_side_by_side(const Task& t, std::int64_t members, F solve, int rows) {
  const double n = static_cast<double>(members), eps = t.denominator.eps;
  const auto solve_all = [&](bool centered, Denominator d) NORMKIT_INLINE_LAMBDA {
    if (n == 0) return;
    for (int k = 0; k < rows; ++k) solve(k, n, centered, d);
  };
  if (t.denominator.is_norm) return solve_all(t.centered, {eps, true});
  t.centered ? solve_all(true, {eps, false}) : solve_all(false, {eps, false});
}

/// Likewise of a statistic of any task, and leaves its share of dweight and dbias.
template <class S> Solved<S> solve(const Task& t, std::int64_t r, std::int64_t o, std::int64_t lane, Reduced reduced) {
  const Statistic<S> s = given_statistic<S>(t, r);
  const double shift = mean_shift(t, s, reduced.sums.d, reduced.n);
  for_own_dparams(t, o, lane, [&](double* d) { d[0] = s.rstd * mul_add(-shift, d[1], d[0]); });
  if (t.kind == ParamKind::statistic) put_dparams(t, r, s.rstd, recenter(reduced.sums, shift));
  if (t.frozen) return {s, {static_cast<S>(s.rstd), 0, 0}};
  const double weight = t.phase == Phase::apply ? 1 : common_weight(t, o, lane);
  return solved_of(s, reduced, shift, weight, t.centered, t.denominator);
}

/// The sums of statistic r in Phase::apply, as Phase::reduce and the caller's additions left them.
NORMKIT_LOCAL Reduced given_sums(const Task& t, std::int64_t r) {
  return {{t.sums[3 * r], t.sums[3 * r + 1], t.sums[3 * r + 2]}, t.counts[r]};
}
NORMKIT_LOCAL void put_sums(const Task& t, std::int64_t r, Sums<double> sums, double weight) {
  t.sums[3 * r] = weight * sums.g, t.sums[3 * r + 1] = weight * sums.gx, t.sums[3 * r + 2] = sums.d;
}

/// What backward_range() reads and writes, each from the first element of a run on.
template <class X> struct BackwardRows {
  const X *dy, *x, *residual;
  X* dx;  // null: not wanted
  ScalarOf<X>* row_sums;  // ParamKind::row: dweight and then dbias of this row's group
};

/// Gradients of parameters that follow the elements, from the first element of a piece on: added up over the rows of a group,
/// or one for each element of x.
template <class X> struct ElementGradients {
  using V = VectorOf<X>;
  using S = ScalarOf<X>;
  S *dweight, *dbias;  // null: not wanted
  bool summed, masked;
  V mean, scale, shift;

  ElementGradients(const Task& t, S* row_sums, std::int64_t offset, std::int64_t begin, Statistic<S> s)
      : summed(row_sums), masked(t.where.data) {
    dweight = row_sums ? row_sums + begin : t.dweight_out ? at<S>(t.dweight_out, offset + begin) : nullptr;
    dbias = row_sums ? row_sums + t.geometry.run + begin : t.dbias_out ? at<S>(t.dbias_out, offset + begin) : nullptr;
    const Affine<S> standard = forward_affine(s, 1, 0);
    mean = broadcast<V>(s.mean), scale = broadcast<V>(standard.scale), shift = broadcast<V>(standard.shift);
  }

  /// Adds one vector to both gradients, which are wanted and added up over rows.
  template <class P> NORMKIT_LOCAL void add_row(P place, V dy, V x) const {
    place.store(dweight, mul_add(forward(x, mean, scale, shift), dy, place.load(dweight)));
    place.store(dbias, place.load(dbias) + dy);
  }

  /// Adds or stores the gradients of one vector; `dy` is the gradient that reaches the weights.
  template <class P> NORMKIT_LOCAL void add(P place, V dy, V x) const {
    V x_hat = forward(x, mean, scale, shift);
    if (masked) x_hat = where(dy, x_hat);
    // The sum of one product, too, begins with a zero: the sign of a product that is none does not depend on a mask.
    if (dweight) place.store(dweight, mul_add(x_hat, dy, summed ? place.load(dweight) : broadcast<V>(S(0))));
    if (dbias) place.store(dbias, summed ? place.load(dbias) + dy : dy);
  }
};

/// dx over one range of a run, and, where the parameters follow the elements, what the range adds to their gradients.
/// dx may lie over x or dy, so it comes last. An activation is one whose kink is all there is, see takes_kink(): z comes from the
/// statistics that the caller gave, as the sums had it.
template <class X>
[[gnu::noinline]] void backward_range(const Task& t, BackwardRows<X> rows, std::int64_t o, std::int64_t offset,
                                      std::int64_t begin, std::int64_t end, const Solved<ScalarOf<X>>& known,
                                      Statistic<ScalarOf<X>> given, Streamer<X>* streamer) {
  using V = VectorOf<X>;
  using S = ScalarOf<X>;
  const V mean = broadcast<V>(known.statistic.mean);
  const V b = broadcast<V>(known.gradient.b), c = broadcast<V>(known.gradient.c);
  ParamBuffers<S> params;
  for_pieces(t, o, offset, begin, end, follows_elements(t.geometry) ? kBuffer : end,
             [&](Piece piece) NORMKIT_INLINE_LAMBDA {
    const X *dy = rows.dy + piece.begin, *x = rows.x + piece.begin;
    X* dx = rows.dx + piece.begin;
    const FetchBoth next(x, dy, {t.walk, kAhead, t.walk.fetch_bytes});
    const auto fetch = [&](auto place) NORMKIT_INLINE_LAMBDA {
      const std::int64_t byte = place.i * static_cast<std::int64_t>(sizeof(X));
      if (t.frozen) next.near_line(byte);
      else next.far_line(byte);
    };
    const double weight = piece.linear ? 1 : element(t.weight, piece.parameter, 1);
    const V a = broadcast<V>(static_cast<S>(known.statistic.rstd * weight));
    const bool weighted = piece.linear && t.weight.data;
    const S* factors = weighted ? params.weights.read(t.weight, piece.parameter, piece.n, 1) : nullptr;
    const auto dx_of = [&](V g, V x_v)
                           NORMKIT_INLINE_LAMBDA { return backward(g, a, through_statistics(x_v, mean, b, c)); };
    const auto write = [&](auto reaching) NORMKIT_INLINE_LAMBDA {
      map(dx, piece.n, streamer, Fetch{}, [&](auto place) NORMKIT_INLINE_LAMBDA {
        fetch(place);
        const V x_v = place.load(x), g = reaching(place, dy, x_v);
        return dx_of(factors ? g * place.load(factors) : g, x_v);
      });
    };
    if constexpr (kHasKinked<X>)
      if (has_activation(t))
        return write(Kinked<X>{slope_below(t.activation), activation_input<X>(t, piece, given, params)});
    if (!writes_element_gradients(t)) return write(Straight<X>{});
    const ElementGradients<X> gradients(t, rows.row_sums, offset, piece.begin, known.statistic);
    if (!rows.dx) {
      for_positions<V>(piece.n,
                       [&](auto place) NORMKIT_INLINE_LAMBDA { gradients.add(place, place.load(dy), place.load(x)); });
      return;
    }
    map(dx, piece.n, streamer, Fetch{}, [&](auto place) NORMKIT_INLINE_LAMBDA {
      fetch(place);
      const V dy_v = place.load(dy), x_v = place.load(x);
      gradients.add(place, dy_v, x_v);
      return dx_of(factors ? dy_v * place.load(factors) : dy_v, x_v);
    });
  });
}

/// backward_range() with a mask, an activation or a gradient to add. The gradient that reaches the weights is put into a buffer
/// first; z comes from the statistics that the caller gave, as the sums had it.
template <class X>
[[gnu::noinline]] void detailed_range(const Task& t, BackwardRows<X> rows, std::int64_t o, std::int64_t offset,
                                      std::int64_t begin, std::int64_t end, const Solved<ScalarOf<X>>& known,
                                      Statistic<ScalarOf<X>> given, Masked members, Streamer<X>* streamer) {
  using V = VectorOf<X>;
  using S = ScalarOf<X>;
  const V mean = broadcast<V>(known.statistic.mean);
  const V b = broadcast<V>(known.gradient.b), c = broadcast<V>(known.gradient.c);
  ParamBuffers<S> params;
  alignas(64) S reaching[kBuffer];
  for_pieces(t, o, offset, begin, end, kBuffer, [&](Piece piece) NORMKIT_INLINE_LAMBDA {
    const X *dy = rows.dy + piece.begin, *x = rows.x + piece.begin;
    const Preactivation<X> z = activation_input<X>(t, piece, given, params);
    reach(t, z, dy, x, 0, piece.n, reaching);
    if (writes_element_gradients(t)) {
      const ElementGradients<X> gradients(t, rows.row_sums, offset, piece.begin, known.statistic);
      for_positions<V>(piece.n, [&](auto place) NORMKIT_INLINE_LAMBDA {
        gradients.add(place, place.load(static_cast<const S*>(reaching)), place.load(x));
      });
    }
    if (!rows.dx) return;
    const double weight = piece.linear ? 1 : element(t.weight, piece.parameter, 1);
    const V a = broadcast<V>(static_cast<S>(known.statistic.rstd * weight));
    const X* residual = rows.residual ? rows.residual + piece.begin : nullptr;
    const Masked piece_members = members.from(piece.begin - begin);
    const Fetch ahead{residual ? reinterpret_cast<const char*>(residual) + kAhead : nullptr};
    map(rows.dx + piece.begin, piece.n, streamer, ahead, [&](auto place) NORMKIT_INLINE_LAMBDA {
      V g = place.load(static_cast<const S*>(reaching));
      if (z.weight) g = g * place.load(z.weight);
      const V dx = backward(g, a, piece_members.only(place, through_statistics(place.load(x), mean, b, c)));
      return residual ? dx + place.load(residual) : dx;
    });
  });
}

template <class X>
void backward_span(const Task& t, std::int64_t r, Chunks c, std::int64_t span, const Solved<ScalarOf<X>>& known,
                   Streamer<X>* streamer) {
  using S = ScalarOf<X>;
  const Geometry& g = t.geometry;
  const std::int64_t o = r / g.lanes, lane = r % g.lanes;
  S* row_sums = nullptr;
  if (t.kind == ParamKind::row)
    row_sums = reinterpret_cast<S*>(t.dparams + 2 * (o * row_groups(g) + lane / kRowGroup) * g.run);
  for_ranges(g, c, span, [&](std::int64_t step, std::int64_t begin, std::int64_t end) {
    const BackwardRows<X> rows{at<X>(t.dy, o, step, lane), at<X>(t.x, o, step, lane),
                               t.residual.data ? at<X>(t.residual, o, step, lane) : nullptr,
                               t.dx.data ? at<X>(t.dx, o, step, lane) : nullptr, row_sums};
    const std::int64_t offset = g.offset(o, step, lane, 0);
    const Statistic<S> given = given_statistic<S>(t, r);
    if (!has_detailed_ranges(t) || takes_kink<X>(t))
      return backward_range(t, rows, o, offset, begin, end, known, given, streamer);
    detailed_range(t, rows, o, offset, begin, end, known, given, members_at(t, o, step, lane, begin), streamer);
  });
}

/// The sums of a whole statistic: taken here, or given in Phase::apply.
template <class X, class Beside>
Reduced statistic_sums(const Task& t, std::int64_t r, Chunks c, Beside& beside) {
  if (t.phase == Phase::apply) return given_sums(t, r);
  Reduced reduced;
  if (!needs_sums(t)) return reduced;
  const Statistic<ScalarOf<X>> given = given_statistic<ScalarOf<X>>(t, r);
  for (std::int64_t span = 0; span < c.spans; ++span)
    reduced = reduced + span_sums<X>(t, r / t.geometry.lanes, r % t.geometry.lanes, c, span, given, beside);
  return reduced;
}

template <class X> void backward_statistic(const Task& t, std::int64_t r, Chunks c, Streamer<X>* streamer) {
  const std::int64_t o = r / t.geometry.lanes, lane = r % t.geometry.lanes;
  Nothing alone;
  const Reduced reduced = statistic_sums<X>(t, r, c, alone);
  if (t.phase == Phase::reduce) return put_sums(t, r, reduced.sums, common_weight(t, o, lane));
  const Solved<ScalarOf<X>> known = solve<ScalarOf<X>>(t, r, o, lane, reduced);
  if (has_second_pass(t))
    for_spans(t, 0, c.spans, [&](std::int64_t span) { backward_span<X>(t, r, c, span, known, streamer); });
}

/// dx of one statistic, for a BesideWriter; parameters do not follow the elements.
template <class Element> struct BackwardOutputs {
  using X = Element;
  using V = VectorOf<X>;
  using S = ScalarOf<X>;
  struct Formula {
    const X *dy, *x;
    V mean, a, b, c;
    NORMKIT_LOCAL V operator()(Full place) const {
      return backward(place.load(dy), a, through_statistics(place.load(x), mean, b, c));
    }
  };

  const Task& t;
  std::int64_t o, lane;
  Solved<S> known;
  Streamer<X>& streamer;

  Piece piece(std::int64_t step, std::int64_t begin) const {
    const Geometry& g = t.geometry;
    return piece_at(g, o, g.offset(o, step, lane, 0), begin, g.run, g.run);
  }
  X* out(std::int64_t step) const { return at<X>(t.dx, o, step, lane); }
  Formula formula(std::int64_t step, Piece piece) const {
    const double weight = element(t.weight, piece.parameter, 1);
    return {at<X>(t.dy, o, step, lane) + piece.begin, at<X>(t.x, o, step, lane) + piece.begin,
            broadcast<V>(known.statistic.mean),       broadcast<V>(static_cast<S>(known.statistic.rstd * weight)),
            broadcast<V>(known.gradient.b),           broadcast<V>(known.gradient.c)};
  }
  void write(std::int64_t step, std::int64_t begin, std::int64_t end) const {
    const BackwardRows<X> rows{at<X>(t.dy, o, step, lane), at<X>(t.x, o, step, lane), nullptr, out(step), nullptr};
    backward_range(t, rows, o, t.geometry.offset(o, step, lane, 0), begin, end, known, known.statistic, &streamer);
  }
};

/// Backward, for statistics [begin, end): each is written while the next one is read.
template <class X> void runs_backward_overlapped(const Task& t, std::int64_t begin, std::int64_t end) {
  using S = ScalarOf<X>;
  const Geometry& g = t.geometry;
  const Chunks c = chunks_of(g, Traversal::runs);
  const auto solve_with = [&](std::int64_t r, auto& beside) {
    return solve<S>(t, r, r / g.lanes, r % g.lanes, statistic_sums<X>(t, r, c, beside));
  };
  Streamer<X> streamer;
  Nothing alone;
  Solved<S> known = solve_with(begin, alone);
  for (std::int64_t r = begin; r < end; ++r) {
    BackwardOutputs<X> outputs{t, r / g.lanes, r % g.lanes, known, streamer};
    BesideWriter<BackwardOutputs<X>> writer(outputs);
    if (r + 1 < end) known = solve_with(r + 1, writer);
    writer.finish();
  }
}

/// The statistics of one unit of the schedule: one, or where weights along the row want their gradients summed, all of
/// a group. The rows of a group add to the same sums, so one thread takes them, in order.
struct Rows { std::int64_t first, last; };
NORMKIT_LOCAL Rows rows_of(const Task& t, std::int64_t unit) {
  if (t.kind != ParamKind::row) return {unit, unit + 1};
  const std::int64_t lanes = t.geometry.lanes, groups = row_groups(t.geometry);
  const std::int64_t begin = unit / groups * lanes, first = unit % groups * kRowGroup;
  return {begin + first, begin + least(lanes, first + kRowGroup)};
}

template <class X> void runs_backward(const Task& t, std::int64_t begin, std::int64_t end) {
  if constexpr (kWide) {
    if (t.walk.overlapped) return runs_backward_overlapped<X>(t, begin, end);
  }
  const Chunks c = chunks_of(t.geometry, Traversal::runs);
  Streamer<X> streamer;
  for (std::int64_t unit = begin; unit < end; ++unit) {
    const Rows rows = rows_of(t, unit);
    for (std::int64_t r = rows.first; r < rows.last; ++r)
      backward_statistic<X>(t, r, c, t.walk.stream_stores ? &streamer : nullptr);
  }
}

template <class X> void runs_backward_sums(const Task& t, std::int64_t begin, std::int64_t end) {
  const Geometry& g = t.geometry;
  const Chunks c = chunks_of(g, Traversal::runs);
  for (std::int64_t unit = begin; unit < end; ++unit) {
    const std::int64_t r = unit / c.spans;
    const Statistic<ScalarOf<X>> given = given_statistic<ScalarOf<X>>(t, r);
    Nothing alone;
    put(span_sums<X>(t, r / g.lanes, r % g.lanes, c, unit % c.spans, given, alone), t.partials + 4 * unit);
  }
}

template <class X> void runs_backward_finish(const Task& t, std::int64_t begin, std::int64_t end) {
  using S = ScalarOf<X>;
  const Geometry& g = t.geometry;
  const Chunks c = chunks_of(g, Traversal::runs);
  for (std::int64_t r = begin; r < end; ++r) {
    const std::int64_t o = r / g.lanes, lane = r % g.lanes;
    Reduced reduced;
    if (t.phase == Phase::apply) reduced = given_sums(t, r);
    else
      for (std::int64_t unit = r * c.spans; unit < (r + 1) * c.spans; ++unit)
        reduced = reduced + reduced_at(t.partials + 4 * unit);
    if (t.phase == Phase::reduce) put_sums(t, r, reduced.sums, common_weight(t, o, lane));
    else *solved<S>(t, r) = solve<S>(t, r, o, lane, reduced);
  }
}

/// Backward's apply in the split schedule: the range [begin, end) counts spans of units.
template <class X> void runs_backward_apply(const Task& t, std::int64_t begin, std::int64_t end) {
  const Chunks c = chunks_of(t.geometry, Traversal::runs);
  Streamer<X> streamer;
  for_spans(t, begin, end, [&](std::int64_t unit) {
    const Rows rows = rows_of(t, unit / c.spans);
    for (std::int64_t r = rows.first; r < rows.last; ++r)
      backward_span<X>(t, r, c, unit % c.spans, *solved<ScalarOf<X>>(t, r), t.walk.stream_stores ? &streamer : nullptr);
  });
}

}  // namespace
}  // namespace normkit
