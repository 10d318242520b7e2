// The runs traversal, forward: a statistic is reduced along its contiguous runs.
//
//     statistic = steps x run elements -> chunks (one sum in the compute type each) -> spans -> Moments or Sums
//
// x is read twice, the second time from cache where a statistic fits there. Short rows go in batches, see batches.hpp.
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

/// Calls f with all differences to a pivot, in double, eight at a time; zeros for what is no member.
template <class F> NORMKIT_LOCAL void for_differences(Segments x, Masked members, double pivot, F f) {
  const F64 p = broadcast<F64>(pivot);
  alignas(64) double value[kBuffer];
  for (std::int64_t row = 0; row < x.rows; ++row, members.next_row())
    for (std::int64_t begin = 0; begin < x.n; begin += kBuffer) {
      const std::int64_t n = least(x.n - begin, kBuffer);
      read_all(x.from(row, begin), x.dtype, n, value);
      const Masked here = members.from(begin);
      for (std::int64_t i = 0; i < n; i += kLanes<F64>)
        f(here.keep(Part{i, static_cast<int>(least(n - i, kLanes<F64>))}, load(value + i) - p));
    }
}

/// The first of the members, of which there must be one.
NORMKIT_LOCAL double first_member(Segments x, Masked members) {
  alignas(64) double value[16];
  for (std::int64_t row = 0; row < x.rows; ++row, members.next_row())
    for (std::int64_t i = 0; i < x.n; ++i)
      if (members.has(i)) return read_all(x.from(row, i), x.dtype, 1, value), value[0];
  return 0;
}

/// Moments of a chunk in double, in two passes: for data that defeats the pivot of chunk_moments().
NORMKIT_LOCAL Moments<double> careful_moments(Segments x, bool centered, double count, const Masked& members) {
  double pivot = centered ? first_member(x, members) : 0;
  for (int pass = 0;; ++pass) {  // a loop, so that the sums are here once
    F64 s = broadcast<F64>(0.0), q = s;
    for_differences(x, members, pivot, [&](F64 d) NORMKIT_INLINE_LAMBDA { s = s + d, q = mul_add(d, d, q); });
    const Moments<double> m = from_pivot<double>(pivot, sum(s), sum(q), count);
    if (!centered) return moments_of<double>(0, 0, mul_add(m.mean * m.mean, count, m.m2), count);
    if (pass == 1) return m;
    pivot = m.mean;
  }
}

/// True where all members are `value`, a finite number: differences are scaled so that no square vanishes.
NORMKIT_LOCAL bool all_equal(Segments x, double value, const Masked& members) {
  const F64 scale = broadcast<F64>(1e200);
  F64 q = broadcast<F64>(0.0);
  for_differences(x, members, value, [&](F64 d) NORMKIT_INLINE_LAMBDA {
    d = d * scale;
    q = mul_add(d, d, q);
  });
  return sum(q) == 0;
}

/// Sums over differences to a pivot and over their squares, of each lane.
template <class V> struct DifferenceSums { V sum, squares; };

/// The DifferenceSums of the members of `rows` segments of n elements, `stride` apart.
template <class X, class Members, class Beside>
NORMKIT_LOCAL DifferenceSums<VectorOf<X>> pivot_sums(const X* x, std::int64_t rows, std::int64_t stride, std::int64_t n,
                                                     ScalarOf<X> pivot, Members members, Fetch fetch, Beside& beside) {
  using V = VectorOf<X>;
  constexpr int kWidth = kLanes<V>;
  constexpr int kShortSum = 16;  // additions; a sum of short sums rounds a quarter as much as one of a whole chunk
  const V p = broadcast<V>(pivot), zero = broadcast<V>(ScalarOf<X>(0));
  V s[4], q[4], total_s[4], total_q[4];
  for (int k = 0; k < 4; ++k) s[k] = q[k] = total_s[k] = total_q[k] = zero;
  std::int64_t pending = 0;
  const auto add = [&](V& sum, V& squares, auto place, const X* from) NORMKIT_INLINE_LAMBDA {
    const V d = members.keep(place, place.load(from) - p);
    sum = sum + d;
    squares = mul_add(d, d, squares);
  };
  const auto added = [&](std::int64_t times) NORMKIT_INLINE_LAMBDA {
    pending += times;
    if (pending < kShortSum) return;
    for (int k = 0; k < 4; ++k) total_s[k] = total_s[k] + s[k], total_q[k] = total_q[k] + q[k], s[k] = q[k] = zero;
    pending = 0;
  };
  for (std::int64_t row = 0; row < rows; ++row, x += stride, members.next_row()) {
    const std::int64_t whole = n / (4 * kWidth) * (4 * kWidth);
    std::int64_t i = 0;
    while (i < whole) {
      const std::int64_t first = i, stop = least(whole, i + (kShortSum - pending) * 4 * kWidth);
      V local_s[4], local_q[4];  // copies, which stay in registers whatever is done beside
      for (int k = 0; k < 4; ++k) local_s[k] = s[k], local_q[k] = q[k];
      for (; i < stop; i += 4 * kWidth) {
        const std::int64_t byte = (row * stride + i) * static_cast<std::int64_t>(sizeof(X));
        if constexpr (__is_same(Beside, Nothing)) fetch.template block<4 * kWidth * sizeof(X)>(byte);
        else fetch.template block_of_both<4 * kWidth * sizeof(X)>(byte);
        beside.block();
        for (int k = 0; k < 4; ++k) add(local_s[k], local_q[k], Full{i + k * kWidth}, x);
      }
      for (int k = 0; k < 4; ++k) s[k] = local_s[k], q[k] = local_q[k];
      added((stop - first) / (4 * kWidth));
    }
    if (i == n) continue;
    if (i + kWidth <= n) add(s[0], q[0], Full{i}, x), i += kWidth;
    if (i + kWidth <= n) add(s[1], q[1], Full{i}, x), i += kWidth;
    if (i + kWidth <= n) add(s[2], q[2], Full{i}, x), i += kWidth;
    if (i < n) add(s[3], q[3], Part{i, static_cast<int>(n - i)}, x);
    added(1);
  }
  for (int k = 0; k < 4; ++k) total_s[k] = total_s[k] + s[k], total_q[k] = total_q[k] + q[k];
  return {(total_s[0] + total_s[1]) + (total_s[2] + total_s[3]), (total_q[0] + total_q[1]) + (total_q[2] + total_q[3])};
}

/// Moments of members whose sums do not settle them: all equal to the pivot, or to be taken in double.
[[gnu::noinline]] Moments<double> unsettled_moments(Segments x, double pivot, double squares, bool centered,
                                                    double count, const Masked& members) {
  if (squares == 0 && all_equal(x, pivot, members)) return moments_of<double>(pivot, 0, 0, count);
  return careful_moments(x, centered, count, members);
}

/// Moments of the members of `rows` segments of n elements, `stride` apart, from one pass about a pivot near their mean.
template <class X, class Members, class Beside>
[[gnu::noinline]] Moments<ScalarOf<X>> chunk_moments(const X* x, std::int64_t rows, std::int64_t stride, std::int64_t n,
                                                     ScalarOf<X> pivot, bool centered, double count,
                                                     const Members& members, Fetch fetch, Beside& beside) {
  using S = ScalarOf<X>;
  const DifferenceSums<VectorOf<X>> sums = pivot_sums(x, rows, stride, n, pivot, members, fetch, beside);
  // RMS has no mean: the pivot is 0, and from_pivot() is to keep the mean at 0.
  const double s = centered ? sum(sums.sum) : 0, q = sum(sums.squares);
  if (trustworthy<S>(s, q, count)) return from_pivot<S>(static_cast<double>(pivot), s, q, count);
  return moments_of<S>(
      unsettled_moments(segments(x, rows, stride, n), static_cast<double>(pivot), q, centered, count, masked(members)));
}

/// The mean of the first vector of a chunk, or of its members, or, where it has none, a member: near enough to the mean of
/// the chunk, as a rule.
template <class X> NORMKIT_LOCAL ScalarOf<X> first_pivot(const X* x, std::int64_t, std::int64_t, std::int64_t n,
                                                         Everyone) {
  constexpr int kWidth = kLanes<VectorOf<X>>;
  return n >= kWidth ? sum(load(x)) * (ScalarOf<X>(1) / kWidth)
                     : sum(load(x, static_cast<int>(n))) * (ScalarOf<X>(1) / static_cast<ScalarOf<X>>(n));
}
template <class X>
ScalarOf<X> first_pivot(const X* x, std::int64_t stride, std::int64_t rows, std::int64_t n, const Masked& members) {
  using V = VectorOf<X>;
  const Part begin{0, static_cast<int>(least(n, kLanes<V>))};
  const auto count = sum(members.keep(begin, broadcast<V>(ScalarOf<X>(1))));
  if (count > 0) return sum(members.keep(begin, begin.load(x))) * (ScalarOf<X>(1) / count);
  return first(load(members.first(x, stride, rows, n), 1));
}

/// The address of element `begin` of a run.
NORMKIT_LOCAL const char* address(const Operand& a, std::int64_t o, std::int64_t step, std::int64_t lane,
                                  std::int64_t begin) {
  return reinterpret_cast<const char*>(a.data) + (index_at(a, o, step, lane) + begin) * size_of(a.dtype);
}

/// What is fetched while ranges of a statistic are read, and, by fetch_while_writing(), while they are written.
NORMKIT_LOCAL Fetch fetch_while_reading(const Task& t, const Operand& a, std::int64_t o, std::int64_t step,
                                        std::int64_t lane, std::int64_t rows, std::int64_t begin) {
  const char* from = address(a, o, step, lane, begin);
  const bool strided = t.geometry.run < kChunk && t.geometry.steps > 1;  // then the next chunk is
  if (strided) return far_fetch(from, rows * a.strides.step * size_of(a.dtype));
  return {from + kNearAhead, from + kNearAhead + far_or_next(t.walk.far_bytes, t.walk.next_x)};
}
NORMKIT_LOCAL Fetch fetch_while_writing(const Task& t, const Operand& a, std::int64_t o, std::int64_t step,
                                        std::int64_t lane, std::int64_t begin) {
  const char* from = address(a, o, step, lane, begin);
  return t.frozen ? Fetch{from + kAhead} : far_fetch(from, far_or_next(t.walk.fetch_bytes, t.walk.next_x));
}

/// Writes n elements x = source + residual, rounded to the type of x.
template <class X> NORMKIT_LOCAL void form_row(const X* source, const X* residual, std::int64_t n, X* x) {
  map(x, n, kPlain<X>, Fetch{}, [&](auto place) NORMKIT_INLINE_LAMBDA {
    prefetch_both(reinterpret_cast<const char*>(source + place.i) + kAhead);
    prefetch_both(reinterpret_cast<const char*>(residual + place.i) + kAhead);
    return place.load(source) + place.load(residual);
  });
}
template <class X>
void form_sum(const Task& t, std::int64_t o, std::int64_t step, std::int64_t lane, std::int64_t rows,
              std::int64_t begin, std::int64_t end) {
  if constexpr (kFloating<X>) {
    for (std::int64_t row = step; row < step + rows; ++row) {
      form_row(at<X>(t.source, o, row, lane) + begin, at<X>(t.residual, o, row, lane) + begin, end - begin,
               at<X>(t.x, o, row, lane) + begin);
    }
  }
}

/// Adds the moments of one chunk, whose pivot is the mean of the chunks before it.
template <class X, class Members, class Beside>
NORMKIT_LOCAL void add_chunk(const X* x, std::int64_t rows, std::int64_t stride, std::int64_t n, bool centered,
                             const Members& members, Fetch fetch, Beside& beside, Moments<ScalarOf<X>>& m) {
  const double count = members.count(rows, n);
  if (count == 0) return;
  const ScalarOf<X> pivot = !centered  ? ScalarOf<X>(0)
                            : m.n == 0 ? first_pivot(x, stride, rows, n, members)
                                       : static_cast<ScalarOf<X>>(m.mean);
  const Moments<ScalarOf<X>> chunk = chunk_moments(x, rows, stride, n, pivot, centered, count, members, fetch, beside);
  m = m.n == 0 ? chunk : merge(m, chunk);
}

/// Moments of the members of one span of a statistic.
template <class X>
Moments<ScalarOf<X>> span_moments(const Task& t, std::int64_t o, std::int64_t lane, Chunks c, std::int64_t span) {
  const std::int64_t first = span * kSpanChunks, last = least(c.count, first + kSpanChunks);
  Moments<ScalarOf<X>> m;
  for_chunks(t.geometry, c, first, last,
             [&](std::int64_t step, std::int64_t rows, std::int64_t begin, std::int64_t end) {
    if (t.residual.data) form_sum<X>(t, o, step, lane, rows, begin, end);
    const Fetch fetch = fetch_while_reading(t, t.residual.data ? t.source : t.x, o, step, lane, rows, begin);
    with_members(t, o, step, lane, begin, [&](const auto& members) {
      Nothing alone;
      add_chunk(at<X>(t.x, o, step, lane) + begin, rows, t.x.strides.step, end - begin, t.centered, members, fetch,
                alone, m);
    });
  });
  return m;
}

template <class X, class Y>
[[gnu::noinline]] void forward_range(const Task& t, const X* x, Y* y, std::int64_t o, std::int64_t offset,
                                     std::int64_t begin, std::int64_t end, Statistic<ScalarOf<X>> s,
                                     Streamer<Y>* streamer, Fetch fetch) {
  using S = ScalarOf<X>;
  const bool curved = is_curved(t.activation);
  ParamBuffers<S> params;
  for_pieces(t, o, offset, begin, end, curved || follows_elements(t.geometry) ? kBuffer : end,
             [&](Piece piece) NORMKIT_INLINE_LAMBDA {
    const X* from = x + piece.begin;
    Y* to = y + piece.begin;
    const Fetch next = fetch.at((piece.begin - begin) * static_cast<std::int64_t>(sizeof(X)));
    const Preactivation<X> z = activation_input<X>(t, piece, s, params);
    if (curved) {
      alignas(64) S value[kBuffer];
      map(value, piece.n, kPlain<S>, Fetch{},
          [&](auto place) NORMKIT_INLINE_LAMBDA { return z.at(place, place.load(from)); });
      activate_all(z.activation, z.slopes, value, piece.n);
      put_all<Y, S>(value, to, piece.n, streamer, next);
    } else if (is_relu(t.activation)) {
      map(to, piece.n, streamer, next,
          [&](auto place) NORMKIT_INLINE_LAMBDA { return relu(z.at(place, place.load(from))); });
    } else if (piece.linear) {
      map(to, piece.n, streamer, next,
          [&](auto place) NORMKIT_INLINE_LAMBDA { return z.linear(place, place.load(from)); });
    } else {
      map(to, piece.n, streamer, next, [&](auto place) NORMKIT_INLINE_LAMBDA { return z.constant(place.load(from)); });
    }
  });
}

template <class X, class Y>
void forward_span(const Task& t, std::int64_t o, std::int64_t lane, Chunks c, std::int64_t span,
                  Statistic<ScalarOf<X>> s, Streamer<Y>* streamer) {
  for_ranges(t.geometry, c, span, [&](std::int64_t step, std::int64_t begin, std::int64_t end) {
    if (t.residual.data && t.frozen) form_sum<X>(t, o, step, lane, 1, begin, end);
    forward_range(t, at<X>(t.x, o, step, lane), at<Y>(t.y, o, step, lane), o, t.geometry.offset(o, step, lane, 0),
                  begin, end, s, streamer,
                  fetch_while_writing(t, t.residual.data ? t.source : t.x, o, step, lane, begin));
  });
}

/// The moments of a whole statistic; span(k) gives the moments of span k, and is called in order.
template <class F> NORMKIT_LOCAL auto merged_spans(Chunks c, F span) {
  auto m = span(std::int64_t{0});
  for (std::int64_t k = 1; k < c.spans; ++k) m = merge(m, span(k));
  return m;
}

template <class X> Statistic<ScalarOf<X>> forward_statistic(const Task& t, std::int64_t r, Chunks c) {
  if (t.frozen) return given_statistic<ScalarOf<X>>(t, r);
  return publish<ScalarOf<X>>(t, r, merged_spans(c, [&](std::int64_t span) {
    return span_moments<X>(t, r / t.geometry.lanes, r % t.geometry.lanes, c, span);
  }));
}

/// y of one statistic, for a BesideWriter.
template <class Element, bool kLinear> struct ForwardOutputs {
  using X = Element;
  using S = ScalarOf<X>;
  struct Formula {
    const X* x;
    Preactivation<X> z;
    NORMKIT_LOCAL VectorOf<X> operator()(Full place) const {
      return kLinear ? z.linear(place, place.load(x)) : z.constant(place.load(x));
    }
  };

  const Task& t;
  Operand x;
  std::int64_t o, lane;
  Statistic<S> s;
  Streamer<X>& streamer;
  ParamBuffers<S>& params;

  Piece piece(std::int64_t step, std::int64_t begin) const {
    const bool whole = !kLinear || (ParamBuffer<S>::reads_in_place(t.weight) && ParamBuffer<S>::reads_in_place(t.bias));
    const std::int64_t run = t.geometry.run, offset = t.geometry.offset(o, step, lane, 0);
    return piece_at(t.geometry, o, offset, begin, run, whole ? run : kBuffer);
  }
  X* out(std::int64_t step) const { return at<X>(t.y, o, step, lane); }
  Formula formula(std::int64_t step, Piece piece) {
    return {at<X>(x, o, step, lane) + piece.begin, preactivation<X>(t, piece, s, params)};
  }
  void write(std::int64_t step, std::int64_t begin, std::int64_t end) {
    forward_range(t, at<X>(x, o, step, lane), out(step), o, t.geometry.offset(o, step, lane, 0), begin, end, s,
                  &streamer, Fetch{});
  }
};

/// x as statistic r of it is read: where it lies, or where it is gathered.
NORMKIT_LOCAL Operand input_of(const Task& t, std::int64_t r) {
  Operand x = t.x;
  if (t.gather.copy) x.data = t.gather.place(r), x.strides = {0, t.geometry.run, 0, 1};
  return x;
}

/// Forward, for statistics [begin, end): each is written while the next one is read.
template <class X, bool kLinear> void runs_forward_overlapped(const Task& t, std::int64_t begin, std::int64_t end) {
  const Geometry& g = t.geometry;
  const Chunks c = chunks_of(g, Traversal::runs);
  Streamer<X> streamer;
  ParamBuffers<ScalarOf<X>> params;
  const auto find = [&](std::int64_t r, auto& beside) {
    const std::int64_t o = r / g.lanes, lane = r % g.lanes;
    const Operand input = input_of(t, r);
    return publish<ScalarOf<X>>(t, r, merged_spans(c, [&](std::int64_t span) {
      Moments<ScalarOf<X>> m;
      for_chunks(g, c, span * kSpanChunks, least(c.count, (span + 1) * kSpanChunks),
                 [&](std::int64_t step, std::int64_t rows, std::int64_t first, std::int64_t last) {
        const X* x = at<X>(input, o, step, lane) + first;
        const char* const near = reinterpret_cast<const char*>(x) + near_ahead(g.run * sizeof(X));
        Fetch fetch{near, near + far_or_next(t.walk.far_bytes, t.walk.next_x)};
        if (t.gather.copy) {
          const std::int64_t next = t.gather.copy(t.gather, r, step * g.run + first, (step + rows - 1) * g.run + last);
          if (next) fetch.far = reinterpret_cast<const char*>(x) + next;
        }
        add_chunk(x, rows, input.strides.step, last - first, t.centered, Everyone{}, fetch, beside, m);
      });
      return m;
    }));
  };
  Nothing alone;
  Statistic<ScalarOf<X>> s = find(begin, alone);
  for (std::int64_t r = begin; r < end; ++r) {
    ForwardOutputs<X, kLinear> outputs{t, input_of(t, r), r / g.lanes, r % g.lanes, s, streamer, params};
    BesideWriter<ForwardOutputs<X, kLinear>> writer(outputs);
    if (r + 1 < end) s = find(r + 1, writer);
    writer.finish();
  }
}

template <class X, class Y> void runs_forward(const Task& t, std::int64_t begin, std::int64_t end) {
  using S = ScalarOf<X>;
  const Geometry& g = t.geometry;
  if constexpr (kWide && kFloating<X> && __is_same(X, Y)) {
    if (t.walk.overlapped) {
      if constexpr (kHoldsRows) {
        if (follows_elements(g)) return runs_forward_overlapped<X, true>(t, begin, end);
      }
      return runs_forward_overlapped<X, false>(t, begin, end);
    }
  }
  const Chunks c = chunks_of(g, Traversal::runs);
  Streamer<Y> streamer;
  for (std::int64_t r = begin; r < end; ++r) {
    const std::int64_t o = r / g.lanes, lane = r % g.lanes;
    const Statistic<S> s = forward_statistic<X>(t, r, c);
    if (t.phase == Phase::reduce) continue;
    for_spans(t, 0, c.spans, [&](std::int64_t span) {
      forward_span<X, Y>(t, o, lane, c, span, s, t.walk.stream_stores ? &streamer : nullptr);
    });
  }
}

template <class X> void runs_forward_sums(const Task& t, std::int64_t begin, std::int64_t end) {
  const Geometry& g = t.geometry;
  const Chunks c = chunks_of(g, Traversal::runs);
  for (std::int64_t unit = begin; unit < end; ++unit) {
    const std::int64_t r = unit / c.spans;
    put_moments(span_moments<X>(t, r / g.lanes, r % g.lanes, c, unit % c.spans),
                t.partials + kMomentDoubles<ScalarOf<X>> * unit);
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
    solved<S>(t, r)->statistic = publish<S>(t, r, merged_spans(c, [&](std::int64_t span) {
      return moments_at<S>(t.partials + kMomentDoubles<S> * (r * c.spans + span));
    }));
  }
}

template <class X, class Y> void runs_forward_apply(const Task& t, std::int64_t begin, std::int64_t end) {
  const Geometry& g = t.geometry;
  Streamer<Y> streamer;
  const Chunks c = chunks_of(g, Traversal::runs);
  for_spans(t, begin, end, [&](std::int64_t unit) {
    const std::int64_t r = unit / c.spans;
    forward_span<X, Y>(t, r / g.lanes, r % g.lanes, c, unit % c.spans, solved<ScalarOf<X>>(t, r)->statistic,
                       t.walk.stream_stores ? &streamer : nullptr);
  });
}

}  // namespace
}  // namespace normkit
