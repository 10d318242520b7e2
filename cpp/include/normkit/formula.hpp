// Every formula of the library, once: for scalars, for vectors of every instruction set, on host and device.
//
// V is float, double or a vector type with +, -, * and mul_add. Contraction is off on every compiler, so a fused
// multiply-add happens exactly where mul_add is written, which is what makes the bits agree between instruction sets.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define NORMKIT_HD __host__ __device__ __forceinline__
#else
// always_inline: a shared copy of a formula compiled for AVX-512 must never be the one that an older machine links to.
#define NORMKIT_HD [[gnu::always_inline]] inline
#endif

namespace normkit {

// mul_add(a, b, c) is a * b + c, rounded once where the machine has a fused multiply-add, else twice.
// A GPU always has one. So the shim, which runs its kernels on a CPU, has one everywhere: of libm, if need be.
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA) || defined(__CUDA_ARCH__) || defined(NORMKIT_SHIM)
NORMKIT_HD float mul_add(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
NORMKIT_HD double mul_add(double a, double b, double c) { return __builtin_fma(a, b, c); }
#else
NORMKIT_HD float mul_add(float a, float b, float c) { return a * b + c; }
NORMKIT_HD double mul_add(double a, double b, double c) { return a * b + c; }
#endif

/// a + b as two numbers: the sum, and what its rounding left over (Knuth, 1969). An infinite sum leaves nothing.
struct Twofold { double high, low; };
NORMKIT_HD Twofold two_sum(double a, double b) {
  const double sum = a + b, of_b = sum - a, rest = (a - (sum - of_b)) + (b - of_b);
  return {sum, sum - sum == 0 ? rest : 0};
}

/// The mean of a set of members, the sum of their squared deviations from it, and their number; all are zero where there
/// are no members. RMS keeps the mean at zero, so one merge rule serves both. S is the compute type: where that is double
/// itself, the mean goes on in `mean_low`, as far from zero a double has no digits left for it.
template <class S> struct Moments { double mean = 0, m2 = 0, n = 0; };
template <> struct Moments<double> { double mean = 0, mean_low = 0, m2 = 0, n = 0; };
template <class S> inline constexpr int kMomentDoubles = sizeof(Moments<S>) / sizeof(double);

template <class S> NORMKIT_HD double low_of(const Moments<S>& m) {
  if constexpr (sizeof(S) == 8) return m.mean_low;
  else return 0;
}
template <class S> NORMKIT_HD Moments<S> moments_of(double mean, double mean_low, double m2, double n) {
  if constexpr (sizeof(S) == 8) return {mean, mean_low, m2, n};
  else return {mean, m2, n};
}
/// The moments of members of another compute type, which may have no use for the low part of the mean.
template <class S, class Other> NORMKIT_HD Moments<S> moments_of(const Moments<Other>& m) {
  return moments_of<S>(m.mean, low_of(m), m.m2, m.n);
}

/// Moments in memory: the low part of the mean comes last.
template <class S> NORMKIT_HD void put_moments(const Moments<S>& m, double* to) {
  to[0] = m.mean, to[1] = m.m2, to[2] = m.n;
  if constexpr (sizeof(S) == 8) to[3] = m.mean_low;
}
template <class S> NORMKIT_HD Moments<S> moments_at(const double* from) {
  return moments_of<S>(from[0], sizeof(S) == 8 ? from[3] : 0, from[1], from[2]);
}

/// The moments of the union of two disjoint sets (Chan, Golub and LeVeque, 1979). Either set may be empty. There is no
/// branch, so that loops over columns become vectors.
template <class S> NORMKIT_HD Moments<S> merge(Moments<S> a, Moments<S> b) {
  const double n = a.n + b.n, share = b.n / (n == 0 ? 1 : n);
  double delta = b.mean - a.mean;
  if constexpr (sizeof(S) == 8) delta += b.mean_low - a.mean_low;
  Twofold mean{mul_add(delta, share, a.mean), 0};
  if constexpr (sizeof(S) == 8) {
    const Twofold both = two_sum(a.mean, mul_add(delta, share, a.mean_low));
    mean = {a.n == 0 ? b.mean : both.high, a.n == 0 ? b.mean_low : both.low};
  }
  return moments_of<S>(mean.high, mean.low, a.m2 + mul_add(delta, delta * (a.n * share), b.m2), n);
}

/// Merges n moments, four numbers each, into as many others, by the rule of their compute type.
template <class S> NORMKIT_HD void merge_all(double* into, const double* from, std::int64_t n) {
  for (double* const end = into + kMomentDoubles<double> * n; into != end;
       into += kMomentDoubles<double>, from += kMomentDoubles<double>)
    put_moments(merge(moments_at<S>(into), moments_at<S>(from)), into);
}

/// The moments of n > 0 members, from the sum of their differences to a pivot and the sum of the squared differences.
template <class S>
NORMKIT_HD Moments<S> from_pivot_of_some(double pivot, double sum, double sum_squares, double n) {
  const double delta = sum / n;
  Twofold mean{pivot + delta, 0};
  if constexpr (sizeof(S) == 8) mean = two_sum(pivot, delta);
  return moments_of<S>(mean.high, mean.low, mul_add(-delta, sum, sum_squares), n);
}

/// The moments of n >= 0 members, from the sums that from_pivot_of_some() takes: n = 0 gives the moments of an empty
/// set.
template <class S> NORMKIT_HD Moments<S> from_pivot(double pivot, double sum, double sum_squares, double n) {
  const Moments<S> m = from_pivot_of_some<S>(pivot, sum, sum_squares, n == 0 ? 1 : n);
  return moments_of<S>(n == 0 ? 0 : m.mean, n == 0 ? 0 : low_of(m), m.m2, n);
}

/// True where sums of differences to a pivot, taken in the compute type S, hold the moments to within a few roundings: the pivot is
/// at most 4 standard deviations from the mean, and no square has been lost to underflow or overflow. RMS, which has no
/// pivot, passes sum = 0.
template <class S> NORMKIT_HD bool trustworthy(double sum, double sum_squares, double n) {
  constexpr double vanishing = sizeof(S) == 8 ? 1e-280 : 1e-28, overflowing = sizeof(S) == 8 ? 1e300 : 1e38;
  const double spread = sum_squares - sum * sum / n;
  const bool near = sum * sum <= 16 * n * spread;
  const bool kept = sum_squares > vanishing, held = sum_squares < overflowing;
  return near & kept & held;  // without branches: loops over rows and columns become vectors
}

/// A mean, held as two numbers of the compute type (one has too few digits for a mean far from zero), and 1/std.
template <class S> struct Statistic {
  S mean, mean_low;
  double rstd;
};

/// 1 / sqrt(var + eps); 0 where var + eps is 0, so that a constant normalizes to 0 and never to NaN.
NORMKIT_HD double rstd_of(double var, double eps) {
  const double sum = var + eps;
  return sum == 0 ? 0 : 1 / std::sqrt(sum);
}

/// What x - mean is divided by: sqrt(var + eps), or the Euclidean norm, eps at least.
struct Denominator {
  double eps = 0;
  bool is_norm = false;
};

/// One over the denominator of a set of members, whose variance is the biased one, m2 / n. With a variance, an empty
/// set has 0, so that its outputs are the bias.
template <class S> NORMKIT_HD double rstd_of(const Moments<S>& m, Denominator d) {
  if (!d.is_norm) return m.n == 0 ? 0 : rstd_of(m.m2 / m.n, d.eps);
  const double norm = std::sqrt(m.m2), divisor = norm < d.eps ? d.eps : norm;  // NaN stays
  return divisor == 0 ? 0 : 1 / divisor;
}

/// The Statistic with this mean and this 1/std: `mean_low` is the part of the mean that S has no digits for.
template <class S> NORMKIT_HD Statistic<S> statistic_of(double mean, double mean_low, double rstd) {
  if constexpr (sizeof(S) == 8) {
    return {mean, mean_low, rstd};
  } else {
    const S high = static_cast<S>(mean);
    return {high, static_cast<S>(mean - static_cast<double>(high)), rstd};
  }
}
template <class S> NORMKIT_HD Statistic<S> statistic_of(const Moments<S>& m, double rstd) {
  return statistic_of<S>(m.mean, low_of(m), rstd);
}

/// The Statistic whose mean is `shift` above the high part of another's.
template <class S> NORMKIT_HD Statistic<S> shifted(const Statistic<S>& s, double shift) {
  const double mean = static_cast<double>(s.mean);
  Twofold sum{mean + shift, 0};
  if constexpr (sizeof(S) == 8) sum = two_sum(mean, shift);
  return statistic_of<S>(sum.high, sum.low, s.rstd);
}

/// A scale in S: the largest number there is where S has none as large. Without eps, subnormal x have a 1/std beyond float.
template <class S> NORMKIT_HD S nearest(double v) {
  const S s = static_cast<S>(v);
  constexpr S most = 0x1.fffffep127f;
  if constexpr (sizeof(S) == 4) return s > most ? most : s < -most ? -most : s;
  else return s;
}

/// y = (x - mean) * scale + shift: a whole normalization, once scale and shift are known. A kernel finds them once for
/// all elements that share a statistic and a parameter.
template <class V> struct Affine { V scale, shift; };

/// Scale and shift for x_hat * weight + bias; the low part of the mean moves into the shift.
template <class S> NORMKIT_HD Affine<S> forward_affine(Statistic<S> s, double weight, double bias) {
  const double scale = s.rstd * weight;
  return {nearest<S>(scale), static_cast<S>(bias - static_cast<double>(s.mean_low) * scale)};
}

/// y before its activation. The mean is subtracted first, and not folded into the shift: near the mean the difference
/// is exact, while x * scale and a shift of mean * scale would cancel.
template <class V> NORMKIT_HD V forward(V x, V mean, V scale, V shift) { return mul_add(x - mean, scale, shift); }

/// The sums of g and of g * (x - mean) over the elements of a statistic, and of x - mean over its members. The sums of
/// two parts add up to the sums of the whole.
template <class V> struct Sums { V g, gx, d; };

template <class V> NORMKIT_HD Sums<V> operator+(Sums<V> a, Sums<V> b) { return {a.g + b.g, a.gx + b.gx, a.d + b.d}; }

/// Moves sums that were taken about one mean to a mean that is `shift` above it.
NORMKIT_HD Sums<double> recenter(Sums<double> s, double shift) { return {s.g, mul_add(-shift, s.g, s.gx), s.d}; }

/// The coefficients of dx = g * a + (x - mean) * b + c. The last two terms are for members only.
template <class V> struct Gradient { V a, b, c; };

/// dx = rstd * (g - mean(g) - x_hat * mean(g * x_hat)), where g = dy * weight, as coefficients of g and x - mean.
/// Averages are sums over all elements, divided by the number of members n: the output of an element that is no member
/// depends on the statistics too. `sums` are taken about the true mean; RMS has no mean(g) term. A norm has sums in
/// place of both averages; where it is below eps, the divisor is the constant eps, and only the first term is left.
template <class S>
NORMKIT_HD Gradient<S> gradient_of(Statistic<S> s, Sums<double> sums, double n, bool centered, Denominator d) {
  if (n == 0 || (d.is_norm && s.rstd >= static_cast<double>(static_cast<S>(1 / d.eps))))
    return {static_cast<S>(s.rstd), 0, 0};
  if (d.is_norm) n = 1;
  const double b = -(s.rstd * s.rstd) * (s.rstd * sums.gx / n);
  const double c = centered ? -(s.rstd * sums.g / n) : 0;
  return {static_cast<S>(s.rstd), static_cast<S>(b), static_cast<S>(c - static_cast<double>(s.mean_low) * b)};
}

/// The part of dx that comes through the statistics; only members have it.
template <class V> NORMKIT_HD V through_statistics(V x, V mean, V b, V c) { return mul_add(x - mean, b, c); }

/// dx of an element: its own part, g * a, and `through`, which is what through_statistics() gives, or 0 if it is no
/// member.
template <class V> NORMKIT_HD V backward(V g, V a, V through) { return mul_add(g, a, through); }

// ---- the gradient of a backward ----------------------------------------------------------------------------------

/// Sums over the elements of a statistic, where d = x - mean, v is the gradient with respect to dx, g = dy * weight, and
/// q = dy * ddweight. Those of v, v * d and d are over members alone.
template <class V> struct SecondSums { V v, vd, g, gd, vg, q, qd, d; };

template <class V> NORMKIT_HD SecondSums<V> operator+(SecondSums<V> a, SecondSums<V> b) {
  return {a.v + b.v, a.vd + b.vd, a.g + b.g, a.gd + b.gd, a.vg + b.vg, a.q + b.q, a.qd + b.qd, a.d + b.d};
}

/// Moves sums that were taken about one mean to a mean that is `shift` above it.
NORMKIT_HD SecondSums<double> recenter(SecondSums<double> s, double shift) {
  s.vd = mul_add(-shift, s.v, s.vd), s.gd = mul_add(-shift, s.g, s.gd), s.qd = mul_add(-shift, s.q, s.qd);
  return s;
}

/// The coefficients of v * of_v + x_hat * of_x + constant.
template <class V> struct SecondForm { V of_v, of_x, constant; };
template <class V> NORMKIT_HD V second_form(V v, V x_hat, V of_v, V of_x, V constant) {
  return mul_add(v, of_v, mul_add(x_hat, of_x, constant));
}

/// What is known of the elements of a statistic: x_hat = d * rstd + origin, the form of rp = rstd * P(v), which has rstd as its
/// of_v, and
///
///     d_dy = weight * rp + ddweight * x_hat + ddbias
///     d_x = rstd * (dy * (weight * g + ddweight) + through)            `through` is another form, for members alone
///
/// P(u) = u - mean(u) - x_hat * mean(u * x_hat), and dx = rstd * P(g). For h = q - rstd * (v * mean(g * x_hat) +
/// g * mean(v * x_hat)), which is what x_hat gets, d_x = rstd * P(h) - rstd^2 * x_hat * mean(P(v) * g). No coefficient has a
/// power of rstd that results have not: those of floats would run out of their range before.
template <class V> struct SecondGradient {
  V rstd, origin, g;
  SecondForm<V> rp, through;
};

/// `sums` are taken about the true mean, which is `shift` above the given one; RMS subtracts no averages.
NORMKIT_HD SecondGradient<double> second_gradient_of(double rstd, double shift, SecondSums<double> sums, double n,
                                                     bool centered) {
  const double origin = -shift * rstd;
  if (n == 0) return {rstd, origin, 0, {rstd, 0, 0}, {0, 0, 0}};
  const double share = 1 / n, all = centered ? share : 0, along = rstd * share;
  const double v = all * sums.v, g = all * sums.g, q = all * sums.q;
  const double vx = along * sums.vd, gx = along * sums.gd, qx = along * sums.qd;
  const double h = q - rstd * (v * gx + g * vx), hx = qx - 2 * rstd * vx * gx, pvg = share * sums.vg - v * g - vx * gx;
  return {rstd, origin, -rstd * vx, {rstd, -rstd * vx, -rstd * v}, {-rstd * gx, -(hx + rstd * pvg), -h}};
}

/// The form of d_dy, and what dy is multiplied by in d_x / rstd, of elements with these parameters.
template <class V> struct SecondLine {
  SecondForm<V> d_dy;
  V dy;
};
template <class V> NORMKIT_HD SecondLine<V> second_line(V g, SecondForm<V> rp, V weight, V ddweight, V ddbias) {
  return {{weight * rp.of_v, mul_add(weight, rp.of_x, ddweight), mul_add(weight, rp.constant, ddbias)},
          mul_add(weight, g, ddweight)};
}

/// The sum of dy * rp over some elements of a statistic, their part of d_weight, from sums in which dy stands for g and which
/// are taken about the given mean.
NORMKIT_HD double second_dweight(const SecondGradient<double>& k, SecondSums<double> sums) {
  return k.rp.of_v * sums.vg + k.rp.of_x * mul_add(k.rstd, sums.gd, k.origin * sums.g) + k.rp.constant * sums.g;
}

// Through an activation f of z = x_hat * weight + bias a backward takes f'(z) * dy in the place of dy. Then e = f'(z) * dy stands
// for dy above, d_dy is f'(z) times what it was, D, and what reaches z is dz = bend * D, where bend = f''(z) * dy. A backward
// takes that to x, weight and bias:
//
//     d_x += rstd * (weight * dz - mean(weight * dz) - x_hat * mean(weight * dz * x_hat))
//     d_weight += sum(dz * x_hat)    d_bias = sum(dz)

/// Sums over elements, where h is bend times some factor that D has, too.
template <class V> struct BendSums { V hv, hvd, h, hd, hdd; };

template <class V> NORMKIT_HD BendSums<V> operator+(BendSums<V> a, BendSums<V> b) {
  return {a.hv + b.hv, a.hvd + b.hvd, a.h + b.h, a.hd + b.hd, a.hdd + b.hdd};
}
template <class V> NORMKIT_HD BendSums<V> operator*(V w, BendSums<V> a) {
  return {w * a.hv, w * a.hvd, w * a.h, w * a.hd, w * a.hdd};
}

/// Sums of h * form, and of h * form * x_hat, which are those of dz, and of dz * x_hat, where `form` is D.
struct BendGradient { double bias, weight; };
NORMKIT_HD BendGradient operator+(BendGradient a, BendGradient b) { return {a.bias + b.bias, a.weight + b.weight}; }
NORMKIT_HD BendGradient bend_gradient(double rstd, double origin, SecondForm<double> form, BendSums<double> b) {
  const double hx = mul_add(rstd, b.hd, origin * b.h), hvx = mul_add(rstd, b.hvd, origin * b.hv);
  const double hxx = rstd * mul_add(rstd, b.hdd, origin * b.hd) + origin * hx;
  return {form.of_v * b.hv + form.of_x * hx + form.constant * b.h,
          form.of_v * hvx + form.of_x * hxx + form.constant * hx};
}

/// The same over elements with any parameters: h is bend times weight^2, weight * ddweight and weight * ddbias in turn, so that
/// the results are the sums of weight * dz and of weight * dz * x_hat.
struct WeightedBends { BendSums<double> weight, ddweight, ddbias; };
NORMKIT_HD WeightedBends operator+(WeightedBends a, WeightedBends b) {
  return {a.weight + b.weight, a.ddweight + b.ddweight, a.ddbias + b.ddbias};
}
NORMKIT_HD WeightedBends weighted_bends(double weight, double ddweight, double ddbias, BendSums<double> b) {
  const BendSums<double> once = weight * b;
  return {weight * once, ddweight * once, ddbias * once};
}
/// Adds to `through` what comes through the statistics with dz.
NORMKIT_HD SecondGradient<double> bent(SecondGradient<double> k, WeightedBends b, double n, bool centered) {
  const BendGradient sums = bend_gradient(k.rstd, k.origin, k.rp, b.weight) +
                            bend_gradient(k.rstd, k.origin, {0, 1, 0}, b.ddweight) +
                            bend_gradient(k.rstd, k.origin, {0, 0, 1}, b.ddbias);
  if (n == 0) return k;
  k.through.of_x -= sums.weight / n;
  if (centered) k.through.constant -= sums.bias / n;
  return k;
}

/// A running statistic r after another statistic s: r <- (1 - momentum) * r + momentum * s.
NORMKIT_HD double running(double r, double s, double momentum) { return (1 - momentum) * r + momentum * s; }

}  // namespace normkit
