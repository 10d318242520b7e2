// What both traversals do with the elements of one vector: 16 bytes of neighbors, or fewer at the end of a row.
#pragma once

#include "group.cuh"
#include "normkit/activation.hpp"
#include "work.hpp"

namespace normkit::cuda {

template <class X> constexpr int kVector = vector_for(sizeof(X));
/// The bits of an element, and the element that has these.
template <class X> NORMKIT_DEVICE std::uint64_t bits_of(X v) {
  if constexpr (__is_same(X, float)) return __builtin_bit_cast(std::uint32_t, v);
  else if constexpr (__is_same(X, double)) return __builtin_bit_cast(std::uint64_t, v);
  else return v.bits;
}
template <class X> NORMKIT_DEVICE X of_bits(std::uint64_t bits) {
  if constexpr (__is_same(X, float)) return __builtin_bit_cast(float, static_cast<std::uint32_t>(bits));
  else if constexpr (__is_same(X, double)) return __builtin_bit_cast(double, bits);
  else return {static_cast<std::uint16_t>(bits)};
}

/// The elements of a vector as they lie in memory, in whole words: kept apart, two-byte elements would take a register each.
template <class X> struct alignas(kVectorBytes) Vector {
  static constexpr int kPerWord = sizeof(X) < 4 ? 4 / sizeof(X) : 1, kBits = 8 * sizeof(X);
  std::uint32_t word[kVectorBytes / 4];

  NORMKIT_DEVICE X operator[](int e) const {
    if constexpr (sizeof(X) == 8) return of_bits<X>(word[2 * e] | std::uint64_t{word[2 * e + 1]} << 32);
    else return of_bits<X>(word[e / kPerWord] >> e % kPerWord * kBits);
  }
  /// Takes the first element; the others move up.
  NORMKIT_DEVICE X take() {
    constexpr int kWords = kVectorBytes / 4, kMoved = sizeof(X) / 4;
    const X first = (*this)[0];
    NORMKIT_UNROLL
    for (int w = 0; w < kWords; ++w) {
      if constexpr (kMoved > 0) word[w] = w + kMoved < kWords ? word[w + kMoved] : 0;
      else word[w] = word[w] >> kBits | (w + 1 < kWords ? word[w + 1] << (32 - kBits) : 0);
    }
    return first;
  }
  /// Puts an element where there are zeros.
  NORMKIT_DEVICE void put(int e, X v) {
    const std::uint64_t bits = bits_of(v);
    if constexpr (sizeof(X) == 8) {
      word[2 * e] = static_cast<std::uint32_t>(bits), word[2 * e + 1] = static_cast<std::uint32_t>(bits >> 32);
    } else {
      word[e / kPerWord] |= static_cast<std::uint32_t>(bits) << e % kPerWord * kBits;
    }
  }
};
template <class X> NORMKIT_DEVICE Vector<X> zeros() {
  Vector<X> v;
  NORMKIT_UNROLL
  for (std::uint32_t& word : v.word) word = 0;
  return v;
}

template <class X> struct Compute { using type = float; };
template <> struct Compute<double> { using type = double; };
/// The type of arithmetic on elements of type X.
template <class X> using ComputeOf = typename Compute<X>::type;

// ---- memory ------------------------------------------------------------------------------------------------------

template <class X> NORMKIT_DEVICE ComputeOf<X> value_of(X v) {
  if constexpr (__is_same(X, Half) || __is_same(X, Bfloat)) return widen(v);
  else return static_cast<ComputeOf<X>>(v);
}
template <class Y, class S> NORMKIT_DEVICE Y stored(S v) {
  if constexpr (__is_same(Y, Half) || __is_same(Y, Bfloat))
    return narrow(static_cast<const Y*>(nullptr), static_cast<float>(v));
  else return static_cast<Y>(v);
}

template <class T> NORMKIT_DEVICE T* at(std::byte* base, std::int64_t index) {
  return reinterpret_cast<T*>(base) + index;
}
template <class T> NORMKIT_DEVICE const T* at(const std::byte* base, std::int64_t index) {
  return reinterpret_cast<const T*>(base) + index;
}
/// The first element of a tile; and where it stands among the elements that one round of the parameters covers.
struct Origin { std::int64_t o = 0, step = 0, lane = 0, i = 0, phase = 0; };
/// Where a vector lies: elements [i, i + n) of row `row` of a tile. Within a tile, 32 bits are enough.
struct Place {
  Origin tile;
  int row, i, n;
};

template <class T> NORMKIT_DEVICE T* at(const Operand& a, const Origin& tile) {
  const Strides& s = a.strides;
  if (NORMKIT_PLANTED(int_overflow))
    return at<T>(a.data, static_cast<int>(tile.lane) * static_cast<int>(s.lane) + tile.i);
  return at<T>(a.data, tile.o * s.outer + tile.step * s.step + tile.lane * s.lane + tile.i);
}
template <class T> NORMKIT_DEVICE T* at(const Operand& a, const Place& p) {
  return at<T>(a, p.tile) + (p.row * a.strides.step + p.i);
}

/// True where a whole vector can be read at p at once. The address itself is asked, so that any view is right and
/// aligned ones are fast.
template <class X> NORMKIT_DEVICE bool is_wide(const X* p) {
  if (NORMKIT_PLANTED(misaligned_load)) return true;
  return reinterpret_cast<std::uintptr_t>(p) % alignof(Vector<X>) == 0;
}

NORMKIT_DEVICE bool reads_whole(const Work& work) { return work.reads_whole || NORMKIT_PLANTED(misaligned_load); }

template <class X> NORMKIT_DEVICE void fetch_element(X* to, const X* from) {
  if constexpr (sizeof(X) >= 4) copy_aside<sizeof(X)>(to, from);
  else *to = *from;
}
template <class X> NORMKIT_CALLED void fetch_elements(X* to, const X* from, int n) {
  NORMKIT_ROLL
  for (int e = 0; e < n + NORMKIT_PLANTED(long_tail); ++e) fetch_element(to + e, from + e);
}

/// Vectors in shared memory of which each thread has its own, at a distance that keeps threads out of each other's banks.
template <class X> struct Slots {
  std::byte* first;

  /// Slots [place * each, (place + 1) * each) of this thread.
  NORMKIT_DEVICE Slots(std::byte* memory, int place, int each)
      : first(memory + (place * each * block_threads() + thread_index()) * kVectorBytes) {}
  NORMKIT_DEVICE std::byte* address(int k) const { return first + k * block_threads() * kVectorBytes; }
  NORMKIT_DEVICE Vector<X>& operator[](int k) const { return *reinterpret_cast<Vector<X>*>(address(k)); }

  /// Starts to copy the first n elements from p on to slot k, while the thread goes on; what follows them in the slot
  /// is anything.
  NORMKIT_DEVICE void fetch(int k, const X* p, int n, bool whole = false) const {
    if (whole || (n == kVector<X> && is_wide(p))) copy_aside<kVectorBytes>(address(k), p);
    else fetch_elements(reinterpret_cast<X*>(address(k)), p, n);
  }
};

template <class X> NORMKIT_CALLED Vector<X> load_elements(const X* p, int n) {
  Vector<X> v = zeros<X>();
  NORMKIT_UNROLL
  for (int e = 0; e < kVector<X>; ++e)
    if (e < n) v.put(e, p[e]);
  return v;
}
/// Calls fetch(slot, j), then f(slot, j), for all j < count; fetch runs ahead of f, so that the contents of up to
/// kSlots slots are on their way before f wants them.
template <int kSlots, class Fetch, class F> NORMKIT_DEVICE void streamed(int count, Fetch fetch, F f) {
  NORMKIT_ROLL
  for (int j = 1 - kSlots; j < count; ++j) {
    const int ahead = j + kSlots - 1;
    if (ahead < count) fetch(ahead % kSlots, ahead);
    end_batch();
    if (j < 0) continue;
    if (NORMKIT_PLANTED(short_wait) && ahead < count) wait_for_batches<kSlots>();
    else wait_for_batches<kSlots - 1>();
    f(j % kSlots, j);
  }
}

/// Waits for all but the last n batches, or for more.
NORMKIT_DEVICE void wait_for_all_but(int n) {
  switch (n) {
    case 0: return wait_for_batches<0>();
    case 1: return wait_for_batches<1>();
    case 2: return wait_for_batches<2>();
    case 3: return wait_for_batches<3>();
    case 4: return wait_for_batches<4>();
    case 5: return wait_for_batches<5>();
    case 6: return wait_for_batches<6>();
    default: return wait_for_batches<7>();
  }
}

/// Loads the first n elements from p on; zeros follow. `whole`: they are known to be a whole vector.
template <class X> NORMKIT_DEVICE Vector<X> load(const X* p, int n, bool whole = false) {
  if (whole || (n == kVector<X> && is_wide(p))) return *reinterpret_cast<const Vector<X>*>(p);
  return load_elements(p, n);
}

template <class X> NORMKIT_DEVICE void widened(const Vector<X>& v, ComputeOf<X> (&out)[kVector<X>]) {
  NORMKIT_UNROLL
  for (int e = 0; e < kVector<X>; ++e) out[e] = value_of(v[e]);
}
/// Values `first` and on as a vector of the elements that they become; zeros follow.
template <class Y, class S, int N> NORMKIT_DEVICE Vector<Y> narrowed(const S (&v)[N], int first = 0) {
  Vector<Y> out = zeros<Y>();
  NORMKIT_UNROLL
  for (int e = 0; e < kVector<Y> && first + e < N; ++e) out.put(e, stored<Y>(v[first + e]));
  return out;
}

template <class Y> NORMKIT_CALLED void store_elements(Y* p, Vector<Y> v, int n) {
  NORMKIT_UNROLL
  for (int e = 0; e < kVector<Y>; ++e)
    if (e < n) p[e] = v[e];
}
/// Stores the first n of N values from p on: N may be several vectors of Y, or less than one. `whole`: they are whole
/// vectors.
template <class Y, class S, int N> NORMKIT_DEVICE void store(Y* p, const S (&v)[N], int n, bool whole = false) {
  NORMKIT_UNROLL
  for (int first = 0; first < N; first += kVector<Y>) {
    const Vector<Y> out = narrowed<Y>(v, first);
    if (whole || (n - first >= kVector<Y> && is_wide(p))) store_words(p + first, out.word);
    else store_elements(p + first, out, n - first);
  }
}

/// Takes the first of N values; the others move up.
template <class S, int N> NORMKIT_DEVICE S take(S (&v)[N]) {
  const S first = v[0];
  NORMKIT_UNROLL
  for (int e = 0; e + 1 < N; ++e) v[e] = v[e + 1];
  return first;
}
/// Takes the first of N values and puts it behind the others.
template <class S, int N> NORMKIT_DEVICE S turn(S (&v)[N]) { return v[N - 1] = take(v); }
/// Replaces each value by f of it, turning them through the first place: one copy of f in the code, and no index into
/// registers.
template <class S, int N, class F> NORMKIT_DEVICE void in_turn(S (&v)[N], F f) {
  NORMKIT_ROLL
  for (int turn = 0; turn < N; ++turn) v[N - 1] = f(take(v));
}

// ---- statistics and parameters -----------------------------------------------------------------------------------

/// Calls f(Type<T>{}) with the floating storage type T of `dtype`.
template <class F> NORMKIT_DEVICE auto visit_floating(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::float64: return f(Type<double>{});
    case Dtype::float16: return f(Type<Half>{});
    case Dtype::bfloat16: return f(Type<Bfloat>{});
    default: return f(Type<float>{});
  }
}

/// Element `index` of an array of any floating type.
NORMKIT_CALLED double element(const std::byte* data, Dtype dtype, std::int64_t index) {
  return visit_floating(
      dtype, [&](auto type) { return static_cast<double>(value_of(*at<typename decltype(type)::type>(data, index))); });
}
NORMKIT_DEVICE double element(const Param& p, std::int64_t index, double absent) {
  return p.data ? p.offset + element(p.data, p.dtype, index) : absent;
}
/// Writes the first n of N values to elements `index` and on of an array of any floating type.
template <class S, int N>
NORMKIT_DEVICE void put_elements(const ParamGradient& out, std::int64_t index, const S (&v)[N], int n) {
  visit_floating(out.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    store(at<T>(out.data, index), v, n);
  });
}

/// a / b of numbers that are not negative.
NORMKIT_CALLED int divided(int a, int b) {
  return static_cast<int>(static_cast<unsigned>(a) / static_cast<unsigned>(b));
}
/// a / b and a % b of numbers that are not negative, in 32 bits where these hold both; mostly there is nothing to divide.
NORMKIT_CALLED std::int64_t quotient_of_many(std::int64_t a, std::int64_t b) {
  if (a < b) return 0;
  if ((a | b) >> 32 == 0) return static_cast<std::uint32_t>(a) / static_cast<std::uint32_t>(b);
  return a / b;
}
NORMKIT_DEVICE std::int64_t quotient(std::int64_t a, std::int64_t b) { return b == 1 ? a : quotient_of_many(a, b); }
NORMKIT_DEVICE std::int64_t remainder(std::int64_t a, std::int64_t b) { return a - quotient(a, b) * b; }

/// (k / stride) % count of a number, and of the numbers after it without another division.
struct Cycle {
  std::int64_t stride, count, within, index;

  NORMKIT_DEVICE Cycle(std::int64_t k, std::int64_t run, std::int64_t runs) : stride(run), count(runs) {
    const std::int64_t turn = quotient(k, stride);
    within = k - turn * stride, index = remainder(turn, count);
  }
  NORMKIT_DEVICE void next() {
    if (++within < stride) return;
    within = 0;
    if (++index == count) index = 0;
  }
};

/// Element `index` of the given statistics.
template <class S> NORMKIT_DEVICE Statistic<S> given_at(const Task& t, std::int64_t index) {
  const double scale = element(t.given.scale, t.given.scale_dtype, index);
  const double mean = t.given.mean ? element(t.given.mean, t.given.mean_dtype, index) : 0;
  const bool has_low = sizeof(S) == 8 && t.given.mean_low;
  const double low = has_low ? element(t.given.mean_low, t.given.low_dtype, index) : 0;
  return statistic_of<S>(mean, low, t.given.is_variance ? rstd_of(scale, t.denominator.eps) : scale);
}
template <class S> NORMKIT_DEVICE Statistic<S> given_statistic(const Task& t, std::int64_t statistic) {
  return given_at<S>(t, remainder(quotient(statistic, t.given.stride), t.given.count));
}

/// The parameters that all elements of a unit share; where they do not, 1 and 0.
struct UnitParameters {
  double weight = 1, bias = 0;

  NORMKIT_DEVICE static UnitParameters of(const Work& work, std::int64_t o, std::int64_t lane, std::int64_t unit) {
    const Task& t = work.task;
    if (!work.constant || (!t.weight.data && !t.bias.data)) return {};
    const Geometry& g = t.geometry;
    const std::int64_t before = (o * g.steps * g.lanes + lane) * work.policy.units + unit;
    const std::int64_t own = remainder(quotient(before, work.units_per_parameter), g.params.count);
    const std::int64_t first = o * g.params.outer;
    return {element(t.weight, first + own, 1), element(t.bias, first + own, 0)};
  }
};

/// The number of elements before a vector, in the memory of a dense x.
NORMKIT_DEVICE std::int64_t offset_of(const Geometry& g, const Place& p) {
  return g.offset(p.tile.o, p.tile.step, p.tile.lane, p.tile.i) + p.row * g.columns() + p.i;
}

/// The value of Origin::phase, where the parameters of a unit differ.
NORMKIT_DEVICE std::int64_t phase_of(const Geometry& g, const Origin& tile) {
  return remainder(g.offset(tile.o, tile.step, tile.lane, tile.i), g.params.stride * g.params.count);
}

/// The number of elements from where the parameters begin to a vector.
NORMKIT_DEVICE std::int64_t within_parameters(const Geometry& g, const Place& p) {
  return p.tile.phase + p.row * g.columns() + p.i;
}

/// Reads parameters `index` and on, one for each of n elements. visit(dtype, f) calls f with their type.
template <class S, int N, class Visit>
NORMKIT_DEVICE void read_along(const Param& p, std::int64_t index, int n, bool whole, double absent, S (&out)[N],
                               Visit visit) {
  NORMKIT_UNROLL
  for (S& v : out) v = static_cast<S>(absent);
  if (!p.data) return;
  visit(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    constexpr int kStep = kVector<T> < N ? kVector<T> : N;
    const T* const from = at<T>(p.data, index);
    NORMKIT_UNROLL
    for (int first = 0; first < N; first += kStep) {
      const int left = n - first;
      const Vector<T> v = load(from + first, left < 0 ? 0 : left < kStep ? left : kStep, whole && kStep == kVector<T>);
      NORMKIT_UNROLL
      for (int e = 0; e < kStep; ++e) out[first + e] = static_cast<S>(value_of(v[e]));
    }
  });
  if (p.offset == 0) return;
  const S offset = static_cast<S>(p.offset);  // in double, conversions alone would take longer than memory
  NORMKIT_UNROLL
  for (S& v : out) v += offset;
}

/// The weights, or the biases, of the elements of a vector.
template <class S, int N>
NORMKIT_DEVICE void read_parameters(const Work& work, const Place& p, const Param& param, double absent, S (&out)[N]) {
  const Geometry& g = work.task.geometry;
  const ParamMap& map = g.params;
  const std::int64_t within = within_parameters(g, p), first = p.tile.o * map.outer;
  std::int64_t group = within, index = within;
  if (map.stride > 1 || within + p.n > map.count)
    group = quotient(within, map.stride), index = remainder(group, map.count);
  if (work.params_whole || (map.stride == 1 && index + p.n <= map.count)) {
    read_along(param, first + index, p.n, work.params_whole, absent, out,
               [](Dtype dtype, auto f) { visit_floating(dtype, f); });
  } else if (work.only_whole || within + p.n <= (group + 1) * map.stride) {
    const S all = static_cast<S>(element(param, first + index, absent));
    NORMKIT_UNROLL
    for (S& v : out) v = all;
  } else {  // several pieces in one vector
    int e = 0;
    in_turn(out, [&](S) {
      const std::int64_t own = remainder(quotient(within + (e < p.n ? e : p.n - 1), map.stride), map.count);
      return ++e, static_cast<S>(element(param, first + own, absent));
    });
  }
}
/// The weights and the biases of the elements of a vector, one after the other through the same code, which is most of
/// a kernel; or the weights alone.
template <class S, int N>
NORMKIT_DEVICE void read_parameters(const Work& work, const Place& p, bool both, S (&weight)[N], S (&bias)[N]) {
  NORMKIT_UNROLL
  for (int e = 0; e < N; ++e) weight[e] = bias[e] = 0;
  NORMKIT_ROLL
  for (int k = both ? 0 : 1; k < 2; ++k) {
    Param param = work.task.bias;
    if (k == 1) param = work.task.weight;
    NORMKIT_UNROLL
    for (int e = 0; e < N; ++e) bias[e] = weight[e];
    read_parameters(work, p, param, k, weight);
  }
}

/// The piece of a run that a thread was in last, elements [begin, end) from where the parameters of its tile begin, and what all
/// of these share: in group norm the next vector is mostly in it too.
template <class S> struct Piece {
  std::int64_t begin = 0, end = 0;
  S weight = 1, bias = 0;

  template <int N>
  NORMKIT_DEVICE void read(const Work& work, const Place& p, bool both, S (&weights)[N], S (&biases)[N]) {
    const std::int64_t within = within_parameters(work.task.geometry, p), stride = work.task.geometry.params.stride;
    if (within >= begin && within + p.n <= end) {
      NORMKIT_UNROLL
      for (int e = 0; e < N; ++e) weights[e] = weight, biases[e] = bias;
      return;
    }
    read_parameters(work, p, both, weights, biases);
    if (stride == 1) return;
    begin = quotient(within, stride) * stride, end = within + p.n <= begin + stride ? begin + stride : begin;
    weight = weights[0], bias = biases[0];
  }
};

/// What x_hat, or all of z = x_hat * weight + bias where the parameters are constant, is made with: for each of N elements, or
/// once for all.
template <class S, int N> struct Factors {
  S mean[N], scale[N], shift[N];
  /// Puts the factors of one more element behind the others, which move up.
  NORMKIT_DEVICE void append(Statistic<S> s, double weight, double bias) {
    const Affine<S> affine = forward_affine(s, weight, bias);
    take(mean), take(scale), take(shift);
    mean[N - 1] = s.mean, scale[N - 1] = affine.scale, shift[N - 1] = affine.shift;
  }
};

NORMKIT_CALLED unsigned bits_of_bytes(const std::uint8_t* byte, int n) {
  unsigned bits = 0;
  NORMKIT_ROLL
  for (int e = 0; e < n; ++e) bits |= static_cast<unsigned>(byte[e] != 0) << e;
  return bits;
}

/// The elements of a vector that are members of their statistics, one bit each.
NORMKIT_DEVICE unsigned members_of(const Task& t, const Place& p) {
  const unsigned all = (1u << p.n) - 1;
  if (!t.where.data) return all;
  const Strides& s = t.where.strides;
  const std::int64_t run = s.run;  // 0: one byte stands for all of a run
  Origin first = p.tile;
  first.i *= run;
  const std::uint8_t* const byte = at<std::uint8_t>(t.where, first) + (p.row * s.step + p.i * run);
  if (run == 0) return *byte ? all : 0;
  return bits_of_bytes(byte, p.n);
}

/// Calls f(e, exists, is a member) for the N elements of a vector; where all are members, in code that knows it.
template <int N, class F> NORMKIT_DEVICE void for_members(unsigned members, int n, F f) {
  if (members == (1u << N) - 1) {
    NORMKIT_UNROLL
    for (int e = 0; e < N; ++e) f(e, true, true);
  } else {
    NORMKIT_UNROLL
    for (int e = 0; e < N; ++e) f(e, e < n, (members >> e & 1) != 0);
  }
}

// ---- activation --------------------------------------------------------------------------------------------------

template <class S> NORMKIT_CALLED S activated(Activation activation, S z) { return activate(activation, z); }
/// activated() for one that is_kink(), in line.
template <class S> NORMKIT_DEVICE S kinked(Activation activation, S z) {
  const ActivationKind relu = ActivationKind::relu;
  return activation.kind == relu ? activate({relu, 0}, z)
                                 : activate({ActivationKind::leaky_relu, activation.parameter}, z);
}
template <class S> NORMKIT_CALLED S slope_at(Activation activation, S z) { return activation_slope(activation, z); }

/// The activation of one element after the other of a vector: prelu has a slope for each parameter.
class Activations {
 public:
  NORMKIT_DEVICE Activations(const Task& t, const Place& p)
      : slopes_(t.slopes),
        activation_(t.activation),
        first_(p.tile.o * t.geometry.params.outer),
        cycle_(t.slopes.data ? offset_of(t.geometry, p) : 0, t.geometry.params.stride, t.geometry.params.count) {}
  NORMKIT_DEVICE Activation next() {
    if (slopes_.data) activation_.parameter = element(slopes_, first_ + cycle_.index, 1), cycle_.next();
    return activation_;
  }

 private:
  Param slopes_;
  Activation activation_;
  std::int64_t first_;
  Cycle cycle_;
};

/// z = x_hat * weight + bias of the elements of one vector; `weight` is theirs where the parameters are not constant.
template <class X, class S, int N, int M>
NORMKIT_DEVICE void preactivation(const Work& work, const Factors<S, M>& factors, const Place& p, Piece<S>& piece,
                                  bool biased, const S (&x)[N], S (&z)[N], S (&weight)[N]) {
  NORMKIT_UNROLL
  for (int e = 0; e < N; ++e) {
    const int k = M == 1 ? 0 : e;
    z[e] = forward(x[e], factors.mean[k], factors.scale[k], factors.shift[k]), weight[e] = 1;
  }
  if (work.constant) return;
  S bias[N] = {};
  if (work.only_whole && work.params_whole) {
    const std::int64_t index = p.tile.i + p.i;
    const auto visit = [](Dtype dtype, auto f) {  // special_of() lets no other type come here
      if (sizeof(X) < 4 && size_of(dtype) < 4) f(Type<X>{});
      else f(Type<S>{});
    };
    read_along(work.task.weight, index, N, true, 1, weight, visit);
    if (biased) read_along(work.task.bias, index, N, true, 0, bias, visit);
  } else {
    piece.read(work, p, biased, weight, bias);
  }
  NORMKIT_UNROLL
  for (int e = 0; e < N; ++e) z[e] = mul_add(z[e], weight[e], bias[e]);
}

// ---- forward -----------------------------------------------------------------------------------------------------

/// The first n of four integers from p on, as floats; zeros follow.
template <class T> NORMKIT_DEVICE Vector<float> load_integers(const T* p, int n) {
  struct alignas(4 * sizeof(T)) Four { std::uint32_t word[sizeof(T)]; };
  Vector<float> v = zeros<float>();
  if (n == 4 && reinterpret_cast<std::uintptr_t>(p) % alignof(Four) == 0) {
    const Four four = *reinterpret_cast<const Four*>(p);
    NORMKIT_UNROLL
    for (int e = 0; e < 4; ++e) {
      const std::uint32_t bits = four.word[e * sizeof(T) / 4] >> e * 8 * sizeof(T) % 32;
      v.put(e, static_cast<float>(static_cast<T>(bits)));
    }
    return v;
  }
  NORMKIT_UNROLL
  for (int e = 0; e < 4; ++e)
    if (e < n) v.put(e, static_cast<float>(p[e]));
  return v;
}
NORMKIT_DEVICE Vector<float> read_integers(const Task& t, const Place& p) {
  switch (t.x.dtype) {
    case Dtype::uint8: return load_integers(at<std::uint8_t>(t.x, p), p.n);
    case Dtype::uint16: return load_integers(at<std::uint16_t>(t.x, p), p.n);
    default: return load_integers(at<std::int16_t>(t.x, p), p.n);
  }
}

/// x of one vector, as it lies in memory.
template <class X> NORMKIT_DEVICE Vector<X> read_x(const Task& t, const Place& p) {
  if constexpr (__is_same(X, float)) {
    if (!is_floating(t.x.dtype)) return read_integers(t, p);
  }
  return load(at<X>(t.x, p), p.n);
}

/// x of one vector, read; or where there is a residual, formed as source + residual, rounded to the type of x and
/// written.
template <class X> NORMKIT_DEVICE Vector<X> form_x(const Task& t, const Place& p) {
  if (!t.residual.data) return read_x<X>(t, p);
  const Vector<X> source = load(at<X>(t.source, p), p.n), residual = load(at<X>(t.residual, p), p.n);
  Vector<X> v = zeros<X>();
  ComputeOf<X> sum[kVector<X>];
  NORMKIT_UNROLL
  for (int e = 0; e < kVector<X>; ++e) {
    sum[e] = value_of(source[e]) + value_of(residual[e]);
    v.put(e, stored<X>(sum[e]));
  }
  store(at<X>(t.x, p), sum, p.n);
  return v;
}

/// y of one vector.
template <class X, int M>
NORMKIT_DEVICE void make_y(const Work& work, const Factors<ComputeOf<X>, M>& factors, const Place& p,
                           Piece<ComputeOf<X>>& piece, const Vector<X>& v, ComputeOf<X> (&y)[kVector<X>]) {
  ComputeOf<X> x[kVector<X>], weight[kVector<X>];
  const Activation activation = work.task.activation;
  widened(v, x);
  preactivation<X>(work, factors, p, piece, true, x, y, weight);
  if (activation.kind == ActivationKind::none) return;
  if (!work.only_whole) {
    Activations activations(work.task, p);
    return in_turn(y, [&](ComputeOf<X> one) { return activated(activations.next(), one); });
  }
  NORMKIT_UNROLL
  for (ComputeOf<X>& one : y) one = kinked(activation, one);
}

/// True where y has the type of x; else it has the compute type.
template <class X> NORMKIT_DEVICE bool like_x(const Task& t) { return sizeof(X) != 2 || t.y.dtype == t.x.dtype; }
/// merge() and rstd_of(), in one place of the code.
template <class S> NORMKIT_CALLED Moments<S> merged(Moments<S> a, Moments<S> b) { return merge(a, b); }
template <class S> NORMKIT_CALLED double solved_rstd(Moments<S> m, Denominator d) { return rstd_of(m, d); }

/// Hands the moments of a statistic out to the arrays that were asked for. What is called gets copies: of a task it would want
/// the address, and the task would go to memory.
template <class S>
NORMKIT_CALLED void hand_out(std::byte* mean_at, std::byte* rstd_at, double* moments_at, std::int64_t statistic,
                             Moments<S> m, double rstd) {
  if (mean_at) *at<S>(mean_at, statistic) = static_cast<S>(m.mean);
  if (rstd_at) *at<S>(rstd_at, statistic) = nearest<S>(rstd);
  if (moments_at) put_moments(moments_of<double>(m), moments_at + kMomentDoubles<double> * statistic);
}
template <class S>
NORMKIT_DEVICE void publish(const Task& t, std::int64_t statistic, const Moments<S>& m, double rstd) {
  hand_out(t.mean, t.rstd, t.moments, statistic, m, rstd);
}

// ---- backward ----------------------------------------------------------------------------------------------------

/// Sums of backward over a part of a statistic, and its members.
struct Reduced {
  Sums<double> sums{0, 0, 0};
  double n = 0;
};
template <class S> NORMKIT_DEVICE Reduced reduced(Sums<S> s, double n) {
  return {{static_cast<double>(s.g), static_cast<double>(s.gx), static_cast<double>(s.d)}, n};
}
NORMKIT_DEVICE Reduced operator+(Reduced a, Reduced b) { return {a.sums + b.sums, a.n + b.n}; }
NORMKIT_DEVICE void put(Reduced r, double* to) { to[0] = r.sums.g, to[1] = r.sums.gx, to[2] = r.sums.d, to[3] = r.n; }
NORMKIT_DEVICE Reduced reduced_at(const double* from) { return {{from[0], from[1], from[2]}, from[3]}; }

/// The gradient that reaches z, and the weight that it is to meet where the parameters are not constant.
template <class X, class S, int N, int M>
NORMKIT_DEVICE void incoming(const Work& work, const Factors<S, M>& factors, const Place& p, const S (&x)[N],
                             S (&dz)[N], S (&weight)[N]) {
  const bool active = work.task.activation.kind != ActivationKind::none;
  S z[N];
  Piece<S> none;
  preactivation<X>(work, factors, p, none, active, x, z, weight);
  if (!active) return;
  Activations activations(work.task, p);
  in_turn(z, [&](S one) { return slope_at(activations.next(), one); });
  NORMKIT_UNROLL
  for (int e = 0; e < N; ++e) dz[e] = dz[e] == 0 ? S(0) : dz[e] * z[e];  // z of what is no member may be NaN
}

/// True where there may be elements that no gradient reaches. They add nothing, even where x is NaN, as an element that
/// is no member may be.
NORMKIT_DEVICE bool has_gaps(const Task& t) { return t.where.data || t.activation.kind != ActivationKind::none; }

/// A statistic as backward has solved it: its mean and 1/std, and the coefficients of its gradient.
template <class S> struct Solved {
  double mean, rstd, b, c;
  NORMKIT_DEVICE double low() const { return 0; }
};
template <> struct Solved<double> {
  double mean, rstd, b, c, mean_low = 0;
  NORMKIT_DEVICE double low() const { return mean_low; }
};

/// Calls f(number, its place in memory) for all of a Solved.
template <class T, class F> NORMKIT_DEVICE void for_solved(const Work& work, std::int64_t r, T& solved, F f) {
  const std::int64_t all = work.task.geometry.statistics();
  f(solved.mean, work.solved[r]), f(solved.rstd, work.solved[all + r]);
  f(solved.b, work.solved[2 * all + r]), f(solved.c, work.solved[3 * all + r]);
  if constexpr (sizeof(T) == sizeof(Solved<double>)) f(solved.mean_low, work.solved[4 * all + r]);
}
template <class S> NORMKIT_DEVICE Solved<S> solved_at(const Work& work, std::int64_t r) {
  Solved<S> solved;
  for_solved(work, r, solved, [](double& v, double from) { v = from; });
  return solved;
}

/// A Solved as make_dx() wants it, in the compute type, for each of N elements, or once for all.
template <class S, int N> struct Known {
  S mean[N], a[N], b[N], c[N], unit[N], origin[N];
  /// Puts what belongs to one more element behind the others, which move up.
  NORMKIT_DEVICE void append(const Solved<S>& solved, double weight) {
    const Statistic<S> s = statistic_of<S>(solved.mean, solved.low(), solved.rstd);
    const Affine<S> standard = forward_affine(s, 1, 0);
    take(mean), take(a), take(b), take(c), take(unit), take(origin);
    mean[N - 1] = s.mean, a[N - 1] = static_cast<S>(s.rstd * weight);
    b[N - 1] = static_cast<S>(solved.b), c[N - 1] = static_cast<S>(solved.c);
    unit[N - 1] = standard.scale, origin[N - 1] = standard.shift;
  }
};

/// x_hat of an element that `dz` reaches.
template <class S, int M>
NORMKIT_DEVICE S standardized(const Task& t, S dz, S x, const Known<S, M>& known, int k) {
  return t.where.data && dz == 0 ? S(0) : forward(x, known.mean[k], known.unit[k], known.origin[k]);
}

/// x, the gradient that reaches z and the weight that it is to meet, of one vector.
template <class S, int N> struct Incoming {
  S x[N], dz[N], weight[N];

  template <class X, int M>
  NORMKIT_DEVICE Incoming(const Work& work, const Factors<S, M>& given, const Place& p, const Vector<X>& vx,
                          const Vector<X>& vdy) {
    widened(vx, x);
    widened(vdy, dz);
    incoming<X>(work, given, p, x, dz, weight);
  }
};

/// Adds element e to the sums about a mean. `gaps`: as has_gaps() says.
template <class S, int N>
NORMKIT_DEVICE void add(Sums<S>& sums, const Incoming<S, N>& in, int e, S mean, bool gaps, bool member) {
  const S d = in.x[e] - mean, weighted = in.dz[e] * in.weight[e];
  sums.g += weighted;
  sums.gx = mul_add(weighted, gaps && weighted == 0 ? S(0) : d, sums.gx);
  sums.d += member ? d : S(0);
}

/// dx of one vector, if it is wanted, and where every element has parameters of its own, their gradients.
template <class X, class S, int N, int M>
NORMKIT_DEVICE void make_dx(const Work& work, const Known<S, M>& known, const Place& p, const Incoming<S, N>& in,
                            S (&dx)[N]) {
  const Task& t = work.task;
  if (work.elementwise) {
    const std::int64_t first = offset_of(t.geometry, p);
    NORMKIT_UNROLL
    for (int e = 0; e < N; ++e)  // from a zero on, so that no sign of a zero depends on a mask
      dx[e] = mul_add(standardized(t, in.dz[e], in.x[e], known, M == 1 ? 0 : e), in.dz[e], S(0));
    NORMKIT_ROLL
    for (int k = 0; k < 2; ++k) {  // one after the other through the same code
      const ParamGradient out = k == 0 ? work.dweight : work.dbias;
      if (out.data) put_elements(out, first, dx, p.n);
      NORMKIT_UNROLL
      for (int e = 0; e < N; ++e) dx[e] = in.dz[e];
    }
  }
  if (!t.dx.data) return;
  const unsigned members = members_of(t, p);
  NORMKIT_UNROLL
  for (int e = 0; e < N; ++e) {
    const int k = M == 1 ? 0 : e;
    const bool member = !t.where.data || (members >> e & 1) != 0;
    const S through = member ? through_statistics(in.x[e], known.mean[k], known.b[k], known.c[k]) : S(0);
    dx[e] = backward(in.dz[e] * in.weight[e], known.a[k], through);
  }
  if (!t.residual.data) return;
  S residual[N];
  widened(load(at<X>(t.residual, p), p.n), residual);
  NORMKIT_UNROLL
  for (int e = 0; e < N; ++e) dx[e] += residual[e];
}

}  // namespace normkit::cuda
