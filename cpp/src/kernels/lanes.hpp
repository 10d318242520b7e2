// The lanes traversal, forward: a statistic is reduced across steps, with vectors along the contiguous columns.
//
//     columns = lanes x run        chunk = 128 steps of a tile of 4 vectors -> spans -> one column -> fold of run columns
//
// A tile's sums stay in registers for a chunk. What the columns add up to lies in scratch, one array a quantity.
#pragma once

namespace normkit {
namespace {

constexpr int kTile = 4;  // vectors

/// What is known of each column once its statistic is, as arrays of the compute type. Forward: y from mean, a, b. Backward: dx
/// from mean, a, b, c; x_hat from mean, unit, origin; and z, to which an activation was applied, as forward had it.
template <class S> struct Table {
  S *mean, *a, *b, *c, *unit, *origin, *z_mean, *z_scale, *z_shift;
  Table(double* memory, std::int64_t columns) {
    S* next = reinterpret_cast<S*>(memory);
    for (S** array : {&mean, &a, &b, &c, &unit, &origin, &z_mean, &z_scale, &z_shift}) *array = next, next += columns;
  }
};

/// Moments of columns, one array a quantity.
struct ColumnMoments {
  double *mean, *m2, *n;
  ColumnMoments(double* memory, std::int64_t columns) : mean(memory), m2(memory + columns), n(memory + 2 * columns) {}
  NORMKIT_LOCAL Moments at(std::int64_t k) const { return {mean[k], m2[k], n[k]}; }
  NORMKIT_LOCAL void set(std::int64_t k, Moments m) const { mean[k] = m.mean, m2[k] = m.m2, n[k] = m.n; }
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

/// Sums of differences to a pivot over the members of one tile of one chunk, in the compute type.
template <class S> struct TileSums {
  static constexpr int kWidth = kTile * (sizeof(S) == 8 ? 8 : 16);
  alignas(64) S pivot[kWidth], sum[kWidth], squares[kWidth], members[kWidth];
};

/// One tile over one chunk: n columns of `rows` steps.
template <class X> struct Tile {
  const X* x;
  std::int64_t stride, rows, n;
};

/// The pivots of a tile: the mean of the first four steps, so that no column is far from its own.
template <class X, int kVectors>
NORMKIT_LOCAL void first_pivots(Tile<X> tile, Count<kVectors> vectors, ScalarOf<X>* pivot, Everyone) {
  using V = VectorOf<X>;
  const X* x = tile.x;
  for_vectors<V>(vectors, tile.n, [&](int, auto place) NORMKIT_INLINE_LAMBDA {
    V p = place.load(x);
    if (tile.rows >= 4)
      p = ((p + place.load(x + tile.stride)) + (place.load(x + 2 * tile.stride) + place.load(x + 3 * tile.stride))) *
          broadcast<V>(ScalarOf<X>(0.25));
    store(pivot + place.i, p);
  });
}
/// With a mask: the first member of each column.
template <class X, int kVectors>
void first_pivots(Tile<X> tile, Count<kVectors>, ScalarOf<X>* pivot, const Masked& members) {
  for (std::int64_t k = 0; k < tile.n; ++k)
    pivot[k] = first(load(members.from(k).first(tile.x + k, tile.stride, tile.rows, 1), 1));
}

/// kMagnified: the differences are scaled so that only those of a constant column square to 0.
template <bool kMagnified, class X, int kVectors, class Members>
NORMKIT_LOCAL void tile_sums(Tile<X> tile, Count<kVectors> vectors, TileSums<ScalarOf<X>>& out, Members members) {
  using V = VectorOf<X>;
  constexpr std::int64_t kShortSum = 16;  // steps; a sum of sums rounds an eighth as much as one of kChunkSteps
  const V zero = broadcast<V>(ScalarOf<X>(0)), one = broadcast<V>(ScalarOf<X>(1));
  V p[kVectors], total_s[kVectors], total_q[kVectors], total_n[kVectors];
  for (int j = 0; j < kVectors; ++j) {
    p[j] = load(out.pivot + j * kLanes<V>);
    total_s[j] = total_q[j] = total_n[j] = zero;
  }
  const X* x = tile.x;
  for (std::int64_t row = 0; row < tile.rows;) {
    V s[kVectors], q[kVectors];
    for (int j = 0; j < kVectors; ++j) s[j] = q[j] = zero;
    for (const std::int64_t last = least(tile.rows, row + kShortSum); row < last;
         ++row, x += tile.stride, members.next_row())
      for_vectors<V>(vectors, tile.n, [&](int j, auto place) NORMKIT_INLINE_LAMBDA {
        V d = members.only(place, place.load(x) - p[j]);
        if constexpr (kMagnified) d = d * broadcast<V>(kMagnify<ScalarOf<X>>);
        s[j] = s[j] + d;
        q[j] = mul_add(d, d, q[j]);
        if constexpr (!Members::kAll) total_n[j] = total_n[j] + members.only(place, one);
      });
    for (int j = 0; j < kVectors; ++j) total_s[j] = total_s[j] + s[j], total_q[j] = total_q[j] + q[j];
  }
  if constexpr (Members::kAll)
    for (V& n : total_n) n = broadcast<V>(static_cast<ScalarOf<X>>(tile.rows));
  for (int j = 0; j < kVectors; ++j) {
    store(out.sum + j * kLanes<V>, total_s[j]);
    store(out.squares + j * kLanes<V>, total_q[j]);
    store(out.members + j * kLanes<V>, total_n[j]);
  }
}

/// Moments of the n members of one column in double, in two passes: for data that defeats the pivots.
template <class X, class Members>
[[gnu::noinline]] Moments careful_column(const X* x, std::int64_t stride, std::int64_t rows, double n, bool centered,
                                         const Members& members) {
  const auto sums_about = [&](double pivot) {
    double s = 0, q = 0;
    Members row_members = members;
    for (std::int64_t row = 0; row < rows; ++row, row_members.next_row()) {
      if (row_members.count(1, 1) == 0) continue;
      const double d = static_cast<double>(first(load(x + row * stride, 1))) - pivot;
      s += d;
      q = mul_add(d, d, q);
    }
    return from_pivot(pivot, s, q, n);
  };
  if (centered)
    return sums_about(sums_about(static_cast<double>(first(load(members.first(x, stride, rows, 1), 1)))).mean);
  const Moments m = sums_about(0);
  return {0, mul_add(m.mean * m.mean, n, m.m2), n};
}

/// The columns of a tile whose sums say nothing: constant ones keep their pivot, others are taken once more in double. A column
/// is judged by itself, so that none depends on its neighbors.
template <class X, int kVectors, class Members>
[[gnu::noinline]] void mend_columns(Tile<X> tile, bool centered, Count<kVectors> vectors, TileSums<ScalarOf<X>>& sums,
                                    const bool* doubtful, const Members& members, ColumnMoments out, std::int64_t at) {
  tile_sums<true>(tile, vectors, sums, members);
  for (std::int64_t k = 0; k < tile.n; ++k) {
    if (!doubtful[k]) continue;
    const double n = static_cast<double>(sums.members[k]);
    const bool constant = sums.squares[k] == 0;
    out.set(at + k, constant ? Moments{static_cast<double>(sums.pivot[k]), 0, n}
                             : careful_column(tile.x + k, tile.stride, tile.rows, n, centered, members.from(k)));
  }
}

/// Moments of the columns of one chunk of one tile, into columns `at` and on.
template <class X, int kVectors, class Members>
[[gnu::noinline]] void chunk_columns(Tile<X> tile, bool centered, Count<kVectors> vectors, TileSums<ScalarOf<X>>& sums,
                                     const Members& members, ColumnMoments out, std::int64_t at) {
  using S = ScalarOf<X>;
  tile_sums<false>(tile, vectors, sums, members);
  bool doubtful[TileSums<S>::kWidth], any = false;
  for (std::int64_t k = 0; k < tile.n; ++k) {
    const double s = static_cast<double>(sums.sum[k]), q = static_cast<double>(sums.squares[k]);
    const double n = static_cast<double>(sums.members[k]);
    const Moments m = from_pivot(static_cast<double>(sums.pivot[k]), s, q, n);
    out.set(at + k, centered ? m : Moments{0, q, n});
    doubtful[k] = n > 0 && !(centered ? trustworthy<S>(s, q, n) : q > kVanishing<S> && q < kOverflowing<S>);
    any |= doubtful[k];
  }
  if (any) mend_columns(tile, centered, vectors, sums, doubtful, members, out, at);
}

NORMKIT_LOCAL void merge_columns(ColumnMoments into, std::int64_t at, ColumnMoments more, std::int64_t n) {
  for (std::int64_t k = 0; k < n; ++k) into.set(at + k, merge(into.at(at + k), more.at(k)));
}

/// Steps [begin, end) of a span.
NORMKIT_LOCAL std::int64_t span_begin(std::int64_t span) { return span * kSpanChunks * kChunkSteps; }
NORMKIT_LOCAL std::int64_t span_end(const Geometry& g, std::int64_t span) {
  return least(g.steps, span_begin(span + 1));
}

/// Moments of all columns over one span.
template <class X> void span_columns(const Task& t, std::int64_t o, std::int64_t span, ColumnMoments out) {
  using S = ScalarOf<X>;
  const Geometry& g = t.geometry;
  const std::int64_t begin = span_begin(span), end = span_end(g, span);
  TileSums<S> sums;
  double chunk[3 * TileSums<S>::kWidth];
  const ColumnMoments chunk_out(chunk, TileSums<S>::kWidth);
  for (std::int64_t step = begin; step < end; step += kChunkSteps) {
    const std::int64_t rows = least(kChunkSteps, end - step);
    if (t.residual.data) form_sum<X>(t, o, step, 0, rows, 0, g.columns());
    for_tiles<X>(g.columns(), [&](auto vectors, std::int64_t k, std::int64_t n) {
      const Tile<X> tile{at<X>(t.x, o, step, 0) + k, t.x.strides.step, rows, n};
      with_members(t, o, step, 0, k, [&](const auto& members) {
        const bool fresh = step == begin;
        if (!t.centered)
          for (S& p : sums.pivot) p = 0;
        else if (fresh) first_pivots(tile, vectors, sums.pivot, members);
        else
          for (std::int64_t j = 0; j < n; ++j) sums.pivot[j] = static_cast<S>(out.mean[k + j]);
        chunk_columns(tile, t.centered, vectors, sums, members, fresh ? out : chunk_out, fresh ? k : 0);
        if (!fresh) merge_columns(out, k, chunk_out, n);
      });
    });
  }
}

/// From the moments of columns to those of a statistic, whose columns they are.
NORMKIT_LOCAL Moments fold_columns(const Geometry& g, std::int64_t lane, ColumnMoments columns) {
  Moments m = columns.at(lane * g.run);
  for (std::int64_t k = lane * g.run + 1; k < (lane + 1) * g.run; ++k) m = merge(m, columns.at(k));
  return m;
}

/// The factors of z = x_hat * weight + bias for one column; where weights follow the elements, those of x_hat.
template <class S>
NORMKIT_LOCAL Affine<S> column_affine(const Task& t, std::int64_t o, std::int64_t column, Statistic<S> s) {
  if (!constant_in_column(t.geometry)) return forward_affine(s, 1, 0);
  const std::int64_t parameter = t.geometry.parameter(o, t.geometry.offset(o, 0, 0, column));
  return forward_affine(s, element(t.weight, parameter, 1), element(t.bias, parameter, 0));
}

/// From the moments of columns to statistics, and to the table that apply reads.
template <class S> void lanes_finish(const Task& t, std::int64_t o, ColumnMoments columns, Table<S> table) {
  const Geometry& g = t.geometry;
  for (std::int64_t lane = 0; lane < g.lanes; ++lane) {
    const std::int64_t r = o * g.lanes + lane;
    const Statistic<S> s = t.frozen ? given_statistic<S>(t, r) : publish<S>(t, r, fold_columns(g, lane, columns));
    for (std::int64_t k = lane * g.run; k < (lane + 1) * g.run; ++k) {
      const Affine<S> affine = column_affine(t, o, k, s);
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

/// Stores a vector, past the caches where `streaming` says so and it is whole.
template <class P, class Y, class V> NORMKIT_LOCAL void put(P place, Y* y, V v, bool streaming) {
  if constexpr (P::kWhole) {
    if (streaming) return stream(y + place.i, v);
  }
  place.store(y, v);
}

template <class X, class Y>
void lanes_forward_steps(const Task& t, std::int64_t o, std::int64_t begin, std::int64_t end,
                         Table<ScalarOf<X>> table) {
  using V = VectorOf<X>;
  using S = ScalarOf<X>;
  const Geometry& g = t.geometry;
  const bool by_column = constant_in_column(g), streaming = t.stream_stores && rows_on_lines<Y>(t.y, g);
  const bool active = t.activation.kind != ActivationKind::none;
  if (t.residual.data && t.frozen) form_sum<X>(t, o, begin, 0, end - begin, 0, g.columns());
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
        if (active) v = activated(t.activation, v);
        put(place, y, v, streaming);
      });
    }
  });
}

template <class X, class Y> void lanes_forward(const Task& t, std::int64_t begin, std::int64_t end, double* scratch) {
  const Geometry& g = t.geometry;
  const Chunks c = chunks_of(g, Traversal::lanes);
  const std::int64_t columns = g.columns();
  const ColumnMoments all(scratch, columns), part(scratch + 3 * columns, columns);
  const Table<ScalarOf<X>> table(scratch + 8 * columns, columns);
  for (std::int64_t o = begin; o < end; ++o) {
    for (std::int64_t span = 0; span < (t.frozen ? 0 : c.spans); ++span) {
      span_columns<X>(t, o, span, span == 0 ? all : part);
      if (span > 0) merge_columns(all, 0, part, columns);
    }
    lanes_finish(t, o, all, table);
    if (t.phase != Phase::reduce) lanes_forward_steps<X, Y>(t, o, 0, g.steps, table);
  }
}

template <class X> void lanes_forward_sums(const Task& t, std::int64_t begin, std::int64_t end) {
  const Chunks c = chunks_of(t.geometry, Traversal::lanes);
  const std::int64_t columns = t.geometry.columns();
  for (std::int64_t unit = begin; unit < end; ++unit)
    span_columns<X>(t, unit / c.spans, unit % c.spans, ColumnMoments(t.partials + 3 * columns * unit, columns));
}

template <class X> void lanes_forward_finish(const Task& t, std::int64_t begin, std::int64_t end) {
  const Geometry& g = t.geometry;
  const Chunks c = chunks_of(g, Traversal::lanes);
  const std::int64_t columns = g.columns();
  for (std::int64_t o = begin; o < end; ++o) {
    double* part = t.partials + 3 * columns * o * c.spans;
    const ColumnMoments all(part, columns);
    for (std::int64_t span = 1; span < (t.frozen ? 0 : c.spans); ++span)
      merge_columns(all, 0, ColumnMoments(part + 3 * columns * span, columns), columns);
    lanes_finish(t, o, all, Table<ScalarOf<X>>(t.solved + kTableColumns * columns * o, columns));
  }
}

template <class X, class Y> void lanes_forward_apply(const Task& t, std::int64_t begin, std::int64_t end) {
  const Geometry& g = t.geometry;
  const Chunks c = chunks_of(g, Traversal::lanes);
  for (std::int64_t unit = end; unit-- > begin;) {
    const std::int64_t o = unit / c.spans, span = unit % c.spans;
    lanes_forward_steps<X, Y>(t, o, span_begin(span), span_end(g, span),
                              Table<ScalarOf<X>>(t.solved + kTableColumns * g.columns() * o, g.columns()));
  }
}

}  // namespace
}  // namespace normkit
