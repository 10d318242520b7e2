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

template <class V> constexpr int kLanes = 0;
template <> constexpr int kLanes<F32> = 16;
template <> constexpr int kLanes<F64> = 8;
template <class V> constexpr int kRegLanes = 0;
template <> constexpr int kRegLanes<F32> = kLanes32;
template <> constexpr int kRegLanes<F64> = kLanes64;

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

template <class Reg, int kRegs, class Op>
NORMKIT_LOCAL Pack<Reg, kRegs> each(Pack<Reg, kRegs> a, Pack<Reg, kRegs> b, Op op) {
  for (int i = 0; i < kRegs; ++i) a.r[i] = op(a.r[i], b.r[i]);
  return a;
}
template <class Reg, int kRegs> NORMKIT_LOCAL Pack<Reg, kRegs> operator+(Pack<Reg, kRegs> a, Pack<Reg, kRegs> b) {
  return each(a, b, [](Reg x, Reg y) NORMKIT_INLINE_LAMBDA { return reg_add(x, y); });
}
template <class Reg, int kRegs> NORMKIT_LOCAL Pack<Reg, kRegs> operator-(Pack<Reg, kRegs> a, Pack<Reg, kRegs> b) {
  return each(a, b, [](Reg x, Reg y) NORMKIT_INLINE_LAMBDA { return reg_sub(x, y); });
}
template <class Reg, int kRegs> NORMKIT_LOCAL Pack<Reg, kRegs> operator*(Pack<Reg, kRegs> a, Pack<Reg, kRegs> b) {
  return each(a, b, [](Reg x, Reg y) NORMKIT_INLINE_LAMBDA { return reg_mul(x, y); });
}
template <class Reg, int kRegs> NORMKIT_LOCAL Pack<Reg, kRegs> operator/(Pack<Reg, kRegs> a, Pack<Reg, kRegs> b) {
  return each(a, b, [](Reg x, Reg y) NORMKIT_INLINE_LAMBDA { return reg_div(x, y); });
}
template <class Reg, int kRegs>
NORMKIT_LOCAL Pack<Reg, kRegs> mul_add(Pack<Reg, kRegs> a, Pack<Reg, kRegs> b, Pack<Reg, kRegs> c) {
  for (int i = 0; i < kRegs; ++i) c.r[i] = reg_mul_add(a.r[i], b.r[i], c.r[i]);
  return c;
}
/// a where z > 0, else b, also where z is NaN.
template <class Reg, int kRegs>
NORMKIT_LOCAL Pack<Reg, kRegs> positive(Pack<Reg, kRegs> z, Pack<Reg, kRegs> a, Pack<Reg, kRegs> b) {
  for (int i = 0; i < kRegs; ++i) b.r[i] = reg_positive(z.r[i], a.r[i], b.r[i]);
  return b;
}
/// v where m != 0, else 0, whatever is in v there; m has no NaN.
template <class Reg, int kRegs> NORMKIT_LOCAL Pack<Reg, kRegs> where(Pack<Reg, kRegs> m, Pack<Reg, kRegs> v) {
  return each(m, v, [](Reg x, Reg y) NORMKIT_INLINE_LAMBDA { return reg_where(x, y); });
}
/// 2^k from t = k + (1.5 * 2^23 + 127), or (1.5 * 2^52 + 1023) of doubles.
template <class Reg, int kRegs> NORMKIT_LOCAL Pack<Reg, kRegs> shifted_to_exponent(Pack<Reg, kRegs> t) {
  for (auto& reg : t.r) reg = reg_shift_exponent(reg);
  return t;
}
template <class V, class S> NORMKIT_LOCAL V broadcast(S value) {
  V v;
  for (auto& reg : v.r) reg = reg_set(value);
  return v;
}
/// A number as formulas want it that serve scalars and vectors alike; the first argument only says for which type.
template <class Reg, int kRegs> NORMKIT_LOCAL Pack<Reg, kRegs> constant(Pack<Reg, kRegs>, double value) {
  return broadcast<Pack<Reg, kRegs>>(static_cast<typename Pack<Reg, kRegs>::Lane>(value));
}
/// The first n lanes; zeros elsewhere.
template <class V> NORMKIT_LOCAL V keep(V v, int n) {
  for (int i = 0; i < kLanes<V> / kRegLanes<V>; ++i) v.r[i] = reg_keep(v.r[i], n - i * kRegLanes<V>);
  return v;
}
template <class V> NORMKIT_LOCAL auto sum(V v) { return fold(v.r); }
template <class V> NORMKIT_LOCAL auto first(V v) { return first_lane(v.r); }

template <class T> NORMKIT_LOCAL VectorOf<T> load(const T* p) {
  VectorOf<T> v;
  for (auto& reg : v.r) reg = reg_load(p), p += kRegLanes<VectorOf<T>>;
  return v;
}
template <class T> NORMKIT_LOCAL void store(T* p, VectorOf<T> v) {
  for (auto reg : v.r) reg_store(p, reg), p += kRegLanes<VectorOf<T>>;
}
/// Stores past the caches; p is aligned to what one register fills in memory. stream_fence() has to follow.
template <class T> NORMKIT_LOCAL void stream(T* p, VectorOf<T> v) {
  for (auto reg : v.r) reg_stream(p, reg), p += kRegLanes<VectorOf<T>>;
}
/// Loads the first n < kLanes elements, and never touches memory past them.
template <class T> NORMKIT_LOCAL VectorOf<T> load(const T* p, int n) {
  using V = VectorOf<T>;
  if constexpr (requires { reg_load_part(p, n); }) {
    V v;
    for (int i = 0; i < kLanes<V> / kRegLanes<V>; ++i)
      v.r[i] = reg_load_part(p + i * kRegLanes<V>, n - i * kRegLanes<V>);
    return v;
  } else {
    T part[kLanes<V>] = {};
    for (int i = 0; i < n; ++i) part[i] = p[i];
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
    for (int i = 0; i < n; ++i) p[i] = part[i];
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
  constexpr int kRegs = 8 / kLanes64;
  for (int i = 0; i < kRegs; ++i) w.low.r[i] = widen_piece(v.r, i), w.high.r[i] = widen_piece(v.r, kRegs + i);
  return w;
}

/// The first n <= kLanes bytes as numbers, zeros elsewhere; never touches memory past them.
template <class V> NORMKIT_LOCAL V flags(const std::uint8_t* p, int n) {
  const F32 f = n == kLanes<F32> ? load(p) : load(p, n);
  if constexpr (kLanes<V> == kLanes<F32>) return f;
  else return widen(f).low;
}

}  // namespace
}  // namespace normkit
