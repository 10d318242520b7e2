// The runs traversal, forward: a statistic is reduced along its contiguous runs.
//
//     statistic = steps x run elements -> chunks (one sum in the compute type each) -> spans -> Moments or Sums
//
// x is read twice, the second time from cache where a statistic fits there; rows that fit registers are read once.
#pragma once

namespace normkit {
namespace {

/// Calls f(pointer offset in steps, rows, begin, end) for each part of a statistic that chunks [first, last) cover: whole
/// steps where a chunk holds several, else one range of one run.
template <class F>
NORMKIT_LOCAL void for_chunks(const Geometry& g, Chunks c, std::int64_t first, std::int64_t last, F f) {
  for (std::int64_t chunk = first; chunk < last; ++chunk) {
    if (c.per_run == 1) {
      const std::int64_t step = chunk * c.rows;
      f(step, least(g.steps - step, c.rows), std::int64_t{0}, g.run);
    } else {
      const std::int64_t begin = chunk % c.per_run * kChunk;
      f(chunk / c.per_run, std::int64_t{1}, begin, least(g.run, begin + kChunk));
    }
  }
}

/// Calls f(step, begin, end) for the longest contiguous ranges of a span.
template <class F> NORMKIT_LOCAL void for_ranges(const Geometry& g, Chunks c, std::int64_t span, F f) {
  const std::int64_t first = span * kSpanChunks, last = least(c.count, first + kSpanChunks);
  if (c.per_run == 1) {
    for (std::int64_t step = first * c.rows; step < least(g.steps, last * c.rows); ++step)
      f(step, std::int64_t{0}, g.run);
    return;
  }
  for (std::int64_t chunk = first; chunk < last;) {
    const std::int64_t step = chunk / c.per_run, next = least(last, (step + 1) * c.per_run);
    const std::int64_t begin = (chunk - step * c.per_run) * kChunk;
    f(step, begin, least(g.run, begin + (next - chunk) * kChunk));
    chunk = next;
  }
}

// ---- forward ---------------------------------------------------------------------------------------------------

/// Moments of a chunk in double, in two passes: for data that defeats the pivot of chunk_moments().
template <class X, class Members>
[[gnu::noinline]] Moments careful_moments(const X* x, std::int64_t rows, std::int64_t stride, std::int64_t n,
                                          bool centered, double count, const Members& members) {
  using V = VectorOf<X>;
  constexpr int kWidth = kLanes<V>;
  const auto sums_about = [&](double pivot) {
    const F64 p = broadcast<F64>(pivot);
    F64 s = broadcast<F64>(0.0), q = s;
    Members row_members = members;
    const auto add = [&](F64 v, auto place) NORMKIT_INLINE_LAMBDA {
      const F64 d = row_members.keep(place, v - p);
      s = s + d;
      q = mul_add(d, d, q);
    };
    for (std::int64_t row = 0; row < rows; ++row, row_members.next_row())
      for (std::int64_t i = 0; i < n; i += kWidth) {
        const int live = static_cast<int>(least(n - i, kWidth));
        const V v = live == kWidth ? load(x + row * stride + i) : load(x + row * stride + i, live);
        if constexpr (kWidth == 8) {
          add(v, Part{i, live});
        } else {
          const Wide w = widen(v);
          add(w.low, Part{i, live < 8 ? live : 8});
          if (live > 8) add(w.high, Part{i + 8, live - 8});
        }
      }
    return from_pivot(pivot, sum(s), sum(q), count);
  };
  if (!centered) {
    const Moments m = sums_about(0);
    return {0, mul_add(m.mean * m.mean, count, m.m2), count};
  }
  const double rough = sums_about(static_cast<double>(first(load(members.first(x, stride, rows, n), 1)))).mean;
  return sums_about(rough);
}

/// A sum of squares outside of these may have lost squares to underflow or overflow; and a factor that brings the smallest
/// difference into them.
template <class S> constexpr double kVanishing = sizeof(S) == 8 ? 1e-280 : 1e-28;
template <class S> constexpr double kOverflowing = sizeof(S) == 8 ? 1e300 : 1e38;
template <class S> constexpr S kMagnify = sizeof(S) == 8 ? S(1e200) : S(1e30f);

/// True where sums of differences to a pivot, taken in the compute type, hold the moments to within a few roundings: the
/// pivot is at most 4 standard deviations from the mean, and no square has overflowed or vanished.
template <class S> NORMKIT_LOCAL bool trustworthy(double sum, double sum_squares, double n) {
  const double spread = sum_squares - sum * sum / n;
  return sum * sum <= 16 * n * spread && sum_squares > kVanishing<S> && sum_squares < kOverflowing<S>;
}

/// True where all members are `value`: their differences are scaled so that no square vanishes.
template <class X, class Members>
[[gnu::noinline]] bool all_equal(const X* x, std::int64_t rows, std::int64_t stride, std::int64_t n, ScalarOf<X> value,
                                 Members members) {
  using V = VectorOf<X>;
  constexpr int kWidth = kLanes<V>;
  const V p = broadcast<V>(value), scale = broadcast<V>(kMagnify<ScalarOf<X>>);
  V q = broadcast<V>(ScalarOf<X>(0));
  const auto add = [&](auto place) NORMKIT_INLINE_LAMBDA {
    const V d = members.keep(place, (place.load(x) - p) * scale);
    q = mul_add(d, d, q);
  };
  for (std::int64_t row = 0; row < rows; ++row, x += stride, members.next_row()) {
    std::int64_t i = 0;
    for (; i + kWidth <= n; i += kWidth) add(Full{i});
    if (i < n) add(Part{i, static_cast<int>(n - i)});
  }
  return sum(q) == 0;
}

/// Moments of the members of `rows` segments of n elements, `stride` apart, from one pass about a pivot near their mean.
template <class X, class Members>
[[gnu::noinline]] Moments chunk_moments(const X* x, std::int64_t rows, std::int64_t stride, std::int64_t n,
                                        ScalarOf<X> pivot, bool centered, double count, const Members& members) {
  using V = VectorOf<X>;
  using S = ScalarOf<X>;
  constexpr int kWidth = kLanes<V>;
  constexpr int kShortSum = 16;  // additions; a sum of short sums rounds a quarter as much as one of a whole chunk
  const V p = broadcast<V>(pivot), zero = broadcast<V>(S(0));
  V s[4], q[4], total_s[4], total_q[4];
  for (int k = 0; k < 4; ++k) s[k] = q[k] = total_s[k] = total_q[k] = zero;
  std::int64_t pending = 0;
  Members row_members = members;
  const auto add = [&](int k, auto place, const X* from) NORMKIT_INLINE_LAMBDA {
    const V d = row_members.keep(place, place.load(from) - p);
    s[k] = s[k] + d;
    q[k] = mul_add(d, d, q[k]);
  };
  const auto added = [&](std::int64_t times) NORMKIT_INLINE_LAMBDA {
    pending += times;
    if (pending < kShortSum) return;
    for (int k = 0; k < 4; ++k) total_s[k] = total_s[k] + s[k], total_q[k] = total_q[k] + q[k], s[k] = q[k] = zero;
    pending = 0;
  };
  for (std::int64_t row = 0; row < rows; ++row, x += stride, row_members.next_row()) {
    const std::int64_t whole = n / (4 * kWidth) * (4 * kWidth);
    std::int64_t i = 0;
    while (i < whole) {
      const std::int64_t first = i, stop = least(whole, i + (kShortSum - pending) * 4 * kWidth);
      for (; i < stop; i += 4 * kWidth) {
        for (std::int64_t line = 0; line < 4 * kWidth * static_cast<std::int64_t>(sizeof(X)); line += 64)
          prefetch_first(reinterpret_cast<const char*>(x + i) + kAhead + line);
        for (int k = 0; k < 4; ++k) add(k, Full{i + k * kWidth}, x);
      }
      added((stop - first) / (4 * kWidth));
    }
    if (i == n) continue;
    if (i + kWidth <= n) add(0, Full{i}, x), i += kWidth;
    if (i + kWidth <= n) add(1, Full{i}, x), i += kWidth;
    if (i + kWidth <= n) add(2, Full{i}, x), i += kWidth;
    if (i < n) add(3, Part{i, static_cast<int>(n - i)}, x);
    added(1);
  }
  for (int k = 0; k < 4; ++k) total_s[k] = total_s[k] + s[k], total_q[k] = total_q[k] + q[k];
  const double total = sum((total_s[0] + total_s[1]) + (total_s[2] + total_s[3]));
  const double squares = sum((total_q[0] + total_q[1]) + (total_q[2] + total_q[3]));
  x -= rows * stride;
  if (squares == 0 && all_equal(x, rows, stride, n, pivot, members)) return {static_cast<double>(pivot), 0, count};
  if (!centered && squares > kVanishing<S> && squares < kOverflowing<S>) return {0, squares, count};
  if (!centered || !trustworthy<S>(total, squares, count))
    return careful_moments(x, rows, stride, n, centered, count, members);
  return from_pivot(static_cast<double>(pivot), total, squares, count);
}

/// The mean of the first vector of a chunk, or a member: near enough to the mean of the chunk, as a rule.
template <class X> NORMKIT_LOCAL ScalarOf<X> first_pivot(const X* x, std::int64_t, std::int64_t, std::int64_t n,
                                                         Everyone) {
  constexpr int kWidth = kLanes<VectorOf<X>>;
  return n >= kWidth ? sum(load(x)) * (ScalarOf<X>(1) / kWidth) : first(load(x, 1));
}
template <class X>
ScalarOf<X> first_pivot(const X* x, std::int64_t stride, std::int64_t rows, std::int64_t n, const Masked& members) {
  using V = VectorOf<X>;
  if (n >= kLanes<V>) {
    const auto count = sum(members.only(Full{0}, broadcast<V>(ScalarOf<X>(1))));
    if (count > 0) return sum(members.only(Full{0}, load(x))) / count;
  }
  return first(load(members.first(x, stride, rows, n), 1));
}

/// Writes x = source + residual, rounded to the type of x.
template <class X>
void form_sum(const Task& t, std::int64_t o, std::int64_t step, std::int64_t lane, std::int64_t rows,
              std::int64_t begin, std::int64_t end) {
  if constexpr (kFloating<X>) {
    for (std::int64_t row = step; row < step + rows; ++row) {
      const X *source = at<X>(t.source, o, row, lane) + begin, *residual = at<X>(t.residual, o, row, lane) + begin;
      map(at<X>(t.x, o, row, lane) + begin, end - begin, kPlain<X>, nullptr, [&](auto place) NORMKIT_INLINE_LAMBDA {
        prefetch_first(reinterpret_cast<const char*>(source + place.i) + kAhead);
        prefetch_first(reinterpret_cast<const char*>(residual + place.i) + kAhead);
        return place.load(source) + place.load(residual);
      });
    }
  }
}

/// Moments of the members of one span of a statistic.
template <class X> Moments span_moments(const Task& t, std::int64_t o, std::int64_t lane, Chunks c, std::int64_t span) {
  const Geometry& g = t.geometry;
  const std::int64_t first = span * kSpanChunks, last = least(c.count, first + kSpanChunks);
  Moments m;
  for_chunks(g, c, first, last, [&](std::int64_t step, std::int64_t rows, std::int64_t begin, std::int64_t end) {
    if (t.residual.data) form_sum<X>(t, o, step, lane, rows, begin, end);
    const X* x = at<X>(t.x, o, step, lane) + begin;
    const std::int64_t stride = t.x.strides.step, n = end - begin;
    const auto merge_chunk = [&](const auto& members) {
      const double count = members.count(rows, n);
      if (count == 0) return;
      const ScalarOf<X> pivot = !t.centered ? ScalarOf<X>(0)
                                : m.n == 0  ? first_pivot(x, stride, rows, n, members)
                                            : static_cast<ScalarOf<X>>(m.mean);
      const Moments chunk = chunk_moments(x, rows, stride, n, pivot, t.centered, count, members);
      m = m.n == 0 ? chunk : merge(m, chunk);
    };
    with_members(t, o, step, lane, begin, merge_chunk);
  });
  return m;
}

template <class X, class Y>
[[gnu::noinline]] void forward_range(const Task& t, const X* x, Y* y, std::int64_t o, std::int64_t offset,
                                     std::int64_t begin, std::int64_t end, Statistic<ScalarOf<X>> s,
                                     Streamer<Y>* streamer, const char* ahead) {
  using S = ScalarOf<X>;
  ParamBuffer<S> weights, biases;
  for_pieces(t, o, offset, begin, end, follows_elements(t.geometry) ? kBuffer : end,
             [&](Piece piece) NORMKIT_INLINE_LAMBDA {
    const X* from = x + piece.begin;
    Y* to = y + piece.begin;
    const char* next = ahead ? ahead + (piece.begin - begin) * static_cast<std::int64_t>(sizeof(X)) : nullptr;
    const Preactivation<X> z = preactivation<X>(t, piece, s, weights, biases);
    if (t.activation.kind != ActivationKind::none)
      map(to, piece.n, streamer, next,
          [&](auto place) NORMKIT_INLINE_LAMBDA { return activated(t.activation, z.at(place, place.load(from))); });
    else if (piece.linear)
      map(to, piece.n, streamer, next,
          [&](auto place) NORMKIT_INLINE_LAMBDA { return z.linear(place, place.load(from)); });
    else
      map(to, piece.n, streamer, next, [&](auto place) NORMKIT_INLINE_LAMBDA { return z.constant(place.load(from)); });
  });
}

template <class X, class Y>
void forward_span(const Task& t, std::int64_t o, std::int64_t lane, Chunks c, std::int64_t span,
                  Statistic<ScalarOf<X>> s, Streamer<Y>* streamer, const char* ahead) {
  for_ranges(t.geometry, c, span, [&](std::int64_t step, std::int64_t begin, std::int64_t end) {
    if (t.residual.data && t.frozen) form_sum<X>(t, o, step, lane, 1, begin, end);
    forward_range(t, at<X>(t.x, o, step, lane), at<Y>(t.y, o, step, lane), o, t.geometry.offset(o, step, lane, 0),
                  begin, end, s, streamer, ahead);
  });
}

/// Rows of up to eight vectors stay in registers between the statistics and the output.
template <class X> constexpr std::int64_t kRegisterRow = 8 * kLanes<VectorOf<X>>;

template <class X, int kVectors>
NORMKIT_LOCAL Moments row_moments(const X* x, std::int64_t n, double share, VectorOf<X> (&v)[kVectors], bool centered) {
  using V = VectorOf<X>;
  using S = ScalarOf<X>;
  constexpr int kWidth = kLanes<V>;
  const int tail = static_cast<int>(n - (kVectors - 1) * kWidth);
  for (int k = 0; k + 1 < kVectors; ++k) v[k] = load(x + k * kWidth);
  v[kVectors - 1] = tail == kWidth ? load(x + (kVectors - 1) * kWidth) : load(x + (kVectors - 1) * kWidth, tail);
  const double count = static_cast<double>(n);
  double mean = 0;
  if (centered) {  // a member as pivot: no difference exceeds the range, whatever the offset
    const S x_first = first(v[0]);
    const V pivot = broadcast<V>(x_first);
    V s = broadcast<V>(S(0));
    for (int k = 0; k + 1 < kVectors; ++k) s = s + (v[k] - pivot);
    s = s + keep(v[kVectors - 1] - pivot, tail);
    mean = static_cast<double>(x_first) + static_cast<double>(sum(s)) * share;
  }
  const Statistic<S> about = statistic_of<S>(mean, 1);
  const V high = broadcast<V>(about.mean);
  V q = broadcast<V>(S(0));
  for (int k = 0; k + 1 < kVectors; ++k) {
    const V d = v[k] - high;
    q = mul_add(d, d, q);
  }
  const V d = keep(v[kVectors - 1] - high, tail);
  const double squares = sum(mul_add(d, d, q));
  const double low = about.mean_low, m2 = mul_add(-low * low, count, squares);
  if (squares > kVanishing<S> && squares < kOverflowing<S> && m2 > 0.5 * squares) return {mean, m2, count};
  if (squares == 0 && all_equal(x, 1, 0, n, about.mean, Everyone{})) return {mean, 0, count};
  // Squares that overflowed or vanished, or a mean whose low part is all that is left: once more, in double.
  return careful_moments(x, 1, 0, n, centered, count, Everyone{});
}

template <class X, class Y, int kVectors>
void forward_rows(const Task& t, std::int64_t begin, std::int64_t end) {
  using V = VectorOf<X>;
  using S = ScalarOf<X>;
  constexpr int kWidth = kLanes<V>;
  const Geometry& g = t.geometry;
  const int tail = static_cast<int>(g.run - (kVectors - 1) * kWidth);
  const bool simple = constant_in_statistic(g) && t.activation.kind == ActivationKind::none;
  const double share = 1 / static_cast<double>(g.run);
  const bool in_turn = g.params.stride == g.run && g.outer == 1;  // each row has the next parameter
  std::int64_t parameter = in_turn ? begin % g.params.count : 0;
  const bool streaming = t.stream_stores && tail == kWidth && kVectors * kWidth * sizeof(Y) % 64 == 0 &&
                         reinterpret_cast<std::uintptr_t>(t.y.data) % 64 == 0 && t.y.strides.lane == g.run &&
                         (g.outer == 1 || t.y.strides.outer % g.run == 0);
  Streamer<Y> streamer;
  for (std::int64_t r = begin; r < end; ++r) {
    const std::int64_t o = g.outer == 1 ? 0 : r / g.lanes, lane = g.outer == 1 ? r : r % g.lanes;
    if (t.residual.data) form_sum<X>(t, o, 0, lane, 1, 0, g.run);
    const X* x = at<X>(t.x, o, 0, lane);
    Y* y = at<Y>(t.y, o, 0, lane);
    for (std::int64_t line = 0; line < kVectors * kWidth * static_cast<std::int64_t>(sizeof(X)); line += 64)
      prefetch_first(reinterpret_cast<const char*>(x) + kAhead + line);
    V v[kVectors];
    const Statistic<S> s = publish<S>(t, r, row_moments<X, kVectors>(x, g.run, share, v, t.centered));
    if (t.phase == Phase::reduce) continue;
    if (!simple) {
      forward_range(t, x, y, o, g.offset(o, 0, lane, 0), 0, g.run, s, t.stream_stores ? &streamer : nullptr, nullptr);
      continue;
    }
    if (!in_turn) parameter = g.parameter(o, g.offset(o, 0, lane, 0));
    const Affine<S> affine = forward_affine(s, element(t.weight, parameter, 1), element(t.bias, parameter, 0));
    if (in_turn && ++parameter == g.params.count) parameter = 0;
    const V mean = broadcast<V>(s.mean), scale = broadcast<V>(affine.scale), shift = broadcast<V>(affine.shift);
    const auto put = [&](Y* to, V value) NORMKIT_INLINE_LAMBDA { streaming ? stream(to, value) : store(to, value); };
    for (int k = 0; k + 1 < kVectors; ++k) put(y + k * kWidth, forward(v[k], mean, scale, shift));
    const V last = forward(v[kVectors - 1], mean, scale, shift);
    if (tail == kWidth) put(y + (kVectors - 1) * kWidth, last);
    else store(y + (kVectors - 1) * kWidth, last, tail);
  }
}

template <class X, class Y> bool forward_register_rows(const Task& t, std::int64_t begin, std::int64_t end) {
  if (t.frozen || t.where.data || t.geometry.steps != 1 || t.geometry.run > kRegisterRow<X>) return false;
  switch ((t.geometry.run - 1) / kLanes<VectorOf<X>>) {
    case 0: forward_rows<X, Y, 1>(t, begin, end); break;
    case 1: forward_rows<X, Y, 2>(t, begin, end); break;
    case 2: forward_rows<X, Y, 3>(t, begin, end); break;
    case 3: forward_rows<X, Y, 4>(t, begin, end); break;
    case 4: forward_rows<X, Y, 5>(t, begin, end); break;
    case 5: forward_rows<X, Y, 6>(t, begin, end); break;
    case 6: forward_rows<X, Y, 7>(t, begin, end); break;
    default: forward_rows<X, Y, 8>(t, begin, end); break;
  }
  return true;
}

template <class X> Statistic<ScalarOf<X>> forward_statistic(const Task& t, std::int64_t r, Chunks c) {
  if (t.frozen) return given_statistic<ScalarOf<X>>(t, r);
  Moments m = span_moments<X>(t, r / t.geometry.lanes, r % t.geometry.lanes, c, 0);
  for (std::int64_t span = 1; span < c.spans; ++span)
    m = merge(m, span_moments<X>(t, r / t.geometry.lanes, r % t.geometry.lanes, c, span));
  return publish<ScalarOf<X>>(t, r, m);
}

template <class X, class Y> void runs_forward(const Task& t, std::int64_t begin, std::int64_t end) {
  using S = ScalarOf<X>;
  if (forward_register_rows<X, Y>(t, begin, end)) return;
  const Geometry& g = t.geometry;
  const Chunks c = chunks_of(g, Traversal::runs);
  Streamer<Y> streamer;
  const bool contiguous = g.steps == 1 && g.run * static_cast<std::int64_t>(sizeof(X)) <= kFetchable;
  for (std::int64_t r = begin; r < end; ++r) {
    const std::int64_t o = r / g.lanes, lane = r % g.lanes;
    const Statistic<S> s = forward_statistic<X>(t, r, c);
    if (t.phase == Phase::reduce) continue;
    const char* ahead = nullptr;
    const Operand& next = t.residual.data ? t.source : t.x;
    if (contiguous && r + 1 < end)
      ahead = reinterpret_cast<const char*>(at<X>(next, (r + 1) / g.lanes, 0, (r + 1) % g.lanes)) + kHalfPage;
    // Backwards: what was read last is still in cache.
    for (std::int64_t span = c.spans; span-- > 0;)
      forward_span<X, Y>(t, o, lane, c, span, s, t.stream_stores ? &streamer : nullptr, span == 0 ? ahead : nullptr);
  }
}

template <class X> void runs_forward_sums(const Task& t, std::int64_t begin, std::int64_t end) {
  const Geometry& g = t.geometry;
  const Chunks c = chunks_of(g, Traversal::runs);
  for (std::int64_t unit = begin; unit < end; ++unit) {
    const std::int64_t r = unit / c.spans;
    put(span_moments<X>(t, r / g.lanes, r % g.lanes, c, unit % c.spans), t.partials + 3 * unit);
  }
}

template <class S> NORMKIT_LOCAL Solved<S>* solved(const Task& t, std::int64_t r) {
  static_assert(sizeof(Solved<S>) <= 6 * sizeof(double));
  return reinterpret_cast<Solved<S>*>(t.solved + 6 * r);
}

template <class X> void runs_forward_finish(const Task& t, std::int64_t begin, std::int64_t end) {
  using S = ScalarOf<X>;
  const Chunks c = chunks_of(t.geometry, Traversal::runs);
  for (std::int64_t r = begin; r < end; ++r) {
    if (t.frozen) {
      solved<S>(t, r)->statistic = given_statistic<S>(t, r);
      continue;
    }
    Moments m = moments_at(t.partials + 3 * r * c.spans);
    for (std::int64_t unit = r * c.spans + 1; unit < (r + 1) * c.spans; ++unit)
      m = merge(m, moments_at(t.partials + 3 * unit));
    solved<S>(t, r)->statistic = publish<S>(t, r, m);
  }
}

template <class X, class Y> void runs_forward_apply(const Task& t, std::int64_t begin, std::int64_t end) {
  const Geometry& g = t.geometry;
  Streamer<Y> streamer;
  const Chunks c = chunks_of(g, Traversal::runs);
  for (std::int64_t unit = end; unit-- > begin;) {
    const std::int64_t r = unit / c.spans;
    forward_span<X, Y>(t, r / g.lanes, r % g.lanes, c, unit % c.spans, solved<ScalarOf<X>>(t, r)->statistic,
                       t.stream_stores ? &streamer : nullptr, nullptr);
  }
}

}  // namespace
}  // namespace normkit
