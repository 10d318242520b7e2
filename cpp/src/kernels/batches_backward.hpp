// The runs traversal, backward, where a statistic is one short run: as in batches.hpp, while one batch is written the next is
// summed and a later one fetched.
#pragma once

namespace normkit {
namespace {

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
  const std::uint8_t* mask[kRows];  // where there is one
  V g[kRows], gx[kRows], d[kRows];  // Sums of each row, about the given mean
  V members[kRows];  // of each row with a mask, counted in each lane
  RowStatistics<kRows> given;
  // The statistics of each row, at first as they are given, and the coefficients of its gradient, with its weight.
  alignas(64) S mean[kRows], mean_low[kRows], a[kRows], b[kRows], c[kRows];
  alignas(64) double rstd[kRows];
  double* room = nullptr;  // for what reaches the rows through an activation

  Statistic<S> statistic(int k) const { return {mean[k], mean_low[k], rstd[k]}; }
};

/// Has the rows of a batch what reaches them through an activation in the place of dy: X is the compute type.
template <class X> [[gnu::noinline]] void reach_batch(const Task& t, BackwardBatch<X>& batch) {
  const Geometry& g = t.geometry;
  const bool linear = weighs_elements(g);
  ParamBuffers<X> params;
  X* to = reinterpret_cast<X*>(batch.room);
  for (int k = 0; k < batch.rows; ++k, to += whole_vectors(g.run)) {
    const std::int64_t r = batch.first + k, parameter = g.parameter(g.outer == 1 ? 0 : r / g.lanes, r * g.run);
    for (std::int64_t begin = 0; begin < g.run; begin += kBuffer) {
      const Piece piece{begin, least(g.run - begin, kBuffer), linear ? begin : parameter, linear};
      const Preactivation<X> z = activation_input<X>(t, piece, given_statistic<X>(t, r), params);
      reach(t, z, batch.dy[k] + begin, batch.x[k] + begin, 0, piece.n, to + begin);
    }
    batch.dy[k] = to;
  }
}

template <class X>
[[gnu::noinline]] void begin_batch(const Task& t, std::int64_t first, std::int64_t end, BackwardBatch<X>& batch) {
  using S = ScalarOf<X>;
  using V = VectorOf<X>;
  const Geometry& g = t.geometry;
  batch.first = first, batch.rows = static_cast<int>(end - first);
  std::int64_t o = first / g.lanes, lane = first % g.lanes;
  for (int k = 0; k < batch.rows; ++k) {
    batch.x[k] = at<X>(t.x, o, 0, lane), batch.dy[k] = at<X>(t.dy, o, 0, lane), batch.dx[k] = at<X>(t.dx, o, 0, lane);
    if (t.kind == ParamKind::row)
      batch.row_sums[k] = reinterpret_cast<S*>(t.dparams + 2 * (o * row_groups(g) + lane / kRowGroup) * g.run);
    if (++lane == g.lanes) ++o, lane = 0;
  }
  if (asks_mask(t)) find_masks(t, first, batch.rows, batch.mask);
  given_statistics(t, first, batch.rows, batch.given);
  for (int k = 0; k < BackwardBatch<X>::kRows; ++k) batch.mean[k] = static_cast<S>(batch.given.mean[k]);
  if constexpr (__is_same(X, S))
    if (t.walk.forms_rows) reach_batch(t, batch);
  const V zero = broadcast<V>(S(0));
  for (int k = batch.rows; k < BackwardBatch<X>::kRows; ++k)
    batch.g[k] = batch.gx[k] = batch.d[k] = batch.members[k] = zero;
}

template <class X, bool kLinear, class Beside>
NORMKIT_LOCAL void sum_row(std::int64_t n, int k, const ScalarOf<X>* weight, Ahead ahead, Beside& beside,
                           BackwardBatch<X>& batch) {
  LaneSums<X> sums;
  add_segments<X, kLinear>(sums, batch.dy[k], 0, batch.x[k], 0, 1, n, batch.mean[k], weight, ahead, beside);
  const Sums<VectorOf<X>> s = sums.all();
  batch.g[k] = s.g, batch.gx[k] = s.gx, batch.d[k] = s.d;
}

/// The gradient that reaches x_hat: dy, times weights along the row, if there are any.
template <class X> struct Weighted {
  const ScalarOf<X>* weight;
  template <class P> NORMKIT_LOCAL VectorOf<X> operator()(P place, const X* dy, VectorOf<X>) const {
    return weight ? place.load(dy) * place.load(weight) : place.load(dy);
  }
};

/// sum_row() with a mask, which is fetched ahead and counts the members: only they have a part in the sum of x - mean.
template <class X>
[[gnu::noinline]] void sum_masked_row(std::int64_t n, int k, const ScalarOf<X>* weight, Ahead ahead,
                                      BackwardBatch<X>& batch) {
  using V = VectorOf<X>;
  Nothing alone;
  LaneSums<X> sums;
  V members = broadcast<V>(ScalarOf<X>(0));
  const char* const next = reinterpret_cast<const char*>(batch.mask[k]) + kBatchAhead;
  for (std::int64_t line = 0; line < n; line += 64) prefetch_first(next + line);
  add_segments<X, false>(sums, batch.dy[k], 0, batch.x[k], 0, 1, n, batch.mean[k], nullptr, ahead, alone,
                         Weighted<X>{weight}, Counted<V>{batch.mask[k], members});
  const Sums<V> s = sums.all();
  batch.g[k] = s.g, batch.gx[k] = s.gx, batch.d[k] = s.d, batch.members[k] = members;
}

/// Finds what solve() does, of all rows of a batch.
template <class X> [[gnu::noinline]] void solve_batch(const Task& t, BackwardBatch<X>& batch) {
  using S = ScalarOf<X>;
  constexpr int kRows = BackwardBatch<X>::kRows;
  alignas(64) S g[kRows], gx[kRows], d[kRows];
  alignas(64) double weight[kRows], shift[kRows];
  store(g, sums_of(batch.g)), store(gx, sums_of(batch.gx)), store(d, sums_of(batch.d));
  if (weighs_elements(t.geometry))
    for (double& w : weight) w = 1;
  else row_parameters(t, t.weight, batch.first, batch.rows, 1, weight);
  const auto sums = [&](int k) NORMKIT_INLINE_LAMBDA {
    return Sums<double>{static_cast<double>(g[k]), static_cast<double>(gx[k]), static_cast<double>(d[k])};
  };
  const auto& rstd = batch.given.rstd;
  const auto solve_row = [&](int k, double n, bool centered, Denominator denominator) NORMKIT_INLINE_LAMBDA {
    shift[k] = centered && n != 0 ? sums(k).d / n : 0;
    const Statistic<S> given = batch.given.template at<S>(k);
    const Solved<S> known = solved_of(given, {sums(k), n}, shift[k], weight[k], centered, denominator);
    batch.mean[k] = known.statistic.mean, batch.mean_low[k] = known.statistic.mean_low, batch.rstd[k] = rstd[k];
    batch.a[k] = static_cast<S>(rstd[k] * weight[k]), batch.b[k] = known.gradient.b, batch.c[k] = known.gradient.c;
  };
  if (asks_mask(t)) {
    alignas(64) S members[kRows];
    store(members, count_members(batch.members));
    for (int k = 0; k < batch.rows; ++k) solve_row(k, static_cast<double>(members[k]), t.centered, t.denominator);
  } else {
    solve_side_by_side(t, t.geometry.run, solve_row, kRows);
  }
  if (t.kind == ParamKind::statistic)
    for (int k = 0; k < batch.rows; ++k) put_dparams(t, batch.first + k, rstd[k], recenter(sums(k), shift[k]));
}

/// dx of elements [begin, end) of row k and, kSummed, what they add to the gradients of weights along rows.
template <class X, bool kLinear, bool kSummed>
[[gnu::noinline]] void write_row(const Task& t, const BackwardBatch<X>& batch, int k, std::int64_t begin,
                                 std::int64_t end, const ScalarOf<X>* weight, Streamer<X>* streamer) {
  using V = VectorOf<X>;
  const X *x = batch.x[k] + begin, *dy = batch.dy[k] + begin;
  if (kLinear) weight += begin;
  const V mean = broadcast<V>(batch.mean[k]), a = broadcast<V>(batch.a[k]);
  const V b = broadcast<V>(batch.b[k]), c = broadcast<V>(batch.c[k]);
  const FetchBoth fetch(x, dy, {t.walk, 0, t.walk.fetch_bytes});
  const ElementGradients<X> gradients(t, kSummed ? batch.row_sums[k] : nullptr, 0, begin, batch.statistic(k));
  map(batch.dx[k] + begin, end - begin, streamer, Fetch{}, [&](auto place) NORMKIT_INLINE_LAMBDA {
    fetch.far_line(place.i * static_cast<std::int64_t>(sizeof(X)));
    const V dy_v = place.load(dy), x_v = place.load(x);
    if constexpr (kSummed) gradients.add_row(place, dy_v, x_v);
    return backward(kLinear ? dy_v * place.load(weight) : dy_v, a, through_statistics(x_v, mean, b, c));
  });
}

/// write_row() of a whole row with a mask; a buffer of the row, since each loop of map() would be so long.
template <class X>
[[gnu::noinline]] void write_masked_row(const Task& t, const BackwardBatch<X>& batch, int k, const ScalarOf<X>* weight,
                                        Streamer<X>* streamer) {
  using V = VectorOf<X>;
  const X *x = batch.x[k], *dy = batch.dy[k];
  const std::uint8_t* mask = batch.mask[k];
  const V mean = broadcast<V>(batch.mean[k]), a = broadcast<V>(batch.a[k]);
  const V b = broadcast<V>(batch.b[k]), c = broadcast<V>(batch.c[k]);
  const FetchBoth fetch(x, dy, {t.walk, 0, t.walk.fetch_bytes});
  const bool summed = t.kind == ParamKind::row;
  const ElementGradients<X> gradients(t, summed ? batch.row_sums[k] : nullptr, 0, 0, batch.statistic(k));
  alignas(64) ScalarOf<X> value[kMaskedRun];
  for_positions<V>(t.geometry.run, [&](auto place) NORMKIT_INLINE_LAMBDA {
    fetch.far_line(place.i * static_cast<std::int64_t>(sizeof(X)));
    const V dy_v = place.load(dy), x_v = place.load(x);
    if (summed) gradients.add(place, dy_v, x_v);
    const V g = weight ? dy_v * place.load(weight) : dy_v;
    store(value + place.i, backward(g, a, place.where(mask, through_statistics(x_v, mean, b, c))));
  });
  put_all<X, ScalarOf<X>>(value, batch.dx[k], t.geometry.run, streamer, Fetch{});
}

/// Rows that are written side by side: with 4 their factors no longer fit the registers.
constexpr int kBackwardTile = 2;

/// A tile for a TileWriter. kSummed: gradients of weights along them are added up, in their order.
template <class X, bool kSummed> struct BackwardTile {
  using V = VectorOf<X>;
  using S = ScalarOf<X>;
  static constexpr int kRows = kBackwardTile;
  const X *x[kRows], *dy[kRows];
  X* dx[kRows];
  V mean[kRows], a[kRows], b[kRows], c[kRows], scale[kRows], shift[kRows];
  const S* weight;
  S *dweight, *dbias;

  template <class Store> NORMKIT_LOCAL void put(Full place, Store store) const {
    const V w = place.load(weight);
    V dw{}, db{};
    if constexpr (kSummed) dw = place.load(dweight), db = place.load(dbias);
    for (int k = 0; k < kRows; ++k) {
      const V dy_v = place.load(dy[k]), x_v = place.load(x[k]);
      if constexpr (kSummed) dw = mul_add(forward(x_v, mean[k], scale[k], shift[k]), dy_v, dw), db = db + dy_v;
      store(dx[k] + place.i, backward(dy_v * w, a[k], through_statistics(x_v, mean[k], b[k], c[k])));
    }
    if constexpr (kSummed) place.store(dweight, dw), place.store(dbias, db);
  }
};

/// Writes the rows of a tile, from row k of the batch on, while rows k and on of the next batch are summed.
template <class X, bool kSummed>
[[gnu::noinline]] void write_tile(const Task& t, int k, const BackwardBatch<X>& batch, BackwardBatch<X>& next,
                                  const ScalarOf<X>* weight, Streamer<X>* streamer) {
  using V = VectorOf<X>;
  using S = ScalarOf<X>;
  const Geometry& g = t.geometry;
  BackwardTile<X, kSummed> tile;
  tile.weight = weight;
  tile.dweight = kSummed ? batch.row_sums[k] : nullptr, tile.dbias = kSummed ? batch.row_sums[k] + g.run : nullptr;
  for (int j = 0; j < kBackwardTile; ++j) {
    const Affine<S> standard = forward_affine(batch.statistic(k + j), 1, 0);
    tile.x[j] = batch.x[k + j], tile.dy[j] = batch.dy[k + j], tile.dx[j] = batch.dx[k + j];
    tile.mean[j] = broadcast<V>(batch.mean[k + j]), tile.a[j] = broadcast<V>(batch.a[k + j]);
    tile.b[j] = broadcast<V>(batch.b[k + j]), tile.c[j] = broadcast<V>(batch.c[k + j]);
    tile.scale[j] = broadcast<V>(standard.scale), tile.shift[j] = broadcast<V>(standard.shift);
  }
  const Ahead ahead(t.walk, 2048, 2048 + kFarAhead);
  const auto write_part = [&](std::int64_t begin, std::int64_t end) {
    for (int j = k; j < k + kBackwardTile; ++j) write_row<X, true, kSummed>(t, batch, j, begin, end, weight, streamer);
  };
  write_beside(tile, tile.dx[0], g.run, streamer, write_part, [&](auto& writer) NORMKIT_INLINE_LAMBDA {
    for (int j = k; j < k + kBackwardTile && j < next.rows; ++j)
      sum_row<X, true>(g.run, j, weight, ahead, writer, next);
  });
}

/// True where the rows of a tile that begins with row k are in the batch, and add to the same sums.
template <class X> NORMKIT_LOCAL bool is_tile(const Task& t, int k, const BackwardBatch<X>& batch) {
  const int last = k + kBackwardTile - 1;
  return last < batch.rows && (t.kind != ParamKind::row || batch.row_sums[k] == batch.row_sums[last]);
}

/// Writes the rows of a batch while those of the next are summed; before the first there are none to write.
template <class X, bool kLinear, bool kSummed>
[[gnu::noinline]] void walk_batch(const Task& t, const ScalarOf<X>* weight, Streamer<X>* streamer,
                                  const BackwardBatch<X>& batch, BackwardBatch<X>& next) {
  const std::int64_t n = t.geometry.run;
  const int rows = batch.rows, next_rows = next.rows;
  const bool is_masked = asks_mask(t);
  Nothing alone;
  const Ahead ahead(t.walk, kBatchAhead, 0);
  for (int k = 0; k < rows || k < next_rows; ++k) {
    if constexpr (kWide && kLinear) {
      if (t.walk.tiled && is_tile(t, k, batch)) {
        write_tile<X, kSummed>(t, k, batch, next, weight, streamer);
        k += kBackwardTile - 1;
        continue;
      }
    }
    if (is_masked) {
      if (k < next_rows) sum_masked_row(n, k, weight, ahead, next);
      if (k < rows) write_masked_row(t, batch, k, weight, streamer);
      continue;
    }
    if (k < next_rows) sum_row<X, kLinear>(n, k, weight, ahead, alone, next);
    if (k < rows) write_row<X, kLinear, kSummed>(t, batch, k, 0, n, weight, streamer);
  }
}

/// A range counts fused_units().
template <class X>
void batches_backward(const Task& t, std::int64_t begin, std::int64_t end, double* scratch) {
  const RowParameter<ScalarOf<X>> weight(t.geometry, t.weight, 1);
  const bool summed = t.kind == ParamKind::row;
  const auto walk = weight.value ? (summed ? walk_batch<X, true, true> : walk_batch<X, true, false>)
                                 : (summed ? walk_batch<X, false, true> : walk_batch<X, false, false>);
  const std::int64_t rows = batch_rows(t.geometry, sizeof(X)), last = rows_of(t, end - 1).last;
  Streamer<X> streamer;
  BackwardBatch<X> batches[2], *batch = &batches[0], *next = &batches[1];
  batch->room = scratch, next->room = scratch + batch_doubles(t.geometry, sizeof(X));
  for (std::int64_t first = rows_of(t, begin).first; first < last || batch->rows > 0;) {
    begin_batch(t, least(first, last), least(last, first + rows), *next);
    walk(t, weight.value, t.walk.stream_stores ? &streamer : nullptr, *batch, *next);
    solve_batch(t, *next);
    first += next->rows;
    BackwardBatch<X>* const written = batch;
    batch = next, next = written;
  }
}

}  // namespace
}  // namespace normkit
