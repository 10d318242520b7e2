// What both traversals share: statistics and parameters in, pieces of constant parameters, elementwise walks.
#pragma once

namespace normkit {
namespace {

/// Which loops are compiled for this instruction set; policy.cpp asks for no other.
constexpr bool kHoldsRows = can_hold_rows(kHeldVectors), kWide = is_wide(kHeldVectors);

/// A number of vectors that the compiler knows.
template <int kValue> struct Count { static constexpr int value = kValue; };

/// Bytes that a reader runs ahead of itself, so that its loads find the first-level cache filled.
constexpr std::int64_t kAhead = 4096;

NORMKIT_LOCAL void prefetch_first(const char* p) { __builtin_prefetch(p, 0, 3); }
NORMKIT_LOCAL void prefetch_second(const char* p) { __builtin_prefetch(p, 0, 2); }
/// Fetches a line into the first-level cache, and one further on into the second, where more fetches are under way at once: for
/// loops that read and write at once. (8, 64, 128, 128): 1.25 of a copy, without the second 1.8 (Zen 4).
NORMKIT_LOCAL void prefetch_both(const char* p) { prefetch_first(p), prefetch_second(p + kFarAhead); }

/// Fetches other memory while a range is walked, as many bytes as are walked, so that memory is never idle: into the first-level
/// cache what follows soon, into the second, where more fetches are under way at once, what follows later.
struct Fetch {
  const char *near = nullptr, *far = nullptr;  // what is fetched at the first element of the range; null: nothing is

  NORMKIT_LOCAL Fetch at(std::int64_t byte) const { return {near ? near + byte : nullptr, far ? far + byte : nullptr}; }
  template <int kBytes> NORMKIT_LOCAL void block(std::int64_t byte) const {
    for (int line = 0; near && line < kBytes; line += 64) prefetch_first(near + byte + line);
    for (int line = 0; far && line < kBytes; line += 64) prefetch_second(far + byte + line);
  }
  /// Fetches both without asking, which would cost up to a tenth.
  template <int kBytes> NORMKIT_LOCAL void block_of_both(std::int64_t byte) const {
    for (int line = 0; line < kBytes; line += 64)
      prefetch_first(near + byte + line), prefetch_second(far + byte + line);
  }
};
/// How far fetches into the second-level cache run ahead, where it is usual that they run so far.
NORMKIT_LOCAL std::int64_t far_or_next(std::int64_t far, std::int64_t next) { return next ? next : far; }
/// Fetches far ahead alone.
NORMKIT_LOCAL Fetch far_fetch(const void* from, std::int64_t bytes) {
  return {nullptr, static_cast<const char*>(from) + bytes};
}

NORMKIT_LOCAL void copy(const double* from, std::int64_t n, double* to) {
  for (std::int64_t i = 0; i < n; ++i) to[i] = from[i];
}

/// What is known of a statistic before its outputs are written.
template <class S> struct Solved {
  Statistic<S> statistic;
  Gradient<S> gradient;
};

template <class T> NORMKIT_LOCAL T* at(std::byte* base, std::int64_t index) {
  return reinterpret_cast<T*>(base) + index;
}
template <class T> NORMKIT_LOCAL const T* at(const std::byte* base, std::int64_t index) {
  return reinterpret_cast<const T*>(base) + index;
}
NORMKIT_LOCAL std::int64_t index_at(const Operand& a, std::int64_t o, std::int64_t step, std::int64_t lane) {
  return o * a.strides.outer + step * a.strides.step + lane * a.strides.lane;
}
template <class T> NORMKIT_LOCAL T* at(const Operand& a, std::int64_t o, std::int64_t step, std::int64_t lane) {
  return at<T>(a.data, index_at(a, o, step, lane));
}

NORMKIT_LOCAL double scalar(float v) { return v; }
NORMKIT_LOCAL double scalar(double v) { return v; }
NORMKIT_LOCAL double scalar(Half v) { return widen(v); }
NORMKIT_LOCAL double scalar(Bfloat v) { return widen(v); }

/// Element `index` of a parameter or statistic array of any floating type.
double element(const std::byte* data, Dtype dtype, std::int64_t index) {
  switch (dtype) {
    case Dtype::float64: return *at<double>(data, index);
    case Dtype::float16: return scalar(*at<Half>(data, index));
    case Dtype::bfloat16: return scalar(*at<Bfloat>(data, index));
    default: return *at<float>(data, index);
  }
}
NORMKIT_LOCAL double element(const Param& p, std::int64_t index, double absent) {
  if (!p.data) return absent;
  return p.offset + (p.dtype == Dtype::float32 ? *at<float>(p.data, index) : element(p.data, p.dtype, index));
}

/// What is given of one statistic; what is absent is 0.
struct GivenValues { double mean, low, scale; };
NORMKIT_LOCAL GivenValues given_at(const Given& given, std::int64_t index) {
  return {given.mean ? element(given.mean, given.mean_dtype, index) : 0,
          given.mean_low ? element(given.mean_low, given.low_dtype, index) : 0,
          element(given.scale, given.scale_dtype, index)};
}
template <class S> Statistic<S> given_statistic(const Task& t, std::int64_t statistic) {
  const GivenValues values = given_at(t.given, statistic / t.given.stride % t.given.count);
  return statistic_of<S>(values.mean, sizeof(S) == 8 ? values.low : 0, values.scale);
}

/// Statistics that are solved side by side, so that loops over them become vectors. What lies past the last one is 0.
template <int kRows> struct RowStatistics {
  alignas(64) double mean[kRows], low[kRows], rstd[kRows];
  template <class S> NORMKIT_LOCAL Statistic<S> at(int k) const {
    return statistic_of<S>(mean[k], sizeof(S) == 8 ? low[k] : 0, rstd[k]);
  }
};

/// Given statistics, `rows` of them from `first` on.
template <int kRows>
[[gnu::noinline]] void given_statistics(const Task& t, std::int64_t first, int rows, RowStatistics<kRows>& s) {
  for (int k = 0; k < kRows; ++k) s.mean[k] = s.low[k] = s.rstd[k] = 0;
  CyclicIndex index(first, t.given.stride, t.given.count);
  for (int k = 0; k < rows; ++k, index.next()) {
    const GivenValues values = given_at(t.given, *index);
    s.mean[k] = values.mean, s.low[k] = values.low, s.rstd[k] = values.scale;
  }
}

/// 1/std of statistics from their m2 and their members, n of them each. The compiler makes vectors of the loop, as it knows which
/// denominator that is, and that n is not 0.
template <int kRows>
NORMKIT_LOCAL void find_rstd(Denominator denominator, double n, const double (&m2)[kRows], double (&rstd)[kRows]) {
  const auto find = [&](Denominator d) NORMKIT_INLINE_LAMBDA {
    if (n == 0) return;
    for (int k = 0; k < kRows; ++k) rstd[k] = rstd_of(moments_of<double>(0, 0, m2[k], n), d);
  };
  denominator.is_norm ? find({denominator.eps, true}) : find({denominator.eps, false});
}

/// Hands the moments of a statistic out: to the arrays that were asked for, and to the caller.
template <class S>
NORMKIT_LOCAL Statistic<S> publish(const Task& t, std::int64_t statistic, const Moments<S>& m, double rstd) {
  if (t.mean) *at<S>(t.mean, statistic) = static_cast<S>(m.mean);
  if (t.rstd) *at<S>(t.rstd, statistic) = nearest<S>(rstd);
  if (t.moments) put_moments(moments_of<double>(m), t.moments + kMomentDoubles<double> * statistic);
  return statistic_of<S>(m, rstd);
}
template <class S> NORMKIT_LOCAL Statistic<S> publish(const Task& t, std::int64_t statistic, const Moments<S>& m) {
  return publish<S>(t, statistic, m, rstd_of(m, t.denominator));
}

/// Integers are read, but never written.
template <class X>
constexpr bool kFloating = sizeof(X) > 1 && !__is_same(X, std::uint16_t) && !__is_same(X, std::int16_t);

/// visit() for the dtypes that kernels read.
template <class F> void visit_read(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::float64: return f(Type<double>{});
    case Dtype::float16: return f(Type<Half>{});
    case Dtype::bfloat16: return f(Type<Bfloat>{});
    case Dtype::uint8: return f(Type<std::uint8_t>{});
    case Dtype::uint16: return f(Type<std::uint16_t>{});
    case Dtype::int16: return f(Type<std::int16_t>{});
    default: return f(Type<float>{});
  }
}

/// A part of a run whose parameters are one (`linear` false) or follow the elements.
struct Piece {
  std::int64_t begin, n;      // elements of the run
  std::int64_t parameter;     // of the first element
  bool linear;
};

/// The piece that begins with element i of a run that starts at `offset`; it ends at `end` at the latest, and has no more than
/// `limit` elements.
NORMKIT_LOCAL Piece piece_at(const Geometry& g, std::int64_t o, std::int64_t offset, std::int64_t i, std::int64_t end,
                             std::int64_t limit) {
  const ParamMap& p = g.params;
  const bool linear = follows_elements(g);
  const std::int64_t here = offset + i, group = here / p.stride, index = group % p.count;
  const std::int64_t left = linear ? p.count - index : (group + 1) * p.stride - here;
  return {i, least(p.count == 1 ? end - i : least(left, end - i), limit), o * p.outer + index, linear};
}

/// Walks the pieces of [begin, end) of a run that starts at `offset`. None is longer than `limit`.
template <class F>
NORMKIT_LOCAL void for_pieces(const Task& t, std::int64_t o, std::int64_t offset, std::int64_t begin, std::int64_t end,
                              std::int64_t limit, F f) {
  for (std::int64_t i = begin; i < end;) {
    const Piece piece = piece_at(t.geometry, o, offset, i, end, limit);
    f(piece);
    i += piece.n;
  }
}

/// Parameters along the elements, in the compute type: where they lie already if they can be read there, else converted a
/// buffer at a time.
constexpr std::int64_t kBuffer = 512;
/// The most of them that are read at once.
constexpr std::int64_t kMostParams = 1024;
/// One number kMostParams times.
template <class T> struct Filled {
  T value[kMostParams];
  explicit constexpr Filled(T of) : value() {
    for (T& v : value) v = of;
  }
};
template <class T> alignas(64) constexpr Filled<T> kZeros(0);
template <class T> alignas(64) constexpr Filled<T> kOnes(1);

template <class S, std::int64_t kRoom = kBuffer> struct ParamBuffer {
  static_assert(kRoom <= kMostParams);
  alignas(64) S value[kRoom];

  /// True where any number of them can be read.
  static bool reads_in_place(const Param& p) {
    return p.data && p.offset == 0 && p.dtype == (sizeof(S) == 8 ? Dtype::float64 : Dtype::float32);
  }
  const S* read(const Param& p, std::int64_t index, std::int64_t n, S absent) {
    if (reads_in_place(p)) return at<S>(p.data, index);
    if (!p.data) return absent == 0 ? kZeros<S>.value : kOnes<S>.value;
    for (std::int64_t i = 0; i < n; ++i) value[i] = static_cast<S>(element(p, index + i, absent));
    return value;
  }
  /// The parameters in this buffer, past whose last one the rest of a vector can be read.
  const S* copy(const Param& p, std::int64_t index, std::int64_t n, S absent) {
    const S* const from = read(p, index, n, absent);
    for (std::int64_t i = 0; i < n && from != value; ++i) value[i] = from[i];
    return value;
  }
};

/// Room for the parameters of one piece.
template <class S> struct ParamBuffers { ParamBuffer<S> weights, biases, slopes; };

/// Loads and stores of one position, so that one lambda serves whole vectors and tails.
struct Full {
  static constexpr bool kWhole = true;
  std::int64_t i;
  template <class T> NORMKIT_LOCAL auto load(const T* p) const { return ::normkit::load(p + i); }
  template <class T, class V> NORMKIT_LOCAL void store(T* p, V v) const { ::normkit::store(p + i, v); }
  template <class V> NORMKIT_LOCAL V keep(V v) const { return v; }
  NORMKIT_LOCAL Full back(std::int64_t elements) const { return {i - elements}; }
  template <class V> NORMKIT_LOCAL V where(const std::uint8_t* p, V v) const {
    return ::normkit::where(p + i, kLanes<V>, v);
  }
};
struct Part {
  static constexpr bool kWhole = false;
  std::int64_t i;
  int n;
  template <class T> NORMKIT_LOCAL auto load(const T* p) const { return ::normkit::load(p + i, n); }
  template <class T, class V> NORMKIT_LOCAL void store(T* p, V v) const { ::normkit::store(p + i, v, n); }
  template <class V> NORMKIT_LOCAL V keep(V v) const { return ::normkit::keep(v, n); }
  NORMKIT_LOCAL Part back(std::int64_t elements) const { return {i - elements, n}; }
  template <class V> NORMKIT_LOCAL V where(const std::uint8_t* p, V v) const { return ::normkit::where(p + i, n, v); }
};

/// Calls f for each position of [0, n).
template <class V, class F> NORMKIT_LOCAL void for_positions(std::int64_t n, F f) {
  std::int64_t i = 0;
  for (; i + kLanes<V> <= n; i += kLanes<V>) f(Full{i});
  if (i < n) f(Part{i, static_cast<int>(n - i)});
}

/// Elements of any type, in segments of n that are `stride` apart. Code that is rarely needed takes them so, and is
/// compiled once.
struct Segments {
  const std::byte* data;
  Dtype dtype;
  std::int64_t rows, stride, n;

  NORMKIT_LOCAL const std::byte* from(std::int64_t row, std::int64_t i) const {
    return data + (row * stride + i) * size_of(dtype);
  }
};
template <class X> constexpr Dtype kDtypeOf = Dtype::float32;
template <> constexpr Dtype kDtypeOf<double> = Dtype::float64;
template <> constexpr Dtype kDtypeOf<Half> = Dtype::float16;
template <> constexpr Dtype kDtypeOf<Bfloat> = Dtype::bfloat16;
template <> constexpr Dtype kDtypeOf<std::uint8_t> = Dtype::uint8;
template <> constexpr Dtype kDtypeOf<std::uint16_t> = Dtype::uint16;
template <> constexpr Dtype kDtypeOf<std::int16_t> = Dtype::int16;
template <class X>
NORMKIT_LOCAL Segments segments(const X* x, std::int64_t rows, std::int64_t stride, std::int64_t n) {
  return {reinterpret_cast<const std::byte*>(x), kDtypeOf<X>, rows, stride, n};
}

NORMKIT_LOCAL void store_doubles(double* to, F64 v) { store(to, v); }
NORMKIT_LOCAL void store_doubles(double* to, F32 v) {
  const Wide w = widen(v);
  store(to, w.low), store(to + kLanes<F64>, w.high);
}

/// n elements of any type as doubles, or of a floating type as floats; `to` has room for whole vectors.
[[gnu::noinline]] void read_all(const std::byte* from, Dtype dtype, std::int64_t n, double* to) {
  visit_read(dtype, [&](auto type) {
    using X = typename decltype(type)::type;
    const X* x = at<X>(from, 0);
    for_positions<VectorOf<X>>(n,
                               [&](auto place) NORMKIT_INLINE_LAMBDA { store_doubles(to + place.i, place.load(x)); });
  });
}
[[gnu::noinline, maybe_unused]] void read_all(const std::byte* from, Dtype dtype, std::int64_t n, float* to) {
  const auto read = [&](const auto* x) {
    for_positions<F32>(n, [&](auto place) NORMKIT_INLINE_LAMBDA { store(to + place.i, place.load(x)); });
  };
  if (dtype == Dtype::float32) return read(at<float>(from, 0));
  dtype == Dtype::float16 ? read(at<Half>(from, 0)) : read(at<Bfloat>(from, 0));
}

/// Spans that are written in the order of memory, which a fetch ahead foresees.
constexpr std::int64_t kStretch = 16;
/// Calls f(span) for spans [begin, end) after a first pass over them: stretch by stretch, backwards, since what was read last is
/// still in cache. Given statistics had no first pass.
template <class F> NORMKIT_LOCAL void for_spans(const Task& t, std::int64_t begin, std::int64_t end, F f) {
  for (std::int64_t last = end; last > begin;) {
    const std::int64_t first = t.frozen || last - begin < kStretch ? begin : last - kStretch;
    for (std::int64_t span = first; span < last; ++span) f(span);
    last = first;
  }
}

// ---- members -----------------------------------------------------------------------------------------------------

/// The members of a range where there is no mask: all its elements.
struct Everyone {
  static constexpr bool kAll = true;
  NORMKIT_LOCAL void next_row() {}
  NORMKIT_LOCAL Everyone from(std::int64_t) const { return {}; }
  template <class P, class V> NORMKIT_LOCAL V keep(P place, V v) const { return place.keep(v); }
  template <class P, class V> NORMKIT_LOCAL V only(P, V v) const { return v; }
  double count(std::int64_t rows, std::int64_t n) const { return static_cast<double>(rows * n); }
  template <class X> const X* first(const X* x, std::int64_t, std::int64_t, std::int64_t) const { return x; }
};

/// The members of a range that a mask names; `same`: one byte stands for the whole row. An element that is no member
/// may be NaN.
struct Masked {
  static constexpr bool kAll = false;
  const std::uint8_t* byte;
  std::int64_t row_stride;
  bool same;

  NORMKIT_LOCAL void next_row() { byte += row_stride; }
  NORMKIT_LOCAL Masked from(std::int64_t i) const { return {same ? byte : byte + i, row_stride, same}; }
  NORMKIT_LOCAL bool has(std::int64_t i) const { return byte[same ? 0 : i]; }
  /// v of members, zeros elsewhere and past the end.
  template <class P, class V> NORMKIT_LOCAL V keep(P place, V v) const { return place.keep(only(place, v)); }
  template <class P, class V> NORMKIT_LOCAL V only(P place, V v) const {
    if (same) return *byte ? v : broadcast<V>(decltype(sum(v))(0));
    return place.where(byte, v);
  }
  [[gnu::noinline]] double count(std::int64_t rows, std::int64_t n) const {
    using Bytes [[gnu::vector_size(32)]] = std::uint8_t;
    constexpr std::int64_t kBytes = sizeof(Bytes);
    std::int64_t members = 0;
    const std::uint8_t* row = byte;
    for (std::int64_t k = 0; k < rows; ++k, row += row_stride) {
      std::int64_t i = 0;
      if (same) members += *row ? n : 0, i = n;
      while (i + kBytes <= n) {
        Bytes found = {};
        for (const std::int64_t end = least(n, i + 255 * kBytes); i + kBytes <= end; i += kBytes) {
          prefetch_second(reinterpret_cast<const char*>(row + i) + 8192);
          Bytes here;
          __builtin_memcpy(&here, row + i, sizeof here);
          found -= (Bytes)(here != Bytes{});  // a comparison gives 255, which is -1, where it holds
        }
        for (int j = 0; j < kBytes; ++j) members += found[j];
      }
      for (; i < n; ++i) members += row[i] != 0;
    }
    return static_cast<double>(members);
  }
  /// The first member; an element where there is none.
  template <class X> const X* first(const X* x, std::int64_t stride, std::int64_t rows, std::int64_t n) const {
    for (std::int64_t k = 0; k < rows; ++k)
      for (std::int64_t i = 0; i < n; ++i)
        if (byte[k * row_stride + (same ? 0 : i)]) return x + k * stride + i;
    return x;
  }
};

/// The members of one row that a mask names, which has a byte for each element. Each lane of `count` counts those it kept.
template <class V> struct Counted {
  static constexpr bool kAll = false;
  const std::uint8_t* byte;
  V& count;

  template <class P> NORMKIT_LOCAL V keep(P place, V v) const {
    const V one = place.where(byte, broadcast<V>(typename V::Lane(1)));
    count = count + one;
    if constexpr (P::kWhole) return place.where(byte, v);
    else return where(one, v);
  }
};

/// A mask that names everyone, for code that is compiled for masks alone.
constexpr std::uint8_t kMember = 1;
NORMKIT_LOCAL Masked masked(Everyone) { return {&kMember, 0, true}; }
NORMKIT_LOCAL Masked masked(const Masked& members) { return members; }

NORMKIT_LOCAL const std::uint8_t* mask_at(const Task& t, std::int64_t o, std::int64_t step, std::int64_t lane) {
  return reinterpret_cast<const std::uint8_t*>(at<std::uint8_t>(t.where, o, step, lane));
}

/// The masks of statistics [first, first + rows), of one run each.
[[gnu::noinline]] void find_masks(const Task& t, std::int64_t first, int rows, const std::uint8_t** mask) {
  std::int64_t o = first / t.geometry.lanes, lane = first % t.geometry.lanes;
  for (int k = 0; k < rows; ++k) {
    mask[k] = mask_at(t, o, 0, lane);
    if (++lane == t.geometry.lanes) ++o, lane = 0;
  }
}

/// Calls f with the members of a range of a row, and of those that follow it step by step.
template <class F>
NORMKIT_LOCAL auto with_members(const Task& t, std::int64_t o, std::int64_t step, std::int64_t lane, std::int64_t begin,
                                F f) {
  if (!t.where.data) return f(Everyone{});
  const Strides& s = t.where.strides;
  return f(Masked{mask_at(t, o, step, lane) + begin * s.run, s.step, s.run == 0});
}
NORMKIT_LOCAL Masked members_at(const Task& t, std::int64_t o, std::int64_t step, std::int64_t lane,
                                std::int64_t begin) {
  return with_members(t, o, step, lane, begin, [](auto members) NORMKIT_INLINE_LAMBDA { return masked(members); });
}

// ---- activation --------------------------------------------------------------------------------------------------

/// Anything but relu, which loops apply as they go. What is curved goes through a buffer of the compute type: a dozen functions in
/// each loop would be most of the library.
NORMKIT_LOCAL bool is_relu(const Activation& a) { return a.kind == ActivationKind::relu; }
NORMKIT_LOCAL bool is_curved(const Activation& a) { return a.kind != ActivationKind::none && !is_relu(a); }
/// relu and leaky_relu, whose slopes loops of backward apply as they go.
NORMKIT_LOCAL bool has_kink(const Activation& a) { return is_relu(a) || a.kind == ActivationKind::leaky_relu; }
NORMKIT_LOCAL bool has_curved_slope(const Activation& a) { return a.kind != ActivationKind::none && !has_kink(a); }

/// Calls f with an activation whose kind the compiler knows, so that loops have its constants at hand.
template <int kKind = 1, class F> NORMKIT_LOCAL void with_kind(const Activation& a, F f) {
  if constexpr (kKind < kActivationKinds) {
    constexpr ActivationKind kind{kKind};
    if (a.kind != kind) return with_kind<kKind + 1>(a, f);
    f([=, parameter = a.parameter] NORMKIT_INLINE_LAMBDA { return Activation{kind, parameter}; });
  }
}

/// z <- the activation of z, in whole vectors; a register at a time, since most formulas are long. `slopes`: those of prelu, where
/// they follow the elements; else null.
template <class S>
[[gnu::noinline]] void activate_all(const Activation& a, const S* slopes, S* z, std::int64_t n) {
  using One = RegisterOf<S>;
  for (std::int64_t i = 0; slopes && i < n; i += kRegLanes<VectorOf<S>>)
    reg_store(z + i, prelu(One{{reg_load(z + i)}}, One{{reg_load(slopes + i)}}).r[0]);
  if (!slopes)
    with_kind(a, [&](auto known) NORMKIT_INLINE_LAMBDA {
      for (std::int64_t i = 0; i < n; i += kRegLanes<VectorOf<S>>)
        reg_store(z + i, activate(known(), One{{reg_load(z + i)}}).r[0]);
    });
}
/// g <- g times the slope of the activation at z, likewise. Where g is 0 it stays so, even if z is NaN, as that of an element that is no
/// member may be. Where `slope` is not null it gets the slope, and `bend`, which may be z, g times the second derivative of an
/// activation that is bent.
template <class S>
[[gnu::noinline]] void multiply_by_slopes(const Activation& a, const S* slopes, const S* z, S* g, std::int64_t n,
                                          S* slope = nullptr, S* bend = nullptr) {
  using One = RegisterOf<S>;
  const auto multiply = [&](std::int64_t i, One by) NORMKIT_INLINE_LAMBDA {
    const auto before = reg_load(g + i);
    reg_store(g + i, reg_where(before, reg_mul(before, by.r[0])));
    return One{{before}};
  };
  for (std::int64_t i = 0; slopes && i < n; i += kRegLanes<VectorOf<S>>)
    multiply(i, prelu_slope(One{{reg_load(z + i)}}, One{{reg_load(slopes + i)}}));
  if (!slopes)
    with_kind(a, [&](auto known) NORMKIT_INLINE_LAMBDA {
      for (std::int64_t i = 0; i < n; i += kRegLanes<VectorOf<S>>) {
        const One here{{reg_load(z + i)}}, first = activation_slope(known(), here), before = multiply(i, first);
        if (!slope) continue;
        reg_store(slope + i, first.r[0]);
        if (is_bent(known().kind))
          reg_store(bend + i, where(before, before * activation_curvature(known(), here)).r[0]);
      }
    });
}

/// z = x_hat * weight + bias, to which an activation is applied. A constant weight and bias are in scale and shift; those that
/// follow the elements are apart.
template <class X> struct Preactivation {
  using V = VectorOf<X>;
  V mean, scale, shift;
  const ScalarOf<X>*weight = nullptr, *bias = nullptr, *slopes = nullptr;
  Activation activation = {};  // with the slope of prelu, where it is constant

  NORMKIT_LOCAL V constant(V x) const { return forward(x, mean, scale, shift); }
  template <class P> NORMKIT_LOCAL V linear(P place, V x) const {
    return mul_add(constant(x), place.load(weight), place.load(bias));
  }
  template <class P> NORMKIT_LOCAL V at(P place, V x) const { return weight ? linear(place, x) : constant(x); }
};

/// The Preactivation of one piece of a run.
template <class X, class S>
NORMKIT_LOCAL Preactivation<X> preactivation(const Task& t, Piece piece, Statistic<S> s, ParamBuffers<S>& params) {
  using V = VectorOf<X>;
  const double weight = piece.linear ? 1 : element(t.weight, piece.parameter, 1);
  const Affine<S> affine = forward_affine(s, weight, piece.linear ? 0 : element(t.bias, piece.parameter, 0));
  Preactivation<X> z{broadcast<V>(s.mean), broadcast<V>(affine.scale), broadcast<V>(affine.shift)};
  if (piece.linear) {
    z.weight = params.weights.read(t.weight, piece.parameter, piece.n, 1);
    z.bias = params.biases.read(t.bias, piece.parameter, piece.n, 0);
  }
  return z;
}

/// The slopes of prelu along a piece; where the whole piece has one slope, `a` takes it, and there are none.
template <class S>
[[gnu::noinline]] const S* piece_slopes(const Task& t, Piece piece, ParamBuffer<S>& slopes, Activation& a) {
  if (piece.linear) return slopes.copy(t.slopes, piece.parameter, piece.n, 1);
  a.parameter = element(t.slopes, piece.parameter, 1);
  return nullptr;
}
/// preactivation() where an activation is to come, with all that this activation wants to know.
template <class X, class S>
NORMKIT_LOCAL Preactivation<X> activation_input(const Task& t, Piece piece, Statistic<S> s, ParamBuffers<S>& params) {
  Preactivation<X> z = preactivation<X>(t, piece, s, params);
  z.activation = t.activation;
  if (t.slopes.data) z.slopes = piece_slopes(t, piece, params.slopes, z.activation);
  return z;
}

/// Stores of one thread that go past the caches. Memory takes whole lines only; a line that one run ends in and the next
/// begins in is put together here, since a part of a line written the usual way would first be read from memory.
template <class Y> class Streamer {
 public:
  static constexpr int kLine = 64 / sizeof(Y);

  Streamer() = default;
  Streamer(const Streamer&) = delete;
  Streamer& operator=(const Streamer&) = delete;
  ~Streamer() {
    put_part();
    put_whole();
  }

  /// A place for the elements from y to the end of its line; done() says how many were put there.
  Y* place(Y* y) {
    if (!start_ || start_ + last_ != y) begin(y);
    return line_[whole_] + last_;
  }
  void done(std::int64_t elements) {
    last_ += elements;
    if (last_ == kLine) end();
  }

 private:
  /// Whole lines go when there are some: one that was put together just now would be waited for.
  static constexpr int kLines = 8;

  [[gnu::noinline]] void begin(Y* y) {
    put_part();
    first_ = last_ = static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(y) % 64 / sizeof(Y));
    start_ = y - last_;
  }
  [[gnu::noinline]] void end() {
    if (first_ > 0) return put_part();
    to_[whole_++] = start_;
    start_ = nullptr;
    if (whole_ == kLines) put_whole();
  }
  [[gnu::noinline]] void put_part() {
    if (start_)
      for (std::int64_t k = first_; k < last_; ++k) start_[k] = line_[whole_][k];
    start_ = nullptr;
  }
  [[gnu::noinline]] void put_whole() {
    for (int line = 0; line < whole_; ++line)
      for (int k = 0; k < kLine; k += kLanes<VectorOf<Y>>) stream(to_[line] + k, load(line_[line] + k));
    whole_ = 0;
  }

  alignas(64) Y line_[kLines][kLine];
  Y* to_[kLines];
  int whole_ = 0;  // lines that are complete; the next may have a part
  Y* start_ = nullptr;  // of that line in memory
  std::int64_t first_ = 0, last_ = 0;  // elements of it that are here
};

/// The null Streamer, which stands for plain stores.
template <class Y> constexpr Streamer<Y>* kPlain = nullptr;

/// Stores a whole vector, past the caches or not.
template <class Y> NORMKIT_LOCAL void put(Y* to, VectorOf<Y> v, bool streamed) {
  if (streamed) stream(to, v);
  else store(to, v);
}

/// y[i] = f(position i) for i < n; through `streamer`, where given, past the caches.
template <class Y, class F> NORMKIT_LOCAL void map(Y* y, std::int64_t n, Streamer<Y>* streamer, Fetch fetch, F f) {
  constexpr int kWidth = kLanes<VectorOf<Y>>;
  constexpr std::int64_t kBlock = 4 * kWidth, kLine = Streamer<Y>::kLine;
  const bool streamed = streamer;
  const std::int64_t unit = streamed ? kLine : kWidth;  // what whole vectors are stored in, a power of two
  const std::int64_t past = static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(y) % 64 / sizeof(Y));
  std::int64_t i = 0;
  for (std::int64_t ragged = streamed && past ? least(kLine - past, n) : 0;; ragged = n) {  // before units, and after
    if (i < ragged) {
      Y* const to = streamed ? streamer->place(y + i) - i : y;
      const std::int64_t begin = i;
      for (; i < ragged; i += kWidth) {
        const Part part{i, static_cast<int>(least(ragged - i, kWidth))};
        part.store(to, f(part));
      }
      i = ragged;
      if (streamed) streamer->done(ragged - begin);
    }
    if (i == n) return;
    if constexpr (kWide) {
      if (streamed)  // a loop for each, since a branch would cost up to a tenth
        for (; i + kBlock <= n; i += kBlock) {
          fetch.template block<kBlock * sizeof(Y)>(i * static_cast<std::int64_t>(sizeof(Y)));
          for (int k = 0; k < 4; ++k) stream(y + i + k * kWidth, f(Full{i + k * kWidth}));
        }
      else
        for (; i + kBlock <= n; i += kBlock)
          for (int k = 0; k < 4; ++k) store(y + i + k * kWidth, f(Full{i + k * kWidth}));
    }
    for (const std::int64_t end = i + ((n - i) & -unit); i < end; i += kWidth) {
      if (!kWide && streamed) fetch.template block<kWidth * sizeof(Y)>(i * static_cast<std::int64_t>(sizeof(Y)));
      put(y + i, f(Full{i}), streamed);
    }
    if (i == n) return;
  }
}

/// Writes n values to y. A function of its own, since each loop over x would have a copy of it.
template <class Y, class S>
[[gnu::noinline]] void put_all(const S* value, Y* y, std::int64_t n, Streamer<Y>* streamer, Fetch fetch) {
  map(y, n, streamer, fetch, [&](auto place) NORMKIT_INLINE_LAMBDA { return place.load(value); });
}

/// The `Beside` that does nothing. With every block of 4 vectors, sums call block() of a Beside; that of a writer
/// writes some outputs of the statistic before, so that memory reads and writes at once. Instance norm (1, 64, 512,
/// 512): 1.5 of a copy before, 1.2 after.
struct Nothing {
  NORMKIT_LOCAL void block() {}
};

/// Writes the outputs of one statistic past the caches. `Outputs` knows the formula of each piece of constant parameters, and
/// writes ranges that are no whole blocks of whole lines.
template <class Outputs> class BesideWriter {
  using X = typename Outputs::X;
  static constexpr int kWidth = kLanes<VectorOf<X>>, kBlock = 4 * kWidth;

 public:
  explicit BesideWriter(Outputs& outputs)
      : outputs_(outputs), steps_(outputs.t.geometry.steps), run_(outputs.t.geometry.run) {}

  NORMKIT_LOCAL void block() {
    if (i_ == end_) {
      if (step_ < steps_) advance();
      if (i_ == end_) return;
    }
    const typename Outputs::Formula formula = formula_;  // copied: stores might change it, for all that is known
    X* const out = out_;
    const std::int64_t i = i_;
    for (int k = 0; k < 4; ++k) stream(out + i + k * kWidth, formula(Full{i + k * kWidth}));
    i_ = i + kBlock;
  }

  /// Writes the outputs that are left.
  [[gnu::noinline]] void finish() {
    for (; step_ < steps_; ++step_, piece_ = i_ = 0)
      if (piece_ + i_ < run_) outputs_.write(step_, piece_ + i_, run_);
  }

 private:
  /// Goes on from where blocks have come to, to the next blocks that begin with a line, and writes what lies between.
  [[gnu::noinline]] void advance() {
    const std::int64_t begin = piece_ + i_;
    const Piece piece = outputs_.piece(step_, begin);
    out_ = outputs_.out(step_) + begin, piece_ = begin;
    const std::int64_t past = static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(out_) % 64 / sizeof(X));
    const std::int64_t head = past ? Streamer<X>::kLine - past : 0, blocks = (piece.n - head) / kBlock;
    i_ = blocks > 0 ? head : piece.n, end_ = i_ + (blocks > 0 ? blocks * kBlock : 0);
    if (i_ > 0) outputs_.write(step_, begin, begin + i_);
    if (blocks > 0) formula_ = outputs_.formula(step_, piece);
    else if (begin + i_ == run_) ++step_, piece_ = i_ = end_ = 0;
  }

  Outputs& outputs_;
  typename Outputs::Formula formula_;
  X* out_ = nullptr;  // of the piece
  std::int64_t i_ = 0, end_ = 0;  // in the piece: what is next, and where whole blocks end
  std::int64_t piece_ = 0, step_ = 0;
  const std::int64_t steps_, run_;
};

/// Writes elements [begin, end) of rows side by side, whole lines, a vector of each or two, so that what they share is read once.
/// `Tile` has the number of rows and a formula: put(position, store), which calls store(address, vector) for each row.
template <class X, class Tile, bool kStreamed> class TileWriter {
  static constexpr int kWidth = kLanes<VectorOf<X>>;

 public:
  TileWriter(const Tile& tile, std::int64_t begin, std::int64_t end) : tile_(tile), i_(begin), end_(end) {}

  NORMKIT_LOCAL void block() {
    for (int k = 0; k < 4 / Tile::kRows && i_ < end_; ++k, i_ += kWidth)
      tile_.put(Full{i_}, [](X* to, VectorOf<X> v) NORMKIT_INLINE_LAMBDA { ::normkit::put(to, v, kStreamed); });
  }
  void finish() {
    while (i_ < end_) block();
  }

 private:
  const Tile& tile_;
  std::int64_t i_;
  const std::int64_t end_;
};

/// Writes rows of n elements, which are as long as whole lines, begin as far behind the beginning of one, and are written side by
/// side while sum(writer) is called. Where they go past the caches and lines have parts of two rows, write_part(begin, end) writes
/// these.
template <class X, class Tile, class Part, class F>
NORMKIT_LOCAL void write_beside(const Tile& tile, const X* first, std::int64_t n, bool streamed, Part write_part,
                                F sum) {
  const auto write = [&](auto writer) NORMKIT_INLINE_LAMBDA {
    sum(writer);
    writer.finish();
  };
  if (!streamed) return write(TileWriter<X, Tile, false>(tile, 0, n));
  const std::int64_t past = static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(first) % 64 / sizeof(X));
  const std::int64_t begin = past ? Streamer<X>::kLine - past : 0, end = n - past;
  if (past) write_part(0, begin), write_part(end, n);
  write(TileWriter<X, Tile, true>(tile, begin, end));
}

}  // namespace
}  // namespace normkit
