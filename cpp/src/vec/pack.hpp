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

/// The vector of f(k) for each register k. The calls are written out: through a loop the compiler sees registers only after
/// everything is inlined, and takes half as long again.
template <class P, class F> NORMKIT_LOCAL P each(F f) {
  constexpr int kRegs = sizeof(P::r) / sizeof(P::r[0]);
  static_assert(kRegs == 1 || kRegs == 2 || kRegs == 4);
  if constexpr (kRegs == 1) return {{f(0)}};
  else if constexpr (kRegs == 2) return {{f(0), f(1)}};
  else return {{f(0), f(1), f(2), f(3)}};
}
template <class Reg, int kRegs> NORMKIT_LOCAL Pack<Reg, kRegs> operator+(Pack<Reg, kRegs> a, Pack<Reg, kRegs> b) {
  return each<Pack<Reg, kRegs>>([&](int k) NORMKIT_INLINE_LAMBDA { return reg_add(a.r[k], b.r[k]); });
}
template <class Reg, int kRegs> NORMKIT_LOCAL Pack<Reg, kRegs> operator-(Pack<Reg, kRegs> a, Pack<Reg, kRegs> b) {
  return each<Pack<Reg, kRegs>>([&](int k) NORMKIT_INLINE_LAMBDA { return reg_sub(a.r[k], b.r[k]); });
}
template <class Reg, int kRegs> NORMKIT_LOCAL Pack<Reg, kRegs> operator*(Pack<Reg, kRegs> a, Pack<Reg, kRegs> b) {
  return each<Pack<Reg, kRegs>>([&](int k) NORMKIT_INLINE_LAMBDA { return reg_mul(a.r[k], b.r[k]); });
}
template <class Reg, int kRegs> NORMKIT_LOCAL Pack<Reg, kRegs> operator/(Pack<Reg, kRegs> a, Pack<Reg, kRegs> b) {
  return each<Pack<Reg, kRegs>>([&](int k) NORMKIT_INLINE_LAMBDA { return reg_div(a.r[k], b.r[k]); });
}
template <class Reg, int kRegs>
NORMKIT_LOCAL Pack<Reg, kRegs> mul_add(Pack<Reg, kRegs> a, Pack<Reg, kRegs> b, Pack<Reg, kRegs> c) {
  return each<Pack<Reg, kRegs>>([&](int k) NORMKIT_INLINE_LAMBDA { return reg_mul_add(a.r[k], b.r[k], c.r[k]); });
}
/// a where z > 0, else b, also where z is NaN.
template <class Reg, int kRegs>
NORMKIT_LOCAL Pack<Reg, kRegs> positive(Pack<Reg, kRegs> z, Pack<Reg, kRegs> a, Pack<Reg, kRegs> b) {
  return each<Pack<Reg, kRegs>>([&](int k) NORMKIT_INLINE_LAMBDA { return reg_positive(z.r[k], a.r[k], b.r[k]); });
}
/// v where m != 0, else 0, whatever is in v there; m has no NaN.
template <class Reg, int kRegs> NORMKIT_LOCAL Pack<Reg, kRegs> where(Pack<Reg, kRegs> m, Pack<Reg, kRegs> v) {
  return each<Pack<Reg, kRegs>>([&](int k) NORMKIT_INLINE_LAMBDA { return reg_where(m.r[k], v.r[k]); });
}
/// 2^k from t = k + (1.5 * 2^23 + 127), or (1.5 * 2^52 + 1023) of doubles.
template <class Reg, int kRegs> NORMKIT_LOCAL Pack<Reg, kRegs> shifted_to_exponent(Pack<Reg, kRegs> t) {
  return each<Pack<Reg, kRegs>>([&](int k) NORMKIT_INLINE_LAMBDA { return reg_shift_exponent(t.r[k]); });
}
template <class V, class S> NORMKIT_LOCAL V broadcast(S value) {
  const auto reg = reg_set(value);
  return each<V>([&](int) NORMKIT_INLINE_LAMBDA { return reg; });
}
/// A number as formulas want it that serve scalars and vectors alike; the first argument only says for which type.
template <class Reg, int kRegs> NORMKIT_LOCAL Pack<Reg, kRegs> constant(Pack<Reg, kRegs>, double value) {
  return broadcast<Pack<Reg, kRegs>>(static_cast<typename Pack<Reg, kRegs>::Lane>(value));
}
/// The first n lanes; zeros elsewhere.
template <class V> NORMKIT_LOCAL V keep(V v, int n) {
  return each<V>([&](int k) NORMKIT_INLINE_LAMBDA { return reg_keep(v.r[k], n - k * kRegLanes<V>); });
}
template <class V> NORMKIT_LOCAL auto sum(V v) { return fold(v.r); }
template <class V> NORMKIT_LOCAL auto first(V v) { return first_lane(v.r); }

template <class T> NORMKIT_LOCAL VectorOf<T> load(const T* p) {
  using V = VectorOf<T>;
  return each<V>([&](int k) NORMKIT_INLINE_LAMBDA { return reg_load(p + k * kRegLanes<V>); });
}
/// Calls f(k) for each register k of a vector.
template <class V, class F> NORMKIT_LOCAL void for_registers(F f) {
  constexpr int kRegs = kLanes<V> / kRegLanes<V>;
  f(0);
  if constexpr (kRegs > 1) f(1);
  if constexpr (kRegs > 2) f(2), f(3);
}
template <class T> NORMKIT_LOCAL void store(T* p, VectorOf<T> v) {
  using V = VectorOf<T>;
  for_registers<V>([&](int k) NORMKIT_INLINE_LAMBDA { reg_store(p + k * kRegLanes<V>, v.r[k]); });
}
/// Stores past the caches; p is aligned to what one register fills in memory. stream_fence() has to follow.
template <class T> NORMKIT_LOCAL void stream(T* p, VectorOf<T> v) {
  using V = VectorOf<T>;
  for_registers<V>([&](int k) NORMKIT_INLINE_LAMBDA { reg_stream(p + k * kRegLanes<V>, v.r[k]); });
}
/// Loads the first n < kLanes elements, and never touches memory past them.
template <class T> NORMKIT_LOCAL VectorOf<T> load(const T* p, int n) {
  using V = VectorOf<T>;
  if constexpr (requires { reg_load_part(p, n); }) {
    return each<V>([&](int k)
                       NORMKIT_INLINE_LAMBDA { return reg_load_part(p + k * kRegLanes<V>, n - k * kRegLanes<V>); });
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
  return {each<F64>([&](int k) NORMKIT_INLINE_LAMBDA { return widen_piece(v.r, k); }),
          each<F64>([&](int k) NORMKIT_INLINE_LAMBDA { return widen_piece(v.r, 8 / kLanes64 + k); })};
}

/// The first n <= kLanes bytes as numbers, zeros elsewhere; never touches memory past them.
template <class V> NORMKIT_LOCAL V flags(const std::uint8_t* p, int n) {
  const F32 f = n == kLanes<F32> ? load(p) : load(p, n);
  if constexpr (kLanes<V> == kLanes<F32>) return f;
  else return widen(f).low;
}

}  // namespace
}  // namespace normkit
