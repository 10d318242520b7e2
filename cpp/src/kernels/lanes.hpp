// The lanes traversal: a statistic is reduced across steps, with vectors along the contiguous columns.
//
//     columns = lanes x run        chunk = 128 steps of a tile of 4 vectors -> spans -> one column -> fold of run columns
//
// A tile's sums stay in registers for a chunk. What the columns add up to lies in scratch, one array a quantity.
#pragma once

namespace normkit {
namespace {

constexpr int kTile = 4;  // vectors

/// What is written of each column once its statistic is known, as arrays of the compute type. Forward: y from mean, scale and
/// shift. Backward: dx from mean, a, b, c. x_hat from mean, unit and origin.
template <class S> struct Table {
  S *mean, *a, *b, *c, *unit, *origin;
  Table(double* memory, std::int64_t columns) {
    S* next = reinterpret_cast<S*>(memory);
    for (S** array : {&mean, &a, &b, &c, &unit, &origin}) *array = next, next += columns;
  }
};

/// Calls f(vectors as a constant, first column, columns) for each tile; the columns after the last full tile go one vector
/// at a time, which keeps the code half as large.
template <class X, class F> NORMKIT_LOCAL void for_tiles(std::int64_t columns, F f) {
  constexpr std::int64_t kWidth = kLanes<VectorOf<X>>;
  std::int64_t k = 0;
  for (; k + kTile * kWidth <= columns; k += kTile * kWidth) f(Count<kTile>{}, k, kTile * kWidth);
  for (; k < columns; k += kWidth) f(Count<1>{}, k, least(columns - k, kWidth));
}

/// Calls f(j, position) for the vectors of a tile of n columns. Only a tile of one vector may be less than whole.
template <class V, int kVectors, class F> NORMKIT_LOCAL void for_vectors(Count<kVectors>, std::int64_t n, F f) {
  constexpr int kWidth = kLanes<V>;
  if constexpr (kVectors > 1) {
    for (int j = 0; j < kVectors; ++j) f(j, Full{j * kWidth});
  } else {
    n == kWidth ? f(0, Full{0}) : f(0, Part{0, static_cast<int>(n)});
  }
}

// ---- forward ---------------------------------------------------------------------------------------------------

/// Sums of differences to a pivot, of one tile over one chunk, in the compute type.
template <class S> struct TileSums {
  static constexpr int kWidth = kTile * (sizeof(S) == 8 ? 8 : 16);
  alignas(64) S pivot[kWidth], sum[kWidth], squares[kWidth];
};

/// The pivots of a tile: the mean of the first four steps, so that no column is far from its own.
template <class X, int kVectors>
NORMKIT_LOCAL void first_pivots(const X* x, std::int64_t stride, std::int64_t rows, std::int64_t n,
                                Count<kVectors> vectors, ScalarOf<X>* pivot) {
  using V = VectorOf<X>;
  for_vectors<V>(vectors, n, [&](int, auto place) NORMKIT_INLINE_LAMBDA {
    V p = place.load(x);
    if (rows >= 4)
      p = ((p + place.load(x + stride)) + (place.load(x + 2 * stride) + place.load(x + 3 * stride))) *
          broadcast<V>(ScalarOf<X>(0.25));
    store(pivot + place.i, p);
  });
}

/// kMagnified: the differences are scaled so that only those of a constant column square to 0.
template <bool kMagnified, class X, int kVectors>
NORMKIT_LOCAL void tile_sums(const X* x, std::int64_t stride, std::int64_t rows, std::int64_t n,
                             Count<kVectors> vectors, TileSums<ScalarOf<X>>& out) {
  using V = VectorOf<X>;
  constexpr std::int64_t kShortSum = 16;  // steps; a sum of sums rounds an eighth as much as one of kChunkSteps
  const V zero = broadcast<V>(ScalarOf<X>(0));
  V p[kVectors], total_s[kVectors], total_q[kVectors];
  for (int j = 0; j < kVectors; ++j) {
    p[j] = load(out.pivot + j * kLanes<V>);
    total_s[j] = total_q[j] = zero;
  }
  for (std::int64_t row = 0; row < rows;) {
    V s[kVectors], q[kVectors];
    for (int j = 0; j < kVectors; ++j) s[j] = q[j] = zero;
    for (const std::int64_t last = least(rows, row + kShortSum); row < last; ++row, x += stride)
      for_vectors<V>(vectors, n, [&](int j, auto place) NORMKIT_INLINE_LAMBDA {
        V d = place.load(x) - p[j];
        if constexpr (kMagnified) d = d * broadcast<V>(kMagnify<ScalarOf<X>>);
        s[j] = s[j] + d;
        q[j] = mul_add(d, d, q[j]);
      });
    for (int j = 0; j < kVectors; ++j) total_s[j] = total_s[j] + s[j], total_q[j] = total_q[j] + q[j];
  }
  for (int j = 0; j < kVectors; ++j) {
    store(out.sum + j * kLanes<V>, total_s[j]);
    store(out.squares + j * kLanes<V>, total_q[j]);
  }
}

/// Moments of one column in double, in two passes: for data that defeats the pivots.
template <class X>
[[gnu::noinline]] Moments<double> careful_column(const X* x, std::int64_t stride, std::int64_t rows, bool centered) {
  const double count = static_cast<double>(rows);
  const auto sums_about = [&](double pivot) {
    double s = 0, q = 0;
    for (std::int64_t row = 0; row < rows; ++row) {
      const double d = static_cast<double>(first(load(x + row * stride, 1))) - pivot;
      s += d;
      q = mul_add(d, d, q);
    }
    return from_pivot(pivot, s, q, count);
  };
  if (centered) return sums_about(sums_about(static_cast<double>(first(load(x, 1)))).mean);
  const Moments<double> m = sums_about(0);
  return {0, mul_add(m.mean * m.mean, count, m.m2)};
}

/// The columns of a tile whose sums say nothing: constant ones keep their pivot, others are taken once more in double. A column
/// is judged by itself, so that none depends on its neighbors.
template <class X, int kVectors>
[[gnu::noinline]] void mend_columns(const X* x, std::int64_t stride, std::int64_t rows, std::int64_t n, bool centered,
                                    Count<kVectors> vectors, TileSums<ScalarOf<X>>& sums, const bool* doubtful,
                                    double* mean, double* m2) {
  tile_sums<true>(x, stride, rows, n, vectors, sums);
  for (std::int64_t k = 0; k < n; ++k) {
    if (!doubtful[k]) continue;
    const bool constant = sums.squares[k] == 0;
    const Moments<double> m = constant ? Moments<double>{static_cast<double>(sums.pivot[k]), 0}
                                       : careful_column(x + k, stride, rows, centered);
    mean[k] = m.mean, m2[k] = m.m2;
  }
}

/// Moments of the columns of one chunk of one tile.
template <class X, int kVectors>
[[gnu::noinline]] void chunk_columns(const X* x, std::int64_t stride, std::int64_t rows, std::int64_t n, bool centered,
                                     Count<kVectors> vectors, TileSums<ScalarOf<X>>& sums, double* mean, double* m2) {
  using S = ScalarOf<X>;
  tile_sums<false>(x, stride, rows, n, vectors, sums);
  const double count = static_cast<double>(rows);
  bool doubtful[TileSums<S>::kWidth], any = false;
  for (std::int64_t k = 0; k < n; ++k) {
    const double s = static_cast<double>(sums.sum[k]), q = static_cast<double>(sums.squares[k]);
    const Moments<double> m = from_pivot(static_cast<double>(sums.pivot[k]), s, q, count);
    mean[k] = centered ? m.mean : 0;
    m2[k] = centered ? m.m2 : q;
    doubtful[k] = !(centered ? trustworthy<S>(s, q, count) : q > kVanishing<S> && q < kOverflowing<S>);
    any |= doubtful[k];
  }
  if (any) mend_columns(x, stride, rows, n, centered, vectors, sums, doubtful, mean, m2);
}

/// Merges the moments of n columns, nb members each, into those of na members.
NORMKIT_LOCAL void merge_columns(double* mean, double* m2, double na, const double* more_mean, const double* more_m2,
                                 double nb, std::int64_t n) {
  for (std::int64_t k = 0; k < n; ++k) {
    const Moments<double> m = merge<double>({mean[k], m2[k]}, na, {more_mean[k], more_m2[k]}, nb);
    mean[k] = m.mean, m2[k] = m.m2;
  }
}

/// Moments of all columns over one span.
template <class X>
void span_columns(const Task& t, std::int64_t o, Chunks c, std::int64_t span, double* mean, double* m2) {
  using S = ScalarOf<X>;
  const Geometry& g = t.geometry;
  const std::int64_t first = span * kSpanChunks * c.rows, last = least(g.steps, first + kSpanChunks * c.rows);
  TileSums<S> sums;
  double chunk_mean[TileSums<S>::kWidth], chunk_m2[TileSums<S>::kWidth];
  for (std::int64_t step = first; step < last; step += c.rows) {
    const std::int64_t rows = least(c.rows, last - step);
    const X* from = at<X>(t.x, o, step, 0);
    for_tiles<X>(g.columns(), [&](auto vectors, std::int64_t k, std::int64_t n) {
      if (!t.centered)
        for (S& p : sums.pivot) p = 0;
      else if (step == first) first_pivots(from + k, t.x.strides.step, rows, n, vectors, sums.pivot);
      else
        for (std::int64_t j = 0; j < n; ++j) sums.pivot[j] = static_cast<S>(mean[k + j]);
      const bool fresh = step == first;
      chunk_columns(from + k, t.x.strides.step, rows, n, t.centered, vectors, sums, fresh ? mean + k : chunk_mean,
                    fresh ? m2 + k : chunk_m2);
      if (!fresh)
        merge_columns(mean + k, m2 + k, static_cast<double>(step - first), chunk_mean, chunk_m2,
                      static_cast<double>(rows), n);
    });
  }
}

NORMKIT_LOCAL std::int64_t lanes_span_steps(const Geometry& g, std::int64_t span) {
  return least(g.steps - span * kSpanChunks * kChunkSteps, kSpanChunks * kChunkSteps);
}

/// From the moments of columns to statistics, and to the table that apply reads.
template <class S>
void lanes_finish(const Task& t, std::int64_t o, const double* mean, const double* m2, Table<S> table) {
  const Geometry& g = t.geometry;
  const bool by_column = constant_in_column(g);
  for (std::int64_t lane = 0; lane < g.lanes; ++lane) {
    const std::int64_t r = o * g.lanes + lane, first = lane * g.run;
    Statistic<S> s;
    if (t.frozen) {
      s = given_statistic<S>(t, r);
    } else {
      Moments<double> m{mean[first], m2[first]};
      for (std::int64_t j = 1; j < g.run; ++j)
        m = merge(m, static_cast<double>(j * g.steps), {mean[first + j], m2[first + j]}, static_cast<double>(g.steps));
      s = publish<S>(t, r, m);
    }
    for (std::int64_t k = first; k < first + g.run; ++k) {
      const std::int64_t parameter = by_column ? g.parameter(o, g.offset(o, 0, 0, k)) : 0;
      const Affine<S> affine = by_column
                                   ? forward_affine(s, element(t.weight, parameter, 1), element(t.bias, parameter, 0))
                                   : forward_affine(s, 1, 0);
      table.mean[k] = s.mean, table.a[k] = affine.scale, table.b[k] = affine.shift;
    }
  }
}

/// True where every row of every tile begins at a full line of memory, so that streamed stores fit.
template <class Y> NORMKIT_LOCAL bool rows_on_lines(const Operand& a, const Geometry& g) {
  const auto aligned = [](std::int64_t elements) { return elements * static_cast<std::int64_t>(sizeof(Y)) % 64 == 0; };
  return reinterpret_cast<std::uintptr_t>(a.data) % 64 == 0 && aligned(a.strides.step) &&
         (g.outer == 1 || aligned(a.strides.outer));
}

constexpr std::int64_t kApplyRows = 16;  // steps that a tile takes at once while its table is in registers

/// Calls f(tile, first column, columns, step) for tiles of steps [begin, end), backwards by blocks of steps.
template <class X, class F>
NORMKIT_LOCAL void for_blocks(const Geometry& g, std::int64_t begin, std::int64_t end, F f) {
  for (std::int64_t last = end; last > begin;) {
    const std::int64_t first = last - least(last - begin, kApplyRows);
    for_tiles<X>(g.columns(), [&](auto vectors, std::int64_t k, std::int64_t n)
                                  NORMKIT_INLINE_LAMBDA { f(vectors, k, n, first, last); });
    last = first;
  }
}

template <class X, class Y>
void lanes_forward_steps(const Task& t, std::int64_t o, std::int64_t begin, std::int64_t end,
                         Table<ScalarOf<X>> table) {
  using V = VectorOf<X>;
  using S = ScalarOf<X>;
  const Geometry& g = t.geometry;
  const bool by_column = constant_in_column(g), streaming = t.stream_stores && rows_on_lines<Y>(t.y, g);
  ParamBuffer<S> weights, biases;
  for_blocks<X>(g, begin, end,
                [&](auto vectors, std::int64_t k, std::int64_t n, std::int64_t first, std::int64_t last) {
    constexpr int kVectors = decltype(vectors)::value;
    V mean[kVectors], scale[kVectors], shift[kVectors];
    for_vectors<V>(vectors, n, [&](int j, auto place) NORMKIT_INLINE_LAMBDA {
      mean[j] = place.load(table.mean + k), scale[j] = place.load(table.a + k), shift[j] = place.load(table.b + k);
    });
    for (std::int64_t step = first; step < last; ++step) {
      const X* x = at<X>(t.x, o, step, 0) + k;
      Y* y = at<Y>(t.y, o, step, 0) + k;
      const S *weight = nullptr, *bias = nullptr;
      if (!by_column) {
        const std::int64_t parameter = g.parameter(o, g.offset(o, step, 0, 0)) + k;
        weight = weights.read(t.weight, parameter, n, 1), bias = biases.read(t.bias, parameter, n, 0);
      }
      for_vectors<V>(vectors, n, [&](int j, auto place) NORMKIT_INLINE_LAMBDA {
        V v = forward(place.load(x), mean[j], scale[j], shift[j]);
        if (!by_column) v = mul_add(v, place.load(weight), place.load(bias));
        if constexpr (decltype(place)::kWhole) {
          if (streaming) return stream(y + place.i, v);
        }
        place.store(y, v);
      });
    }
  });
}

template <class X, class Y> void lanes_forward(const Task& t, std::int64_t begin, std::int64_t end, double* scratch) {
  const Geometry& g = t.geometry;
  const Chunks c = chunks_of(g, Traversal::lanes);
  const std::int64_t columns = g.columns();
  double *mean = scratch, *m2 = mean + columns, *span_mean = m2 + columns, *span_m2 = span_mean + columns;
  const Table<ScalarOf<X>> table(scratch + 6 * columns, columns);
  for (std::int64_t o = begin; o < end; ++o) {
    if (!t.frozen) {
      span_columns<X>(t, o, c, 0, mean, m2);
      for (std::int64_t span = 1; span < c.spans; ++span) {
        span_columns<X>(t, o, c, span, span_mean, span_m2);
        merge_columns(mean, m2, static_cast<double>(span * kSpanChunks * kChunkSteps), span_mean, span_m2,
                      static_cast<double>(lanes_span_steps(g, span)), columns);
      }
    }
    lanes_finish(t, o, mean, m2, table);
    lanes_forward_steps<X, Y>(t, o, 0, g.steps, table);
  }
}

template <class X> void lanes_forward_sums(const Task& t, std::int64_t begin, std::int64_t end) {
  const Chunks c = chunks_of(t.geometry, Traversal::lanes);
  const std::int64_t columns = t.geometry.columns();
  for (std::int64_t unit = begin; unit < end; ++unit) {
    double* mean = t.partials + 2 * columns * unit;
    span_columns<X>(t, unit / c.spans, c, unit % c.spans, mean, mean + columns);
  }
}

template <class X> void lanes_forward_finish(const Task& t, std::int64_t begin, std::int64_t end, double* scratch) {
  const Geometry& g = t.geometry;
  const Chunks c = chunks_of(g, Traversal::lanes);
  const std::int64_t columns = g.columns();
  double *mean = scratch, *m2 = mean + columns;
  for (std::int64_t o = begin; o < end; ++o) {
    for (std::int64_t span = 0; span < (t.frozen ? 0 : c.spans); ++span) {
      const double* part = t.partials + 2 * columns * (o * c.spans + span);
      if (span == 0) copy(part, 2 * columns, mean);
      else
        merge_columns(mean, m2, static_cast<double>(span * kSpanChunks * kChunkSteps), part, part + columns,
                      static_cast<double>(lanes_span_steps(g, span)), columns);
    }
    lanes_finish(t, o, mean, m2, Table<ScalarOf<X>>(t.solved + 6 * columns * o, columns));
  }
}

/// Steps [begin, end) of a span.
NORMKIT_LOCAL std::int64_t span_begin(std::int64_t span) { return span * kSpanChunks * kChunkSteps; }

template <class X, class Y> void lanes_forward_apply(const Task& t, std::int64_t begin, std::int64_t end) {
  const Geometry& g = t.geometry;
  const Chunks c = chunks_of(g, Traversal::lanes);
  for (std::int64_t unit = end; unit-- > begin;) {
    const std::int64_t o = unit / c.spans, first = span_begin(unit % c.spans);
    lanes_forward_steps<X, Y>(t, o, first, first + lanes_span_steps(g, unit % c.spans),
                              Table<ScalarOf<X>>(t.solved + 6 * g.columns() * o, g.columns()));
  }
}

// ---- backward --------------------------------------------------------------------------------------------------

/// Adds the sums of one chunk of one tile to three arrays of columns: g, g * (x - mean), x - mean.
template <class X, int kVectors>
[[gnu::noinline]] void add_tile(const Task& t, std::int64_t o, std::int64_t step, std::int64_t rows, std::int64_t k,
                                std::int64_t n, const ScalarOf<X>* mean, bool by_column, Count<kVectors> vectors,
                                double* const (&sums)[3]) {
  using V = VectorOf<X>;
  using S = ScalarOf<X>;
  const Geometry& g = t.geometry;
  ParamBuffer<S> weights;
  V m[kVectors];
  Sums<V> s[kVectors];
  for_vectors<V>(vectors, n, [&](int j, auto place) NORMKIT_INLINE_LAMBDA {
    m[j] = place.load(mean + k);
    s[j].g = s[j].gx = s[j].d = broadcast<V>(S(0));
  });
  for (std::int64_t row = step; row < step + rows; ++row) {
    const X *x = at<X>(t.x, o, row, 0) + k, *dy = at<X>(t.dy, o, row, 0) + k;
    const S* weight = by_column ? nullptr : weights.read(t.weight, g.parameter(o, g.offset(o, row, 0, 0)) + k, n, 1);
    for_vectors<V>(vectors, n, [&](int j, auto place) NORMKIT_INLINE_LAMBDA {
      V dy_w = place.load(dy);
      if (!by_column) dy_w = dy_w * place.load(weight);
      const V d = place.load(x) - m[j];
      s[j].g = s[j].g + dy_w;
      s[j].gx = mul_add(dy_w, d, s[j].gx);
      s[j].d = s[j].d + d;
    });
  }
  alignas(64) S lane[3][kVectors * kLanes<V>];
  for (int j = 0; j < kVectors; ++j) {
    store(lane[0] + j * kLanes<V>, s[j].g);
    store(lane[1] + j * kLanes<V>, s[j].gx);
    store(lane[2] + j * kLanes<V>, s[j].d);
  }
  for (int quantity = 0; quantity < 3; ++quantity)
    for (std::int64_t j = 0; j < n; ++j) sums[quantity][k + j] += static_cast<double>(lane[quantity][j]);
}

/// Sums over one span, as three arrays of columns in `out`.
template <class X>
void span_column_sums(const Task& t, std::int64_t o, std::int64_t span, const ScalarOf<X>* mean, double* out) {
  const Geometry& g = t.geometry;
  const std::int64_t columns = g.columns(), first = span_begin(span), last = first + lanes_span_steps(g, span);
  const bool by_column = constant_in_column(g);
  double* const sums[3] = {out, out + columns, out + 2 * columns};
  for (std::int64_t k = 0; k < 3 * columns; ++k) out[k] = 0;
  for (std::int64_t step = first; step < last; step += kChunkSteps)
    for_tiles<X>(columns, [&](auto vectors, std::int64_t k, std::int64_t n) {
      add_tile<X>(t, o, step, least(kChunkSteps, last - step), k, n, mean, by_column, vectors, sums);
    });
}

/// The given means of all columns of one outer index, which sums are taken about.
template <class S> void column_means(const Task& t, std::int64_t o, S* mean) {
  const Geometry& g = t.geometry;
  for (std::int64_t lane = 0; lane < g.lanes; ++lane) {
    const S value = given_statistic<S>(t, o * g.lanes + lane).mean;
    for (std::int64_t k = lane * g.run; k < (lane + 1) * g.run; ++k) mean[k] = value;
  }
}

/// From the sums of columns to statistics, their gradients and the parameters', and to the table that apply reads.
template <class S> void lanes_solve(const Task& t, std::int64_t o, const double* column_sums, Table<S> table) {
  const Geometry& g = t.geometry;
  const std::int64_t columns = g.columns();
  const double n = static_cast<double>(g.members());
  const bool by_column = constant_in_column(g);
  for (std::int64_t lane = 0; lane < g.lanes; ++lane) {
    const std::int64_t first = lane * g.run, last = first + g.run;
    const auto weight = [&](std::int64_t k) {
      return by_column ? element(t.weight, g.parameter(o, g.offset(o, 0, 0, k)), 1) : 1.0;
    };
    Sums<double> sums{0, 0, 0};
    for (std::int64_t k = first; k < last; ++k) {
      const double w = weight(k);
      sums = sums + Sums<double>{w * column_sums[k], w * column_sums[columns + k], column_sums[2 * columns + k]};
    }
    Statistic<S> s = given_statistic<S>(t, o * g.lanes + lane);
    const double shift = mean_shift(t, s, sums);
    if (t.centered && !t.frozen) s = statistic_of<S>(static_cast<double>(s.mean) + shift, s.rstd);
    sums = recenter(sums, shift);
    const Gradient<S> gradient = t.frozen ? Gradient<S>{0, 0, 0} : gradient_of(s, sums, n, t.centered);
    const Affine<S> standard = forward_affine(s, 1, 0);
    for (std::int64_t k = first; k < last; ++k) {
      table.mean[k] = s.mean, table.a[k] = static_cast<S>(s.rstd * weight(k));
      table.b[k] = gradient.b, table.c[k] = gradient.c;
      table.unit[k] = standard.scale, table.origin[k] = standard.shift;
      if (t.kind != ParamKind::column) continue;
      double* d = t.dparams + 2 * (o * columns + k);
      d[0] = s.rstd * mul_add(-shift, column_sums[k], column_sums[columns + k]), d[1] = column_sums[k];
    }
  }
}

template <class X>
void lanes_backward_steps(const Task& t, std::int64_t o, std::int64_t begin, std::int64_t end,
                          Table<ScalarOf<X>> table) {
  using V = VectorOf<X>;
  using S = ScalarOf<X>;
  const Geometry& g = t.geometry;
  const bool by_column = constant_in_column(g), streaming = t.stream_stores && rows_on_lines<X>(t.dx, g);
  ParamBuffer<S> weights;
  for_blocks<X>(g, begin, end,
                [&](auto vectors, std::int64_t k, std::int64_t n, std::int64_t first, std::int64_t last) {
    constexpr int kVectors = decltype(vectors)::value;
    V mean[kVectors], a[kVectors], b[kVectors], c[kVectors];
    for_vectors<V>(vectors, n, [&](int j, auto place) NORMKIT_INLINE_LAMBDA {
      mean[j] = place.load(table.mean + k), a[j] = place.load(table.a + k);
      b[j] = place.load(table.b + k), c[j] = place.load(table.c + k);
    });
    for (std::int64_t step = first; step < last; ++step) {
      const X *x = at<X>(t.x, o, step, 0) + k, *dy = at<X>(t.dy, o, step, 0) + k;
      X* dx = t.dx.data ? at<X>(t.dx, o, step, 0) + k : nullptr;
      const std::int64_t offset = g.offset(o, step, 0, 0);
      const S* weight = by_column ? nullptr : weights.read(t.weight, g.parameter(o, offset) + k, n, 1);
      for_vectors<V>(vectors, n, [&](int j, auto place) NORMKIT_INLINE_LAMBDA {
        const V x_v = place.load(x), dy_v = place.load(dy);
        if (t.dweight_out) {
          const V x_hat = forward(x_v, mean[j], place.load(table.unit + k), place.load(table.origin + k));
          place.store(at<S>(t.dweight_out, offset + k), x_hat * dy_v);
        }
        if (t.dbias_out) place.store(at<S>(t.dbias_out, offset + k), dy_v);
        if (!dx) return;
        const V v = backward(x_v, by_column ? dy_v : dy_v * place.load(weight), mean[j], a[j], b[j], c[j]);
        if constexpr (decltype(place)::kWhole) {
          if (streaming) return stream(dx + place.i, v);
        }
        place.store(dx, v);
      });
    }
  });
}

template <class X> void lanes_backward(const Task& t, std::int64_t begin, std::int64_t end, double* scratch) {
  const Geometry& g = t.geometry;
  const Chunks c = chunks_of(g, Traversal::lanes);
  const std::int64_t columns = g.columns();
  double *sums = scratch, *part = sums + 3 * columns;
  const Table<ScalarOf<X>> table(scratch + 6 * columns, columns);
  for (std::int64_t o = begin; o < end; ++o) {
    column_means(t, o, table.mean);
    for (std::int64_t span = 0; span < c.spans; ++span) {
      span_column_sums<X>(t, o, span, table.mean, span == 0 ? sums : part);
      if (span > 0)
        for (std::int64_t k = 0; k < 3 * columns; ++k) sums[k] += part[k];
    }
    lanes_solve(t, o, sums, table);
    if (t.dx.data || t.kind == ParamKind::element) lanes_backward_steps<X>(t, o, 0, g.steps, table);
  }
}

template <class X> void lanes_backward_sums(const Task& t, std::int64_t begin, std::int64_t end) {
  using S = ScalarOf<X>;
  const Geometry& g = t.geometry;
  const Chunks c = chunks_of(g, Traversal::lanes);
  for (std::int64_t unit = begin; unit < end; ++unit) {
    const std::int64_t o = unit / c.spans;
    double* out = t.partials + 4 * g.columns() * unit;
    S* mean = reinterpret_cast<S*>(out + 3 * g.columns());
    column_means(t, o, mean);
    span_column_sums<X>(t, o, unit % c.spans, mean, out);
  }
}

template <class X> void lanes_backward_finish(const Task& t, std::int64_t begin, std::int64_t end, double* scratch) {
  const Geometry& g = t.geometry;
  const Chunks c = chunks_of(g, Traversal::lanes);
  const std::int64_t columns = g.columns();
  for (std::int64_t o = begin; o < end; ++o) {
    const double* part = t.partials + 4 * columns * o * c.spans;
    copy(part, 3 * columns, scratch);
    for (std::int64_t span = 1; span < c.spans; ++span)
      for (std::int64_t k = 0; k < 3 * columns; ++k) scratch[k] += part[4 * columns * span + k];
    lanes_solve(t, o, scratch, Table<ScalarOf<X>>(t.solved + 6 * columns * o, columns));
  }
}

template <class X> void lanes_backward_apply(const Task& t, std::int64_t begin, std::int64_t end) {
  const Geometry& g = t.geometry;
  const Chunks c = chunks_of(g, Traversal::lanes);
  for (std::int64_t unit = end; unit-- > begin;) {
    const std::int64_t o = unit / c.spans, first = span_begin(unit % c.spans);
    lanes_backward_steps<X>(t, o, first, first + lanes_span_steps(g, unit % c.spans),
                            Table<ScalarOf<X>>(t.solved + 6 * g.columns() * o, g.columns()));
  }
}

}  // namespace
}  // namespace normkit
