// Activation functions and their derivatives, as formulas like those of formula.hpp: for scalars and for vectors.
//
// V has +, -, *, / and mul_add as there, and three more: positive(z, a, b) is a where z > 0, else b (also where z is
// NaN); shifted_to_exponent(t) shifts the bits of t up to the exponent; constant(z, c) is c as a V. Nothing else is used:
// no library function, no branch on data, and no min or max, whose rules for NaN differ between machines. So a NaN
// comes out of every kind it goes into, and the bits are those of the formulas, wherever there is a fused multiply-add.
#pragma once

#include <cstdint>

#include "normkit/formula.hpp"

namespace normkit {

/// As PyTorch defines them: gelu is z * Phi(z) by the error function, gelu_tanh its approximation by tanh; softplus is
/// log(1 + e^z) everywhere, also where PyTorch takes z in its place, beyond 20.
enum class ActivationKind : std::uint8_t {
  none,
  relu,
  leaky_relu,
  silu,
  gelu,
  gelu_tanh,
  elu,
  sigmoid,
  tanh,
  relu6,
  hardswish,
  mish,
  softplus,
  prelu,
  negative_part,  // for the gradient of prelu's slopes: its derivative is min(z, 0)
};
constexpr int kActivationKinds = static_cast<int>(ActivationKind::negative_part) + 1;

/// An activation; `parameter` is the slope of leaky_relu below zero (usually 0.01) or the alpha of elu (usually 1). That of prelu
/// is an array of its own, from which each element has it.
struct Activation {
  ActivationKind kind = ActivationKind::none;
  double parameter = 0;
};

NORMKIT_HD float positive(float z, float a, float b) { return z > 0 ? a : b; }
NORMKIT_HD double positive(double z, double a, double b) { return z > 0 ? a : b; }
NORMKIT_HD float shifted_to_exponent(float t) {
  return __builtin_bit_cast(float, __builtin_bit_cast(std::uint32_t, t) << 23);
}
NORMKIT_HD double shifted_to_exponent(double t) {
  return __builtin_bit_cast(double, __builtin_bit_cast(std::uint64_t, t) << 52);
}
NORMKIT_HD float constant(float, double c) { return static_cast<float>(c); }
NORMKIT_HD double constant(double, double c) { return c; }

/// The scalar that V is made of.
template <class V> struct LaneOf { using type = typename V::Lane; };
template <> struct LaneOf<float> { using type = float; };
template <> struct LaneOf<double> { using type = double; };

/// What the formulas must know of a format. Exponentials near the least normal number are computed 2^shift times as
/// large, so that below it they lose digits only in one last product, and become 0 as they should.
template <class S> struct Format;
template <> struct Format<float> {
  static constexpr bool is_double = false;
  static constexpr int shift = 32;
  static constexpr double unshift = 0x1p-32;
  static constexpr double integers = 0x1.8p23, bias = 127;  // integers + k has k in its last bits
  static constexpr double ln2_high = 0x1.62e4p-1, ln2_low = 0x1.7f7d1cp-20;  // k * ln2_high is exact
  static constexpr double lowest = -106, highest = 60;  // e^lowest rounds to 0; e^-highest is nothing beside 1
  static constexpr double tail = 14.5;  // beyond it Phi rounds to 0
  static constexpr double splitter = 0x1.8p15;  // rounds to a multiple of 2^-8, whose square is exact
};
template <> struct Format<double> {
  static constexpr bool is_double = true;
  static constexpr int shift = 64;
  static constexpr double unshift = 0x1p-64;
  static constexpr double integers = 0x1.8p52, bias = 1023;
  static constexpr double ln2_high = 0x1.62e42fefa38p-1, ln2_low = 0x1.ef35793c7673p-45;
  static constexpr double lowest = -746, highest = 640;
  static constexpr double tail = 38.625;
  static constexpr double splitter = 0x1.8p32;
};
template <class V> using FormatOf = Format<typename LaneOf<V>::type>;

template <class V> NORMKIT_HD V at_most(V z, double limit) {
  const V most = constant(z, limit);
  return positive(z - most, most, z);
}
template <class V> NORMKIT_HD V at_least(V z, double limit) {
  const V least = constant(z, limit);
  return positive(least - z, least, z);
}

/// Horner's rule, from the highest coefficient to that of x^0.
template <class V, class... Rest> NORMKIT_HD V polynomial(V x, double highest, Rest... rest) {
  V sum = constant(x, highest);
  ((sum = mul_add(sum, x, constant(x, rest))), ...);
  return sum;
}

/// A number as k ln 2 + rest with |rest| <= ln 2 / 2; `power` is 2^(k + shift).
template <class V> struct Exponent { V power, rest; };

/// k + shift must be the exponent of a normal number, unless the result is not looked at.
template <class V> NORMKIT_HD Exponent<V> exponent_of(V z, int shift = 0) {
  using F = FormatOf<V>;
  const V origin = constant(z, F::integers + F::bias + shift);
  const V t = mul_add(z, constant(z, 1.4426950408889634), origin), k = t - origin;
  const V rest = mul_add(k, constant(z, -F::ln2_high), z);
  return {shifted_to_exponent(t), mul_add(k, constant(z, -F::ln2_low), rest)};
}

/// e^r - 1 where |r| < 0.38: Taylor's series, up to where what follows is a quarter of a unit of roundoff.
template <class V> NORMKIT_HD V expm1_of_small(V r) {
  V sum;  // (e^r - 1 - r) / r^2
  if constexpr (FormatOf<V>::is_double) {
    sum = polynomial(r, 1. / 6227020800, 1. / 479001600, 1. / 39916800, 1. / 3628800, 1. / 362880, 1. / 40320,
                     1. / 5040, 1. / 720, 1. / 120, 1. / 24, 1. / 6, 0.5);
  } else {
    sum = polynomial(r, 1. / 5040, 1. / 720, 1. / 120, 1. / 24, 1. / 6, 0.5);
  }
  return mul_add(r * r, sum, r);
}

/// e^z * 2^shift.
template <class V> NORMKIT_HD V exp_scaled(Exponent<V> z) { return mul_add(z.power, expm1_of_small(z.rest), z.power); }

/// e^z of what was split with the shift of its format: only the last product may leave the normal numbers.
template <class V> NORMKIT_HD V exp_unscaled(Exponent<V> z) {
  return exp_scaled(z) * constant(z.power, FormatOf<V>::unshift);
}

/// e^z, from `lowest` to 24; only its last product may leave the normal numbers.
template <class V> NORMKIT_HD V exp_of(V z) { return exp_unscaled(exponent_of(z, FormatOf<V>::shift)); }

template <class V> NORMKIT_HD V expm1_of(V z) {
  const Exponent<V> d = exponent_of(z);
  return mul_add(d.power, expm1_of_small(d.rest), d.power - constant(z, 1));
}

/// sigmoid(z) and sigmoid(-z).
template <class V> struct Sigmoid { V value, opposite; };

/// 1 / (1 + e^-z), all of it scaled by 2^-shift, so that neither e^-z overflows nor the quotient is cut off.
template <class V> NORMKIT_HD Sigmoid<V> sigmoid(V z) {
  using F = FormatOf<V>;
  const V one = constant(z, F::unshift);
  const V e = exp_scaled(exponent_of(constant(z, 0) - at_least(at_most(z, F::highest), F::lowest), -F::shift));
  const V inverse = constant(z, 1) / (one + e);
  return {one * inverse, e * inverse};
}

/// E / (E + 2) where E = e^2z - 1; beyond 20 it is 1.
template <class V> NORMKIT_HD V hyperbolic_tangent(V z) {
  const V e = expm1_of(at_least(at_most(z + z, 40), -40));
  return e / (e + constant(z, 2));
}

/// The inner function of gelu_tanh = z * sigmoid(v), v = 2 sqrt(2/pi) (z + 0.044715 z^3), and its derivative.
template <class V> NORMKIT_HD V gelu_inner(V z) {
  return z * polynomial(z * z, 0.071354816272600249, 1.5957691216057307);
}
template <class V> NORMKIT_HD V gelu_inner_slope(V z) {
  return polynomial(z * z, 0.21406444881780075, 1.5957691216057307);
}

/// Beyond it the sigmoid of gelu_inner is 0 or 1.
constexpr double kGeluTanhEnd = 24;

/// The normal distribution at -a, where a = |z|: e^(-a^2/2), its density times sqrt(2 pi), and Phi(-a).
template <class V> struct NormalTail { V a, density, phi; };

/// Phi(-a) e^(a^2/2) = P(u) / (a + 3.25) with u = 1 - 6.5 / (a + 3.25). P interpolates (a + 3.25) erfcx(a / sqrt 2) / 2
/// in the Chebyshev nodes of the u from a = 0 to `tail` (50 digits, then monomials): within 0.16 and 0.06 units of
/// roundoff of float and double, relative. 3.25 is where few coefficients do, and their sum cancels little.
template <class V> NORMKIT_HD V scaled_tail(V a) {
  const V q = constant(a, 1) / (a + constant(a, 3.25)), u = mul_add(q, constant(a, -6.5), constant(a, 1));
  if constexpr (FormatOf<V>::is_double) {
    return q * polynomial(u, 1.3133442278543286e-9, 3.0362059728038999e-9, -7.4117465617556226e-9,
                          -2.8030336488507358e-8, 5.5715972086513834e-10, 1.1542788150739229e-7, 1.5575931809429777e-7,
                          -2.0973638766147485e-7, -9.1792227945323792e-7, -5.1851888013615004e-7, 3.1273429109005832e-6,
                          6.5445494309989618e-6, -6.0028980910673484e-6, -3.8128510319965881e-5, -8.6451922022216499e-6,
                          1.9357814651964234e-4, 1.7285078449286915e-4, -1.0941663455158131e-3, -1.183157504246148e-3,
                          8.3166303566128178e-3, 1.101786065905209e-3, -0.080926018184261005, 0.27445354546517331,
                          -0.53948666199076982, 0.73743840384044116);
  } else {
    return q * polynomial(u, 1.25899232e-4, 1.41736986e-4, -1.04978586e-3, -1.16219078e-3, 8.30363304e-3, 1.0967699e-3,
                          -0.0809243594, 0.274453935, -0.539486727, 0.737438399);
  }
}

/// a^2 is split into the square of a rounded a, which is exact, and a small rest: in e^(-a^2/2) the rounding of a^2
/// would count a^2/2 times. No fused multiply-add is needed for that.
template <class V> NORMKIT_HD NormalTail<V> normal_tail(V z) {
  using F = FormatOf<V>;
  const V a = at_most(positive(z, z, constant(z, 0) - z), F::tail), minus_half = constant(z, -0.5);
  const V rounded = (a + constant(z, F::splitter)) - constant(z, F::splitter);
  Exponent<V> square = exponent_of(rounded * rounded * minus_half, F::shift);
  square.rest = mul_add((a - rounded) * minus_half, a + rounded, square.rest);
  const V density = exp_unscaled(square);
  return {a, density, density * scaled_tail(a)};
}

template <class V> NORMKIT_HD V relu(V z) {
  const V zero = constant(z, 0);
  return positive(zero - z, zero, z);
}

template <class V> NORMKIT_HD V relu6(V z) { return at_most(relu(z), 6); }

template <class V> NORMKIT_HD V prelu(V z, V slope) { return positive(z, z, slope * z); }

/// 1 above zero, `below` below and at it.
template <class V> NORMKIT_HD V prelu_slope(V z, V below) {
  return positive(z, constant(z, 1), positive(constant(z, 0) - z, below, z + below));
}
template <class V> NORMKIT_HD V kink_slope(V z, double below) { return prelu_slope(z, constant(z, below)); }

/// 0 at both of its kinks, as PyTorch has it.
template <class V> NORMKIT_HD V relu6_slope(V z) { return kink_slope(z, 0) * kink_slope(constant(z, 6) - z, 0); }

/// z * relu6(z + 3) / 6, where z + 3 is exact near -3; from there down it is -0, also for -Inf.
template <class V> NORMKIT_HD V hardswish(V z) {
  return at_least(z, -3) * (relu6(z + constant(z, 3)) * constant(z, 1. / 6));
}
/// 0 at the left kink, 1 at the right one, as PyTorch has it.
template <class V> NORMKIT_HD V hardswish_slope(V z) {
  const V three = constant(z, 3), inner = mul_add(z, constant(z, 1. / 3), constant(z, 0.5));
  return positive(three - z, positive(z + three, inner, constant(z, 0)), kink_slope(z, 0));
}

/// Beyond it mish is z.
constexpr double kMishEnd = 24;

/// z * tanh(log(1 + e)) where e = e^z, and the tanh is n / (n + 2) with n = (1 + e)^2 - 1. From below `lowest` on it is -0, also
/// for -Inf.
template <class V> NORMKIT_HD V mish(V z) {
  const V c = at_least(z, FormatOf<V>::lowest), two = constant(z, 2), e = exp_of(at_most(c, kMishEnd)),
          n = e * (e + two);
  return c * (n / (n + two));
}
/// n / (n + 2) + z * 2 e / (n + 2) * 2 (1 + e) / (n + 2): relative to these two terms, which cancel near -1.19 only.
template <class V> NORMKIT_HD V mish_slope(V z) {
  const V c = at_least(at_most(z, kMishEnd), FormatOf<V>::lowest), two = constant(z, 2);
  const V e = exp_of(c), n = e * (e + two), inverse = constant(z, 1) / (n + two);
  return mul_add(c * ((e + e) * inverse), (e + e + two) * inverse, n * inverse);
}

/// t (2 + z (q - 2 w e q)), where w = n / (n + 2) is the tanh, t = 4 e (1 + e) / (n + 2)^2 its derivative, and q = 1 / (1 + e).
template <class V> NORMKIT_HD V mish_curvature(V z) {
  const V c = at_least(at_most(z, kMishEnd), FormatOf<V>::lowest), one = constant(z, 1), two = constant(z, 2);
  const V e = exp_of(c), n = e * (e + two), inverse = one / (n + two), q = one / (one + e), w = n * inverse;
  return (e + e) * inverse * ((e + e + two) * inverse) * mul_add(c, q - (w + w) * (e * q), two);
}

/// log(1 + e), 0 <= e <= 1, as 2 atanh(s) with s = e / (e + 2) <= 1/3: the series s + s^3 / 3 + s^5 / 5 ..., up to where what
/// follows is 0.26 and 0.17 units of roundoff of float and double, relative.
template <class V> NORMKIT_HD V log1p_of(V e) {
  const V s = e / (e + constant(e, 2)), square = s * s, twice = s + s;
  V sum;  // (atanh(s) - s) / s^3
  if constexpr (FormatOf<V>::is_double) {
    sum = polynomial(square, 1. / 31, 1. / 29, 1. / 27, 1. / 25, 1. / 23, 1. / 21, 1. / 19, 1. / 17, 1. / 15, 1. / 13,
                     1. / 11, 1. / 9, 1. / 7, 1. / 5, 1. / 3);
  } else {
    sum = polynomial(square, 1. / 13, 1. / 11, 1. / 9, 1. / 7, 1. / 5, 1. / 3);
  }
  return mul_add(twice * square, sum, twice);
}

/// relu(z) + log(1 + e^-|z|), both positive: the error stays relative on both sides. Its derivative is the sigmoid.
template <class V> NORMKIT_HD V softplus(V z) {
  const V below = positive(z, constant(z, 0) - z, z);
  return relu(z) + log1p_of(exp_of(at_least(below, FormatOf<V>::lowest)));
}

/// relu(z) - |z| Phi(-|z|), which cancels nothing: the error stays relative on both sides.
template <class V> NORMKIT_HD V gelu(V z) {
  const NormalTail<V> t = normal_tail(z);
  return mul_add(constant(z, 0) - t.a, t.phi, relu(z));
}

/// Phi(z) + z phi(z): d below zero, 1 - d above, where d is the slope at -|z|.
template <class V> NORMKIT_HD V gelu_slope(V z) {
  const NormalTail<V> t = normal_tail(z);
  const V d = mul_add(t.a * constant(z, -0.39894228040143268), t.density, t.phi);
  return positive(z, constant(z, 1) - d, d);
}

/// The derivative of z * sigmoid(v(z)) from that of v.
template <class V> NORMKIT_HD V gated_slope(V z, Sigmoid<V> s, V inner_slope) {
  return mul_add(s.value * s.opposite, z * inner_slope, s.value);
}

/// The second derivative of z * sigmoid(v(z)) from the first two of v.
template <class V> NORMKIT_HD V gated_curvature(V z, Sigmoid<V> s, V inner_slope, V inner_curvature) {
  const V around = mul_add(z, inner_slope * inner_slope * (s.opposite - s.value), z * inner_curvature);
  return s.value * s.opposite * (inner_slope + inner_slope + around);
}

template <class V> NORMKIT_HD V activate(Activation a, V z) {
  using F = FormatOf<V>;
  switch (a.kind) {
    case ActivationKind::none:
    case ActivationKind::negative_part: break;
    case ActivationKind::relu: return relu(z);
    case ActivationKind::leaky_relu:
    case ActivationKind::prelu: return prelu(z, constant(z, a.parameter));
    case ActivationKind::silu: {  // from below `lowest` on it is -0, also for -Inf
      const V c = at_least(z, F::lowest);
      return c * sigmoid(c).value;
    }
    case ActivationKind::gelu: return gelu(z);
    case ActivationKind::gelu_tanh: {
      const V c = at_least(z, -kGeluTanhEnd);
      return c * sigmoid(gelu_inner(c)).value;
    }
    case ActivationKind::elu: return positive(z, z, constant(z, a.parameter) * expm1_of(at_least(z, -40)));
    case ActivationKind::sigmoid: return sigmoid(z).value;
    case ActivationKind::tanh: return hyperbolic_tangent(z);
    case ActivationKind::relu6: return relu6(z);
    case ActivationKind::hardswish: return hardswish(z);
    case ActivationKind::mish: return mish(z);
    case ActivationKind::softplus: return softplus(z);
  }
  return z;
}

/// The derivative of activate() with respect to z; at a kink the one from below.
template <class V> NORMKIT_HD V activation_slope(Activation a, V z) {
  using F = FormatOf<V>;
  switch (a.kind) {
    case ActivationKind::none: break;
    case ActivationKind::relu: return kink_slope(z, 0);
    case ActivationKind::leaky_relu:
    case ActivationKind::prelu: return kink_slope(z, a.parameter);
    case ActivationKind::negative_part: return positive(z, constant(z, 0), z);
    case ActivationKind::silu: {
      const V c = at_least(at_most(z, F::highest), F::lowest);
      return gated_slope(c, sigmoid(c), constant(z, 1));
    }
    case ActivationKind::gelu: return gelu_slope(z);
    case ActivationKind::gelu_tanh: {
      const V c = at_least(at_most(z, kGeluTanhEnd), -kGeluTanhEnd);
      return gated_slope(c, sigmoid(gelu_inner(c)), gelu_inner_slope(c));
    }
    case ActivationKind::elu: {
      const V c = at_least(z, F::lowest);
      return positive(z, constant(z, 1), constant(z, a.parameter) * exp_of(c));
    }
    case ActivationKind::sigmoid: {
      const Sigmoid<V> s = sigmoid(z);
      return s.value * s.opposite;
    }
    case ActivationKind::tanh: {  // 1 - tanh^2 without its cancellation
      const Sigmoid<V> s = sigmoid(z + z);
      return constant(z, 4) * s.value * s.opposite;
    }
    case ActivationKind::relu6: return relu6_slope(z);
    case ActivationKind::hardswish: return hardswish_slope(z);
    case ActivationKind::mish: return mish_slope(z);
    case ActivationKind::softplus: return sigmoid(z).value;
  }
  return constant(z, 1);
}

/// True where the second derivative is not 0 everywhere.
NORMKIT_HD constexpr bool is_bent(ActivationKind kind) {
  using enum ActivationKind;
  return kind != none && kind != relu && kind != leaky_relu && kind != relu6 && kind != prelu && kind != negative_part;
}

/// The second derivative of activate() with respect to z; at a kink that of the side whose derivative activation_slope() has. That of
/// elu jumps at 0, where it is 0, as in PyTorch.
template <class V> NORMKIT_HD V activation_curvature(Activation a, V z) {
  using F = FormatOf<V>;
  const V zero = constant(z, 0);
  switch (a.kind) {
    case ActivationKind::silu: {
      const V c = at_least(at_most(z, F::highest), F::lowest);
      return gated_curvature(c, sigmoid(c), constant(z, 1), zero);
    }
    case ActivationKind::gelu: {  // phi(z) (2 - z^2)
      const NormalTail<V> t = normal_tail(z);
      return t.density * mul_add(t.a * constant(z, -0.39894228040143268), t.a, constant(z, 0.79788456080286536));
    }
    case ActivationKind::gelu_tanh: {
      const V c = at_least(at_most(z, kGeluTanhEnd), -kGeluTanhEnd);
      return gated_curvature(c, sigmoid(gelu_inner(c)), gelu_inner_slope(c), constant(z, 0.42812889763560150) * c);
    }
    case ActivationKind::elu: {
      const V below = constant(z, a.parameter) * exp_of(at_least(z, F::lowest));
      return positive(z, zero, positive(zero - z, below, z));  // NaN stays
    }
    case ActivationKind::sigmoid: {
      const Sigmoid<V> s = sigmoid(z);
      return s.value * s.opposite * (s.opposite - s.value);
    }
    case ActivationKind::tanh: {  // -2 tanh (1 - tanh^2)
      const Sigmoid<V> s = sigmoid(z + z);
      return constant(z, 8) * s.value * s.opposite * (s.opposite - s.value);
    }
    case ActivationKind::hardswish: {
      const V three = constant(z, 3);
      return positive(z + three, positive(three - z, constant(z, 1. / 3), zero), zero);
    }
    case ActivationKind::mish: return mish_curvature(z);
    case ActivationKind::softplus: {
      const Sigmoid<V> s = sigmoid(z);
      return s.value * s.opposite;
    }
    default: return zero;
  }
}

}  // namespace normkit
