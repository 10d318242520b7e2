// The virtual vector that all arithmetic is written in: 16 floats or 8 doubles, whatever the registers of the machine.
// Fixed lanes are what keep the order of a sum, and so its bits, the same on every instruction set.
#pragma once

namespace normkit {
namespace {

using ::normkit::mul_add;  // the scalar ones, beside those of vectors

/// A vector as native registers: a wider vector type would be split and spilled by the compiler.
template <class Reg, int kRegs> struct Pack {
  using Lane = decltype(first_lane(static_cast<const Reg*>(nullptr)));
  Reg r[kRegs];
};
using F32 = Pack<Reg32, 16 / kLanes32>;
using F64 = Pack<Reg64, 8 / kLanes64>;
using R32 = Pack<Reg32, 1>;  // one register, for formulas of which a whole vector would be much code
using R64 = Pack<Reg64, 1>;

/// How many vectors of 16 floats the registers of this instruction set hold.
constexpr int kHeldVectors = kRegisters * kLanes32 / 16;

template <class V> constexpr int kRegLanes = 0;
template <int kRegs> constexpr int kRegLanes<Pack<Reg32, kRegs>> = kLanes32;
template <int kRegs> constexpr int kRegLanes<Pack<Reg64, kRegs>> = kLanes64;
template <class V> constexpr int kLanes = 0;
template <class Reg, int kRegs> constexpr int kLanes<Pack<Reg, kRegs>> = kRegs * kRegLanes<Pack<Reg, kRegs>>;

/// The scalar and the vector that values of a storage type are computed in.
template <class T> struct ComputeOf {
  using Scalar = float;
  using Vector = F32;
  using Register = R32;
};
template <> struct ComputeOf<double> {
  using Scalar = double;
  using Vector = F64;
  using Register = R64;
};
template <class T> using ScalarOf = typename ComputeOf<T>::Scalar;
template <class T> using VectorOf = typename ComputeOf<T>::Vector;
template <class T> using RegisterOf = typename ComputeOf<T>::Register;

/// op() of the registers of vectors, one after the other. The calls are written out: through a loop the compiler sees registers
/// only after everything is inlined: kernels for AVX2 took a fifth longer to compile.
template <class Op, class Reg, int kRegs, class... Packs>
NORMKIT_LOCAL Pack<Reg, kRegs> each(Op op, Pack<Reg, kRegs> a, Packs... more) {
  static_assert(kRegs == 1 || kRegs == 2 || kRegs == 4);
  if constexpr (kRegs == 1) return {{op(a.r[0], more.r[0]...)}};
  else if constexpr (kRegs == 2) return {{op(a.r[0], more.r[0]...), op(a.r[1], more.r[1]...)}};
  else
    return {{op(a.r[0], more.r[0]...), op(a.r[1], more.r[1]...), op(a.r[2], more.r[2]...), op(a.r[3], more.r[3]...)}};
}
template <class Reg, int kRegs> NORMKIT_LOCAL Pack<Reg, kRegs> operator+(Pack<Reg, kRegs> a, Pack<Reg, kRegs> b) {
  return each([](Reg x, Reg y) NORMKIT_INLINE_LAMBDA { return reg_add(x, y); }, a, b);
}
template <class Reg, int kRegs> NORMKIT_LOCAL Pack<Reg, kRegs> operator-(Pack<Reg, kRegs> a, Pack<Reg, kRegs> b) {
  return each([](Reg x, Reg y) NORMKIT_INLINE_LAMBDA { return reg_sub(x, y); }, a, b);
}
template <class Reg, int kRegs> NORMKIT_LOCAL Pack<Reg, kRegs> operator*(Pack<Reg, kRegs> a, Pack<Reg, kRegs> b) {
  return each([](Reg x, Reg y) NORMKIT_INLINE_LAMBDA { return reg_mul(x, y); }, a, b);
}
template <class Reg, int kRegs> NORMKIT_LOCAL Pack<Reg, kRegs> operator/(Pack<Reg, kRegs> a, Pack<Reg, kRegs> b) {
  return each([](Reg x, Reg y) NORMKIT_INLINE_LAMBDA { return reg_div(x, y); }, a, b);
}
template <class Reg, int kRegs>
NORMKIT_LOCAL Pack<Reg, kRegs> mul_add(Pack<Reg, kRegs> a, Pack<Reg, kRegs> b, Pack<Reg, kRegs> c) {
  return each([](Reg x, Reg y, Reg z) NORMKIT_INLINE_LAMBDA { return reg_mul_add(x, y, z); }, a, b, c);
}
/// a where z > 0, else b, also where z is NaN.
template <class Reg, int kRegs>
NORMKIT_LOCAL Pack<Reg, kRegs> positive(Pack<Reg, kRegs> z, Pack<Reg, kRegs> a, Pack<Reg, kRegs> b) {
  return each([](Reg s, Reg x, Reg y) NORMKIT_INLINE_LAMBDA { return reg_positive(s, x, y); }, z, a, b);
}
/// v where m != 0, else 0, whatever is in v there; m has no NaN.
template <class Reg, int kRegs> NORMKIT_LOCAL Pack<Reg, kRegs> where(Pack<Reg, kRegs> m, Pack<Reg, kRegs> v) {
  return each([](Reg x, Reg y) NORMKIT_INLINE_LAMBDA { return reg_where(x, y); }, m, v);
}
/// 2^k from t = k + (1.5 * 2^23 + 127), or (1.5 * 2^52 + 1023) of doubles.
template <class Reg, int kRegs> NORMKIT_LOCAL Pack<Reg, kRegs> shifted_to_exponent(Pack<Reg, kRegs> t) {
  return each([](Reg x) NORMKIT_INLINE_LAMBDA { return reg_shift_exponent(x); }, t);
}
template <class V> constexpr int kRegsOf = sizeof(V::r) / sizeof(V::r[0]);
template <class V, class S> NORMKIT_LOCAL V broadcast(S value) {
  const auto reg = reg_set(value);
  if constexpr (kRegsOf<V> == 1) return {{reg}};
  else if constexpr (kRegsOf<V> == 2) return {{reg, reg}};
  else return {{reg, reg, reg, reg}};
}
/// A number as formulas want it that serve scalars and vectors alike; the first argument only says for which type.
template <class Reg, int kRegs> NORMKIT_LOCAL Pack<Reg, kRegs> constant(Pack<Reg, kRegs>, double value) {
  return broadcast<Pack<Reg, kRegs>>(static_cast<typename Pack<Reg, kRegs>::Lane>(value));
}
/// The first n lanes; zeros elsewhere.
template <class V> NORMKIT_LOCAL V keep(V v, int n) {
  constexpr int kStep = kRegLanes<V>;
  v.r[0] = reg_keep(v.r[0], n);
  if constexpr (kRegsOf<V> > 1) v.r[1] = reg_keep(v.r[1], n - kStep);
  if constexpr (kRegsOf<V> > 2) v.r[2] = reg_keep(v.r[2], n - 2 * kStep), v.r[3] = reg_keep(v.r[3], n - 3 * kStep);
  return v;
}
template <class V> NORMKIT_LOCAL auto sum(V v) { return fold(v.r); }
template <class V> NORMKIT_LOCAL auto first(V v) { return first_lane(v.r); }

template <class T> NORMKIT_LOCAL VectorOf<T> load(const T* p) {
  using V = VectorOf<T>;
  constexpr int kStep = kRegLanes<V>;
  if constexpr (kRegsOf<V> == 1) return {{reg_load(p)}};
  else if constexpr (kRegsOf<V> == 2) return {{reg_load(p), reg_load(p + kStep)}};
  else return {{reg_load(p), reg_load(p + kStep), reg_load(p + 2 * kStep), reg_load(p + 3 * kStep)}};
}
template <class T> NORMKIT_LOCAL void store(T* p, VectorOf<T> v) {
  constexpr int kRegs = kRegsOf<VectorOf<T>>, kStep = kRegLanes<VectorOf<T>>;
  reg_store(p, v.r[0]);
  if constexpr (kRegs > 1) reg_store(p + kStep, v.r[1]);
  if constexpr (kRegs > 2) reg_store(p + 2 * kStep, v.r[2]), reg_store(p + 3 * kStep, v.r[3]);
}
/// Stores past the caches; p is aligned to what one register fills in memory. stream_fence() has to follow.
template <class T> NORMKIT_LOCAL void stream(T* p, VectorOf<T> v) {
  constexpr int kRegs = kRegsOf<VectorOf<T>>, kStep = kRegLanes<VectorOf<T>>;
  reg_stream(p, v.r[0]);
  if constexpr (kRegs > 1) reg_stream(p + kStep, v.r[1]);
  if constexpr (kRegs > 2) reg_stream(p + 2 * kStep, v.r[2]), reg_stream(p + 3 * kStep, v.r[3]);
}
/// Copies the first and the last kBytes of n, which may overlap.
template <int kBytes> NORMKIT_LOCAL void copy_ends(const char* from, int n, char* to) {
  __builtin_memcpy(to, from, kBytes), __builtin_memcpy(to + n - kBytes, from + n - kBytes, kBytes);
}
/// Copies n bytes of a vector, 64 at most. A loop over elements becomes much more code, and is slower.
[[gnu::noinline, maybe_unused]] void copy_part(const void* source, int n, void* target) {
  const char* from = static_cast<const char*>(source);
  char* to = static_cast<char*>(target);
  if (n >= 32) copy_ends<32>(from, n, to);
  else if (n >= 16) copy_ends<16>(from, n, to);
  else if (n >= 8) copy_ends<8>(from, n, to);
  else if (n >= 4) copy_ends<4>(from, n, to);
  else if (n >= 2) copy_ends<2>(from, n, to);
  else if (n == 1) *to = *from;
}
/// Loads the first n < kLanes elements, and never touches memory past them.
template <class T> NORMKIT_LOCAL VectorOf<T> load(const T* p, int n) {
  using V = VectorOf<T>;
  if constexpr (requires { reg_load_part(p, n); }) {
    V v;
    for (int k = 0; k < kRegsOf<V>; ++k) v.r[k] = reg_load_part(p + k * kRegLanes<V>, n - k * kRegLanes<V>);
    return v;
  } else {
    T part[kLanes<V>] = {};
    copy_part(p, n * static_cast<int>(sizeof(T)), part);
    return load(part);
  }
}
template <class T> NORMKIT_LOCAL void store(T* p, VectorOf<T> v, int n) {
  using V = VectorOf<T>;
  if constexpr (kMaskedParts) {
    reg_store_part(p, v.r[0], n);
  } else {
    T part[kLanes<V>];
    store(part, v);
    copy_part(part, n * static_cast<int>(sizeof(T)), p);
  }
}

/// The sum() of each of kLanes vectors, side by side: at once where the registers know how.
template <class V> NORMKIT_LOCAL V sums_of(const V (&rows)[kLanes<V>]) {
  V sums;
  if constexpr (requires { fold_rows(&rows[0].r, sums.r); }) {
    fold_rows(&rows[0].r, sums.r);
  } else {
    alignas(64) typename V::Lane each_sum[kLanes<V>];
    for (int k = 0; k < kLanes<V>; ++k) each_sum[k] = sum(rows[k]);
    sums = load(each_sum);
  }
  return sums;
}

/// Sixteen floats as two vectors of doubles.
struct Wide { F64 low, high; };
NORMKIT_LOCAL Wide widen(F32 v) {
  Wide w;
  constexpr int kRegs = kRegsOf<F64>;
  for (int k = 0; k < kRegs; ++k) w.low.r[k] = widen_piece(v.r, k), w.high.r[k] = widen_piece(v.r, kRegs + k);
  return w;
}

/// v where the first n <= kLanes bytes are not 0, else 0, whatever is in v there; memory past them is never touched.
template <class V> NORMKIT_LOCAL V where(const std::uint8_t* p, int n, V v) {
  if constexpr (requires { reg_where(p, n, v.r[0]); }) {
    return {{reg_where(p, n, v.r[0])}};
  } else {
    const F32 f = n == kLanes<F32> ? load(p) : load(p, n);
    V m;
    for (int k = 0; k < kRegsOf<V>; ++k) {
      if constexpr (sizeof(typename V::Lane) == 4) m.r[k] = f.r[k];
      else m.r[k] = widen_piece(f.r, k);
    }
    return where(m, v);
  }
}

}  // namespace
}  // namespace normkit
