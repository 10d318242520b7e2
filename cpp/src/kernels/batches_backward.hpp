// The runs traversal, backward, where a statistic is one short run: as in batches.hpp, while one batch is written the next is
// summed and a later one fetched.
#pragma once

namespace normkit {
namespace {

template <class X> NORMKIT_LOCAL bool has_backward_batches(const Task& t) {
  const Geometry& g = t.geometry;
  const bool plain = !t.frozen && t.dx.data && t.phase == Phase::both && !has_detailed_ranges(t);
  const bool whole = t.kind == ParamKind::none || t.kind == ParamKind::statistic || t.kind == ParamKind::row;
  return plain && whole && batch_rows(g, sizeof(X)) > 0 && (weighs_elements(g) || constant_in_statistic(g));
}

/// Weights along a row, in the compute type, where there are such: read where they lie, or converted once for all rows.
template <class X> struct RowWeights {
  using S = ScalarOf<X>;
  const S* weight = nullptr;
  alignas(64) S converted[4096 / sizeof(X)];

  explicit RowWeights(const Task& t) {
    if (!weighs_elements(t.geometry) || !t.weight.data) return;
    weight = converted;
    if (t.weight.offset == 0 && t.weight.dtype == (sizeof(S) == 8 ? Dtype::float64 : Dtype::float32))
      weight = at<S>(t.weight.data, 0);
    else
      for (std::int64_t i = 0; i < t.geometry.run; ++i) converted[i] = static_cast<S>(element(t.weight, i, 1));
  }
};

/// The rows of one batch and what is known of them.
template <class X> struct BackwardBatch {
  using V = VectorOf<X>;
  using S = ScalarOf<X>;
  static constexpr int kRows = kLanes<V>;
  std::int64_t first = 0;  // statistic
  int rows = 0;  // up to kRows
  const X *x[kRows], *dy[kRows];
  X* dx[kRows];
  S* row_sums[kRows];
  V g[kRows], gx[kRows], d[kRows];  // Sums of each row, about the given mean
  S mean[kRows];
  Solved<S> solved[kRows];
};

template <class X>
[[gnu::noinline]] void begin_batch(const Task& t, std::int64_t first, std::int64_t end, BackwardBatch<X>& batch) {
  using S = ScalarOf<X>;
  using V = VectorOf<X>;
  const Geometry& g = t.geometry;
  batch.first = first, batch.rows = static_cast<int>(end - first);
  std::int64_t o = first / g.lanes, lane = first % g.lanes;
  for (int k = 0; k < batch.rows; ++k) {
    batch.x[k] = at<X>(t.x, o, 0, lane), batch.dy[k] = at<X>(t.dy, o, 0, lane), batch.dx[k] = at<X>(t.dx, o, 0, lane);
    batch.mean[k] = given_statistic<S>(t, first + k).mean;
    if (t.kind == ParamKind::row)
      batch.row_sums[k] = reinterpret_cast<S*>(t.dparams + 2 * (o * row_groups(g) + lane / kRowGroup) * g.run);
    if (++lane == g.lanes) ++o, lane = 0;
  }
  const V zero = broadcast<V>(S(0));
  for (int k = batch.rows; k < BackwardBatch<X>::kRows; ++k) batch.g[k] = batch.gx[k] = batch.d[k] = zero;
}

template <class X>
NORMKIT_LOCAL void sum_row(std::int64_t n, int k, const ScalarOf<X>* weight, BackwardBatch<X>& batch) {
  const auto sums = [&](auto weighted) NORMKIT_INLINE_LAMBDA {
    return lane_sums<X, weighted.value>(batch.dy[k], 0, batch.x[k], 0, 1, n, batch.mean[k], weight, false);
  };
  const Sums<VectorOf<X>> s = weight ? sums(Count<1>{}) : sums(Count<0>{});
  batch.g[k] = s.g, batch.gx[k] = s.gx, batch.d[k] = s.d;
}

template <class X> [[gnu::noinline]] void solve_batch(const Task& t, BackwardBatch<X>& batch) {
  using S = ScalarOf<X>;
  constexpr int kRows = BackwardBatch<X>::kRows;
  alignas(64) S g[kRows], gx[kRows], d[kRows];
  store(g, sums_of(batch.g)), store(gx, sums_of(batch.gx)), store(d, sums_of(batch.d));
  const double n = static_cast<double>(t.geometry.run);
  for (int k = 0; k < batch.rows; ++k) {
    const std::int64_t r = batch.first + k, o = t.geometry.outer == 1 ? 0 : r / t.geometry.lanes;
    const Sums<double> sums{static_cast<double>(g[k]), static_cast<double>(gx[k]), static_cast<double>(d[k])};
    batch.solved[k] = solve<S>(t, r, o, r - o * t.geometry.lanes, {sums, n});
  }
}

/// dx of row k and what the row adds to the gradients of weights along it.
template <class X>
NORMKIT_LOCAL void write_row(const Task& t, std::int64_t n, int k, const ScalarOf<X>* weight, std::int64_t ahead,
                             const BackwardBatch<X>& batch, Streamer<X>* streamer) {
  using V = VectorOf<X>;
  using S = ScalarOf<X>;
  const X *x = batch.x[k], *dy = batch.dy[k];
  const Solved<S>& known = batch.solved[k];
  double factor = 1;
  if (!weighs_elements(t.geometry)) {
    const std::int64_t r = batch.first + k, o = t.geometry.outer == 1 ? 0 : r / t.geometry.lanes;
    factor = common_weight(t, o, r - o * t.geometry.lanes);
  }
  const V mean = broadcast<V>(known.statistic.mean), a = broadcast<V>(static_cast<S>(known.statistic.rstd * factor));
  const V b = broadcast<V>(known.gradient.b), c = broadcast<V>(known.gradient.c);
  const FetchBoth fetch(x, dy, ahead, false);
  const auto dx_of = [&](auto place, V dy_v, V x_v) NORMKIT_INLINE_LAMBDA {
    const V g = weight ? dy_v * place.load(weight) : dy_v;
    return backward(g, a, through_statistics(x_v, mean, b, c));
  };
  if (t.kind != ParamKind::row) {
    map(batch.dx[k], n, streamer, Fetch{}, [&](auto place) NORMKIT_INLINE_LAMBDA {
      fetch.line(place.i * static_cast<std::int64_t>(sizeof(X)));
      return dx_of(place, place.load(dy), place.load(x));
    });
    return;
  }
  const ElementGradients<X> gradients(t, batch.row_sums[k], 0, 0, known.statistic);
  map(batch.dx[k], n, streamer, Fetch{}, [&](auto place) NORMKIT_INLINE_LAMBDA {
    fetch.line(place.i * static_cast<std::int64_t>(sizeof(X)));
    const V dy_v = place.load(dy), x_v = place.load(x);
    gradients.add_row(place, dy_v, x_v);
    return dx_of(place, dy_v, x_v);
  });
}

/// A range counts fused_units().
template <class X> void batches_backward(const Task& t, std::int64_t begin, std::int64_t end) {
  const std::int64_t n = t.geometry.run, rows = batch_rows(t.geometry, sizeof(X)), ahead = t.fetch_bytes;
  const std::int64_t last = rows_of(t, end - 1).last;
  const RowWeights<X> weights(t);
  Streamer<X> streamer;
  BackwardBatch<X> batches[2], *batch = &batches[0], *next = &batches[1];
  std::int64_t first = rows_of(t, begin).first;
  begin_batch(t, first, least(last, first + rows), *batch);
  for (int k = 0; k < batch->rows; ++k) sum_row(n, k, weights.weight, *batch);
  solve_batch(t, *batch);
  while (batch->rows > 0) {
    first = batch->first + batch->rows;
    begin_batch(t, first, least(last, first + rows), *next);
    for (int k = 0; k < batch->rows; ++k) {
      if (k < next->rows) sum_row(n, k, weights.weight, *next);
      write_row(t, n, k, weights.weight, ahead, *batch, t.stream_stores ? &streamer : nullptr);
    }
    solve_batch(t, *next);
    BackwardBatch<X>* const written = batch;
    batch = next, next = written;
  }
}

}  // namespace
}  // namespace normkit
