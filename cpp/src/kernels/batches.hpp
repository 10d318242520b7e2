// The runs traversal where a statistic is one short run: rows go in batches, as many as a vector has lanes at most, so
// that what is done once a row (folding its sums, square roots, divisions) is done in vectors too.
//
//     rows -> two sums of each, in vectors -> a vector of all rows' sums -> moments, scale and shift of each -> outputs
//
// With a mask, members are counted along with the sums; all elements are written. Given statistics are read in the place of sums. x + residual is formed where a batch begins, and an activation applied as its
// rows are written.
//
// While one batch is written the next is summed, and a later one fetched: memory is never idle. Rows of whole lines of memory are
// written side by side, so that what they share is read once; others row by row, and the outputs of short ones are put together
// to whole lines first.
#pragma once

namespace normkit {
namespace {

/// Bytes that fetches into the first-level cache run ahead while rows are summed. Runs of 196, arrays beyond the caches: 0.7 of the
/// time without; 8 KB ahead, arrays in the second-level cache: 1.15 (Zen 4).
constexpr std::int64_t kBatchAhead = 2048;

/// Parameters along a row, the same for all rows, in the compute type: read where they lie, or converted once for all rows.
template <class S> struct RowParameter {
  const S* value = nullptr;  // null: none that vary
  alignas(64) S converted[kChunk];

  [[gnu::noinline]] RowParameter(const Geometry& g, const Param& p, S absent) {
    if (!weighs_elements(g)) return;
    value = converted;
    if (ParamBuffer<S>::reads_in_place(p)) value = at<S>(p.data, 0);
    else
      for (std::int64_t i = 0; i < g.run; ++i) converted[i] = static_cast<S>(element(p, i, absent));
  }
};

/// The rows of one batch, where they are read and written, and what is known of them, whatever type they are stored in.
template <class Vector> struct Batch {
  using V = Vector;
  using S = typename V::Lane;
  static constexpr int kRows = kLanes<V>;
  static_assert(kRows == kMostBatchRows || sizeof(S) == 8);
  std::int64_t first = 0;  // statistic
  int rows = 0;  // up to kRows
  double* room = nullptr;  // for the rows, where they are formed
  const std::byte* x[kRows];
  std::byte* y[kRows];
  const std::uint8_t* mask[kRows];  // where there is one
  V sum[kRows], squares[kRows];  // of each row, about its pivot
  V members[kRows];  // of each row with a mask, counted in each lane
  alignas(64) S pivot[kRows];
  alignas(64) S mean[kRows], scale[kRows], shift[kRows];
};
template <class X> using BatchOf = Batch<VectorOf<X>>;

/// Forms x + residual of the rows of a batch.
template <class X> [[gnu::noinline]] void form_batch(const Task& t, BatchOf<X>& batch) {
  const Geometry& g = t.geometry;
  X* room = reinterpret_cast<X*>(batch.room);
  for (int k = 0; k < batch.rows; ++k, room += whole_vectors(g.run)) {
    const std::int64_t r = batch.first + k, o = r / g.lanes, lane = r - o * g.lanes;
    X* const x = t.walk.forms_rows ? room : at<X>(t.x, o, 0, lane);
    form_row(at<X>(t.source, o, 0, lane), at<X>(t.residual, o, 0, lane), g.run, x);
    batch.x[k] = reinterpret_cast<const std::byte*>(x);
  }
}

/// True where a mask says which elements of a row are summed.
NORMKIT_LOCAL bool asks_mask(const Task& t) { return kWide && t.where.data && !t.frozen; }

/// How many members rows have, from what was counted in each lane.
template <class V> [[gnu::noinline]] V count_members(const V (&members)[kLanes<V>]) { return sums_of(members); }

/// The first_pivot() of each row of a batch with a mask, whose first vectors are in `sum`.
template <class V> [[gnu::noinline]] void find_masked_pivots(const Task& t, int n, Batch<V>& batch) {
  using S = typename V::Lane;
  const Part begin{0, n};
  for (int k = 0; k < batch.rows; ++k) {
    batch.members[k] = begin.where(batch.mask[k], broadcast<V>(S(1)));
    batch.sum[k] = where(batch.members[k], batch.sum[k]);
  }
  alignas(64) S members[kLanes<V>];
  const V counts = count_members(batch.members);
  store(members, counts), store(batch.pivot, sums_of(batch.sum) * (broadcast<V>(S(1)) / counts));
  for (int k = 0; k < batch.rows; ++k)
    if (members[k] == 0)
      batch.pivot[k] =
          static_cast<S>(first_member({batch.x[k], t.x.dtype, 1, 0, t.geometry.run}, Masked{batch.mask[k], 0, false}));
}

/// Statistics [first, end): where they lie, and a pivot of each, the mean of its first vector.
template <class X>
[[gnu::noinline]] void begin_batch(const Task& t, std::int64_t first, std::int64_t end, BatchOf<X>& batch) {
  using V = VectorOf<X>;
  using S = ScalarOf<X>;
  constexpr int kWidth = kLanes<V>, kRows = BatchOf<X>::kRows;
  const Geometry& g = t.geometry;
  const int n = static_cast<int>(least(g.run, kWidth));
  const V zero = broadcast<V>(S(0));
  batch.first = first, batch.rows = static_cast<int>(end - first);
  if (batch.rows < kRows)
    for (int k = 0; k < kRows; ++k) batch.sum[k] = batch.squares[k] = batch.members[k] = zero;
  const std::int64_t y_bytes = size_of(t.y.dtype);
  std::int64_t o = first / g.lanes, lane = first % g.lanes;
  for (int k = 0; k < batch.rows; ++k) {
    batch.x[k] = reinterpret_cast<const std::byte*>(at<X>(t.x, o, 0, lane));
    batch.y[k] = t.y.data + index_at(t.y, o, 0, lane) * y_bytes;
    if (++lane == g.lanes) ++o, lane = 0;
  }
  if constexpr (kFloating<X>)
    if (t.residual.data) form_batch<X>(t, batch);
  if (asks_mask(t)) find_masks(t, first, batch.rows, batch.mask);
  if (!t.centered || t.frozen) return store(batch.pivot, zero);
  for (int k = 0; k < batch.rows; ++k) {
    const X* x = at<X>(batch.x[k], 0);
    batch.sum[k] = n == kWidth ? load(x) : load(x, n);
  }
  if (asks_mask(t)) return find_masked_pivots(t, n, batch);
  store(batch.pivot, sums_of(batch.sum) * broadcast<V>(S(1) / static_cast<S>(n)));
}

/// Calls f(k, position) for the vectors of a row of n elements; only the last may be less than whole.
template <class V, int kVectors, class F> NORMKIT_LOCAL void for_row(Count<kVectors>, std::int64_t n, F f) {
  constexpr int kWidth = kLanes<V>, kLast = (kVectors - 1) * kWidth;
  for (int k = 0; k + 1 < kVectors; ++k) f(k, Full{k * kWidth});
  const int left = static_cast<int>(n) - kLast;
  left == kWidth ? f(kVectors - 1, Full{kLast}) : f(kVectors - 1, Part{kLast, left});
}

/// The sums of row k of a batch: by pivot_sums(), or in its order where the compiler knows the number of a row's
/// vectors.
template <class X, int kVectors, class Beside>
NORMKIT_LOCAL void sum_row(Count<kVectors> vectors, std::int64_t n, int k, Fetch fetch, Beside& beside,
                           BatchOf<X>& batch) {
  using V = VectorOf<X>;
  using S = ScalarOf<X>;
  const X* x = at<X>(batch.x[k], 0);
  if constexpr (kVectors == 0) {
    const DifferenceSums<V> sums = pivot_sums(x, 1, 0, n, batch.pivot[k], Everyone{}, fetch, beside);
    batch.sum[k] = sums.sum, batch.squares[k] = sums.squares;
  } else {
    const V zero = broadcast<V>(S(0)), p = broadcast<V>(batch.pivot[k]);
    V s[4] = {zero, zero, zero, zero}, q[4] = {zero, zero, zero, zero};
    for_row<V>(vectors, n, [&](int j, auto place) NORMKIT_INLINE_LAMBDA {
      const int part = decltype(place)::kWhole ? j % 4 : 3;
      const V d = place.keep(place.load(x) - p);
      s[part] = s[part] + d;
      q[part] = mul_add(d, d, q[part]);
    });
    batch.sum[k] = (s[0] + s[1]) + (s[2] + s[3]), batch.squares[k] = (q[0] + q[1]) + (q[2] + q[3]);
  }
}

/// sum_row() with a mask, which counts the members. In a row of kMaskedRun elements at most no short sum of pivot_sums() ends before
/// the row does: these are its sums without those it would add them to.
template <class X> [[gnu::noinline]] void sum_masked_row(std::int64_t n, int k, Fetch fetch, BatchOf<X>& batch) {
  using V = VectorOf<X>;
  constexpr int kWidth = kLanes<V>;
  const V p = broadcast<V>(batch.pivot[k]), zero = broadcast<V>(ScalarOf<X>(0));
  const X* x = at<X>(batch.x[k], 0);
  V s[4] = {zero, zero, zero, zero}, q[4] = {zero, zero, zero, zero}, members = zero;
  const Counted<V> own{batch.mask[k], members};
  const auto add = [&](V& sum, V& squares, auto place) NORMKIT_INLINE_LAMBDA {
    const V d = own.keep(place, place.load(x) - p);
    sum = sum + d;
    squares = mul_add(d, d, squares);
  };
  std::int64_t i = 0;
  for (; i + 4 * kWidth <= n; i += 4 * kWidth) {
    fetch.template block<4 * kWidth * sizeof(X)>(i * static_cast<std::int64_t>(sizeof(X)));
    for (int j = 0; j < 4; ++j) add(s[j], q[j], Full{i + j * kWidth});
  }
  if (i + kWidth <= n) add(s[0], q[0], Full{i}), i += kWidth;
  if (i + kWidth <= n) add(s[1], q[1], Full{i}), i += kWidth;
  if (i + kWidth <= n) add(s[2], q[2], Full{i}), i += kWidth;
  if (i < n) add(s[3], q[3], Part{i, static_cast<int>(n - i)});
  batch.sum[k] = (s[0] + s[1]) + (s[2] + s[3]), batch.squares[k] = (q[0] + q[1]) + (q[2] + q[3]);
  batch.members[k] = members;
}

/// The parameters of the rows of a batch, in `buffer` unless they are read where they lie.
template <int kRows>
NORMKIT_LOCAL void row_parameters(const Task& t, const Param& p, std::int64_t first, int rows, double absent,
                                  double (&values)[kRows]) {
  const Geometry& g = t.geometry;
  const bool in_turn = g.outer == 1 || g.params.outer == 0;
  CyclicIndex index(first * g.run, g.params.stride, g.params.count, g.run);
  if (in_turn && g.params.stride == g.run && *index + kRows <= g.params.count && p.data && p.dtype == Dtype::float32) {
    const float* from = at<float>(p.data, *index);
    for (int k = 0; k < kRows; ++k) values[k] = p.offset + static_cast<double>(from[k]);
    return;
  }
  for (int k = 0; k < kRows; ++k) values[k] = absent;
  for (int k = 0; p.data && k < rows; ++k, index.next())
    values[k] = element(p, in_turn ? *index : g.parameter((first + k) / g.lanes, (first + k) * g.run), absent);
}

/// The statistics of the rows of a batch from their sums. A row whose sums do not hold its moments is summed once more by itself.
template <class V>
[[gnu::noinline]] void found_statistics(const Task& t, const Batch<V>& batch, RowStatistics<Batch<V>::kRows>& found) {
  using S = typename V::Lane;
  constexpr int kRows = Batch<V>::kRows;
  auto& [mean, low, rstd] = found;
  alignas(64) S sums[kRows], squares[kRows];
  alignas(64) double n[kRows], m2[kRows], variance[kRows];
  // Without a mean, pivots are 0, and so are sums, as far as moments go: no loop need ask, and all become vectors.
  store(sums, t.centered ? sums_of(batch.sum) : broadcast<V>(S(0))), store(squares, sums_of(batch.squares));
  const bool is_masked = asks_mask(t), is_norm = t.denominator.is_norm;
  int unsettled = 0;
  const auto settle = [&](auto members) NORMKIT_INLINE_LAMBDA {
    for (int k = 0; k < kRows; ++k) {
      const double s = static_cast<double>(sums[k]), q = static_cast<double>(squares[k]);
      const Moments<S> m = from_pivot_of_some<S>(static_cast<double>(batch.pivot[k]), s, q, members(k));
      mean[k] = m.mean, low[k] = low_of(m), m2[k] = m.m2;
      unsettled += trustworthy<S>(s, q, members(k)) ? 0 : 1;
    }
  };
  const double run = static_cast<double>(t.geometry.run);
  for (double& of_row : n) of_row = run;
  if (is_masked) {
    alignas(64) S members[kRows];
    alignas(64) double some[kRows];
    store(members, count_members(batch.members));
    for (int k = 0; k < kRows; ++k) n[k] = static_cast<double>(members[k]), some[k] = n[k] == 0 ? 1 : n[k];
    settle([&](int k) NORMKIT_INLINE_LAMBDA { return some[k]; });
  } else {
    settle([&](int) NORMKIT_INLINE_LAMBDA { return run; });
  }
  for (int k = 0; k < batch.rows && unsettled > kRows - batch.rows; ++k) {
    const double s = static_cast<double>(sums[k]), q = static_cast<double>(squares[k]);
    if (n[k] > 0 && trustworthy<S>(s, q, n[k])) continue;
    Moments<double> m;
    if (n[k] > 0)
      m = unsettled_moments({batch.x[k], t.x.dtype, 1, 0, t.geometry.run}, static_cast<double>(batch.pivot[k]), q,
                            t.centered, n[k], is_masked ? Masked{batch.mask[k], 0, false} : masked(Everyone{}));
    mean[k] = m.mean, low[k] = m.mean_low, m2[k] = m.m2;
  }
  for (int k = 0; is_masked && k < kRows; ++k) variance[k] = m2[k] / (is_norm || n[k] == 0 ? 1 : n[k]);
  find_rstd(t.denominator, is_masked ? 1 : run, is_masked ? variance : m2, rstd);
  for (int k = 0; is_masked && k < kRows; ++k) rstd[k] = is_norm || n[k] > 0 ? rstd[k] : 0;
  if (t.mean || t.rstd || t.moments)
    for (int k = 0; k < batch.rows; ++k)
      publish(t, batch.first + k, moments_of<S>(mean[k], low[k], m2[k], n[k]), rstd[k]);
}

/// Finds the factors of each row's outputs.
template <class V> [[gnu::noinline]] void solve_batch(const Task& t, Batch<V>& batch) {
  using S = typename V::Lane;
  constexpr int kRows = Batch<V>::kRows;
  RowStatistics<kRows> known;
  alignas(64) double weight[kRows], bias[kRows];
  t.frozen ? given_statistics(t, batch.first, batch.rows, known) : found_statistics(t, batch, known);
  if (weighs_elements(t.geometry)) {
    for (int k = 0; k < kRows; ++k) weight[k] = 1, bias[k] = 0;
  } else {
    row_parameters(t, t.weight, batch.first, batch.rows, 1, weight);
    row_parameters(t, t.bias, batch.first, batch.rows, 0, bias);
  }
  for (int k = 0; k < kRows; ++k) {
    const Statistic<S> s = known.template at<S>(k);
    const Affine<S> affine = forward_affine(s, weight[k], bias[k]);
    batch.mean[k] = s.mean, batch.scale[k] = affine.scale, batch.shift[k] = affine.shift;
  }
}

/// Outputs of rows that follow each other without gaps, put together to whole lines that go past the caches.
template <class Y> class LineBuffer {
 public:
  static constexpr std::int64_t kLine = 64 / sizeof(Y);

  explicit LineBuffer(Y* y) {
    filled_ = first_ = static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(y) % 64 / sizeof(Y));
    to_ = y - first_;
  }
  LineBuffer(const LineBuffer&) = delete;
  LineBuffer& operator=(const LineBuffer&) = delete;
  ~LineBuffer() {
    flush();
    for (std::int64_t k = first_; k < filled_; ++k) to_[k] = line_[k];
  }

  /// Room for a short row and one vector, so that its last one may be stored whole.
  Y* room() { return line_ + filled_; }
  void done(std::int64_t elements) {
    filled_ += elements;
    if (filled_ >= kCapacity) flush();
  }

 private:
  static constexpr std::int64_t kCapacity = 4096 / sizeof(Y);

  [[gnu::noinline]] void flush() {
    std::int64_t k = 0;
    if (first_ > 0 && filled_ >= kLine) {  // begun by others
      for (std::int64_t i = first_; i < kLine; ++i) to_[i] = line_[i];
      k = kLine, first_ = 0;
    }
    for (; k + kLine <= filled_; k += kLine)
      for (std::int64_t i = 0; i < kLine; i += kLanes<VectorOf<Y>>) stream(to_ + k + i, load(line_ + k + i));
    for (std::int64_t i = k; i < filled_; ++i) line_[i - k] = line_[i];
    to_ += k, filled_ -= k;
  }

  Y* to_;  // the line in memory that line_ begins
  std::int64_t first_, filled_;
  alignas(64) Y line_[kCapacity + 1024 / sizeof(Y) + 64];
};

/// True where the outputs of statistics r and r + 1 are neighbors in memory.
NORMKIT_LOCAL bool rows_are_dense(const Operand& y, const Geometry& g) {
  return (g.lanes == 1 || y.strides.lane == g.run) && (g.outer == 1 || y.strides.outer == g.lanes * g.run);
}

/// How outputs are stored: whole vectors where they belong, past the caches or not; or one after the other in a
/// LineBuffer.
enum class Stores : std::uint8_t { plain, streamed, gathered };

/// y[i] = f(position i) for one row. Streamed rows are whole lines. They have a loop of their own: with a branch at
/// every vector, the constants that half types are rounded by would be set anew for each.
template <class Y, int kVectors, class F>
NORMKIT_LOCAL void map_row(Count<kVectors> vectors, Y* y, std::int64_t n, Stores stores, LineBuffer<Y>& lines, F f) {
  using V = VectorOf<Y>;
  if (stores == Stores::streamed) {
    for (int k = 0; k < kVectors; ++k) stream(y + k * kLanes<V>, f(Full{k * kLanes<V>}));
    return;
  }
  const bool gathered = stores == Stores::gathered;
  Y* to = gathered ? lines.room() : y;
  for_row<V>(vectors, n, [&](int, auto place) NORMKIT_INLINE_LAMBDA {
    const V v = f(place);
    if (place.kWhole || gathered) store(to + place.i, v);
    else place.store(to, v);
  });
  if (gathered) lines.done(n);
}

/// What the rows of a batch share when they are written.
template <class X, class Y> struct BatchWriter {
  const Task& t;
  const ScalarOf<X>*weight, *bias;  // null: none that vary along a row
  Stores stores;
  LineBuffer<Y>& lines;
  Streamer<Y>* streamer;
};

/// What is fetched while row k of a batch is written, from element `begin` on: rows to come, unless they are formed first. Rows with
/// given statistics are read here for the first time: into the first-level cache.
template <class X>
NORMKIT_LOCAL Fetch fetch_for_row(const Task& t, const BatchOf<X>& batch, int k, std::int64_t begin) {
  if (t.walk.forms_rows) return {};
  if (t.frozen) return {reinterpret_cast<const char*>(at<X>(batch.x[k], 0) + begin) + kAhead};
  return far_fetch(at<X>(batch.x[k], 0) + begin, far_or_next(t.walk.fetch_bytes, t.walk.next_x));
}

/// What makes outputs of row k of a batch from element `begin` on.
template <class X, class Y>
NORMKIT_LOCAL Preactivation<X> row_preactivation(const BatchWriter<X, Y>& writer, const BatchOf<X>& batch, int k,
                                                 std::int64_t begin) {
  using V = VectorOf<X>;
  Preactivation<X> z{broadcast<V>(batch.mean[k]), broadcast<V>(batch.scale[k]), broadcast<V>(batch.shift[k])};
  if (writer.weight) z.weight = writer.weight + begin, z.bias = writer.bias + begin;
  return z;
}

/// Calls write(f), where f(place) are the outputs of row k of a batch from element `begin` on.
template <class X, class Y, class F>
NORMKIT_LOCAL void with_outputs(const BatchWriter<X, Y>& writer, const BatchOf<X>& batch, int k, std::int64_t begin,
                                F write) {
  const X* x = at<X>(batch.x[k], 0) + begin;
  const Preactivation<X> z = row_preactivation(writer, batch, k, begin);
  if (!writer.weight) return write([&](auto place) NORMKIT_INLINE_LAMBDA { return z.constant(place.load(x)); });
  write([&](auto place) NORMKIT_INLINE_LAMBDA { return z.linear(place, place.load(x)); });
}

/// Writes elements [begin, end) of row k of a batch.
template <class X, class Y>
[[gnu::noinline]] void write_row(const BatchWriter<X, Y>& writer, const BatchOf<X>& batch, int k, std::int64_t begin,
                                 std::int64_t end) {
  const Fetch fetch = fetch_for_row<X>(writer.t, batch, k, begin);
  with_outputs(writer, batch, k, begin, [&](auto f) NORMKIT_INLINE_LAMBDA {
    map(at<Y>(batch.y[k], 0) + begin, end - begin, writer.streamer, fetch, f);
  });
}

/// Writes row k of a batch, to which an activation is applied: relu as outputs go by, where nothing varies along the row.
template <class X, class Y>
[[gnu::noinline]] void write_activated(const BatchWriter<X, Y>& writer, const BatchOf<X>& batch, int k) {
  using S = ScalarOf<X>;
  const Task& t = writer.t;
  Y* const y = at<Y>(batch.y[k], 0);
  const X* x = at<X>(batch.x[k], 0);
  if (is_relu(t.activation) && !writer.weight) {
    const Preactivation<X> z = row_preactivation(writer, batch, k, 0);
    return map(y, t.geometry.run, writer.streamer, fetch_for_row<X>(t, batch, k, 0),
               [&](auto place) NORMKIT_INLINE_LAMBDA { return relu(z.constant(place.load(x))); });
  }
  alignas(64) S value[kBuffer];
  for (std::int64_t begin = 0; begin < t.geometry.run; begin += kBuffer, x += kBuffer) {
    const std::int64_t n = least(t.geometry.run - begin, kBuffer);
    const Preactivation<X> z = row_preactivation(writer, batch, k, begin);
    map(value, n, kPlain<S>, Fetch{}, [&](auto place) NORMKIT_INLINE_LAMBDA { return z.at(place, place.load(x)); });
    activate_all<S>(t.activation, nullptr, value, n);
    put_all<Y, S>(value, y + begin, n, writer.streamer, Fetch{});
  }
}

/// Rows that are written side by side, for a TileWriter: what they share are weights along them.
template <class X> struct ForwardTile {
  using V = VectorOf<X>;
  /// 4; 2 of half types, so that every block is whole lines. Layer norm (4096, 4096): 1.3 of a copy, with 2 1.55.
  static constexpr int kRows = sizeof(X) == 2 ? 2 : 4;
  const X* x[kRows];
  X* y[kRows];
  V mean[kRows], scale[kRows], shift[kRows];
  const ScalarOf<X>*weight, *bias;

  template <class Store> NORMKIT_LOCAL void put(Full place, Store store) const {
    const V w = place.load(weight), b = place.load(bias);
    for (int k = 0; k < kRows; ++k)
      store(y[k] + place.i, mul_add(forward(place.load(x[k]), mean[k], scale[k], shift[k]), w, b));
  }
};

/// Writes the rows of a tile, from row k of the batch on, while rows k and on of the next batch are summed.
template <class X>
[[gnu::noinline]] void write_tile(const BatchWriter<X, X>& writer, int k, const BatchOf<X>& batch, BatchOf<X>& next) {
  using V = VectorOf<X>;
  const std::int64_t n = writer.t.geometry.run;
  constexpr int kRows = ForwardTile<X>::kRows;
  ForwardTile<X> tile;
  tile.weight = writer.weight, tile.bias = writer.bias;
  for (int j = 0; j < kRows; ++j) {
    tile.x[j] = at<X>(batch.x[k + j], 0), tile.y[j] = at<X>(batch.y[k + j], 0);
    tile.mean[j] = broadcast<V>(batch.mean[k + j]), tile.scale[j] = broadcast<V>(batch.scale[k + j]);
    tile.shift[j] = broadcast<V>(batch.shift[k + j]);
  }
  const auto write_part = [&](std::int64_t begin, std::int64_t end) {
    for (int j = k; j < k + kRows; ++j) write_row(writer, batch, j, begin, end);
  };
  write_beside(tile, tile.y[0], n, writer.streamer, write_part, [&](auto& beside) NORMKIT_INLINE_LAMBDA {
    for (int j = k; j < k + kRows && j < next.rows; ++j) {
      const char* const near = reinterpret_cast<const char*>(next.x[j]) + near_ahead(n * sizeof(X));
      sum_row<X>(Count<0>{}, n, j, Fetch{near, near + far_or_next(kFarAhead, writer.t.walk.next_x)}, beside, next);
    }
  });
}

/// Writes the rows of a batch while those of the next are summed; before the first there are none to write.
template <class X, class Y, int kVectors>
[[gnu::noinline]] void walk_batch(const BatchWriter<X, Y>& writer, const BatchOf<X>& batch, BatchOf<X>& next) {
  using V = VectorOf<X>;
  constexpr Count<kVectors> vectors;
  const Task& t = writer.t;
  const std::int64_t n = t.geometry.run;
  // Copies: stores might change them, for all that is known.
  const bool is_given = t.frozen;
  const int rows = batch.rows, next_rows = is_given ? 0 : next.rows;
  const bool is_active = has_activation(t), is_masked = asks_mask(t);
  Nothing alone;
  for (int k = 0; k < rows || k < next_rows; ++k) {
    if constexpr (kVectors == 0 && kHoldsRows && kFloating<X> && __is_same(X, Y)) {
      constexpr int kTile = ForwardTile<X>::kRows;
      if (t.walk.tiled && k + kTile <= rows) {
        write_tile<X>(writer, k, batch, next);
        k += kTile - 1;
        continue;
      }
    }
    if constexpr (kVectors > 0)
      if (k < rows) {
        const Fetch ahead = is_given ? Fetch{reinterpret_cast<const char*>(batch.x[k]) + kAhead}
                                     : far_fetch(batch.x[k], far_or_next(t.walk.fetch_bytes, t.walk.next_x));
        ahead.template block<kVectors * kLanes<V> * sizeof(X)>(0);
      }
    if (k < next_rows) {
      const char* const near = reinterpret_cast<const char*>(next.x[k]) + kBatchAhead;
      if (is_masked) sum_masked_row<X>(n, k, Fetch{near, nullptr}, next);
      else sum_row<X>(vectors, n, k, Fetch{near, nullptr}, alone, next);
    }
    if (k >= rows) continue;
    if (is_active) write_activated(writer, batch, k);
    else if constexpr (kVectors == 0) write_row(writer, batch, k, 0, n);
    else
      with_outputs(writer, batch, k, 0, [&](auto f) NORMKIT_INLINE_LAMBDA {
        map_row(vectors, at<Y>(batch.y[k], 0), n, writer.stores, writer.lines, f);
      });
  }
}

template <class X, class Y> using WalkBatch = void (*)(const BatchWriter<X, Y>&, const BatchOf<X>&, BatchOf<X>&);

/// A loop of known length for a usual run of up to 32 bits, compiled for each type; null for any other run.
template <class X, class Y> NORMKIT_LOCAL WalkBatch<X, Y> walk_of_known_length(std::int64_t run) {
  if constexpr (kWide && kFloating<X> && __is_same(X, Y) && sizeof(X) <= 4) {
    switch (ceil_div(run, kLanes<VectorOf<X>>)) {
      case 1: return walk_batch<X, Y, 1>;
      case 2: return walk_batch<X, Y, 2>;
      case 3: return walk_batch<X, Y, 3>;
      case 4: return walk_batch<X, Y, 4>;
      case 5: return walk_batch<X, Y, 5>;
      case 6: return walk_batch<X, Y, 6>;
      case 7: return walk_batch<X, Y, 7>;
      case 8: return walk_batch<X, Y, 8>;
      default: break;
    }
  }
  return nullptr;
}

template <class X, class Y>
void batches_forward(const Task& t, std::int64_t begin, std::int64_t end, double* scratch) {
  using S = ScalarOf<X>;
  const Geometry& g = t.geometry;
  const std::int64_t rows = batch_rows(g, sizeof(X));
  const RowParameter<S> weight(g, t.weight, 1), bias(g, t.bias, 0);
  const WalkBatch<X, Y> known = walk_of_known_length<X, Y>(g.run), walk = known ? known : walk_batch<X, Y, 0>;
  Stores stores = Stores::plain;
  if (t.walk.stream_stores && known && rows_are_dense(t.y, g))
    stores = t.walk.whole_lines ? Stores::streamed : Stores::gathered;
  LineBuffer<Y> lines(at<Y>(t.y, begin / g.lanes, 0, begin % g.lanes));
  Streamer<Y> streamer;
  const BatchWriter<X, Y> writer{t,      weight.value, bias.value,
                                 stores, lines,        t.walk.stream_stores ? &streamer : nullptr};
  BatchOf<X> batches[2], *batch = &batches[0], *next = &batches[1];
  batch->room = scratch, next->room = scratch + batch_doubles(g, sizeof(X));
  for (std::int64_t first = begin; first < end || batch->rows > 0;) {
    begin_batch<X>(t, least(first, end), least(end, first + rows), *next);
    walk(writer, *batch, *next);
    solve_batch(t, *next);
    first += next->rows;
    BatchOf<X>* const written = batch;
    batch = next, next = written;
  }
}

}  // namespace
}  // namespace normkit
