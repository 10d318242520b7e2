/// @file
/// normkit: normalization of dense arrays, forward and backward. This header is all that a C++ user reads.
///
/// Every normalization is one operation: statistics over some axes of x, then a scale and a shift.
///
///     const std::int64_t shape[] = {8, 3, 224, 224}, per_channel[] = {3};
///     normkit::Args args;
///     args.x = normkit::Array::dense(x, normkit::Dtype::float32, shape);
///     args.out = normkit::Array::dense(y, normkit::Dtype::float32, shape);
///     args.weight = normkit::Array::dense(weight, normkit::Dtype::float32, per_channel);
///     normkit::forward(args, normkit::instance_spec(4));
#pragma once

// clang-cl says which standard it compiles in _MSVC_LANG.
#if __cplusplus < 202002L && (!defined(_MSVC_LANG) || _MSVC_LANG < 202002L)
#error "normkit.hpp wants C++20: compile with -std=c++20"
#else

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "normkit/activation.hpp"
#include "normkit/dtype.hpp"
#include "normkit/geometry.hpp"

#if defined(NORMKIT_SHARED) && defined(__GNUC__)
#pragma GCC visibility push(default)  // of all that is declared here, in a shared library and for it
#endif

namespace normkit {

/// Bad input. The message names the argument, what was given and what would be right. An Error is thrown before
/// anything is written.
struct Error : std::runtime_error {
  /// What is wrong: a dtype; a shape, a layout, a number or an array that is not there; an axis that x does not have.
  enum class Kind { type, value, axis };
  Kind kind;  ///< which of them
  /// An error with a message in full.
  Error(Kind k, const std::string& message) : std::runtime_error(message), kind(k) {}
};

/// A view of somebody's array on the CPU; a default view stands for an absent array. The view owns nothing: the
/// elements, the shape and the strides must outlive it.
struct Array {
  std::byte* data = nullptr;              ///< the element whose indices are all 0
  Dtype dtype = Dtype::float32;           ///< of the elements
  bool present = false;                   ///< false: the array is absent
  bool read_only = false;                 ///< true: a call that would write it throws Error
  std::span<const std::int64_t> shape;    ///< one extent for each axis
  std::span<const std::int64_t> strides;  ///< in bytes, any sign; empty: dense, the last axis fastest
  std::string_view other_dtype = {};      ///< what the type is called where dtype is Dtype::other

  /// A dense array in C order.
  static Array dense(const void* data, Dtype dtype, std::span<const std::int64_t> shape) {
    return {static_cast<std::byte*>(const_cast<void*>(data)), dtype, true, false, shape, {}, {}};
  }
  /// The number of axes.
  int ndim() const { return static_cast<int>(shape.size()); }
  /// Bytes from one index of `axis` to the next.
  std::int64_t stride(int axis) const {
    if (!strides.empty()) return strides[axis];
    std::int64_t bytes = size_of(dtype);
    for (int a = ndim() - 1; a > axis; --a) bytes *= shape[a];
    return bytes;
  }
};

/// What is normalized and how weight and bias are laid over x.
struct Spec {
  AxisMask reduce_axes = 0;  ///< axes that a statistic is taken over, one bit each
  bool centered = true;      ///< false: root mean square, no mean (Zhang and Sennrich, 2019)
  /// True: x is divided by its Euclidean norm, or by eps where the norm is less; rstd then stands for one over that
  /// divisor.
  bool divides_by_norm = false;
  double eps = 1e-5;  ///< added to the variance
  /// False: running_mean and running_var (forward), mean and rstd (backward) are constants.
  bool use_input_stats = true;
  double momentum = 0.1;     ///< running <- (1 - momentum) * running + momentum * statistic
  double weight_offset = 0;  ///< added to weight where it is used; an absent weight stays 1
  Activation activation;     ///< of y

  /// The shapes that weight and bias may have, as sets of axes of x, of which the first `param_forms` count; where that
  /// is 0, any shape that broadcasts against x.
  std::array<AxisMask, 3> param_axes{};
  int param_forms = 0;  ///< how many of `param_axes` count
  /// What one element of weight belongs to, as messages say it.
  const char* param_meaning = "one element per channel of x";
  int channel_axis = 1;  ///< the axis that running statistics belong to, and that groups divide
  /// More than 0: the channels form so many groups, and a statistic is taken over the channels of one group too.
  std::int64_t num_groups = 0;
  const char* frozen_by = "use_input_stats";  ///< the option that clears use_input_stats, for messages
};

// Each of these functions makes the Spec of a named normalization of an x with `ndim` axes, or of shape `shape`. An
// axis is a number from -ndim to ndim - 1, where -1 is the last; any other throws Error. The other fields of the Spec,
// such as eps, activation or use_input_stats, have their defaults, and the caller may change them. Weight and bias have
// one of the shapes that are named, or one with ones among its extents, so that it broadcasts: (C, 1, 1) for (C,).

/// Instance normalization (Ulyanov, Vedaldi and Lempitsky, 2016): statistics over every axis but the first and the
/// channels, for each image apart. Weights: (C,), (N, C) or the shape of x.
Spec instance_spec(int ndim, std::int64_t channel_axis = 1);

/// Group normalization (Wu and He, 2018): statistics over each of `num_groups` groups of channels of each image, and all
/// positions. The shapes of weights are those of instance normalization.
Spec group_spec(std::span<const std::int64_t> shape, std::int64_t num_groups, std::int64_t channel_axis = 1);

/// Batch normalization (Ioffe and Szegedy, 2015): statistics over every axis but the channels. Weights: (C,).
Spec batch_spec(int ndim, std::int64_t channel_axis = 1);

/// Layer normalization (Ba, Kiros and Hinton, 2016) over any axes. Weights: the shape of those axes.
Spec layer_spec(int ndim, std::span<const std::int64_t> axes, bool centered = true);

/// Normalization over any axes, each from -ndim to ndim - 1. Weights: any shape that broadcasts against x.
Spec normalize_spec(int ndim, std::span<const std::int64_t> axes, bool centered = true);

/// x / max(norm, eps), where norm is the Euclidean norm over any axes, and eps is 1e-12 by default. rstd is one over
/// that divisor, and there is no mean. Its backward must be given the eps of its forward.
Spec l2_spec(int ndim, std::span<const std::int64_t> axes);

/// The arrays of a call. Letters say which calls use an array; other calls leave it alone: f forward(), m moments(),
/// a apply(), b backward(), s backward_sums(), d apply_backward(), 2 double_backward(). An array that is not wanted may
/// be absent, unless the table says otherwise.
///
/// ```
/// x                   all   any dtype (backward: floating), any strides; see forward() for what is refused; never absent
/// dy                  bsd2  like x; never absent
/// weight, bias        fabsd2 float32, float64 or the dtype of x; absent means 1 and 0. In backward bias says what shape dbias
///                           has, and counts where there is an activation
/// slopes              fabsd like weight, of prelu alone; one element may stand for all
/// ddx                 2     like x
/// ddweight, ddbias    2     of the shapes of weight and bias; without one of those of dweight and dbias then
/// mean, rstd          absd2 float32 or float64, one element per statistic; shape: the kept axes of x; never absent, but
///                           for mean where spec.centered is false
///                     fm    of compute_dtype(x), written
/// mean_low            a     like mean, what it has left over: moments() finds it, and apply() has the bits of forward() then
/// running_mean, running_var  f  (C,) of any floating dtype, read and updated (spec.use_input_stats), or only read
/// residual            fm    like a floating x: x + residual is normalized
/// dresidual           bd    like x, added to dx
/// where               all   bool that broadcasts against x: the members of the statistics
/// sums                d     what backward_sums() has written: float64, the kept axes of x and 3; never absent
///                     s     written; never absent
/// count               d     float64, one element per statistic: how many members `sums` were taken over; never absent
/// out                 fa    y: like x in shape, of any floating dtype; never absent. May be x itself
///                     bd    dx: like x; in d never absent. May be x or dy itself
/// sum                 fm    like x, written: x + residual; may be x or residual itself. moments() needs it, and so does an out of
///                           another dtype
/// moments             m     float64, the kept axes of x and 4, written: mean, sum of squared deviations, count, mean_low;
///                           never absent
/// dweight, dbias      b     the shapes of weight and bias, any floating dtype, written. Without bias dbias is like dweight; without
///                           weight dweight has the extents of the first form, or of the normalized axes
///                     2     the gradients with respect to weight and bias; dbias through an activation alone
/// dslopes             b     the shape of slopes, any floating dtype, written
/// d_dy                2     like x, written; `out` is the gradient with respect to x. Neither may be absent
/// ```
///
/// An array that is written must overlap no other, except where the table says so, and its elements must not overlap:
/// each axis steps over all that faster ones reach. Statistics, parameters and their gradients are dense, their axes in the
/// order in which they lie in x.
struct Args {
  /// @{
  /// One array of the call, as the table says.
  Array x, dy, weight, bias, slopes, mean, rstd, mean_low, running_mean, running_var, residual, dresidual, where, sums,
      count, out, sum, moments, dweight, dbias, dslopes, ddx, ddweight, ddbias, d_dy;
  /// @}
  Dtype out_dtype = Dtype::other;  ///< that y is to have; `other`: the dtype of x, or float32 for an integer x
  /// Called where the memory of two arrays interleaves; returns true where they share an element. Where it is null,
  /// they are taken to share one.
  bool (*share_elements)(const Array& a, const Array& b) = nullptr;
};

/// Normalizes x over `spec.reduce_axes`, then scales and shifts it.
///
///     y = activation((x - mean) / sqrt(var + eps) * weight + bias)        var divides by the number of members
///
/// Shapes, dtypes and aliasing are those of Args. A constant statistic gives exactly bias. NaN and Inf stay in their
/// own statistic. A mask says which elements are members; all are normalized. A statistic without members has mean 0
/// and rstd 0, so that y is bias; with spec.divides_by_norm rstd is 1 / eps then. The bits of y do not depend on the
/// number of threads, on what else is in the batch, or on alignment, and are the same on every instruction set that has
/// a fused multiply-add.
/// forward() allocates only scratch, on the heap. It throws Error, naming the argument, before any memory is written.
/// Arrays that are not dense are taken in parts that fit a buffer, with the bits of their dense copies, unless what has
/// to be in the buffer together is larger than that (many columns that have gaps between them): pack such arrays first.
void forward(const Args& args, const Spec& spec);

/// The gradient of forward().
///
///     dx = rstd * (g - mean(g) - x_hat * mean(g * x_hat))     g = dz * weight, x_hat = (x - mean) * rstd
///     dweight = sum(dz * x_hat)    dbias = sum(dz)            over all elements that share the parameter
///     dslopes = sum(dy * min(z, 0))                           of prelu, where z = x_hat * weight + bias
///
/// dz is dy, or with an activation dy times its slope. With a mask the averages are sums over all elements, divided by the
/// number of members, and only members have them in their dx. With spec.use_input_stats false, dx = rstd * g. `mean` is
/// rounded; it is corrected from the data, so that dx is as exact far from zero as it is near it; the slope of an activation
/// is taken at the statistics as they are given. Deterministic: sums are taken in an order that depends on the shape alone.
/// Aliasing, allocation and errors are those of forward().
void backward(const Args& args, const Spec& spec);

/// The first phase of forward(), for data in parts: the moments of one part, for each statistic.
///
///     moments = (mean, m2, count, mean_low)        m2 = sum((x - mean)^2), over the members of the part
///
/// The mean is mean + mean_low, exact to a few roundings of the distances to it where x is float64; of all other dtypes a
/// float64 holds it, and mean_low is 0.
///
/// A part is a piece of x along any axes, with all the axes of x. merge_moments() merges the moments of all parts; then
/// apply() is called on each part, with the mean that was found and with rstd = 1 / sqrt(m2 / count + spec.eps), or 0
/// where that does not exist (rstd_of() in formula.hpp). Where spec.centered is false, mean is 0 and m2 is the sum of
/// squares. With a residual, Args::sum gets x + residual, and is the x of apply(). mean and rstd, if given, get those
/// of the part alone. Allocation and errors are those of forward().
void moments(const Args& args, const Spec& spec);

/// The second phase of forward(): the y of one part, at statistics of the whole.
///
///     y = activation((x - mean) * rstd * weight + bias)
///
/// mean and rstd have one element for each statistic that the part has elements of, weight and bias one for each of its
/// parameters. In float64 they lose no digits. spec.eps has no say: rstd holds it. Aliasing, allocation and errors are
/// those of forward().
void apply(const Args& args, const Spec& spec);

/// The two phases of backward(): the sums of parts add. Neither writes dweight, dbias or dslopes: given, they are refused.
void backward_sums(const Args& args, const Spec& spec);
/// The second phase: dx of one part, from what backward_sums() found of all parts, for each statistic.
///
///     sums = (sum(g), sum(g * (x - mean)), sum(x - mean))        g = dz * weight; the last one over members alone
///
/// The caller adds up the sums of all parts, and passes them with `count`, the number of members of all parts. Both
/// phases take the same mean and rstd. That mean may be rounded: the third sum tells how far it is from the mean of the
/// data, and corrects the other two. Allocation and errors are those of forward().
void apply_backward(const Args& args, const Spec& spec);

/// The gradient of backward(): of a scalar that is a function of dx, dweight and dbias, and whose gradient with respect to
/// these is ddx, ddweight and ddbias, with respect to dy, x, weight and bias.
///
///     P(u) = u - mean(u) - x_hat * mean(u * x_hat)    g = dy * weight    q = dy * ddweight
///     d_dy = weight * rstd * P(ddx) + ddweight * x_hat + ddbias
///     out = rstd * P(q) - rstd^2 * (x_hat * mean(P(ddx) * g) + mean(ddx * x_hat) * P(g) + mean(g * x_hat) * P(ddx))
///     dweight = sum(dy * rstd * P(ddx))
///
/// Statistics are functions of x here, so that `out` is the whole derivative; with spec.use_input_stats false they are
/// constants, and only rstd * q is left of it. With a mask, averages are sums divided by the number of members: over
/// members alone of ddx, over all elements of the rest; what comes through the statistics is for members alone.
///
/// Through an activation f of z = x_hat * weight + bias, f'(z) * dy stands for dy above, d_dy is f'(z) times what stands
/// there, and f''(z) * dy times the same goes on to z, from where a backward takes it to x, weight and bias: without an
/// activation nothing depends on bias. prelu is refused. Sums are taken in float64, the rest is computed in compute_dtype(x).
/// Aliasing, allocation and errors are those of forward().
void double_backward(const Args& args, const Spec& spec);

/// Merges n moments of parts of x, four numbers each, into as many others (Chan, Golub and LeVeque, 1979): into[k] becomes
/// the moments of the members of into[k] and from[k] together. Either may have none: (0, 0, 0, 0). `x`: the dtype of x.
void merge_moments(double* into, const double* from, std::int64_t n, Dtype x);

/// The name of the instruction set in use. NORMKIT_ISA in the environment makes the first choice.
std::string isa();
/// The names of all instruction sets that this build and this machine have, the best first.
std::vector<std::string> isas();
/// Chooses an instruction set by its name; false where there is none of that name.
bool use_isa(const std::string& name);

/// How many threads a call may use, the calling one included. The number starts at NORMKIT_NUM_THREADS, or at the CPUs
/// of the affinity mask and the cgroup quota, at most OMP_NUM_THREADS. Results do not depend on it.
int num_threads();
/// Sets that number, at least 1.
void set_num_threads(int n);

}  // namespace normkit

#if defined(NORMKIT_SHARED) && defined(__GNUC__)
#pragma GCC visibility pop
#endif

#endif
