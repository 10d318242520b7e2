// What both traversals share: statistics and parameters in, pieces of constant parameters, elementwise walks.
#pragma once

namespace normkit {
namespace {

/// A number of vectors that the compiler knows.
template <int kValue> struct Count { static constexpr int value = kValue; };

/// Bytes that a reader runs ahead of itself, so that its loads find the first-level cache filled.
constexpr std::int64_t kAhead = 4096;
/// The largest next statistic that is fetched while this one is written.
constexpr std::int64_t kFetchable = std::int64_t{512} << 10;

/// Large arrays begin at one offset of a page, so y is written where the next x is fetched, in one memory channel; half a page
/// apart they do not meet. Instance norm of float32 (16, 256, 32, 32), time / copy of the same arrays: 1.06 before, 1.00 after
/// (Zen 5, g++ 12, one thread, medians of 40).
constexpr std::int64_t kHalfPage = 2048;

NORMKIT_LOCAL void prefetch_first(const char* p) { __builtin_prefetch(p, 0, 3); }

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
template <class T> NORMKIT_LOCAL T* at(const Operand& a, std::int64_t o, std::int64_t step, std::int64_t lane) {
  return at<T>(a.data, o * a.strides.outer + step * a.strides.step + lane * a.strides.lane);
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
  return p.dtype == Dtype::float32 ? *at<float>(p.data, index) : element(p.data, p.dtype, index);
}

template <class S> Statistic<S> given_statistic(const Task& t, std::int64_t statistic) {
  const std::int64_t index = statistic / t.given.stride % t.given.count;
  const double scale = element(t.given.scale, t.given.scale_dtype, index);
  const double mean = t.given.mean ? element(t.given.mean, t.given.mean_dtype, index) : 0;
  return statistic_of<S>(mean, t.given.is_variance ? rstd_of(scale, t.eps) : scale);
}

/// Hands the moments of a statistic out: to the arrays that were asked for, and to the caller.
template <class S> NORMKIT_LOCAL Statistic<S> publish(const Task& t, std::int64_t statistic, Moments<double> m) {
  const double rstd = rstd_of(m.m2 * (1 / static_cast<double>(t.geometry.members())), t.eps);
  if (t.mean) *at<S>(t.mean, statistic) = static_cast<S>(m.mean);
  if (t.rstd) *at<S>(t.rstd, statistic) = static_cast<S>(rstd);
  if (t.moments) t.moments[2 * statistic] = m.mean, t.moments[2 * statistic + 1] = m.m2;
  return statistic_of<S>(m.mean, rstd);
}

/// A part of a run whose parameters are one (`linear` false) or follow the elements.
struct Piece {
  std::int64_t begin, n;      // elements of the run
  std::int64_t parameter;     // of the first element
  bool linear;
};

/// Walks the pieces of [begin, end) of a run that starts at `offset`. None is longer than `limit`.
template <class F>
NORMKIT_LOCAL void for_pieces(const Task& t, std::int64_t o, std::int64_t offset, std::int64_t begin, std::int64_t end,
                              std::int64_t limit, F f) {
  const ParamMap& p = t.geometry.params;
  const bool linear = p.stride == 1 && p.count > 1;
  for (std::int64_t i = begin; i < end;) {
    const std::int64_t here = offset + i, group = here / p.stride, index = group % p.count;
    const std::int64_t left = linear ? p.count - index : (group + 1) * p.stride - here;
    const std::int64_t n = least(p.count == 1 ? end - i : least(left, end - i), limit);
    f(Piece{i, n, o * p.outer + index, linear});
    i += n;
  }
}

/// Parameters along the elements, in the compute type: where they lie already if they can be read there, else converted a
/// buffer at a time.
constexpr std::int64_t kBuffer = 512;
template <class S> struct ParamBuffer {
  alignas(64) S value[kBuffer];

  const S* read(const Param& p, std::int64_t index, std::int64_t n, S absent) {
    if (p.data && (p.dtype == Dtype::float64) == (sizeof(S) == 8) && (sizeof(S) == 8 || p.dtype == Dtype::float32))
      return at<S>(p.data, index);
    for (std::int64_t i = 0; i < n; ++i) value[i] = static_cast<S>(element(p, index + i, absent));
    return value;
  }
};

/// Loads and stores of one position, so that one lambda serves whole vectors and tails.
struct Full {
  static constexpr bool kWhole = true;
  std::int64_t i;
  template <class T> NORMKIT_LOCAL auto load(const T* p) const { return ::normkit::load(p + i); }
  template <class T, class V> NORMKIT_LOCAL void store(T* p, V v) const { ::normkit::store(p + i, v); }
  template <class V> NORMKIT_LOCAL V keep(V v) const { return v; }
};
struct Part {
  static constexpr bool kWhole = false;
  std::int64_t i;
  int n;
  template <class T> NORMKIT_LOCAL auto load(const T* p) const { return ::normkit::load(p + i, n); }
  template <class T, class V> NORMKIT_LOCAL void store(T* p, V v) const { ::normkit::store(p + i, v, n); }
  template <class V> NORMKIT_LOCAL V keep(V v) const { return ::normkit::keep(v, n); }
};

/// Stores of one thread that go past the caches. Memory takes whole lines only; a line that one run ends in and the next
/// begins in is put together here, since a part of a line written the usual way would first be read from memory.
template <class Y> class Streamer {
 public:
  static constexpr int kLine = 64 / sizeof(Y);

  Streamer() = default;
  Streamer(const Streamer&) = delete;
  Streamer& operator=(const Streamer&) = delete;
  ~Streamer() { flush(); }

  /// A place for the elements from y to the end of its line; done() says how many were put there.
  Y* place(Y* y) {
    const std::int64_t past = static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(y) % 64 / sizeof(Y));
    if (!start_ || start_ + last_ != y) {
      flush();
      start_ = y - past;
      first_ = past;
    }
    last_ = past;
    return line_ + past;
  }
  void done(std::int64_t elements) {
    last_ += elements;
    if (last_ < kLine) return;
    if (first_ > 0) return flush();
    for (int k = 0; k < kLine; k += kLanes<VectorOf<Y>>) stream(start_ + k, load(line_ + k));
    start_ = nullptr;
  }

 private:
  void flush() {
    if (start_)
      for (std::int64_t k = first_; k < last_; ++k) start_[k] = line_[k];
    start_ = nullptr;
  }

  alignas(64) Y line_[kLine];
  Y* start_ = nullptr;  // of the line in memory
  std::int64_t first_ = 0, last_ = 0;  // elements of the line that are here
};

/// No streamer: plain stores.
template <class Y> constexpr Streamer<Y>* kPlain = nullptr;

/// y[i] = f(position i) for i < n; through `streamer`, where given, past the caches. `ahead`, where given, is what this thread
/// reads next; it is fetched meanwhile. (Into the first-level cache: 1.12 and 1.17 of a streaming, prefetching copy for rows of
/// 4 KB and 64 KB, where the second-level cache gave 1.20 and 1.22; Zen 5, g++ 12, one thread, medians of 40.)
template <class Y, class F>
NORMKIT_LOCAL void map(Y* y, std::int64_t n, Streamer<Y>* streamer, const char* ahead, F f) {
  constexpr int kWidth = kLanes<VectorOf<Y>>;
  constexpr std::int64_t kBlock = 4 * kWidth, kLine = Streamer<Y>::kLine;
  std::int64_t i = 0;
  if (streamer) {
    const auto gather = [&](std::int64_t end) NORMKIT_INLINE_LAMBDA {
      Y* line = streamer->place(y + i);
      const std::int64_t elements = end - i;
      for (std::int64_t k = 0; k < elements; k += kWidth, i += kWidth) {
        const Part part{i, static_cast<int>(least(end - i, kWidth))};
        ::normkit::store(line + k, f(part), part.n);
      }
      i = end;
      streamer->done(elements);
    };
    const std::int64_t past = static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(y) % 64 / sizeof(Y));
    if (past) gather(least(kLine - past, n));
    for (; i + kBlock <= n; i += kBlock) {
      if (ahead)
        for (std::int64_t line = 0; line < kBlock * static_cast<std::int64_t>(sizeof(Y)); line += 64)
          prefetch_first(ahead + i * static_cast<std::int64_t>(sizeof(Y)) + line);
      for (int k = 0; k < 4; ++k) stream(y + i + k * kWidth, f(Full{i + k * kWidth}));
    }
    for (; i + kLine <= n; i += kLine)
      for (int k = 0; k < kLine / kWidth; ++k) stream(y + i + k * kWidth, f(Full{i + k * kWidth}));
    if (i < n) gather(n);
    return;
  }
  for (; i + kBlock <= n; i += kBlock)
    for (int k = 0; k < 4; ++k) store(y + i + k * kWidth, f(Full{i + k * kWidth}));
  for (; i + kWidth <= n; i += kWidth) store(y + i, f(Full{i}));
  if (i < n) {
    const Part part{i, static_cast<int>(n - i)};
    part.store(y, f(part));
  }
}

}  // namespace
}  // namespace normkit
