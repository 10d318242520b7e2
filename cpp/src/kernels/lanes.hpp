// The lanes traversal, forward: a statistic is reduced across steps, with vectors along the contiguous columns.
//
//     columns = lanes x run     block = 16 steps, a tile of 4 vectors at a time -> span = 512 steps -> one column -> fold of run
//
// Memory is walked in its own order, a few rows at a time. The sums of a tile stay in registers for a block; the sums
// of columns lie in scratch, one array a quantity. Apply is elementwise: rows of memory beside rows of a table.
#pragma once

namespace normkit {
namespace {

constexpr int kTile = kWide ? 4 : 1;  // vectors

/// What is known of each column once its statistic is, as arrays of the compute type. Forward: y from mean, a, b. Backward: dx
/// from mean, a, b, c; x_hat from mean, unit, origin; and z, to which an activation was applied, as forward had it. `slope` is that
/// of prelu, in both.
template <class S> struct Table {
  S *mean, *a, *b, *c, *unit, *origin, *z_mean, *z_scale, *z_shift, *slope;
  Table(double* memory, std::int64_t columns) {
    S* next = reinterpret_cast<S*>(memory);
    for (S** array : {&mean, &a, &b, &c, &unit, &origin, &z_mean, &z_scale, &z_shift, &slope})
      *array = next, next += columns;
  }
};

/// Moments of columns, one array a quantity.
template <class S> struct ColumnMoments {
  static constexpr int kArrays = kMomentDoubles<S>;
  double *mean, *m2, *n, *mean_low;
  ColumnMoments(double* memory, std::int64_t columns)
      : mean(memory), m2(memory + columns), n(memory + 2 * columns), mean_low(memory + 3 * columns) {}
  NORMKIT_LOCAL Moments<S> at(std::int64_t k) const {
    return moments_of<S>(mean[k], sizeof(S) == 8 ? mean_low[k] : 0, m2[k], n[k]);
  }
  NORMKIT_LOCAL void set(std::int64_t k, const Moments<S>& m) const {
    mean[k] = m.mean, m2[k] = m.m2, n[k] = m.n;
    if constexpr (sizeof(S) == 8) mean_low[k] = m.mean_low;
  }
};

/// Calls f(vectors as a constant, first column, columns) for each tile; the columns after the last full tile go one vector
/// at a time, which keeps the code half as large.
template <class X, class F> NORMKIT_LOCAL void for_tiles(std::int64_t columns, F f) {
  constexpr std::int64_t kWidth = kLanes<VectorOf<X>>;
  std::int64_t k = 0;
  if constexpr (kTile > 1)
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

/// Steps of a block. The sums of a block are taken in the compute type, and those of several blocks add up in double.
constexpr std::int64_t kBlockSteps = 16;

/// Bytes that the first pass runs ahead of itself, in whole blocks of steps. It fetches into the second-level cache:
/// the first has no room for a block of all columns beside the next.
constexpr std::int64_t kBlockAhead = 8192;

/// How far the first pass runs ahead, in elements from a column to the same column of a later step: by whole blocks of
/// steps, or where a tile is a whole row, by about 8 KB of rows.
template <class X> NORMKIT_LOCAL std::int64_t block_ahead(const Geometry& g, const Operand& a) {
  const std::int64_t row_bytes = g.columns() * static_cast<std::int64_t>(sizeof(X));
  if (g.columns() <= kTile * kLanes<VectorOf<X>>) return ceil_div(8192, row_bytes) * a.strides.step;
  return a.strides.step * kBlockSteps * ceil_div(kBlockAhead, kBlockSteps * row_bytes);
}
template <class X, int kVectors> NORMKIT_LOCAL void prefetch_tile(Count<kVectors>, const X* x, std::int64_t ahead) {
  constexpr int kBytes = kVectors * kLanes<VectorOf<X>> * static_cast<int>(sizeof(X));
  for (int line = 0; line < kBytes; line += 64) prefetch_second(reinterpret_cast<const char*>(x + ahead) + line);
}

/// Fetches the line of a row that a position begins, if it begins one.
template <class X, class P> NORMKIT_LOCAL void prefetch_place(const X* row, P place) {
  constexpr int kWidth = kLanes<VectorOf<X>>, kBytes = kWidth * sizeof(X);
  if (kBytes >= 64 || place.i / kWidth % (64 / kBytes) == 0)
    prefetch_second(reinterpret_cast<const char*>(row + place.i));
}

/// Adds the lanes of v to as many doubles.
NORMKIT_LOCAL void add_to(double* sum, F64 v) { store(sum, load(sum) + v); }
NORMKIT_LOCAL void add_to(double* sum, F32 v) {
  const Wide w = widen(v);
  add_to(sum, w.low), add_to(sum + kLanes<F64>, w.high);
}

// ---- forward ---------------------------------------------------------------------------------------------------

/// Sums of differences to a pivot over the members of each column of a span. Arrays of whole vectors.
template <class S> struct PivotSums {
  double *sum, *squares, *members;
  S* pivot;
  PivotSums(double* memory, std::int64_t columns)
      : sum(memory),
        squares(memory + columns),
        members(memory + 2 * columns),
        pivot(reinterpret_cast<S*>(memory + 3 * columns)) {}
};

/// One tile over one block or span: n columns of `rows` steps. `ahead` elements further lies what is read next.
template <class X> struct Tile {
  const X* x;
  std::int64_t stride, rows, n, ahead = 0;
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
/// The pivots of a tile where there is a mask: the same mean where the first four steps are members, else the first member
/// of the column.
template <class X, int kVectors>
void first_pivots(Tile<X> tile, Count<kVectors>, ScalarOf<X>* pivot, const Masked& members) {
  for (std::int64_t k = 0; k < tile.n; ++k) {
    const Masked column = members.from(k);
    const X* x = tile.x + k;
    if (tile.rows >= 4 && column.count(4, 1) == 4) {
      ScalarOf<X> value[4];
      for (int row = 0; row < 4; ++row) value[row] = first(load(x + row * tile.stride, 1));
      pivot[k] = ((value[0] + value[1]) + (value[2] + value[3])) * ScalarOf<X>(0.25);
    } else {
      pivot[k] = first(load(column.first(x, tile.stride, tile.rows, 1), 1));
    }
  }
}

/// Adds one block of one tile to the sums of columns k and on.
template <class X, int kVectors, class Members, class Beside>
NORMKIT_LOCAL void add_block(Tile<X> tile, Count<kVectors> vectors, PivotSums<ScalarOf<X>> sums, std::int64_t k,
                             Members members, Beside& beside) {
  using V = VectorOf<X>;
  const V zero = broadcast<V>(ScalarOf<X>(0)), one = broadcast<V>(ScalarOf<X>(1));
  V p[kVectors], s[kVectors], q[kVectors], n[kVectors];
  for (int j = 0; j < kVectors; ++j) {
    p[j] = load(sums.pivot + k + j * kLanes<V>);
    s[j] = q[j] = n[j] = zero;
  }
  const X* x = tile.x;
  for (std::int64_t row = 0; row < tile.rows; ++row, x += tile.stride, members.next_row()) {
    prefetch_tile(vectors, x, tile.ahead);
    if (row % (kTile / kVectors) == 0) beside.block();
    for_vectors<V>(vectors, tile.n, [&](int j, auto place) NORMKIT_INLINE_LAMBDA {
      const V d = members.only(place, place.load(x) - p[j]);
      s[j] = s[j] + d;
      q[j] = mul_add(d, d, q[j]);
      if constexpr (!Members::kAll) n[j] = n[j] + members.only(place, one);
    });
  }
  for (int j = 0; j < kVectors; ++j) {
    const std::int64_t at = k + j * kLanes<V>;
    add_to(sums.sum + at, s[j]), add_to(sums.squares + at, q[j]);
    if constexpr (!Members::kAll) add_to(sums.members + at, n[j]);
  }
}

/// Turns 8 rows of 4 elements, `columns` apart, into 4 rows of a vector.
NORMKIT_LOCAL void turn_tile(const float* from, std::int64_t columns, float* to) {
  using Quad [[gnu::vector_size(16)]] = float;
  using Eight [[gnu::vector_size(32)]] = float;
  Eight row[4];  // a row, and the one that is four below it
  for (int k = 0; k < 4; ++k) {
    Quad above, below;
    __builtin_memcpy(&above, from + k * columns, sizeof(Quad));
    __builtin_memcpy(&below, from + (k + 4) * columns, sizeof(Quad));
    row[k] = __builtin_shufflevector(above, below, 0, 1, 2, 3, 4, 5, 6, 7);
  }
  const Eight low = __builtin_shufflevector(row[0], row[1], 0, 8, 1, 9, 4, 12, 5, 13);
  const Eight high = __builtin_shufflevector(row[0], row[1], 2, 10, 3, 11, 6, 14, 7, 15);
  const Eight next_low = __builtin_shufflevector(row[2], row[3], 0, 8, 1, 9, 4, 12, 5, 13);
  const Eight next_high = __builtin_shufflevector(row[2], row[3], 2, 10, 3, 11, 6, 14, 7, 15);
  const auto put = [&](int k, const Eight& column)
                       NORMKIT_INLINE_LAMBDA { __builtin_memcpy(to + k * kLanes<F32>, &column, sizeof(Eight)); };
  put(0, __builtin_shufflevector(low, next_low, 0, 1, 8, 9, 4, 5, 12, 13));  // a loop would go through memory
  put(1, __builtin_shufflevector(low, next_low, 2, 3, 10, 11, 6, 7, 14, 15));
  put(2, __builtin_shufflevector(high, next_high, 0, 1, 8, 9, 4, 5, 12, 13));
  put(3, __builtin_shufflevector(high, next_high, 2, 3, 10, 11, 6, 7, 14, 15));
}
/// Turns as many rows of `columns` elements, a multiple of 4, as a vector has lanes into `columns` vectors. As many elements
/// from `next` on are fetched meanwhile, a little with each tile: memory takes no hundred requests at once. A few columns have room in
/// the first-level cache.
template <class X>
[[gnu::noinline]] void turn(const float* from, std::int64_t columns, float* to, const X* next) {
  constexpr int kWidth = kLanes<F32>, kLine = 64 / static_cast<int>(sizeof(X));
  for (std::int64_t column = 0; column < columns; column += 4, next += 4 * kWidth) {
    for (int i = 0; i < 4 * kWidth; i += kLine) prefetch_both(reinterpret_cast<const char*>(next + i));
    for (int row = 0; row < kWidth; row += 8)
      turn_tile(from + row * columns + column, columns, to + column * kWidth + row);
  }
}
[[gnu::noinline, maybe_unused]] void turn(const double* from, std::int64_t columns, double* to, const double* next) {
  constexpr int kWidth = kLanes<F64>;
  for (std::int64_t column = 0; column < columns; ++column, next += kWidth) {
    prefetch_second(reinterpret_cast<const char*>(next));
    for (int row = 0; row < kWidth; ++row) to[column * kWidth + row] = from[row * columns + column];
  }
}

/// Elements of a few columns over as many blocks of steps as a vector has lanes, each lane with a block of its own, so that
/// vectors are full, and the sums of a block are those that it has in a vector of many columns.
template <class S> struct Turned {
  static constexpr int kWidth = kLanes<VectorOf<S>>;
  static constexpr std::int64_t kSteps = kWidth * kBlockSteps, kMost = kSteps * (kWidth - 1);
  alignas(64) S value[kMost];

  NORMKIT_LOCAL VectorOf<S> at(std::int64_t step, std::int64_t k, std::int64_t n) const {
    return load(value + (step * n + k) * kWidth);
  }
  NORMKIT_LOCAL void set(std::int64_t step, std::int64_t k, std::int64_t n, VectorOf<S> v) {
    store(value + (step * n + k) * kWidth, v);
  }
};

/// Steps of n columns, `stride` apart, one behind the other: where they lie already, or else in `room`.
template <class X>
NORMKIT_LOCAL const X* dense_steps(const X* x, std::int64_t stride, std::int64_t steps, std::int64_t n, X* room) {
  if (stride == n) return x;
  for (std::int64_t step = 0; step < steps; ++step)
    for (std::int64_t k = 0; k < n; ++k) room[step * n + k] = x[step * stride + k];
  return room;
}

/// Reads steps that are `stride` apart, of n columns, and fetches what follows.
template <class X>
[[gnu::noinline]] void read_turned(const X* x, std::int64_t stride, std::int64_t n, Turned<ScalarOf<X>>& turned) {
  using T = Turned<ScalarOf<X>>;
  alignas(64) X room[T::kMost];
  const X* const next = x + kBlockAhead / static_cast<std::int64_t>(sizeof(X));
  x = dense_steps(x, stride, T::kSteps, n, room);
  if constexpr (__is_same(X, ScalarOf<X>)) {
    turn(x, kBlockSteps * n, turned.value, next);
  } else {
    alignas(64) ScalarOf<X> wide[T::kMost];
    for (std::int64_t i = 0; i < T::kSteps * n; i += T::kWidth) normkit::store(wide + i, load(x + i));
    turn(wide, kBlockSteps * n, turned.value, next);
  }
}

/// Who is a member among turned steps, as Everyone and Masked say it of others.
struct TurnedEveryone {
  static constexpr bool kAll = true;
  template <class V> NORMKIT_LOCAL V only(std::int64_t, std::int64_t, V v) const { return v; }
};
struct TurnedMasked {
  static constexpr bool kAll = false;
  const Turned<float>& byte;
  std::int64_t columns;  // 1 where one stands for all

  NORMKIT_LOCAL F32 only(std::int64_t step, std::int64_t k, F32 v) const {
    return where(byte.at(step, columns == 1 ? 0 : k, columns), v);
  }
};
/// Calls f with the members of as many steps of n columns as are turned together.
template <class S, class F> NORMKIT_LOCAL void with_turned(Everyone, std::int64_t, F f) { f(TurnedEveryone{}); }
template <class S, class F> NORMKIT_LOCAL void with_turned(const Masked& members, std::int64_t n, F f) {
  if constexpr (sizeof(S) == 4) {
    const std::int64_t columns = members.same ? 1 : n;
    Turned<float> byte;
    read_turned(members.byte, members.row_stride, columns, byte);
    f(TurnedMasked{byte, columns});
  }
}

/// The sums of blocks, one a lane, of each of a few columns.
template <class S> struct TurnedSums {
  static constexpr int kWidth = kLanes<VectorOf<S>>;
  alignas(64) double lane[kWidth * kWidth];

  NORMKIT_LOCAL void set(std::int64_t k, VectorOf<S> v) { store_doubles(lane + k * kWidth, v); }
  /// Adds them to the sums of n columns, block after block.
  [[gnu::noinline]] void add_to(double* sums, std::int64_t n) const {
    for (std::int64_t k = 0; k < n; ++k) {
      double total = sums[k];
      for (int block = 0; block < kWidth; ++block) total += lane[k * kWidth + block];
      sums[k] = total;
    }
  }
};

/// Columns whose sums are taken together, so that none waits for the additions of another; the last one again where there are fewer.
constexpr int kTogether = 3;

/// Adds blocks of n columns, few, to their sums.
template <class S, class Members>
[[gnu::noinline]] void add_turned(const Turned<S>& x, std::int64_t n, const Members& members, PivotSums<S> sums) {
  using V = VectorOf<S>;
  const V zero = broadcast<V>(S(0)), one = broadcast<V>(S(1));
  TurnedSums<S> all_s, all_q, all_n;
  for (std::int64_t k = 0; k < n; k += kTogether) {
    std::int64_t column[kTogether];
    V p[kTogether], s[kTogether], q[kTogether], count[kTogether];
    for (int j = 0; j < kTogether; ++j) {
      column[j] = least(k + j, n - 1);
      p[j] = broadcast<V>(sums.pivot[column[j]]), s[j] = q[j] = count[j] = zero;
    }
    for (std::int64_t step = 0; step < kBlockSteps; ++step)
      for (int j = 0; j < kTogether; ++j) {
        const V d = members.only(step, column[j], x.at(step, column[j], n) - p[j]);
        s[j] = s[j] + d;
        q[j] = mul_add(d, d, q[j]);
        if constexpr (!Members::kAll) count[j] = count[j] + members.only(step, column[j], one);
      }
    for (int j = 0; j < kTogether; ++j) {
      all_s.set(column[j], s[j]), all_q.set(column[j], q[j]);
      if constexpr (!Members::kAll) all_n.set(column[j], count[j]);
    }
  }
  all_s.add_to(sums.sum, n), all_q.add_to(sums.squares, n);
  if constexpr (!Members::kAll) all_n.add_to(sums.members, n);
}

/// Adds blocks of steps of n columns of bytes, few, to their sums. Differences of bytes to a pivot, a mean of four bytes, are
/// multiples of 1/4, so 16 of their squares add up without rounding, in whatever order: nothing need be turned.
[[gnu::noinline]] void add_bytes(Tile<std::uint8_t> tile, PivotSums<float> sums) {
  constexpr int kWidth = kLanes<F32>, kMost = kWidth * (kWidth - 1);
  static_assert(kWidth == kBlockSteps);  // so that the columns come again after n vectors
  alignas(64) std::uint8_t room[kSpanSteps * (kWidth - 1)];
  alignas(64) float pivot[kMost];
  alignas(64) double s[kMost], q[2][kMost];
  const std::int64_t n = tile.n, period = kWidth * n, blocks = tile.rows / kBlockSteps;
  const char* next = reinterpret_cast<const char*>(tile.x) + kBlockAhead;
  const std::uint8_t* x = dense_steps(tile.x, tile.stride, tile.rows, n, room);
  for (std::int64_t i = 0; i < period; i += n)
    for (std::int64_t k = 0; k < n; ++k) pivot[i + k] = sums.pivot[k];
  for (std::int64_t i = 0; i < period; i += kWidth, x += kWidth) {
    const F32 p = load(pivot + i), zero = broadcast<F32>(0.0f);
    F32 total[2] = {zero, zero}, squares[2] = {zero, zero};  // of every other block: 16 squares each
    const auto add = [&](std::int64_t block, int j) NORMKIT_INLINE_LAMBDA {
      const F32 d = load(x + block * period) - p;
      total[j] = total[j] + d;
      squares[j] = mul_add(d, d, squares[j]);
    };
    std::int64_t block = 0;
    for (; block + 1 < blocks; block += 2, next += 2 * kWidth) {
      prefetch_both(next);
      add(block, 0), add(block + 1, 1);
    }
    if (block < blocks) add(block, 0);
    store_doubles(s + i, total[0] + total[1]);
    store_doubles(q[0] + i, squares[0]), store_doubles(q[1] + i, squares[1]);
  }
  for (std::int64_t k = 0; k < n; ++k) {
    double sum = 0, squares = 0;
    for (std::int64_t i = k; i < period; i += n) sum += s[i], squares += q[0][i] + q[1][i];
    sums.sum[k] += sum, sums.squares[k] += squares;
  }
}

/// Moments of the members of one column of a span in double, in two passes: for data that defeats the pivots.
NORMKIT_LOCAL Moments<double> careful_column(Segments x, bool centered, Masked members) {
  alignas(64) double value[kSpanSteps + 16];
  std::int64_t n = 0;
  for (std::int64_t row = 0; row < x.rows; ++row, members.next_row())
    if (members.has(0)) read_all(x.from(row, 0), x.dtype, 1, value + n++);
  double pivot = centered ? value[0] : 0;
  for (int pass = 0;; ++pass) {
    double s = 0, q = 0;
    for (std::int64_t k = 0; k < n; ++k) {
      const double d = value[k] - pivot;
      s += d;
      q = mul_add(d, d, q);
    }
    const Moments<double> m = from_pivot<double>(pivot, s, q, static_cast<double>(n));
    if (!centered) return moments_of<double>(0, 0, mul_add(m.mean * m.mean, m.n, m.m2), m.n);
    if (pass == 1) return m;
    pivot = m.mean;
  }
}

/// Steps [begin, end) of a span.
NORMKIT_LOCAL std::int64_t span_begin(std::int64_t span) { return span * kSpanSteps; }
NORMKIT_LOCAL std::int64_t span_end(const Geometry& g, std::int64_t span) {
  return least(g.steps, span_begin(span + 1));
}

/// Calls f(rows, first step) for the blocks of a span.
template <class F> NORMKIT_LOCAL void for_blocks(std::int64_t begin, std::int64_t end, F f) {
  for (std::int64_t step = begin; step < end; step += kBlockSteps) f(step, least(kBlockSteps, end - step));
}

/// True where the sums of a column do not hold its moments. There is no branch, so that loops over columns become
/// vectors.
template <class S> NORMKIT_LOCAL bool doubtful(double s, double q, double n) {
  return (n > 0) & !trustworthy<S>(s, q, n);
}

/// The doubtful columns of a span: constant ones keep their pivot, others are taken once more in double. A column is judged
/// by itself, so that none depends on its neighbors.
template <class S>
[[gnu::noinline]] void mend_columns(const Task& t, std::int64_t o, std::int64_t begin, std::int64_t end,
                                    PivotSums<S> sums, ColumnMoments<S> out) {
  constexpr std::int64_t kWidth = 64;
  const std::int64_t columns = t.geometry.columns();
  for (std::int64_t first = 0; first < columns; first += kWidth) {
    const std::int64_t n = least(kWidth, columns - first);
    double pivot[kWidth];
    bool doubts[kWidth], equal[kWidth], any = false;
    for (std::int64_t k = 0; k < n; ++k) {
      const std::int64_t column = first + k;
      doubts[k] = doubtful<S>(sums.sum[column], sums.squares[column], sums.members[column]);
      pivot[k] = static_cast<double>(sums.pivot[column]);
      equal[k] = pivot[k] - pivot[k] == 0;  // a finite number
      any |= doubts[k];
    }
    if (!any) continue;
    const Segments x{reinterpret_cast<const std::byte*>(address(t.x, o, begin, 0, first)), t.x.dtype, end - begin,
                     t.x.strides.step, n};
    const Masked members = members_at(t, o, begin, 0, first);
    Masked row_members = members;
    alignas(64) double value[kWidth];
    for (std::int64_t row = 0; row < x.rows; ++row, row_members.next_row()) {
      read_all(x.from(row, 0), x.dtype, n, value);
      for (std::int64_t k = 0; k < n; ++k) equal[k] &= !row_members.has(k) | (value[k] == pivot[k]);
    }
    for (std::int64_t k = 0; k < n; ++k) {
      if (!doubts[k]) continue;
      out.set(first + k, moments_of<S>(equal[k] ? moments_of<double>(pivot[k], 0, 0, sums.members[first + k])
                                                : careful_column({x.from(0, k), x.dtype, x.rows, x.stride, 1},
                                                                 t.centered, members.from(k))));
    }
  }
}

template <class S>
NORMKIT_LOCAL void merge_columns(ColumnMoments<S> into, ColumnMoments<S> more, std::int64_t n) {
  for (std::int64_t k = 0; k < n; ++k) into.set(k, merge(into.at(k), more.at(k)));
}

/// Moments of all columns over one span. `memory`: four arrays of columns. What is done beside knows of no masks, and is inlined
/// with all of this, so that what it has come to stays in registers.
template <class X, class Beside>
NORMKIT_LOCAL void span_columns_beside(const Task& t, std::int64_t o, std::int64_t span, double* memory,
                                       ColumnMoments<ScalarOf<X>> out, Beside& beside) {
  using S = ScalarOf<X>;
  const Geometry& g = t.geometry;
  const std::int64_t begin = span_begin(span), end = span_end(g, span), columns = g.columns();
  const PivotSums<S> sums(memory, array_of_columns(g));
  const F64 zero = broadcast<F64>(0.0), steps = broadcast<F64>(static_cast<double>(end - begin));
  for (std::int64_t k = 0; k < whole_vectors(columns); k += kLanes<F64>)
    store(sums.sum + k, zero), store(sums.squares + k, zero), store(sums.members + k, t.where.data ? zero : steps);
  for (std::int64_t k = 0; k < whole_vectors(columns); k += kLanes<VectorOf<S>>)
    store(sums.pivot + k, broadcast<VectorOf<S>>(S(0)));
  const std::int64_t ahead = block_ahead<X>(g, t.x);
  const bool scans = t.residual.data && t.where.data;  // the first members are looked for in the whole span
  if (scans) form_sum<X>(t, o, begin, 0, end - begin, 0, columns);
  std::int64_t first = begin;
  if (turns_columns(t)) {
    constexpr bool kBytes = __is_same(X, std::uint8_t);
    const std::int64_t whole_blocks = (end - begin) / kBlockSteps * kBlockSteps,
                       each = kBytes && !t.where.data ? whole_blocks : Turned<S>::kSteps;
    for (; each > 0 && end - first >= each; first += each) {
      const Tile<X> tile{at<X>(t.x, o, first, 0), t.x.strides.step, each, columns};
      if (t.residual.data && !scans) form_sum<X>(t, o, first, 0, each, 0, columns);
      with_members(t, o, first, 0, 0, [&](const auto& members) {
        if (first == begin && t.centered)
          first_pivots(Tile<X>{tile.x, tile.stride, end - begin, columns}, Count<1>{}, sums.pivot, members);
        if constexpr (kBytes)
          if (!t.where.data) return add_bytes(tile, sums);
        Turned<S> turned;
        read_turned(tile.x, tile.stride, columns, turned);
        with_turned<S>(members, columns, [&](const auto& those) { add_turned(turned, columns, those, sums); });
      });
    }
  }
  for_blocks(first, end, [&](std::int64_t step, std::int64_t rows) NORMKIT_INLINE_LAMBDA {
    if (t.residual.data && !scans) form_sum<X>(t, o, step, 0, rows, 0, columns);
    for_tiles<X>(columns, [&](auto vectors, std::int64_t k, std::int64_t n) NORMKIT_INLINE_LAMBDA {
      const Tile<X> tile{at<X>(t.x, o, step, 0) + k, t.x.strides.step, rows, n, ahead};
      const auto add = [&](const auto& members) NORMKIT_INLINE_LAMBDA {
        if (step == begin && t.centered)
          first_pivots(Tile<X>{tile.x, tile.stride, end - begin, n}, vectors, sums.pivot + k, members);
        add_block(tile, vectors, sums, k, members, beside);
      };
      if constexpr (__is_same(Beside, Nothing))
        with_members(t, o, step, 0, k, [&](const auto& members) { add(members); });
      else add(Everyone{});
    });
  });
  if (!t.centered)  // pivots are 0, and so are sums, as far as moments go: no loop need ask, and all become vectors
    for (std::int64_t k = 0; k < columns; ++k) sums.sum[k] = 0;
  std::int64_t doubts = 0;
  const auto solve = [&](auto members) NORMKIT_INLINE_LAMBDA {
    for (std::int64_t k = 0; k < columns; ++k) {
      const double s = sums.sum[k], q = sums.squares[k], n = members(k);
      out.set(k, from_pivot<S>(static_cast<double>(sums.pivot[k]), s, q, n));
      doubts |= doubtful<S>(s, q, n);
    }
  };
  // The compiler makes vectors of a loop whose n it knows not to be 0.
  const double n = static_cast<double>(end - begin);
  if (t.where.data) solve([&](std::int64_t k) { return sums.members[k]; });
  else if (n > 0) solve([=](std::int64_t) { return n; });
  if (doubts) mend_columns<S>(t, o, begin, end, sums, out);
}
template <class X>
[[gnu::noinline]] void span_columns(const Task& t, std::int64_t o, std::int64_t span, double* memory,
                                    ColumnMoments<ScalarOf<X>> out) {
  Nothing alone;
  span_columns_beside<X>(t, o, span, memory, out, alone);
}

/// Statistics that are solved side by side, so that loops over them become vectors.
constexpr int kSolved = 8;

/// Their moments, one array a quantity. What lies past the last lane is 0.
struct FoldedLanes {
  alignas(64) double mean[kSolved], low[kSolved], m2[kSolved], n[kSolved];
  template <class S> NORMKIT_LOCAL Moments<S> at(int j) const { return moments_of<S>(mean[j], low[j], m2[j], n[j]); }
  template <class S> NORMKIT_LOCAL void set(int j, const Moments<S>& m) {
    mean[j] = m.mean, low[j] = low_of(m), m2[j] = m.m2, n[j] = m.n;
  }
};

/// Merges the moments of the columns of `count` statistics from `lane` on, each its own, of `run` columns. kSteps: all columns have
/// `steps` members, so that what a merge divides by is the same for all statistics.
template <bool kSteps, class S>
NORMKIT_LOCAL void fold_columns(std::int64_t lane, int count, std::int64_t run, double steps, ColumnMoments<S> columns,
                                FoldedLanes& folded) {
  const std::int64_t first = lane * run;
  for (int j = 0; j < kSolved; ++j) folded.set(j, j < count ? columns.at(first + j * run) : moments_of<S>(0, 0, 0, 0));
  for (std::int64_t i = 1; i < run; ++i) {
    const double before = static_cast<double>(i) * steps;
    for (int j = 0; j < count; ++j) {
      Moments<S> all = folded.at<S>(j), column = columns.at(first + j * run + i);
      if (kSteps) all.n = before, column.n = steps;
      folded.set(j, merge(all, column));
    }
  }
}

/// The statistics of `count` lanes from `lane` on.
template <class S>
[[gnu::noinline]] void lane_statistics(const Task& t, std::int64_t o, std::int64_t lane, int count,
                                       ColumnMoments<S> columns, RowStatistics<kSolved>& found) {
  const Geometry& g = t.geometry;
  const std::int64_t first = o * g.lanes + lane;
  if (t.frozen) return given_statistics(t, first, count, found);
  FoldedLanes folded;
  const double steps = static_cast<double>(g.steps);
  // The compiler makes vectors of loops if it knows how long they are and where their numbers lie.
  if (t.where.data) fold_columns<false>(lane, count, g.run, steps, columns, folded);
  else if (count < kSolved) fold_columns<true>(lane, count, g.run, steps, columns, folded);
  else if (g.run == 1) fold_columns<true>(lane, kSolved, 1, steps, columns, folded);
  else fold_columns<true>(lane, kSolved, g.run, steps, columns, folded);
  if (!t.where.data) find_rstd(t.denominator, static_cast<double>(g.members()), folded.m2, found.rstd);
  for (int j = 0; t.where.data && j < kSolved; ++j) found.rstd[j] = rstd_of(folded.at<S>(j), t.denominator);
  for (int j = 0; j < kSolved; ++j) found.mean[j] = folded.mean[j], found.low[j] = folded.low[j];
  if (t.mean || t.rstd || t.moments)
    for (int j = 0; j < count; ++j) publish(t, first + j, folded.at<S>(j), found.rstd[j]);
}

/// The parameter of one column after the other, without a division for each. Where weights follow the elements there is none.
class ColumnParameter {
 public:
  ColumnParameter(const Task& t, std::int64_t o)
      : by_column_(constant_in_column(t.geometry)),
        outer_(o * t.geometry.params.outer),
        index_(t.geometry.offset(o, 0, 0, 0), t.geometry.params.stride, t.geometry.params.count) {}
  std::int64_t index() const { return outer_ + *index_; }
  double of(const Param& p, double absent) const { return by_column_ ? element(p, index(), absent) : absent; }
  void next() { index_.next(); }
  /// True where all columns of a lane share a parameter.
  bool is_of_lanes(const Geometry& g) const {
    return !by_column_ || g.params.count == 1 || g.params.stride % g.run == 0;
  }
  /// A parameter of `count` lanes from this one on, of which each has one.
  [[gnu::noinline]] void of_lanes(const Geometry& g, int count, const Param& p, double absent,
                                  double (&values)[kSolved]) const {
    for (double& value : values) value = absent;
    if (!p.data || !by_column_) return;
    if (g.run == 1 && g.params.stride == 1 && *index_ + kSolved <= g.params.count && p.dtype == Dtype::float32) {
      const float* from = at<float>(p.data, index());  // in vectors
      for (int j = 0; j < kSolved; ++j) values[j] = p.offset + static_cast<double>(from[j]);
      return;
    }
    ColumnParameter next = *this;
    for (int j = 0; j < count; ++j, next.skip_lanes(g, 1)) values[j] = element(p, next.index(), absent);
  }
  void skip_lanes(const Geometry& g, int count) {
    for (int j = 0; j < count; ++j) index_.skip(g.run);
  }

 private:
  bool by_column_;
  std::int64_t outer_;
  CyclicIndex index_;
};

/// The factors of z = x_hat * weight + bias for one column; where weights follow the elements, the factors of x_hat.
template <class S>
NORMKIT_LOCAL Affine<S> column_affine(const Task& t, const ColumnParameter& parameter, Statistic<S> s) {
  return forward_affine(s, parameter.of(t.weight, 1), parameter.of(t.bias, 0));
}

/// Writes n times the same value.
template <class S> NORMKIT_LOCAL void fill(S* to, std::int64_t n, S value) {
  for (std::int64_t i = 0; i < n; ++i) to[i] = value;
}

/// Writes what is known of `count` lanes from `lane` on to each of their columns. There is room behind the last one.
template <class S>
[[gnu::noinline]] void put_lanes(const Geometry& g, std::int64_t lane, int count, const S (&values)[kSolved],
                                 S* columns) {
  for (int j = 0; g.run == 1 && j < kSolved; ++j) columns[lane + j] = values[j];
  for (int j = 0; g.run > 1 && j < count; ++j) fill(columns + (lane + j) * g.run, g.run, values[j]);
}

/// Repeats the columns in arrays of a table up to the end of each array, or, where all steps are short together, a vector or two.
template <class S, int kArrays> NORMKIT_LOCAL void repeat_columns(const Geometry& g, S* const (&arrays)[kArrays]) {
  constexpr std::int64_t kWidth = kLanes<VectorOf<S>>;
  const std::int64_t columns = g.columns(), first = ceil_div(kWidth, columns) * columns;
  const std::int64_t end = g.steps * columns <= first ? first : array_of_columns(g);
  for (S* array : arrays) {
    for (std::int64_t k = columns; k < first; ++k) array[k] = array[k - columns];
    for (std::int64_t k = first; k < end; k += kWidth) {
      const std::int64_t at = least(k, end - kWidth);
      store(array + at, load(array + at - first));
    }
  }
}

/// Makes statistics of the moments of columns, and the table that apply reads.
template <class S> void lanes_finish(const Task& t, std::int64_t o, ColumnMoments<S> columns, Table<S> table) {
  const Geometry& g = t.geometry;
  ColumnParameter parameter(t, o);
  for (std::int64_t lane = 0; lane < g.lanes; lane += kSolved) {
    const int count = static_cast<int>(least(kSolved, g.lanes - lane));
    RowStatistics<kSolved> found;
    lane_statistics(t, o, lane, count, columns, found);
    if (parameter.is_of_lanes(g)) {
      alignas(64) double weight[kSolved], bias[kSolved], slope_value[kSolved];
      alignas(64) S mean[kSolved], scale[kSolved], shift[kSolved], slope[kSolved];
      parameter.of_lanes(g, count, t.weight, 1, weight), parameter.of_lanes(g, count, t.bias, 0, bias);
      parameter.of_lanes(g, count, t.slopes, 1, slope_value), parameter.skip_lanes(g, count);
      for (int j = 0; j < kSolved; ++j) {
        const Statistic<S> s = found.template at<S>(j);
        const Affine<S> affine = forward_affine(s, weight[j], bias[j]);
        mean[j] = s.mean, scale[j] = affine.scale, shift[j] = affine.shift;
        slope[j] = static_cast<S>(slope_value[j]);
      }
      put_lanes(g, lane, count, mean, table.mean), put_lanes(g, lane, count, scale, table.a);
      put_lanes(g, lane, count, shift, table.b);
      put_lanes(g, lane, count, slope, table.slope);
      continue;
    }
    for (std::int64_t k = lane * g.run; k < (lane + count) * g.run; ++k, parameter.next()) {
      const Statistic<S> s = found.template at<S>(static_cast<int>(k / g.run - lane));
      const Affine<S> affine = column_affine(t, parameter, s);
      table.mean[k] = s.mean, table.a[k] = affine.scale, table.b[k] = affine.shift;
      table.slope[k] = static_cast<S>(parameter.of(t.slopes, 1));
    }
  }
  repeat_columns(g, {table.mean, table.a, table.b, table.slope});
}

/// Bytes that apply runs ahead of itself where it reads from memory.
constexpr std::int64_t kApplyAhead = 16384;

/// What is fetched while a step is applied: the step of `from` that is `shift` later, in outer index `o`.
struct NextSteps {
  const Operand& from;
  std::int64_t o, shift;
};
/// Chooses what is fetched while a span is applied. Where slabs fit the caches, x is in them already, so the next slab
/// is fetched; else what this pass reads next. Where all arrays are in a cache, it is what is being read: to fetch more takes
/// a fifth longer.
template <class X> NORMKIT_LOCAL NextSteps fetch_for(const Task& t, std::int64_t o, std::int64_t span, bool last) {
  if (t.walk.fetch_bytes == 0) return {t.x, o, 0};
  const Operand& from = t.residual.data ? t.source : t.x;
  const std::int64_t step_bytes = t.geometry.columns() * static_cast<std::int64_t>(sizeof(X));
  if (!t.frozen && !last && span_begin(span) * step_bytes < t.walk.fetch_bytes) return {from, o + 1, 0};
  return {t.x, o, ceil_div(kApplyAhead, step_bytes)};
}

/// True where steps lie one behind the other and only the table tells them apart.
template <int kOperands>
NORMKIT_LOCAL bool one_walk(const Geometry& g, const Operand* const (&operands)[kOperands]) {
  bool dense = constant_in_column(g);
  for (const Operand* a : operands) dense &= !a->data || a->strides.step == g.columns();
  return dense;
}

/// Calls f(step, first column, elements) for steps [begin, end): for many steps at once where they lie `dense`, else
/// for each step; where they are `buffered`, for pieces that fit a buffer.
template <class F>
NORMKIT_LOCAL void for_walks(const Geometry& g, std::int64_t begin, std::int64_t end, bool dense, bool buffered, F f) {
  const std::int64_t columns = g.columns(), most = buffered ? kBuffer / columns : end - begin;
  const std::int64_t steps = dense && most > 1 ? most : 1, piece = buffered && steps == 1 ? kBuffer : steps * columns;
  for (std::int64_t step = begin; step < end; step += steps) {
    const std::int64_t n = least(steps, end - step) * columns;
    for (std::int64_t k = 0; k < n; k += piece) f(step, k, least(piece, n - k));
  }
}

/// The place in the table of each element of a walk, where elements come one after the other.
struct Round {
  std::int64_t period, begin = 0;
  template <class P> NORMKIT_LOCAL P operator()(P place) {
    if (place.i - begin >= period) begin += period;
    return place.back(begin);
  }
};

/// The slopes of prelu for n elements of a walk, where whole vectors can be read; null of other activations. `columns`: those of the
/// table from its first column on.
template <class S>
[[gnu::noinline]] const S* walk_slopes(const Task& t, const S* columns, std::int64_t parameter, std::int64_t n,
                                       ParamBuffer<S>& slopes) {
  if (!t.slopes.data) return nullptr;
  if (!constant_in_column(t.geometry)) return slopes.copy(t.slopes, parameter, n, 1);
  const std::int64_t period = table_period(t.geometry);
  for (std::int64_t begin = 0; begin < n; begin += period)
    for (std::int64_t i = begin; i < least(n, begin + period); ++i) slopes.value[i] = columns[i - begin];
  return slopes.value;
}

/// Vectors after which columns that are few come again, so that what is known of them stays in registers: from x to y of the dtypes
/// that go in batches too, to spare the others' loops.
constexpr int kHeld = 3;
template <class X, class Y> constexpr bool kHolds = kWide && goes_in_batches(kDtypeOf<X>, kDtypeOf<Y>);

/// Elements [begin, end) of a walk.
struct Stretch { std::int64_t begin, end; };

/// Writes y of those of n elements that are whole vectors on whole lines of memory, where columns can be held. The walk begins with
/// the first column.
template <class X, class Y>
[[gnu::noinline]] Stretch write_held(const X* x, Y* y, std::int64_t n, Table<ScalarOf<X>> table, std::int64_t period,
                                     const X* ahead, bool streamed) {
  using V = VectorOf<X>;
  constexpr std::int64_t kWidth = kLanes<V>, kEach = kHeld * kWidth, kLine = Streamer<Y>::kLine;
  const auto past = static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(y) % 64 / sizeof(Y));
  const std::int64_t begin = least(n, past ? kLine - past : 0), end = begin + (n - begin) / kEach * kEach;
  V mean[kHeld], scale[kHeld], shift[kHeld];
  for (int k = 0; k < kHeld; ++k) {
    const Full here{begin % period + k * kWidth};
    mean[k] = here.load(table.mean), scale[k] = here.load(table.a), shift[k] = here.load(table.b);
  }
  for (std::int64_t i = begin; i < end; i += kEach)
    for (int k = 0; k < kHeld; ++k) {
      const Full here{i + k * kWidth};
      prefetch_place(ahead, here);
      put(y + here.i, forward(here.load(x), mean[k], scale[k], shift[k]), streamed);
    }
  return {begin, end};
}

template <class X, class Y>
void lanes_forward_span(const Task& t, std::int64_t o, std::int64_t span, Table<ScalarOf<X>> table, NextSteps fetch,
                        Streamer<Y>* streamer) {
  using S = ScalarOf<X>;
  const Geometry& g = t.geometry;
  const std::int64_t begin = span_begin(span), end = span_end(g, span);
  const bool by_column = constant_in_column(g);
  const bool curved = is_curved(t.activation), rectified = is_relu(t.activation);
  if (t.residual.data && t.frozen) form_sum<X>(t, o, begin, 0, end - begin, 0, g.columns());
  ParamBuffer<S> weights, biases, slopes;
  for_walks(g, begin, end, one_walk(g, {&t.x, &t.y}), curved || !by_column,
            [&](std::int64_t step, std::int64_t k, std::int64_t n) NORMKIT_INLINE_LAMBDA {
    const X *x = at<X>(t.x, o, step, 0) + k, *ahead = at<X>(fetch.from, fetch.o, step + fetch.shift, 0) + k;
    const S *mean = table.mean + k, *scale = table.a + k, *shift = table.b + k, *weight = nullptr, *bias = nullptr;
    const std::int64_t parameter = by_column ? 0 : g.parameter(o, g.offset(o, step, 0, 0)) + k;
    if (!by_column) {
      weight = weights.read(t.weight, parameter, n, 1), bias = biases.read(t.bias, parameter, n, 0);
    }
    Y* const y = at<Y>(t.y, o, step, 0) + k;
    const auto constant_from = [=](std::int64_t begin) NORMKIT_INLINE_LAMBDA {
      const std::int64_t period = table_period(g);
      Round round{period, begin ? -(begin % period) : 0};
      return [=, x = x + begin, ahead = ahead + begin] [[gnu::always_inline]] (auto place) mutable {
        prefetch_place(ahead, place);
        const auto column = round(place);
        return forward(place.load(x), column.load(mean), column.load(scale), column.load(shift));
      };
    };
    if (by_column && !curved && !rectified) {
      Stretch held{n, n};
      if constexpr (kHolds<X, Y>) {
        if (k == 0 && kHeld * kLanes<VectorOf<X>> % g.columns() == 0)
          held = write_held(x, y, n, table, table_period(g), ahead, t.walk.stream_stores);
      }
      for (Stretch rest{0, held.begin};; rest = {held.end, n}) {  // what comes before whole lines, and after
        if (rest.begin < rest.end)
          map(y + rest.begin, rest.end - rest.begin, streamer, Fetch{}, constant_from(rest.begin));
        if (rest.end == n) return;
      }
    }
    auto constant = constant_from(0);
    auto any = [=] [[gnu::always_inline]] (auto place) mutable {
      VectorOf<X> z = constant(place);
      if (!by_column) z = mul_add(z, place.load(weight), place.load(bias));
      return rectified ? relu(z) : z;
    };
    if (!curved) return map(y, n, streamer, Fetch{}, any);
    alignas(64) S value[kBuffer];
    map(value, n, kPlain<S>, Fetch{}, any);
    activate_all(t.activation, walk_slopes(t, table.slope + k, parameter, n, slopes), value, n);
    put_all<Y, S>(value, y, n, streamer, Fetch{});
  });
}

/// Moments of all columns of one outer index. `memory`: twelve arrays of columns, of which the first will hold them.
template <class X, class Beside>
NORMKIT_LOCAL ColumnMoments<ScalarOf<X>> outer_columns(const Task& t, std::int64_t o, double* memory, Beside& beside) {
  const std::int64_t columns = array_of_columns(t.geometry), spans = chunks_of(t.geometry, Traversal::lanes).spans;
  using Columns = ColumnMoments<ScalarOf<X>>;
  const Columns all(memory, columns), part(memory + Columns::kArrays * columns, columns);
  for (std::int64_t span = 0; span < spans; ++span) {
    const Columns out = span == 0 ? all : part;
    double* const sums = memory + 2 * Columns::kArrays * columns;
    if constexpr (__is_same(Beside, Nothing)) span_columns<X>(t, o, span, sums, out);
    else span_columns_beside<X>(t, o, span, sums, out, beside);
    if (span > 0) merge_columns(all, part, t.geometry.columns());
  }
  return all;
}

/// Bytes that the slab being written is fetched ahead. Group norm (8, 320, 64, 64): 1.84 of a copy without, 1.7 with, 4 KB 1.75.
constexpr std::int64_t kBesideAhead = 2048;

/// A BesideWriter for an outer index whose steps lie one behind the other and whose parameters belong to columns.
template <class X> class BesideLanesWriter {
  using S = ScalarOf<X>;
  static constexpr int kWidth = kLanes<VectorOf<X>>, kBlock = kTile * kWidth;

 public:
  BesideLanesWriter(const Task& t, std::int64_t o, Table<S> table, Streamer<X>& streamer)
      : table_(table),
        streamer_(streamer),
        x_(at<X>(t.x, o, 0, 0)),
        y_(at<X>(t.y, o, 0, 0)),
        period_(table_period(t.geometry)),
        n_(t.geometry.steps * t.geometry.columns()) {
    const std::int64_t past = static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(y_) % 64 / sizeof(X));
    if (past) write(least(n_, Streamer<X>::kLine - past));
  }

  NORMKIT_LOCAL void block() {
    if (i_ + kBlock > n_) return;
    const X* const x = x_;
    X* const y = y_;
    const std::int64_t i = i_, column = column_;
    const S *const mean = table_.mean + column, *const scale = table_.a + column, *const shift = table_.b + column;
    for (int line = 0; line < kBlock * static_cast<int>(sizeof(X));
         line += 64)  // a slab may have left the caches meanwhile
      prefetch_both(reinterpret_cast<const char*>(x + i) + kBesideAhead + line);
    for (int k = 0; k < kBlock; k += kWidth)
      stream(y + i + k, forward(load(x + i + k), load(mean + k), load(scale + k), load(shift + k)));
    i_ = i + kBlock, column_ = column + kBlock < period_ ? column + kBlock : column + kBlock - period_;
  }

  /// Writes the outputs that are left.
  void finish() { write(n_); }

 private:
  using V = VectorOf<X>;
  /// Writes the outputs up to element `end`.
  [[gnu::noinline]] void write(std::int64_t end) {
    const std::int64_t begin = i_;
    Round round{period_, begin - column_};
    map(y_ + begin, end - begin, &streamer_, Fetch{}, [&](auto place) NORMKIT_INLINE_LAMBDA {
      const auto here = place.back(-begin), column = round(here);
      return forward(here.load(x_), column.load(table_.mean), column.load(table_.a), column.load(table_.b));
    });
    i_ = end, column_ = (column_ + end - begin) % period_;
  }

  const Table<S> table_;
  Streamer<X>& streamer_;
  const X* const x_;
  X* const y_;
  const std::int64_t period_, n_;
  std::int64_t i_ = 0, column_ = 0;  // the next element, and its column in the table
};

/// Forward, for outer indices [begin, end): each is written while the next one is read.
template <class X>
void lanes_forward_overlapped(const Task& t, std::int64_t begin, std::int64_t end, double* scratch) {
  const std::int64_t columns = array_of_columns(t.geometry);
  Table<ScalarOf<X>> table(scratch + 12 * columns, columns), next(scratch + (12 + kTableColumns) * columns, columns);
  Streamer<X> streamer;
  Nothing alone;
  lanes_finish(t, begin, outer_columns<X>(t, begin, scratch, alone), table);
  for (std::int64_t o = begin; o < end; ++o) {
    BesideLanesWriter<X> writer(t, o, table, streamer);
    if (o + 1 < end) lanes_finish(t, o + 1, outer_columns<X>(t, o + 1, scratch, writer), next);
    writer.finish();
    const Table<ScalarOf<X>> written = table;
    table = next, next = written;
  }
}

template <class X, class Y> void lanes_forward(const Task& t, std::int64_t begin, std::int64_t end, double* scratch) {
  if constexpr (kWide && kFloating<X> && __is_same(X, Y)) {
    if (t.walk.overlapped) return lanes_forward_overlapped<X>(t, begin, end, scratch);
  }
  const Chunks c = chunks_of(t.geometry, Traversal::lanes);
  const std::int64_t columns = array_of_columns(t.geometry);
  const Table<ScalarOf<X>> table(scratch + 12 * columns, columns);
  Streamer<Y> streamer;
  Nothing alone;
  for (std::int64_t o = begin; o < end; ++o) {
    const auto found = [&] { return outer_columns<X>(t, o, scratch, alone); };
    lanes_finish(t, o, t.frozen ? ColumnMoments<ScalarOf<X>>(scratch, columns) : found(), table);
    if (t.phase == Phase::reduce) continue;
    for_spans(t, 0, c.spans, [&](std::int64_t span) {
      lanes_forward_span<X, Y>(t, o, span, table, fetch_for<X>(t, o, span, o + 1 == end),
                               t.walk.stream_stores ? &streamer : nullptr);
    });
  }
}

template <class X>
void lanes_forward_sums(const Task& t, std::int64_t begin, std::int64_t end, double* scratch) {
  const Chunks c = chunks_of(t.geometry, Traversal::lanes);
  const std::int64_t columns = whole_vectors(t.geometry.columns());
  using Columns = ColumnMoments<ScalarOf<X>>;
  for (std::int64_t unit = begin; unit < end; ++unit)
    span_columns<X>(t, unit / c.spans, unit % c.spans, scratch,
                    Columns(t.partials + Columns::kArrays * columns * unit, columns));
}

template <class X> void lanes_forward_finish(const Task& t, std::int64_t begin, std::int64_t end) {
  const Chunks c = chunks_of(t.geometry, Traversal::lanes);
  const std::int64_t columns = array_of_columns(t.geometry), of_part = whole_vectors(t.geometry.columns());
  using Columns = ColumnMoments<ScalarOf<X>>;
  const std::int64_t of_span = Columns::kArrays * of_part;
  for (std::int64_t o = begin; o < end; ++o) {
    double* part = t.partials + of_span * o * c.spans;
    const Columns all(part, of_part);
    for (std::int64_t span = 1; span < (t.frozen ? 0 : c.spans); ++span)
      merge_columns(all, Columns(part + of_span * span, of_part), t.geometry.columns());
    lanes_finish(t, o, all, Table<ScalarOf<X>>(t.solved + kTableColumns * columns * o, columns));
  }
}

template <class X, class Y> void lanes_forward_apply(const Task& t, std::int64_t begin, std::int64_t end) {
  const Chunks c = chunks_of(t.geometry, Traversal::lanes);
  const std::int64_t columns = array_of_columns(t.geometry);
  Streamer<Y> streamer;
  for_spans(t, begin, end, [&](std::int64_t unit) {
    const std::int64_t o = unit / c.spans, span = unit % c.spans;
    lanes_forward_span<X, Y>(t, o, span, Table<ScalarOf<X>>(t.solved + kTableColumns * columns * o, columns),
                             fetch_for<X>(t, o, span, true), t.walk.stream_stores ? &streamer : nullptr);
  });
}

}  // namespace
}  // namespace normkit
