// The gradient of a backward. Plans walk its arrays statistic by statistic, so that each is one run; all is in double,
// whatever the arrays hold, a buffer at a time.
#pragma once

namespace normkit {
namespace {

/// Sums over a part of a statistic, and its members.
struct SecondReduced {
  SecondSums<double> sums{0, 0, 0, 0, 0, 0, 0, 0};
  double n = 0;
};
NORMKIT_LOCAL SecondReduced operator+(SecondReduced a, SecondReduced b) { return {a.sums + b.sums, a.n + b.n}; }
static_assert(sizeof(SecondReduced) == kSecondDoubles * sizeof(double));
static_assert(sizeof(SecondGradient<double>) <= kSecondDoubles * sizeof(double));

/// The doubles of entry k of Task::partials or of Task::solved.
template <class T> NORMKIT_LOCAL T* second_entry(double* entries, std::int64_t k) {
  return reinterpret_cast<T*>(entries + kSecondDoubles * k);
}

/// Writes n doubles as elements of a floating dtype, to a half type by way of float.
[[gnu::noinline]] void write_doubles(const double* from, std::int64_t n, std::byte* to, Dtype dtype) {
  alignas(64) float rounded[kBuffer];
  if (dtype == Dtype::float64) return copy(from, n, at<double>(to, 0));
  float* const single = dtype == Dtype::float32 ? at<float>(to, 0) : rounded;
  for (std::int64_t i = 0; i < n; ++i) single[i] = static_cast<float>(from[i]);
  if (dtype == Dtype::float16) put_all(single, at<Half>(to, 0), n, kPlain<Half>, Fetch{});
  if (dtype == Dtype::bfloat16) put_all(single, at<Bfloat>(to, 0), n, kPlain<Bfloat>, Fetch{});
}

/// The elements of a piece, as doubles: where they lie, if they are doubles, else in a buffer. What is not there is zeros.
class SecondElements {
 public:
  const double *x, *dy, *v;

  SecondElements(const Task& t, std::int64_t o, std::int64_t lane, Piece piece)
      : x(read(t.x, o, lane, piece, 0)), dy(read(t.dy, o, lane, piece, 1)), v(read(t.ddx, o, lane, piece, 2)) {}

 private:
  const double* read(const Operand& a, std::int64_t o, std::int64_t lane, Piece piece, int k) {
    const std::int64_t index = index_at(a, o, 0, lane) + piece.begin;
    if (a.data && a.dtype == Dtype::float64) return at<double>(a.data, index);
    if (a.data) read_doubles(a.data + index * size_of(a.dtype), a.dtype, piece.n, room_[k]);
    else for_positions<F64>(piece.n, [&](auto place) NORMKIT_INLINE_LAMBDA {
      store(room_[k] + place.i, broadcast<F64>(0.0));
    });
    return room_[k];
  }
  alignas(64) double room_[3][kBuffer];
};

/// A parameter of a piece: one for all its elements, or one for each.
struct Factor {
  F64 one;
  const double* each = nullptr;

  Factor(const Param& p, Piece piece, double absent, ParamBuffer<double>& buffer)
      : one(broadcast<F64>(piece.linear ? absent : element(p, piece.parameter, absent))) {
    if (piece.linear && p.data) each = buffer.read(p, piece.parameter, piece.n, absent);
  }
  template <class P> NORMKIT_LOCAL F64 at(P place) const { return each ? place.load(each) : one; }
};

/// The sums over a piece. kWeighted: parameters follow the elements; else dy stands for g and for q.
template <bool kWeighted, class Members>
[[gnu::noinline]] SecondSums<double> second_piece_sums(const SecondElements& a, std::int64_t n, double mean, Factor weight,
                                                       Factor ddweight, Members members) {
  const F64 m = broadcast<F64>(mean), zero = broadcast<F64>(0.0);
  SecondSums<F64> s{zero, zero, zero, zero, zero, zero, zero, zero};
  for_positions<F64>(n, [&](auto place) NORMKIT_INLINE_LAMBDA {
    const F64 dy = place.load(a.dy), v = place.load(a.v), d = place.load(a.x) - m;
    const F64 g = kWeighted ? dy * weight.at(place) : dy, of_v = members.only(place, v);
    // What is no member may be NaN, where no gradient reaches it.
    const auto times = [&](F64 f, F64 total) NORMKIT_INLINE_LAMBDA {
      return mul_add(f, Members::kAll ? d : where(f, d), total);
    };
    s.v = s.v + of_v, s.g = s.g + g, s.d = s.d + members.keep(place, d);
    s.vd = times(of_v, s.vd), s.gd = times(g, s.gd), s.vg = mul_add(v, g, s.vg);
    if constexpr (kWeighted) {
      const F64 q = dy * ddweight.at(place);
      s.q = s.q + q, s.qd = times(q, s.qd);
    }
  });
  SecondSums<double> sums{sum(s.v), sum(s.vd), sum(s.g), sum(s.gd), sum(s.vg), sum(s.q), sum(s.qd), sum(s.d)};
  if constexpr (!kWeighted) sums.q = sums.g, sums.qd = sums.gd;
  return sums;
}

/// Sums in which dy stands for g and for q, times the weight and ddweight that all their elements share.
NORMKIT_LOCAL SecondSums<double> second_weighted(const Task& t, std::int64_t parameter, SecondSums<double> s) {
  const double weight = element(t.weight, parameter, 1), ddweight = element(t.ddweight, parameter, 0);
  return {s.v, s.vd, weight * s.g, weight * s.gd, weight * s.vg, ddweight * s.q, ddweight * s.qd, s.d};
}

/// Calls f(piece) for the pieces of a span of a statistic.
template <class F>
NORMKIT_LOCAL void for_second_pieces(const Task& t, std::int64_t o, std::int64_t lane, std::int64_t span, F f) {
  const Geometry& g = t.geometry;
  const std::int64_t begin = span * kSpanChunks * kChunk;
  for_pieces(t, o, g.offset(o, 0, lane, 0), begin, least(g.run, begin + kSpanChunks * kChunk), kBuffer, f);
}

/// The sums over a span of a statistic. Where the statistic has one parameter, they are to be weighted yet.
SecondReduced second_span_sums(const Task& t, std::int64_t o, std::int64_t lane, std::int64_t span, double mean) {
  const bool shares = constant_in_statistic(t.geometry);
  ParamBuffers<double> params;
  SecondReduced total;
  if (t.frozen && t.kind != ParamKind::statistic) return total;
  for_second_pieces(t, o, lane, span, [&](Piece piece) {
    const SecondElements elements(t, o, lane, piece);
    with_members(t, o, 0, lane, piece.begin, [&](auto members) {
      SecondReduced part;
      part.n = members.count(1, piece.n);
      const Factor weight(t.weight, piece, 1, params.weights), ddweight(t.ddweight, piece, 0, params.biases);
      if (piece.linear && !shares)
        part.sums = second_piece_sums<true>(elements, piece.n, mean, weight, ddweight, members);
      else part.sums = second_piece_sums<false>(elements, piece.n, mean, weight, ddweight, members);
      if (!piece.linear && !shares) part.sums = second_weighted(t, piece.parameter, part.sums);
      total = total + part;
    });
  });
  return total;
}

/// Makes of the sums of a whole statistic the coefficients of its elements, and its share of d_weight.
SecondGradient<double> second_solve(const Task& t, std::int64_t r, SecondReduced reduced) {
  const Geometry& g = t.geometry;
  const std::int64_t o = r / g.lanes, lane = r % g.lanes;
  const Statistic<double> s = given_statistic<double>(t, r);
  const double shift = mean_shift(t, s, reduced.sums.d, reduced.n);
  SecondSums<double> sums = recenter(reduced.sums, shift);
  if (t.kind == ParamKind::statistic)
    t.dparams[2 * r] = second_dweight(s.rstd, sums, reduced.n, t.centered, t.frozen);
  if (constant_in_statistic(g)) sums = second_weighted(t, g.parameter(o, g.offset(o, 0, lane, 0)), sums);
  return second_gradient_of(s.rstd, shift, sums, t.frozen ? 0 : reduced.n, t.centered);
}

/// Where the terms of d_weight go, dy * rp: added up over a piece, or over rows, or one for each element of x.
void put_second_terms(const Task& t, std::int64_t o, std::int64_t lane, Piece piece, const double* terms) {
  const Geometry& g = t.geometry;
  const std::int64_t offset = g.offset(o, 0, lane, piece.begin);
  if (t.kind == ParamKind::piece) {
    F64 all = broadcast<F64>(0.0);
    for_positions<F64>(piece.n, [&](auto place) NORMKIT_INLINE_LAMBDA { all = all + place.load(terms); });
    t.dparams[2 * (offset / g.params.stride)] += sum(all);
  } else if (t.kind == ParamKind::row) {
    double* const sums = t.dparams + 2 * (o * row_groups(g) + lane / kRowGroup) * g.run + piece.begin;
    for_positions<F64>(piece.n, [&](auto place) NORMKIT_INLINE_LAMBDA {
      place.store(sums, place.load(static_cast<const double*>(sums)) + place.load(terms));
    });
  } else if (t.dweight_out) {
    const Dtype dtype = compute_dtype(t.x.dtype);
    write_doubles(terms, piece.n, t.dweight_out + offset * size_of(dtype), dtype);
  }
}

/// d_dy and d_x of a span of a statistic, and terms of d_weight where solving it has not added them up.
void second_apply_span(const Task& t, std::int64_t r, std::int64_t span, const SecondGradient<double>& known) {
  const std::int64_t o = r / t.geometry.lanes, lane = r % t.geometry.lanes;
  const F64 mean = broadcast<F64>(given_statistic<double>(t, r).mean);
  const SecondGradient<F64> k{broadcast<F64>(known.rstd),     broadcast<F64>(known.origin), broadcast<F64>(known.along),
                              broadcast<F64>(known.constant), broadcast<F64>(known.v),      broadcast<F64>(known.g),
                              broadcast<F64>(known.x),        broadcast<F64>(known.c)};
  const bool adds = t.kind == ParamKind::piece || t.kind == ParamKind::row || t.kind == ParamKind::element;
  ParamBuffers<double> params;
  alignas(64) double of_dy[kBuffer], of_x[kBuffer], terms[kBuffer];
  for_second_pieces(t, o, lane, span, [&](Piece piece) {
    const SecondElements a(t, o, lane, piece);
    const Factor weight(t.weight, piece, 1, params.weights), ddweight(t.ddweight, piece, 0, params.biases),
        ddbias(t.ddbias, piece, 0, params.slopes);
    const Masked members = members_at(t, o, 0, lane, piece.begin);
    for_positions<F64>(piece.n, [&](auto place) NORMKIT_INLINE_LAMBDA {
      const F64 dy = place.load(a.dy), v = place.load(a.v), w = weight.at(place), ddw = ddweight.at(place);
      const F64 x_hat = forward(place.load(a.x), mean, k.rstd, k.origin);
      F64 rp = v * k.rstd, d_dy = ddbias.at(place), d_x = dy * (ddw * k.rstd);
      if (t.ddweight.data) d_dy = mul_add(ddw, x_hat, d_dy);
      if (!t.frozen) {
        rp = rp + mul_add(x_hat, k.along, k.constant);
        d_x = mul_add(dy, w * k.g, d_x) + members.only(place, mul_add(v, k.v, mul_add(x_hat, k.x, k.c)));
      }
      store(of_dy + place.i, mul_add(w, rp, d_dy)), store(of_x + place.i, d_x);
      if (adds) store(terms + place.i, t.where.data ? where(dy, dy * rp) : dy * rp);
    });
    const auto put = [&](const Operand& out, const double* values) {
      const std::int64_t index = index_at(out, o, 0, lane) + piece.begin;
      write_doubles(values, piece.n, out.data + index * size_of(out.dtype), out.dtype);
    };
    put(t.d_dy, of_dy), put(t.dx, of_x);
    if (adds) put_second_terms(t, o, lane, piece, terms);
  });
}

void second_sums(const Task& t, std::int64_t begin, std::int64_t end, double*) {
  const std::int64_t spans = chunks_of(t.geometry, Traversal::runs).spans, lanes = t.geometry.lanes;
  for (std::int64_t unit = begin; unit < end; ++unit) {
    const std::int64_t r = unit / spans;
    *second_entry<SecondReduced>(t.partials, unit) =
        second_span_sums(t, r / lanes, r % lanes, unit % spans, given_statistic<double>(t, r).mean);
  }
}

void second_finish(const Task& t, std::int64_t begin, std::int64_t end) {
  const std::int64_t spans = chunks_of(t.geometry, Traversal::runs).spans;
  for (std::int64_t r = begin; r < end; ++r) {
    SecondReduced reduced;
    for (std::int64_t unit = r * spans; unit < (r + 1) * spans; ++unit)
      reduced = reduced + *second_entry<SecondReduced>(t.partials, unit);
    *second_entry<SecondGradient<double>>(t.solved, r) = second_solve(t, r, reduced);
  }
}

void second_apply(const Task& t, std::int64_t begin, std::int64_t end) {
  const std::int64_t spans = chunks_of(t.geometry, Traversal::runs).spans;
  for (std::int64_t unit = begin; unit < end; ++unit) {
    const Rows rows = rows_of(t, unit / spans);
    for (std::int64_t r = rows.first; r < rows.last; ++r)
      second_apply_span(t, r, unit % spans, *second_entry<SecondGradient<double>>(t.solved, r));
  }
}

void second_fused(const Task& t, std::int64_t begin, std::int64_t end, double*) {
  const std::int64_t spans = chunks_of(t.geometry, Traversal::runs).spans, lanes = t.geometry.lanes;
  for (std::int64_t unit = begin; unit < end; ++unit) {
    const Rows rows = rows_of(t, unit);
    for (std::int64_t r = rows.first; r < rows.last; ++r) {
      const double mean = given_statistic<double>(t, r).mean;
      SecondReduced reduced;
      for (std::int64_t span = 0; span < spans; ++span)
        reduced = reduced + second_span_sums(t, r / lanes, r % lanes, span, mean);
      const SecondGradient<double> known = second_solve(t, r, reduced);
      for_spans(t, 0, spans, [&](std::int64_t span) { second_apply_span(t, r, span, known); });
    }
  }
}

}  // namespace
}  // namespace normkit
