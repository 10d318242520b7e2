// The runs traversal: a statistic is reduced along its contiguous runs.
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
template <class X>
[[gnu::noinline]] Moments<double> careful_moments(const X* x, std::int64_t rows, std::int64_t stride, std::int64_t n,
                                                  bool centered) {
  const double count = static_cast<double>(rows * n);
  const auto sums_about = [&](double pivot) {
    const F64 p = broadcast<F64>(pivot);
    F64 s = broadcast<F64>(0.0), q = s;
    const auto add = [&](F64 v, int live) NORMKIT_INLINE_LAMBDA {
      const F64 d = keep(v - p, live < 8 ? live : 8);
      s = s + d;
      q = mul_add(d, d, q);
    };
    for (std::int64_t row = 0; row < rows; ++row)
      for (std::int64_t i = 0; i < n; i += kLanes<VectorOf<X>>) {
        const int live = static_cast<int>(least(n - i, kLanes<VectorOf<X>>));
        const VectorOf<X> v =
            live == kLanes<VectorOf<X>> ? load(x + row * stride + i) : load(x + row * stride + i, live);
        if constexpr (kLanes<VectorOf<X>> == 8) {
          add(v, live);
        } else {
          const Wide w = widen(v);
          add(w.low, live);
          if (live > 8) add(w.high, live - 8);
        }
      }
    return from_pivot(pivot, sum(s), sum(q), count);
  };
  if (!centered) {
    const Moments<double> m = sums_about(0);
    return {0, mul_add(m.mean * m.mean, count, m.m2)};
  }
  const double rough = sums_about(static_cast<double>(first(load(x, 1)))).mean;
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

/// True where all elements are `value`: their differences are scaled so that no square vanishes.
template <class X>
[[gnu::noinline]] bool all_equal(const X* x, std::int64_t rows, std::int64_t stride, std::int64_t n,
                                 ScalarOf<X> value) {
  using V = VectorOf<X>;
  constexpr int kWidth = kLanes<V>;
  const V p = broadcast<V>(value), scale = broadcast<V>(kMagnify<ScalarOf<X>>);
  V q = broadcast<V>(ScalarOf<X>(0));
  const auto add = [&](auto place) NORMKIT_INLINE_LAMBDA {
    const V d = place.keep((place.load(x) - p) * scale);
    q = mul_add(d, d, q);
  };
  for (std::int64_t row = 0; row < rows; ++row, x += stride) {
    std::int64_t i = 0;
    for (; i + kWidth <= n; i += kWidth) add(Full{i});
    if (i < n) add(Part{i, static_cast<int>(n - i)});
  }
  return sum(q) == 0;
}

/// Moments of `rows` segments of n elements, `stride` apart, from one pass about a pivot near their mean.
template <class X>
[[gnu::noinline]] Moments<double> chunk_moments(const X* x, std::int64_t rows, std::int64_t stride, std::int64_t n,
                                                ScalarOf<X> pivot, bool centered) {
  using V = VectorOf<X>;
  using S = ScalarOf<X>;
  constexpr int kWidth = kLanes<V>;
  constexpr int kShortSum = 16;  // additions; a sum of short sums rounds a quarter as much as one of a whole chunk
  const V p = broadcast<V>(pivot), zero = broadcast<V>(S(0));
  V s[4], q[4], total_s[4], total_q[4];
  for (int k = 0; k < 4; ++k) s[k] = q[k] = total_s[k] = total_q[k] = zero;
  std::int64_t pending = 0;
  const auto add = [&](int k, auto place, const X* from) NORMKIT_INLINE_LAMBDA {
    const V d = place.keep(place.load(from) - p);
    s[k] = s[k] + d;
    q[k] = mul_add(d, d, q[k]);
  };
  const auto added = [&](std::int64_t times) NORMKIT_INLINE_LAMBDA {
    pending += times;
    if (pending < kShortSum) return;
    for (int k = 0; k < 4; ++k) total_s[k] = total_s[k] + s[k], total_q[k] = total_q[k] + q[k], s[k] = q[k] = zero;
    pending = 0;
  };
  for (std::int64_t row = 0; row < rows; ++row, x += stride) {
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
  const double count = static_cast<double>(rows * n);
  const double total = sum((total_s[0] + total_s[1]) + (total_s[2] + total_s[3]));
  const double squares = sum((total_q[0] + total_q[1]) + (total_q[2] + total_q[3]));
  x -= rows * stride;
  if (squares == 0 && all_equal(x, rows, stride, n, pivot)) return {static_cast<double>(pivot), 0};
  if (!centered && squares > kVanishing<S> && squares < kOverflowing<S>) return {0, squares};
  if (!centered || !trustworthy<S>(total, squares, count)) return careful_moments(x, rows, stride, n, centered);
  return from_pivot(static_cast<double>(pivot), total, squares, count);
}

/// The mean of the first vector of a chunk: near enough to the mean of the chunk, as a rule.
template <class X> NORMKIT_LOCAL ScalarOf<X> first_pivot(const X* x, std::int64_t n) {
  constexpr int kWidth = kLanes<VectorOf<X>>;
  return n >= kWidth ? sum(load(x)) * (ScalarOf<X>(1) / kWidth) : first(load(x, 1));
}

template <class X> Moments<double> span_moments(const Task& t, const X* x, Chunks c, std::int64_t span) {
  using S = ScalarOf<X>;
  const Geometry& g = t.geometry;
  const std::int64_t first = span * kSpanChunks, last = least(c.count, first + kSpanChunks);
  Moments<double> m{0, 0};
  double count = 0;
  for_chunks(g, c, first, last, [&](std::int64_t step, std::int64_t rows, std::int64_t begin, std::int64_t end) {
    const X* from = x + step * t.x.strides.step + begin;
    const S pivot = !t.centered ? S(0) : count == 0 ? first_pivot(from, end - begin) : static_cast<S>(m.mean);
    const Moments<double> chunk = chunk_moments(from, rows, t.x.strides.step, end - begin, pivot, t.centered);
    const double chunk_count = static_cast<double>(rows * (end - begin));
    m = count == 0 ? chunk : merge(m, count, chunk, chunk_count);
    count += chunk_count;
  });
  return m;
}

/// Members in a span.
NORMKIT_LOCAL double span_count(const Geometry& g, Chunks c, std::int64_t span) {
  std::int64_t count = 0;
  for_ranges(g, c, span, [&](std::int64_t, std::int64_t begin, std::int64_t end) { count += end - begin; });
  return static_cast<double>(count);
}

template <class X, class Y>
[[gnu::noinline]] void forward_range(const Task& t, const X* x, Y* y, std::int64_t o, std::int64_t offset,
                                     std::int64_t begin, std::int64_t end, Statistic<ScalarOf<X>> s,
                                     Streamer<Y>* streamer, const char* ahead) {
  using V = VectorOf<X>;
  using S = ScalarOf<X>;
  const V mean = broadcast<V>(s.mean);
  const Affine<S> standard = forward_affine(s, 1, 0);
  const V unit = broadcast<V>(standard.scale), shift = broadcast<V>(standard.shift);
  const ParamMap& p = t.geometry.params;
  ParamBuffer<S> weights, biases;
  for_pieces(t, o, offset, begin, end, p.stride == 1 && p.count > 1 ? kBuffer : end,
             [&](Piece piece) NORMKIT_INLINE_LAMBDA {
    const X* from = x + piece.begin;
    const char* next = ahead ? ahead + (piece.begin - begin) * static_cast<std::int64_t>(sizeof(X)) : nullptr;
    if (piece.linear) {
      const S* weight = weights.read(t.weight, piece.parameter, piece.n, 1);
      const S* bias = biases.read(t.bias, piece.parameter, piece.n, 0);
      map(y + piece.begin, piece.n, streamer, next, [&](auto place) NORMKIT_INLINE_LAMBDA {
        return mul_add(forward(place.load(from), mean, unit, shift), place.load(weight), place.load(bias));
      });
    } else {
      const Affine<S> affine =
          forward_affine(s, element(t.weight, piece.parameter, 1), element(t.bias, piece.parameter, 0));
      const V scale = broadcast<V>(affine.scale), offset_v = broadcast<V>(affine.shift);
      map(y + piece.begin, piece.n, streamer, next,
          [&](auto place) NORMKIT_INLINE_LAMBDA { return forward(place.load(from), mean, scale, offset_v); });
    }
  });
}

template <class X, class Y>
void forward_span(const Task& t, std::int64_t o, std::int64_t lane, Chunks c, std::int64_t span,
                  Statistic<ScalarOf<X>> s, Streamer<Y>* streamer, const char* ahead) {
  const X* x = at<X>(t.x, o, 0, lane);
  Y* y = at<Y>(t.y, o, 0, lane);
  for_ranges(t.geometry, c, span, [&](std::int64_t step, std::int64_t begin, std::int64_t end) {
    forward_range(t, x + step * t.x.strides.step, y + step * t.y.strides.step, o, t.geometry.offset(o, step, lane, 0),
                  begin, end, s, streamer, ahead);
  });
}

/// Rows of up to eight vectors stay in registers between the statistics and the output.
template <class X> constexpr std::int64_t kRegisterRow = 8 * kLanes<VectorOf<X>>;

template <class X, int kVectors>
NORMKIT_LOCAL Moments<double> row_moments(const X* x, std::int64_t n, double share, VectorOf<X> (&v)[kVectors],
                                          bool centered) {
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
  if (squares > kVanishing<S> && squares < kOverflowing<S> && m2 > 0.5 * squares) return {mean, m2};
  if (squares == 0 && all_equal(x, 1, 0, n, about.mean)) return {mean, 0};
  // Squares that overflowed or vanished, or a mean whose low part is all that is left: once more, in double.
  return careful_moments(x, 1, 0, n, centered);
}

template <class X, class Y, int kVectors>
void forward_rows(const Task& t, std::int64_t begin, std::int64_t end) {
  using V = VectorOf<X>;
  using S = ScalarOf<X>;
  constexpr int kWidth = kLanes<V>;
  const Geometry& g = t.geometry;
  const int tail = static_cast<int>(g.run - (kVectors - 1) * kWidth);
  const bool constant = constant_in_statistic(g);
  const double share = 1 / static_cast<double>(g.run);
  const bool in_turn = g.params.stride == g.run && g.outer == 1;  // each row has the next parameter
  std::int64_t parameter = in_turn ? begin % g.params.count : 0;
  const bool streaming = t.stream_stores && tail == kWidth && kVectors * kWidth * sizeof(Y) % 64 == 0 &&
                         reinterpret_cast<std::uintptr_t>(t.y.data) % 64 == 0 && t.y.strides.lane == g.run &&
                         (g.outer == 1 || t.y.strides.outer % g.run == 0);
  Streamer<Y> streamer;
  for (std::int64_t r = begin; r < end; ++r) {
    const std::int64_t o = g.outer == 1 ? 0 : r / g.lanes, lane = g.outer == 1 ? r : r % g.lanes;
    const X* x = at<X>(t.x, o, 0, lane);
    Y* y = at<Y>(t.y, o, 0, lane);
    for (std::int64_t line = 0; line < kVectors * kWidth * static_cast<std::int64_t>(sizeof(X)); line += 64)
      prefetch_first(reinterpret_cast<const char*>(x) + kAhead + line);
    V v[kVectors];
    const Statistic<S> s = publish<S>(t, r, row_moments<X, kVectors>(x, g.run, share, v, t.centered));
    if (!constant) {
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
  if (t.frozen || t.geometry.steps != 1 || t.geometry.run > kRegisterRow<X>) return false;
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

template <class X> Moments<double> merge_spans(const Task& t, Chunks c, const double* partials) {
  Moments<double> m{partials[0], partials[1]};
  double count = span_count(t.geometry, c, 0);
  for (std::int64_t span = 1; span < c.spans; ++span) {
    const double more = span_count(t.geometry, c, span);
    m = merge(m, count, {partials[2 * span], partials[2 * span + 1]}, more);
    count += more;
  }
  return m;
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
    const X* x = at<X>(t.x, o, 0, lane);
    Statistic<S> s;
    if (t.frozen) {
      s = given_statistic<S>(t, r);
    } else {
      Moments<double> m = span_moments(t, x, c, 0);
      double count = c.spans > 1 ? span_count(g, c, 0) : 0;
      for (std::int64_t span = 1; span < c.spans; ++span) {
        const double more = span_count(g, c, span);
        m = merge(m, count, span_moments(t, x, c, span), more);
        count += more;
      }
      s = publish<S>(t, r, m);
    }
    const char* ahead = nullptr;
    if (contiguous && r + 1 < end)
      ahead = reinterpret_cast<const char*>(at<X>(t.x, (r + 1) / g.lanes, 0, (r + 1) % g.lanes)) + kHalfPage;
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
    const Moments<double> m = span_moments(t, at<X>(t.x, r / g.lanes, 0, r % g.lanes), c, unit % c.spans);
    t.partials[2 * unit] = m.mean, t.partials[2 * unit + 1] = m.m2;
  }
}

template <class S> NORMKIT_LOCAL Solved<S>* solved(const Task& t, std::int64_t r) {
  static_assert(sizeof(Solved<S>) <= 6 * sizeof(double));
  return reinterpret_cast<Solved<S>*>(t.solved + 6 * r);
}

template <class X> void runs_forward_finish(const Task& t, std::int64_t begin, std::int64_t end) {
  using S = ScalarOf<X>;
  const Chunks c = chunks_of(t.geometry, Traversal::runs);
  for (std::int64_t r = begin; r < end; ++r)
    solved<S>(t, r)->statistic =
        t.frozen ? given_statistic<S>(t, r) : publish<S>(t, r, merge_spans<X>(t, c, t.partials + 2 * r * c.spans));
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

// ---- backward --------------------------------------------------------------------------------------------------

/// Sums over `rows` segments of n elements of dy and x; of dy * weight where `weight` gives one factor an element.
template <class X, bool kWeighted>
[[gnu::noinline]] Sums<double> chunk_sums(const X* dy, std::int64_t dy_stride, const X* x, std::int64_t x_stride,
                                          std::int64_t rows, std::int64_t n, ScalarOf<X> mean,
                                          const ScalarOf<X>* weight) {
  using V = VectorOf<X>;
  using S = ScalarOf<X>;
  constexpr int kWidth = kLanes<V>;
  const V m = broadcast<V>(mean);
  Sums<V> s[2];
  for (auto& part : s) part.g = part.gx = part.d = broadcast<V>(S(0));
  const auto add = [&](int k, auto place) NORMKIT_INLINE_LAMBDA {
    V g = place.load(dy);
    if constexpr (kWeighted) g = g * place.load(weight);
    const V d = place.keep(place.load(x) - m);
    s[k].g = s[k].g + g;
    s[k].gx = mul_add(g, d, s[k].gx);
    s[k].d = s[k].d + d;
  };
  for (std::int64_t row = 0; row < rows; ++row, x += x_stride, dy += dy_stride) {
    std::int64_t i = 0;
    for (; i + 4 * kWidth <= n; i += 4 * kWidth) {
      for (std::int64_t line = 0; line < 4 * kWidth * static_cast<std::int64_t>(sizeof(X)); line += 64) {
        prefetch_first(reinterpret_cast<const char*>(x + i) + kAhead + line);
        prefetch_first(reinterpret_cast<const char*>(dy + i) + kAhead + line);
      }
      for (int k = 0; k < 4; ++k) add(k % 2, Full{i + k * kWidth});
    }
    for (; i + kWidth <= n; i += kWidth) add(0, Full{i});
    if (i < n) add(1, Part{i, static_cast<int>(n - i)});
  }
  const Sums<V> all = s[0] + s[1];
  return {static_cast<double>(sum(all.g)), static_cast<double>(sum(all.gx)), static_cast<double>(sum(all.d))};
}

/// Where the parameters change within a statistic: the sums of one range, each piece with its own weight. What a piece
/// adds to its own gradients goes to `dparams`.
template <class X>
Sums<double> piecewise_sums(const Task& t, const X* dy, const X* x, std::int64_t o, std::int64_t offset,
                            std::int64_t begin, std::int64_t end, ScalarOf<X> mean) {
  using S = ScalarOf<X>;
  const ParamMap& p = t.geometry.params;
  ParamBuffer<S> weights;
  Sums<double> total{0, 0, 0};
  for_pieces(t, o, offset, begin, end, p.stride == 1 ? kBuffer : end, [&](Piece piece) NORMKIT_INLINE_LAMBDA {
    const X *dy_at = dy + piece.begin, *x_at = x + piece.begin;
    if (piece.linear) {
      const S* weight = weights.read(t.weight, piece.parameter, piece.n, 1);
      total = total + chunk_sums<X, true>(dy_at, 0, x_at, 0, 1, piece.n, mean, weight);
      return;
    }
    const Sums<double> s = chunk_sums<X, false>(dy_at, 0, x_at, 0, 1, piece.n, mean, nullptr);
    const double w = element(t.weight, piece.parameter, 1);
    total = total + Sums<double>{w * s.g, w * s.gx, s.d};
    if (t.kind == ParamKind::piece) {
      double* d = t.dparams + 2 * ((offset + piece.begin) / p.stride);
      d[0] += s.gx, d[1] += s.g;
    }
  });
  return total;
}

template <class X>
Sums<double> span_sums(const Task& t, std::int64_t o, std::int64_t lane, Chunks c, std::int64_t span,
                       ScalarOf<X> mean) {
  const Geometry& g = t.geometry;
  const X *x = at<X>(t.x, o, 0, lane), *dy = at<X>(t.dy, o, 0, lane);
  const bool constant = constant_in_statistic(g);
  const std::int64_t first = span * kSpanChunks, last = least(c.count, first + kSpanChunks);
  Sums<double> total{0, 0, 0};
  for_chunks(g, c, first, last, [&](std::int64_t step, std::int64_t rows, std::int64_t begin, std::int64_t end) {
    const X* x_at = x + step * t.x.strides.step;
    const X* dy_at = dy + step * t.dy.strides.step;
    if (constant) {
      total = total + chunk_sums<X, false>(dy_at + begin, t.dy.strides.step, x_at + begin, t.x.strides.step, rows,
                                           end - begin, mean, nullptr);
      return;
    }
    for (std::int64_t row = 0; row < rows; ++row)
      total = total + piecewise_sums(t, dy_at + row * t.dy.strides.step, x_at + row * t.x.strides.step, o,
                                     g.offset(o, step + row, lane, 0), begin, end, mean);
  });
  return total;
}

/// From the mean that sums of backward were taken about to the one that they are wanted about: the whole of a given mean, or,
/// since a given mean is rounded, the mean of the data.
template <class S> NORMKIT_LOCAL double mean_shift(const Task& t, Statistic<S> given, Sums<double> sums) {
  if (!t.centered) return 0;
  return t.frozen ? static_cast<double>(given.mean_low) : sums.d / static_cast<double>(t.geometry.members());
}

/// The pairs of `dparams` that belong to the pieces of one statistic.
template <class F> NORMKIT_LOCAL void for_own_dparams(const Task& t, std::int64_t o, std::int64_t lane, F f) {
  if (t.kind != ParamKind::piece) return;
  const Geometry& g = t.geometry;
  const std::int64_t first = g.offset(o, 0, lane, 0) / g.params.stride;
  for (std::int64_t k = 0; k < g.run / g.params.stride; ++k) f(t.dparams + 2 * (first + k));
}

/// Gradients of parameters that follow the elements are summed while dx is written, not before.
NORMKIT_LOCAL bool writes_element_gradients(const Task& t) {
  return t.kind == ParamKind::row || t.kind == ParamKind::element;
}

/// Frozen statistics leave no sums in dx: without gradients of parameters to collect from them, they are not taken.
NORMKIT_LOCAL bool needs_sums(const Task& t) {
  const bool collects = t.kind == ParamKind::statistic || t.kind == ParamKind::piece;
  return collects || (!t.frozen && (t.dx.data || writes_element_gradients(t)));
}

/// From the sums of a whole statistic to the coefficients of its gradient, and its share of dweight and dbias.
template <class S>
Solved<S> solve(const Task& t, std::int64_t r, std::int64_t o, std::int64_t lane, Sums<double> sums) {
  const Geometry& g = t.geometry;
  Statistic<S> s = given_statistic<S>(t, r);
  // The sums are about s.mean: the low part of a given mean, or the distance to the mean of the data, is still to come.
  const double shift = mean_shift(t, s, sums);
  if (t.centered && !t.frozen) s = statistic_of<S>(static_cast<double>(s.mean) + shift, s.rstd);
  sums = recenter(sums, shift);
  for_own_dparams(t, o, lane, [&](double* d) { d[0] = s.rstd * mul_add(-shift, d[1], d[0]); });
  double weight = 1;
  if (constant_in_statistic(g)) {
    weight = element(t.weight, g.parameter(o, g.offset(o, 0, lane, 0)), 1);
    if (t.kind == ParamKind::statistic) t.dparams[2 * r] = s.rstd * sums.gx, t.dparams[2 * r + 1] = sums.g;
  }
  if (t.frozen) return {s, {static_cast<S>(s.rstd), 0, 0}};
  return {s, gradient_of(s, Sums<double>{weight * sums.g, weight * sums.gx, sums.d}, static_cast<double>(g.members()),
                         t.centered)};
}

/// dx over one range of a run, and, where the parameters follow the elements, what the range adds to their gradients:
/// `row_dparams` points at the sums of this row's group.
template <class X>
[[gnu::noinline]] void backward_range(const Task& t, const X* dy, const X* x, X* dx, std::int64_t o,
                                      std::int64_t offset, std::int64_t begin, std::int64_t end,
                                      const Solved<ScalarOf<X>>& known, ScalarOf<X>* row_dparams,
                                      Streamer<X>* streamer) {
  using V = VectorOf<X>;
  using S = ScalarOf<X>;
  const Geometry& geometry = t.geometry;
  const V mean = broadcast<V>(known.statistic.mean);
  const V b = broadcast<V>(known.gradient.b), c = broadcast<V>(known.gradient.c);
  const Affine<S> standard = forward_affine(known.statistic, 1, 0);
  const V unit = broadcast<V>(standard.scale), shift = broadcast<V>(standard.shift);
  ParamBuffer<S> weights;
  const bool linear = geometry.params.stride == 1 && geometry.params.count > 1;
  for_pieces(t, o, offset, begin, end, linear ? kBuffer : end, [&](Piece piece) NORMKIT_INLINE_LAMBDA {
    const X *dy_at = dy + piece.begin, *x_at = x + piece.begin;
    // dx may lie over x or dy, so it comes last.
    const auto x_hat = [&](auto place) NORMKIT_INLINE_LAMBDA { return forward(place.load(x_at), mean, unit, shift); };
    if (row_dparams) {
      S *dweight = row_dparams + piece.begin, *dbias = row_dparams + geometry.run + piece.begin;
      map(dweight, piece.n, kPlain<S>, nullptr, [&](auto place) NORMKIT_INLINE_LAMBDA {
        return mul_add(x_hat(place), place.load(dy_at), place.load(dweight));
      });
      map(dbias, piece.n, kPlain<S>, nullptr,
          [&](auto place) NORMKIT_INLINE_LAMBDA { return place.load(dbias) + place.load(dy_at); });
    }
    if (t.dweight_out)
      map(at<S>(t.dweight_out, offset + piece.begin), piece.n, kPlain<S>, nullptr,
          [&](auto place) NORMKIT_INLINE_LAMBDA { return x_hat(place) * place.load(dy_at); });
    if (t.dbias_out)
      map(at<S>(t.dbias_out, offset + piece.begin), piece.n, kPlain<S>, nullptr,
          [&](auto place) NORMKIT_INLINE_LAMBDA { return place.load(dy_at); });
    if (dx && piece.linear) {
      const V a = broadcast<V>(known.gradient.a);
      const S* weight = weights.read(t.weight, piece.parameter, piece.n, 1);
      map(dx + piece.begin, piece.n, streamer, nullptr, [&](auto place) NORMKIT_INLINE_LAMBDA {
        return backward(place.load(x_at), place.load(dy_at) * place.load(weight), mean, a, b, c);
      });
    } else if (dx) {
      const double weight = element(t.weight, piece.parameter, 1);
      const V a = broadcast<V>(static_cast<S>(known.statistic.rstd * weight));
      map(dx + piece.begin, piece.n, streamer, nullptr, [&](auto place) NORMKIT_INLINE_LAMBDA {
        return backward(place.load(x_at), place.load(dy_at), mean, a, b, c);
      });
    }
  });
}

template <class X>
void backward_span(const Task& t, std::int64_t o, std::int64_t lane, Chunks c, std::int64_t span,
                   const Solved<ScalarOf<X>>& known, Streamer<X>* streamer) {
  using S = ScalarOf<X>;
  const Geometry& g = t.geometry;
  const X *x = at<X>(t.x, o, 0, lane), *dy = at<X>(t.dy, o, 0, lane);
  X* dx = t.dx.data ? at<X>(t.dx, o, 0, lane) : nullptr;
  S* row_dparams = nullptr;
  if (t.kind == ParamKind::row)
    row_dparams = reinterpret_cast<S*>(t.dparams + 2 * (o * row_groups(g) + lane / kRowGroup) * g.run);
  for_ranges(g, c, span, [&](std::int64_t step, std::int64_t begin, std::int64_t end) {
    backward_range(t, dy + step * t.dy.strides.step, x + step * t.x.strides.step,
                   dx ? dx + step * t.dx.strides.step : dx, o, g.offset(o, step, lane, 0), begin, end, known,
                   row_dparams, streamer);
  });
}

template <class X> void backward_statistic(const Task& t, std::int64_t r, Chunks c, Streamer<X>* streamer) {
  using S = ScalarOf<X>;
  const Geometry& g = t.geometry;
  const std::int64_t o = r / g.lanes, lane = r % g.lanes;
  const S mean = given_statistic<S>(t, r).mean;
  Sums<double> sums{0, 0, 0};
  if (needs_sums(t))
    for (std::int64_t span = 0; span < c.spans; ++span) sums = sums + span_sums<X>(t, o, lane, c, span, mean);
  const Solved<S> known = solve<S>(t, r, o, lane, sums);
  if (t.dx.data || writes_element_gradients(t))
    for (std::int64_t span = c.spans; span-- > 0;) backward_span<X>(t, o, lane, c, span, known, streamer);
}

template <class X> void runs_backward(const Task& t, std::int64_t begin, std::int64_t end) {
  const Geometry& g = t.geometry;
  const Chunks c = chunks_of(g, Traversal::runs);
  const std::int64_t groups = row_groups(g);
  Streamer<X> streamer;
  for (std::int64_t unit = begin; unit < end; ++unit) {
    std::int64_t first = unit, last = unit + 1;
    if (t.kind == ParamKind::row) {
      first = unit / groups * g.lanes + unit % groups * kRowGroup;
      last = unit / groups * g.lanes + least(g.lanes, (unit % groups + 1) * kRowGroup);
    }
    for (std::int64_t r = first; r < last; ++r) backward_statistic<X>(t, r, c, t.stream_stores ? &streamer : nullptr);
  }
}

template <class X> void runs_backward_sums(const Task& t, std::int64_t begin, std::int64_t end) {
  const Geometry& g = t.geometry;
  const Chunks c = chunks_of(g, Traversal::runs);
  for (std::int64_t unit = begin; unit < end; ++unit) {
    const std::int64_t r = unit / c.spans;
    const auto mean = given_statistic<ScalarOf<X>>(t, r).mean;
    const Sums<double> s = span_sums<X>(t, r / g.lanes, r % g.lanes, c, unit % c.spans, mean);
    t.partials[3 * unit] = s.g, t.partials[3 * unit + 1] = s.gx, t.partials[3 * unit + 2] = s.d;
  }
}

template <class X> void runs_backward_finish(const Task& t, std::int64_t begin, std::int64_t end) {
  using S = ScalarOf<X>;
  const Geometry& g = t.geometry;
  const Chunks c = chunks_of(g, Traversal::runs);
  for (std::int64_t r = begin; r < end; ++r) {
    Sums<double> sums{0, 0, 0};
    for (std::int64_t unit = r * c.spans; unit < (r + 1) * c.spans; ++unit)
      sums = sums + Sums<double>{t.partials[3 * unit], t.partials[3 * unit + 1], t.partials[3 * unit + 2]};
    *solved<S>(t, r) = solve<S>(t, r, r / g.lanes, r % g.lanes, sums);
  }
}

/// Here a range counts spans of groups of rows where weights along the row want their gradients summed: the rows of a
/// group add to the same sums, so one thread takes them, in order.
template <class X> void runs_backward_apply(const Task& t, std::int64_t begin, std::int64_t end) {
  const Geometry& g = t.geometry;
  const Chunks c = chunks_of(g, Traversal::runs);
  const std::int64_t groups = row_groups(g);
  Streamer<X> streamer;
  for (std::int64_t unit = end; unit-- > begin;) {
    const std::int64_t owner = unit / c.spans;
    std::int64_t first = owner, last = owner + 1;
    if (t.kind == ParamKind::row) {
      first = owner / groups * g.lanes + owner % groups * kRowGroup;
      last = owner / groups * g.lanes + least(g.lanes, (owner % groups + 1) * kRowGroup);
    }
    for (std::int64_t r = first; r < last; ++r)
      backward_span<X>(t, r / g.lanes, r % g.lanes, c, unit % c.spans, *solved<ScalarOf<X>>(t, r),
                       t.stream_stores ? &streamer : nullptr);
  }
}

}  // namespace
}  // namespace normkit
