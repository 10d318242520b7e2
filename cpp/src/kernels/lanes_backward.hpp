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

NORMKIT_LOCAL void add_columns(double* into, const double* more, std::int64_t columns) {
  for (std::int64_t k = 0; k < 4 * columns; ++k) into[k] += more[k];
}

/// What is known of columns before the sums: their given mean, which sums are taken about, and the factors of z.
template <class S> struct Known { const S *mean, *scale, *shift; };

/// Adds the sums of one chunk of one tile to those of columns k and on.
template <class X, int kVectors, class Members>
[[gnu::noinline]] void add_tile(const Task& t, std::int64_t o, std::int64_t step, std::int64_t rows, std::int64_t k,
                                std::int64_t n, Known<ScalarOf<X>> known, Count<kVectors> vectors, Members members,
                                ColumnSums out) {
  using V = VectorOf<X>;
  using S = ScalarOf<X>;
  const Geometry& g = t.geometry;
  const bool by_column = constant_in_column(g), active = t.activation.kind != ActivationKind::none;
  ParamBuffer<S> weights, biases;
  const V zero = broadcast<V>(S(0)), one = broadcast<V>(S(1));
  V m[kVectors], count[kVectors];
  Sums<V> s[kVectors];
  for_vectors<V>(vectors, n, [&](int j, auto place) NORMKIT_INLINE_LAMBDA {
    m[j] = place.load(known.mean + k);
    s[j].g = s[j].gx = s[j].d = count[j] = zero;
  });
  for (std::int64_t row = step; row < step + rows; ++row, members.next_row()) {
    const X *x = at<X>(t.x, o, row, 0) + k, *dy = at<X>(t.dy, o, row, 0) + k;
    const std::int64_t parameter = by_column ? 0 : g.parameter(o, g.offset(o, row, 0, 0)) + k;
    const S* weight = by_column ? nullptr : weights.read(t.weight, parameter, n, 1);
    const S* bias = by_column || !active ? nullptr : biases.read(t.bias, parameter, n, 0);
    for_vectors<V>(vectors, n, [&](int j, auto place) NORMKIT_INLINE_LAMBDA {
      const V x_v = place.load(x);
      V d = x_v - m[j], dz = place.load(dy);
      if (active) {
        const Preactivation<X> z{m[j], place.load(known.scale + k), place.load(known.shift + k), weight, bias};
        dz = dz * slope_at(t.activation, z.at(place, x_v));
      }
      if (!by_column) dz = dz * place.load(weight);
      s[j].g = s[j].g + dz;
      if constexpr (Members::kAll) {
        s[j].gx = mul_add(dz, d, s[j].gx);
      } else {
        s[j].gx = mul_add(dz, where(dz, d), s[j].gx);
        d = members.only(place, d);
        count[j] = count[j] + members.only(place, one);
      }
      s[j].d = s[j].d + d;
    });
  }
  alignas(64) S lane[4][kVectors * kLanes<V>];
  for (int j = 0; j < kVectors; ++j) {
    store(lane[0] + j * kLanes<V>, s[j].g);
    store(lane[1] + j * kLanes<V>, s[j].gx);
    store(lane[2] + j * kLanes<V>, s[j].d);
    store(lane[3] + j * kLanes<V>, Members::kAll ? broadcast<V>(static_cast<S>(rows)) : count[j]);
  }
  double* const sums[] = {out.g, out.gx, out.d, out.n};
  for (int quantity = 0; quantity < 4; ++quantity)
    for (std::int64_t j = 0; j < n; ++j) sums[quantity][k + j] += static_cast<double>(lane[quantity][j]);
}

/// Sums over one span, as four arrays of columns in `out`.
template <class X>
void span_column_sums(const Task& t, std::int64_t o, std::int64_t span, Known<ScalarOf<X>> known, double* out) {
  const std::int64_t columns = t.geometry.columns(), begin = span_begin(span), end = span_end(t.geometry, span);
  for (std::int64_t k = 0; k < 4 * columns; ++k) out[k] = 0;
  for (std::int64_t step = begin; step < end; step += kChunkSteps)
    for_tiles<X>(columns, [&](auto vectors, std::int64_t k, std::int64_t n) {
      with_members(t, o, step, 0, k, [&](const auto& members) {
        add_tile<X>(t, o, step, least(kChunkSteps, end - step), k, n, known, vectors, members,
                    ColumnSums(out, columns));
      });
    });
}

/// Fills in what is known of the columns of one outer index.
template <class S> void know_columns(const Task& t, std::int64_t o, S* mean, S* scale, S* shift) {
  const Geometry& g = t.geometry;
  const bool active = t.activation.kind != ActivationKind::none;
  for (std::int64_t lane = 0; lane < g.lanes; ++lane) {
    const Statistic<S> s = given_statistic<S>(t, o * g.lanes + lane);
    for (std::int64_t k = lane * g.run; k < (lane + 1) * g.run; ++k) {
      mean[k] = s.mean;
      if (!active) continue;
      const Affine<S> affine = column_affine(t, o, k, s);
      scale[k] = affine.scale, shift[k] = affine.shift;
    }
  }
}

/// The weight of one column; where it has several, sums are taken with them.
NORMKIT_LOCAL double column_weight(const Task& t, std::int64_t o, std::int64_t k) {
  const Geometry& g = t.geometry;
  return constant_in_column(g) ? element(t.weight, g.parameter(o, g.offset(o, 0, 0, k)), 1) : 1;
}

/// The sums of a statistic from those of its columns, times their weights; the count is that of its members.
NORMKIT_LOCAL Reduced fold_column_sums(const Task& t, std::int64_t o, std::int64_t lane, ColumnSums columns) {
  const Geometry& g = t.geometry;
  if (t.phase == Phase::apply) return given_sums(t, o * g.lanes + lane);
  Reduced total;
  for (std::int64_t k = lane * g.run; k < (lane + 1) * g.run; ++k) {
    const double w = column_weight(t, o, k);
    const Reduced column = columns.at(k);
    total = total + Reduced{{w * column.sums.g, w * column.sums.gx, column.sums.d}, column.n};
  }
  return total;
}

/// From the sums of columns to statistics, their gradients and the parameters', and to the table that apply reads.
template <class S> void lanes_solve(const Task& t, std::int64_t o, ColumnSums column_sums, Table<S> table) {
  const Geometry& g = t.geometry;
  for (std::int64_t lane = 0; lane < g.lanes; ++lane) {
    const std::int64_t r = o * g.lanes + lane;
    const Reduced reduced = fold_column_sums(t, o, lane, column_sums);
    if (t.phase == Phase::reduce) {
      put_sums(t, r, reduced.sums, 1);
      continue;
    }
    Statistic<S> s = given_statistic<S>(t, r);
    const double shift = mean_shift(t, s, reduced.sums.d, reduced.n);
    if (t.centered && !t.frozen) s = statistic_of<S>(static_cast<double>(s.mean) + shift, s.rstd);
    const Sums<double> sums = recenter(reduced.sums, shift);
    const Gradient<S> gradient = t.frozen ? Gradient<S>{0, 0, 0} : gradient_of(s, sums, reduced.n, t.centered);
    const Affine<S> standard = forward_affine(s, 1, 0);
    for (std::int64_t k = lane * g.run; k < (lane + 1) * g.run; ++k) {
      table.mean[k] = s.mean, table.a[k] = static_cast<S>(s.rstd * column_weight(t, o, k));
      table.b[k] = gradient.b, table.c[k] = gradient.c;
      table.unit[k] = standard.scale, table.origin[k] = standard.shift;
      if (t.kind != ParamKind::column) continue;
      double* d = t.dparams + 2 * (o * g.columns() + k);
      d[0] = s.rstd * mul_add(-shift, column_sums.g[k], column_sums.gx[k]), d[1] = column_sums.g[k];
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
  const bool active = t.activation.kind != ActivationKind::none;
  ParamBuffer<S> weights, biases;
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
      const X* residual = t.residual.data ? at<X>(t.residual, o, step, 0) + k : nullptr;
      X* dx = t.dx.data ? at<X>(t.dx, o, step, 0) + k : nullptr;
      const std::int64_t offset = g.offset(o, step, 0, 0);
      const S* weight = by_column ? nullptr : weights.read(t.weight, g.parameter(o, offset) + k, n, 1);
      const S* bias = by_column || !active ? nullptr : biases.read(t.bias, g.parameter(o, offset) + k, n, 0);
      with_members(t, o, step, 0, k, [&](const auto& members) NORMKIT_INLINE_LAMBDA {
        for_vectors<V>(vectors, n, [&](int j, auto place) NORMKIT_INLINE_LAMBDA {
          const V x_v = place.load(x);
          V dz = place.load(dy);
          if (active) {
            const Preactivation<X> z{place.load(table.z_mean + k), place.load(table.z_scale + k),
                                     place.load(table.z_shift + k), weight, bias};
            dz = dz * slope_at(t.activation, z.at(place, x_v));
          }
          if (t.dweight_out) {
            const V x_hat = forward(x_v, mean[j], place.load(table.unit + k), place.load(table.origin + k));
            place.store(at<S>(t.dweight_out, offset + k), dz * (t.where.data ? where(dz, x_hat) : x_hat));
          }
          if (t.dbias_out) place.store(at<S>(t.dbias_out, offset + k), dz);
          if (!dx) return;
          const V through = members.only(place, through_statistics(x_v, mean[j], b[j], c[j]));
          V v = backward(by_column ? dz : dz * place.load(weight), a[j], through);
          if (residual) v = v + place.load(residual);
          put(place, dx, v, streaming);
        });
      });
    }
  });
}

/// What is known, of the columns that a table describes.
template <class S> NORMKIT_LOCAL Known<S> know(const Task& t, std::int64_t o, Table<S> table) {
  know_columns(t, o, table.z_mean, table.z_scale, table.z_shift);
  return {table.z_mean, table.z_scale, table.z_shift};
}

template <class X> void lanes_backward(const Task& t, std::int64_t begin, std::int64_t end, double* scratch) {
  const Geometry& g = t.geometry;
  const Chunks c = chunks_of(g, Traversal::lanes);
  const std::int64_t columns = g.columns();
  double *sums = scratch, *part = sums + 4 * columns;
  const Table<ScalarOf<X>> table(scratch + 8 * columns, columns);
  for (std::int64_t o = begin; o < end; ++o) {
    const Known<ScalarOf<X>> known = know(t, o, table);
    for (std::int64_t span = 0; span < (t.phase == Phase::apply ? 0 : c.spans); ++span) {
      span_column_sums<X>(t, o, span, known, span == 0 ? sums : part);
      if (span > 0) add_columns(sums, part, columns);
    }
    lanes_solve(t, o, ColumnSums(sums, columns), table);
    if (t.phase != Phase::reduce && (t.dx.data || t.kind == ParamKind::element))
      lanes_backward_steps<X>(t, o, 0, g.steps, table);
  }
}

template <class X> void lanes_backward_sums(const Task& t, std::int64_t begin, std::int64_t end) {
  using S = ScalarOf<X>;
  const std::int64_t columns = t.geometry.columns();
  const Chunks c = chunks_of(t.geometry, Traversal::lanes);
  for (std::int64_t unit = begin; unit < end; ++unit) {
    double* out = t.partials + 7 * columns * unit;
    S *mean = reinterpret_cast<S*>(out + 4 * columns), *scale = mean + columns, *shift = scale + columns;
    know_columns(t, unit / c.spans, mean, scale, shift);
    span_column_sums<X>(t, unit / c.spans, unit % c.spans, Known<S>{mean, scale, shift}, out);
  }
}

template <class X> void lanes_backward_finish(const Task& t, std::int64_t begin, std::int64_t end) {
  const Geometry& g = t.geometry;
  const Chunks c = chunks_of(g, Traversal::lanes);
  const std::int64_t columns = g.columns();
  for (std::int64_t o = begin; o < end; ++o) {
    double* sums = t.partials + 7 * columns * o * c.spans;
    for (std::int64_t span = 1; span < (t.phase == Phase::apply ? 0 : c.spans); ++span)
      add_columns(sums, sums + 7 * columns * span, columns);
    const Table<ScalarOf<X>> table(t.solved + kTableColumns * columns * o, columns);
    know(t, o, table);
    lanes_solve(t, o, ColumnSums(sums, columns), table);
  }
}

template <class X> void lanes_backward_apply(const Task& t, std::int64_t begin, std::int64_t end) {
  const Geometry& g = t.geometry;
  const Chunks c = chunks_of(g, Traversal::lanes);
  for (std::int64_t unit = end; unit-- > begin;) {
    const std::int64_t o = unit / c.spans, span = unit % c.spans;
    lanes_backward_steps<X>(t, o, span_begin(span), span_end(g, span),
                            Table<ScalarOf<X>>(t.solved + kTableColumns * g.columns() * o, g.columns()));
  }
}

}  // namespace
}  // namespace normkit
