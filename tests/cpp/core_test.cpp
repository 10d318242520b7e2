// The core without Python, small enough to run under sanitizers: every instruction set, both traversals, both schedules, forward
// and backward, against sums in long double. Exits with the number of failures.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "normkit/normkit.hpp"

namespace {

using normkit::Array;
using normkit::Dtype;
using Shape = std::vector<std::int64_t>;

int failures = 0;

void expect(bool holds, const std::string& what) {
  if (holds) return;
  ++failures;
  std::printf("FAILED: %s\n", what.c_str());
}

/// A shape whose axes lie in memory in the order `order`, with poison on both sides of the elements.
template <class T> struct BufferOf {
  Shape shape, strides;  // bytes
  std::vector<T> memory;
  static constexpr std::size_t kGuard = 32;

  BufferOf(const Shape& extents, const std::vector<int>& order) : shape(extents), strides(extents.size()) {
    std::int64_t elements = 1;
    for (std::size_t k = order.size(); k-- > 0;) {
      strides[order[k]] = elements * static_cast<std::int64_t>(sizeof(T));
      elements *= shape[order[k]];
    }
    memory.assign(static_cast<std::size_t>(elements) + 2 * kGuard, std::numeric_limits<T>::quiet_NaN());
  }
  T* data() { return memory.data() + kGuard; }
  std::size_t size() const { return memory.size() - 2 * kGuard; }
  Array view() {
    const Dtype dtype = sizeof(T) == 8 ? Dtype::float64 : Dtype::float32;
    return {reinterpret_cast<std::byte*>(data()), dtype, true, false, shape, strides, {}};
  }
  T& operator()(std::int64_t n, std::int64_t c, std::int64_t s) {
    return data()[(n * strides[0] + c * strides[1] + s * strides[2]) / static_cast<std::int64_t>(sizeof(T))];
  }
  bool guards_whole() const {
    for (std::size_t k = 0; k < kGuard; ++k)
      if (!std::isnan(memory[k]) || !std::isnan(memory[memory.size() - 1 - k])) return false;
    return true;
  }
};
using Buffer = BufferOf<float>;
using Doubles = BufferOf<double>;

struct Truth { long double mean = 0, rstd = 0, g = 0, gx = 0; };

struct Case {
  Shape shape;  // images, channels, positions
  std::vector<int> order;
  const char* name;
};

/// prelu on what the call without it gives: to the last bit, and its slopes' gradient to the roundings of a sum.
void run_prelu(const Case& c, const std::string& label) {
  std::mt19937 random(11);
  std::normal_distribution<float> normal(0, 1);
  const Shape per_channel{c.shape[1]}, per_statistic{c.shape[0], c.shape[1]};
  Buffer x(c.shape, c.order), dy(x), z(x), y(x), dx(x);
  Buffer bias(per_channel, {0}), slopes(bias), dslopes(bias), alone(bias), mean(per_statistic, {0, 1}), rstd(mean);
  for (Buffer* b : {&x, &dy, &bias, &slopes})
    for (std::size_t k = 0; k < b->size(); ++k) b->data()[k] = normal(random);
  normkit::Spec spec = normkit::instance_spec(3);
  normkit::Args forward;
  forward.x = x.view(), forward.bias = bias.view(), forward.out = z.view();
  forward.mean = mean.view(), forward.rstd = rstd.view();
  normkit::forward(forward, spec);
  spec.activation = {normkit::ActivationKind::prelu};
  forward.slopes = slopes.view(), forward.out = y.view();
  normkit::forward(forward, spec);
  normkit::Args backward;
  backward.x = x.view(), backward.dy = dy.view(), backward.bias = bias.view(), backward.slopes = slopes.view();
  backward.mean = mean.view(), backward.rstd = rstd.view(), backward.dslopes = alone.view();
  normkit::backward(backward, spec);
  backward.dslopes = dslopes.view(), backward.out = dx.view();
  normkit::backward(backward, spec);
  bool same = true;
  long double worst = 0;
  for (std::int64_t k = 0; k < c.shape[1]; ++k) {
    long double sum = 0, scale = 1;
    for (std::int64_t n = 0; n < c.shape[0]; ++n)
      for (std::int64_t s = 0; s < c.shape[2]; ++s) {
        const float at = z(n, k, s), product = slopes.data()[k] * at;
        same = same && y(n, k, s) == (at > 0 ? at : product);
        if (at > 0) continue;
        sum += static_cast<long double>(dy(n, k, s)) * at, scale += std::fabs(dy(n, k, s)) * (1 + std::fabs(at));
      }
    worst = std::fmax(worst, std::fabs(dslopes.data()[k] - sum) / scale);
    same = same && dslopes.data()[k] == alone.data()[k];
  }
  expect(same && worst <= std::ldexp(256.0L, -24), label);
  for (Buffer* b : {&y, &dx, &dslopes}) expect(b->guards_whole(), label + ": a write out of bounds");
}

/// The gradient of S = sum(ddx * dx) + sum(ddweight * dweight) + sum(ddbias * dbias), by what it has to be: S is linear in dy,
/// and sum(ddx * dx) in the weight; without eps, a shift of x changes nothing, and dx goes down as x is scaled up.
template <class T> void run_double(const Case& c, const std::string& label) {
  using Values = BufferOf<T>;
  std::mt19937 random(13);
  std::normal_distribution<T> normal(0, 1);
  const Shape per_channel{c.shape[1]}, per_statistic{c.shape[0], c.shape[1]};
  const std::vector<int> kept = c.order[0] == 1 ? std::vector<int>{1, 0} : std::vector<int>{0, 1};
  Values x(c.shape, c.order), dy(x), ddx(x), dx(x), d_x(x), d_dy(x);
  Values weight(per_channel, {0}), ddweight(weight), ddbias(weight), dweight(weight), dbias(weight), d_weight(weight);
  Values mean(per_statistic, kept), rstd(mean);
  for (Values* b : {&x, &dy, &ddx, &weight, &ddweight, &ddbias})
    for (std::size_t k = 0; k < b->size(); ++k) b->data()[k] = normal(random);
  normkit::Spec spec = normkit::instance_spec(3);
  spec.eps = 0;
  normkit::Args forward;
  forward.x = x.view(), forward.out = dx.view(), forward.mean = mean.view(), forward.rstd = rstd.view();
  normkit::forward(forward, spec);
  normkit::Args args;
  args.x = x.view(), args.dy = dy.view(), args.mean = mean.view(), args.rstd = rstd.view(), args.weight = weight.view();
  normkit::Args backward = args;
  backward.out = dx.view(), backward.dweight = dweight.view(), backward.dbias = dbias.view();
  normkit::backward(backward, spec);
  args.ddx = ddx.view(), args.ddweight = ddweight.view(), args.ddbias = ddbias.view();
  args.out = d_x.view(), args.d_dy = d_dy.view(), args.dweight = d_weight.view();
  normkit::double_backward(args, spec);
  long double scale = 1;
  const auto dot = [&](Values& a, Values& b) {
    long double sum = 0;
    for (std::size_t k = 0; k < a.size(); ++k) {
      const long double term = static_cast<long double>(a.data()[k]) * b.data()[k];
      sum += term, scale += std::fabs(term);
    }
    return sum;
  };
  const long double by_dx = dot(ddx, dx);
  long double worst = std::fabs(dot(d_dy, dy) - (by_dx + dot(ddweight, dweight) + dot(ddbias, dbias)));
  worst = std::fmax(worst, std::fabs(dot(d_weight, weight) - by_dx));
  if (c.shape[2] > 1) worst = std::fmax(worst, std::fabs(dot(d_x, x) + by_dx));
  for (std::size_t k = 0; k < d_x.size(); ++k) dx.data()[k] = 1;
  if (c.shape[2] > 1) worst = std::fmax(worst, std::fabs(dot(d_x, dx)));
  expect(worst <= scale * std::ldexp(64.0L, sizeof(T) == 8 ? -53 : -24), label);
  for (Values* b : {&d_x, &d_dy, &d_weight}) expect(b->guards_whole(), label + ": a write out of bounds");
}

/// A double backward so large that its results go past the caches, into steps with gaps between them: the bits of dense ones.
void run_double_with_gaps(const std::string& label) {
  std::mt19937 random(17);
  std::normal_distribution<float> normal(0, 1);
  const Shape shape{2, 64, 2000}, wider{2, 67, 2000};
  const std::vector<int> channels_last{0, 2, 1};
  Buffer x(shape, channels_last), dy(x), ddx(x), y(x), d_x(x), d_dy(x);
  Buffer mean({2, 64}, {0, 1}), rstd(mean), wide_d_x(wider, channels_last), wide_d_dy(wide_d_x);
  for (Buffer* b : {&x, &dy, &ddx})
    for (std::size_t k = 0; k < b->size(); ++k) b->data()[k] = normal(random);
  const normkit::Spec spec = normkit::instance_spec(3);
  normkit::Args args;
  args.x = x.view(), args.out = y.view(), args.mean = mean.view(), args.rstd = rstd.view();
  normkit::forward(args, spec);
  args.dy = dy.view(), args.ddx = ddx.view(), args.out = d_x.view(), args.d_dy = d_dy.view();
  normkit::double_backward(args, spec);
  args.out = wide_d_x.view(), args.d_dy = wide_d_dy.view();
  args.out.shape = args.d_dy.shape = shape;
  normkit::double_backward(args, spec);
  bool same = true;
  for (std::int64_t n = 0; n < 2; ++n)
    for (std::int64_t s = 0; s < 2000; ++s)
      for (std::int64_t c = 0; c < 67; ++c) {
        const float of_x = wide_d_x(n, c, s), of_dy = wide_d_dy(n, c, s);
        same =
            same && (c < 64 ? of_x == d_x(n, c, s) && of_dy == d_dy(n, c, s) : std::isnan(of_x) && std::isnan(of_dy));
      }
  expect(same, label + "double backward into steps with gaps");
}

void run_case(const Case& c, const std::string& label) {
  std::mt19937 random(7);
  std::normal_distribution<float> normal(3, 2);
  const std::int64_t images = c.shape[0], channels = c.shape[1], positions = c.shape[2];
  Buffer x(c.shape, c.order), y(c.shape, c.order), dy(c.shape, c.order), dx(c.shape, c.order);
  for (std::size_t k = 0; k < x.size(); ++k) x.data()[k] = normal(random), dy.data()[k] = normal(random);
  const Shape per_channel{channels}, per_statistic{images, channels};
  Buffer weight(per_channel, {0}), bias(per_channel, {0}), dweight(per_channel, {0}), dbias(per_channel, {0});
  // Statistics lie in the order of the kept axes in memory.
  const std::vector<int> kept =
      c.order[0] == 1 || (c.order[1] == 1 && c.order[0] == 2) ? std::vector<int>{1, 0} : std::vector<int>{0, 1};
  Buffer mean(per_statistic, kept), rstd(per_statistic, kept);
  for (std::int64_t k = 0; k < channels; ++k) weight.data()[k] = normal(random), bias.data()[k] = normal(random);

  const normkit::Spec spec = normkit::instance_spec(3);
  normkit::Args forward;
  forward.x = x.view(), forward.out = y.view(), forward.weight = weight.view(), forward.bias = bias.view();
  forward.mean = mean.view(), forward.rstd = rstd.view();
  normkit::forward(forward, spec);
  normkit::Args backward;
  backward.x = x.view(), backward.dy = dy.view(), backward.out = dx.view(), backward.weight = weight.view();
  backward.mean = mean.view(), backward.rstd = rstd.view();
  backward.dweight = dweight.view(), backward.dbias = dbias.view();
  normkit::backward(backward, spec);

  // A few hundred roundings of the largest intermediate: sums are short, so real errors are far smaller.
  const long double unit = std::ldexp(1.0L, -24), roundings = 256;
  long double worst = 0;
  for (std::int64_t k = 0; k < channels; ++k) {
    long double sum_dweight = 0, sum_dbias = 0, scale_dweight = 1;
    for (std::int64_t n = 0; n < images; ++n) {
      Truth t;
      for (std::int64_t s = 0; s < positions; ++s) t.mean += x(n, k, s);
      t.mean /= positions;
      long double var = 0;
      for (std::int64_t s = 0; s < positions; ++s) var += (x(n, k, s) - t.mean) * (x(n, k, s) - t.mean);
      t.rstd = 1 / std::sqrt(var / positions + 1e-5L);
      for (std::int64_t s = 0; s < positions; ++s) {
        const long double x_hat = (x(n, k, s) - t.mean) * t.rstd, g = dy(n, k, s);
        t.g += g, t.gx += g * x_hat;
        scale_dweight += std::fabs(g * x_hat);
      }
      sum_dweight += t.gx, sum_dbias += t.g;
      for (std::int64_t s = 0; s < positions; ++s) {
        const long double x_hat = (x(n, k, s) - t.mean) * t.rstd, w = weight.data()[k];
        const long double want_y = x_hat * w + bias.data()[k];
        const long double want_dx = t.rstd * w * (dy(n, k, s) - t.g / positions - x_hat * t.gx / positions);
        const long double scale = 1 + std::fabs(w) * (1 + std::fabs(x_hat)), slope = 1 + t.rstd * 16 * scale;
        worst = std::fmax(worst, std::fabs(y(n, k, s) - want_y) / (scale * unit));
        worst = std::fmax(worst, std::fabs(dx(n, k, s) - want_dx) / (slope * unit));
      }
    }
    worst = std::fmax(worst, std::fabs(dweight.data()[k] - sum_dweight) / (scale_dweight * unit));
    worst = std::fmax(worst, std::fabs(dbias.data()[k] - sum_dbias) / (scale_dweight * unit));
  }
  expect(worst < roundings, label + ": " + std::to_string(static_cast<double>(worst)) + " roundings");
  for (const Buffer* b : {&x, &y, &dy, &dx, &mean, &rstd, &dweight, &dbias})
    expect(b->guards_whole(), label + ": wrote past the end");
}

/// All options at once, and the two phases over two parts of the positions.
struct OptionCase {
  Shape shape;
  std::vector<int> order;
  bool batch;  // else instance norm
  Shape mask;  // extents of 1 are broadcast; empty: no mask
  bool own_sum;
  const char* name;
};

/// The mask of a case, no byte longer than it must be, so that the address sanitizer sees a read past its end.
struct Mask {
  Shape shape, strides;
  std::vector<std::uint8_t> bytes;

  Mask(const OptionCase& c, std::mt19937& random) : shape(c.mask), strides(c.mask.size()) {
    std::int64_t elements = 1;
    if (shape.empty()) return;
    for (std::size_t k = c.order.size(); k-- > 0;) {
      const std::int64_t extent = shape[c.order[k]];
      strides[c.order[k]] = extent > 1 ? elements : 0;
      elements *= extent;
    }
    bytes.resize(static_cast<std::size_t>(elements));
    for (std::uint8_t& b : bytes) b = random() % 3 != 0;
  }
  Array view() {
    if (shape.empty()) return {};
    return {reinterpret_cast<std::byte*>(bytes.data()), Dtype::boolean, true, false, shape, strides, {}};
  }
  bool operator()(std::int64_t n, std::int64_t c, std::int64_t s) const {
    return shape.empty() || bytes[static_cast<std::size_t>(n * strides[0] + c * strides[1] + s * strides[2])];
  }
};

struct OptionCall {
  const OptionCase& c;
  std::mt19937 random{11};
  std::int64_t images = c.shape[0], channels = c.shape[1], positions = c.shape[2];
  Shape kept = c.batch ? Shape{channels} : Shape{images, channels}, per_channel{channels};
  std::vector<int> kept_order = c.batch ? std::vector<int>{0} : std::vector<int>{0, 1};
  Buffer x{c.shape, c.order}, residual{x}, sum{x}, y{x}, y_of_parts{x}, dy{x}, dresidual{x}, dx{x}, dx_of_parts{x};
  Buffer weight{per_channel, {0}}, bias{weight}, dweight{weight}, dbias{weight}, mean{kept, kept_order}, rstd{mean};
  Doubles means{kept, kept_order}, rstds{means}, counts{means};
  Mask mask{c, random};
  normkit::Spec spec = c.batch ? normkit::batch_spec(3) : normkit::instance_spec(3);

  explicit OptionCall(const OptionCase& given) : c(given) {
    std::normal_distribution<float> normal(1, 2);
    for (Buffer* b : {&x, &residual, &dy, &dresidual, &weight, &bias})
      for (std::size_t k = 0; k < b->size(); ++k) b->data()[k] = normal(random);
    spec.activation = {normkit::ActivationKind::silu};
    spec.weight_offset = 1;
  }

  void whole() {
    normkit::Args forward;
    forward.x = x.view(), forward.residual = residual.view(), forward.out = y.view(), forward.where = mask.view();
    forward.weight = weight.view(), forward.bias = bias.view(), forward.mean = mean.view(), forward.rstd = rstd.view();
    if (c.own_sum) forward.sum = sum.view();
    normkit::forward(forward, spec);
    for (std::size_t k = 0; k < x.size() && !c.own_sum; ++k) sum.data()[k] = x.data()[k] + residual.data()[k];
    normkit::Args backward;
    backward.x = sum.view(), backward.dy = dy.view(), backward.out = dx.view(), backward.where = mask.view();
    backward.mean = mean.view(), backward.rstd = rstd.view(), backward.dresidual = dresidual.view();
    backward.weight = weight.view(), backward.bias = bias.view();
    backward.dweight = dweight.view(), backward.dbias = dbias.view();
    normkit::backward(backward, spec);
  }

  /// Calls f with the cut of each half of the positions: what an array has of it. Of one position, the second has none.
  void for_halves(const std::function<void(const std::function<Array(Array)>&)>& f) {
    const std::int64_t half = positions - positions / 2;
    for (const auto& [begin, end] : {std::pair{std::int64_t{0}, half}, std::pair{half, positions}}) {
      Shape shape = c.shape, mask_shape = mask.shape;
      shape[2] = end - begin;
      f([&, begin = begin, end = end](Array a) {
        const bool is_mask = a.dtype == Dtype::boolean;
        if (is_mask && (a.shape.empty() || mask.shape[2] != positions)) return a;
        if (is_mask) mask_shape[2] = end - begin;
        a.data += begin * a.stride(2);
        a.shape = is_mask ? mask_shape : shape;
        return a;
      });
    }
  }

  /// Moments, then the rest with statistics in double.
  void parts() {
    Shape three = kept, four = kept;
    std::vector<int> order = kept_order;
    three.push_back(3), four.push_back(4), order.push_back(static_cast<int>(order.size()));
    const Doubles none(three, order), no_moments(four, order);
    std::vector<Doubles> moments, sums;
    for_halves([&](const auto& cut) {
      normkit::Args args;
      moments.push_back(no_moments);
      args.x = cut(sum.view()), args.where = cut(mask.view()), args.moments = moments.back().view();
      normkit::moments(args, spec);
    });
    const std::int64_t statistics = static_cast<std::int64_t>(means.size());
    normkit::merge_moments(moments[0].data(), moments[1].data(), statistics, Dtype::float32);
    for (std::int64_t r = 0; r < statistics; ++r) {
      const double* m = moments[0].data() + 4 * r;
      means.data()[r] = m[0], counts.data()[r] = m[2];
      rstds.data()[r] = m[2] == 0 ? 0 : 1 / std::sqrt(m[1] / m[2] + spec.eps);
    }
    const auto backward_args = [&](const auto& cut) {
      normkit::Args args;
      args.x = cut(sum.view()), args.dy = cut(dy.view()), args.where = cut(mask.view());
      args.mean = means.view(), args.rstd = rstds.view(), args.weight = weight.view(), args.bias = bias.view();
      return args;
    };
    for_halves([&](const auto& cut) {
      normkit::Args args;
      args.x = cut(x.view()), args.residual = cut(residual.view()), args.out = cut(y_of_parts.view());
      args.mean = means.view(), args.rstd = rstds.view(), args.weight = weight.view(), args.bias = bias.view();
      normkit::apply(args, spec);
      normkit::Args backward = backward_args(cut);
      sums.push_back(none);
      backward.sums = sums.back().view();
      normkit::backward_sums(backward, spec);
    });
    for (std::size_t k = 0; k < none.size(); ++k) sums[0].data()[k] += sums[1].data()[k];
    for_halves([&](const auto& cut) {
      normkit::Args args = backward_args(cut);
      args.sums = sums[0].view(), args.count = counts.view();
      args.dresidual = cut(dresidual.view()), args.out = cut(dx_of_parts.view());
      normkit::apply_backward(args, spec);
    });
  }

  template <class F> void for_elements(F f) {
    for (std::int64_t n = 0; n < images; ++n)
      for (std::int64_t k = 0; k < channels; ++k)
        for (std::int64_t s = 0; s < positions; ++s)
          f(static_cast<std::size_t>(c.batch ? k : n * channels + k), n, k, s);
  }

  /// Errors in roundings of the largest intermediate, as in run_case().
  long double worst() {
    struct Sums { long double members = 0, mean = 0, var = 0, rstd = 0, g = 0, gx = 0, scale = 0; };
    struct Element { long double x_hat, g, dz, y, scale; };
    std::vector<Sums> of(means.size()), of_channel(static_cast<std::size_t>(channels));
    for_elements([&](std::size_t r, auto n, auto k, auto s) {
      if (mask(n, k, s)) of[r].members += 1, of[r].mean += sum(n, k, s);
    });
    for (Sums& t : of) t.mean /= std::fmax(t.members, 1.0L);
    for_elements([&](std::size_t r, auto n, auto k, auto s) {
      const long double d = sum(n, k, s) - of[r].mean;
      if (mask(n, k, s)) of[r].var += d * d / of[r].members;
    });
    for (Sums& t : of) t.rstd = t.members > 0 ? 1 / std::sqrt(t.var + spec.eps) : 0;
    const auto element = [&](std::size_t r, auto n, auto k, auto s) {
      const long double x_hat = (sum(n, k, s) - of[r].mean) * of[r].rstd, w = weight.data()[k] + 1.0L;
      const long double z = x_hat * w + bias.data()[k], sigmoid = 1 / (1 + std::exp(-z));
      const long double dz = dy(n, k, s) * sigmoid * (1 + z * (1 - sigmoid));
      const long double scale = 1 + std::fabs(bias.data()[k]) + std::fabs(w) * (1 + std::fabs(x_hat));
      return Element{x_hat, dz * w, dz, z * sigmoid, scale};
    };
    for_elements([&](std::size_t r, auto n, auto k, auto s) {
      const Element e = element(r, n, k, s);
      Sums& channel = of_channel[static_cast<std::size_t>(k)];
      channel.g += e.dz, channel.gx += e.dz * e.x_hat, of[r].g += e.g, of[r].gx += e.g * e.x_hat;
      const long double scale = std::fabs(dy(n, k, s)) * e.scale * (1 + std::fabs(e.x_hat));
      channel.scale += scale, of[r].scale += scale * std::fabs(weight.data()[k] + 1.0L);
    });
    long double most = 0;
    const auto judge = [&](long double found, long double wanted, long double scale) {
      most = std::fmax(most, std::isnan(found) ? HUGE_VALL : std::fabs(found - wanted) / std::ldexp(scale, -24));
    };
    for_elements([&](std::size_t r, auto n, auto k, auto s) {
      const Element e = element(r, n, k, s);
      const Sums& t = of[r];
      const long double own = 1 + std::fabs(dy(n, k, s) * (weight.data()[k] + 1.0L)) * e.scale;
      long double through = 0, scale = own;
      if (mask(n, k, s)) {
        through = (t.g + e.x_hat * t.gx) / t.members;
        scale += t.scale * (1 + std::fabs(e.x_hat)) / t.members;
      }
      const long double want = t.rstd * (e.g - through) + dresidual(n, k, s);
      for (Buffer* b : {&y, &y_of_parts}) judge((*b)(n, k, s), e.y, e.scale);
      for (Buffer* b : {&dx, &dx_of_parts}) judge((*b)(n, k, s), want, std::fabs(want) + 1 + t.rstd * scale);
      judge(sum(n, k, s), x(n, k, s) + residual(n, k, s), 0x1p-24L);
    });
    for (std::int64_t k = 0; k < channels; ++k) {
      const Sums& channel = of_channel[static_cast<std::size_t>(k)];
      judge(dweight.data()[k], channel.gx, 1 + channel.scale);
      judge(dbias.data()[k], channel.g, 1 + channel.scale);
    }
    return most;
  }
};

void run_options(const OptionCase& c, const std::string& label) {
  // Halves of a batch have columns with gaps between them: the kernels of a GPU want those packed.
  if (c.batch && normkit::isa() == "shim") return;
  OptionCall call(c);
  call.whole();
  call.parts();
  const double worst = static_cast<double>(call.worst());
  expect(worst < 256, label + ": " + std::to_string(worst) + " roundings");
  for (const Buffer* b : {&call.y, &call.sum, &call.dx, &call.y_of_parts, &call.dx_of_parts, &call.dweight})
    expect(b->guards_whole(), label + ": wrote past the end");
}

/// Calls from several threads at once give what one gives.
void run_together() {
  const Shape shape{3, 2, 40000};
  Buffer x(shape, {0, 1, 2});
  for (std::size_t k = 0; k < x.size(); ++k) x.data()[k] = static_cast<float>(k % 977) * 0.25f;
  std::vector<Buffer> results(4, Buffer(shape, {0, 1, 2}));
  std::vector<std::thread> threads;
  for (Buffer& y : results)
    threads.emplace_back([&x, &y] {
      for (int repeat = 0; repeat < 5; ++repeat) {
        normkit::Args args;
        args.x = x.view(), args.out = y.view();
        normkit::forward(args, normkit::instance_spec(3));
      }
    });
  for (std::thread& t : threads) t.join();
  for (Buffer& y : results)
    expect(std::memcmp(y.data(), results[0].data(), y.size() * sizeof(float)) == 0, "calls at once differ");
}

template <class F> std::string message_of(F call) {
  try {
    call();
  } catch (const normkit::Error& e) {
    return e.what();
  }
  return "no error";
}

void run_errors() {
  Buffer x({2, 3, 4}, {0, 1, 2}), y({2, 3, 4}, {0, 1, 2}), weight({4}, {0});
  normkit::Args args;
  args.x = x.view(), args.out = y.view(), args.weight = weight.view();
  const std::string message = message_of([&] { normkit::forward(args, normkit::instance_spec(3)); });
  expect(message == "weight has shape (4,), expected (3,), (2, 3) or (2, 3, 4): one element per channel of x",
         "message: " + message);
  Buffer channels({3}, {0}), one({1}, {0});
  args.weight = channels.view();
  const auto wrong = [&](normkit::ActivationKind kind, const Array& slopes, const std::string& wanted) {
    normkit::Spec spec = normkit::instance_spec(3);
    spec.activation = {kind}, args.slopes = slopes;
    const std::string found = message_of([&] { normkit::forward(args, spec); });
    expect(found == wanted, "message: " + found + ", wanted: " + wanted);
  };
  using normkit::ActivationKind;
  wrong(ActivationKind::prelu, one.view(), "slopes has shape (1,), expected (3,): repeat it first");
  wrong(ActivationKind::prelu, {},
        "slopes is None, expected an array: the slope of prelu below zero for each parameter, or one for all");
  wrong(ActivationKind::relu, channels.view(), "slopes is given, expected None: the activation is not prelu");
  wrong(ActivationKind::negative_part, {},
        "activation is negative_part, expected another: there is nothing that it makes of x");
  for (std::size_t k = 0; k < y.size(); ++k) expect(std::isnan(y.data()[k]), "an error came after a write");
}

/// Every second index along an axis of arrays that are twice as long, in and out, has the bits of dense arrays.
void run_elsewhere(const Shape& shape, const std::vector<int>& order, int axis, const std::string& label) {
  Shape twice = shape;
  twice[axis] *= 2;
  Buffer x(shape, order), dy(x), residual(x), y(x), sum(x), dx(x);
  Buffer wide_x(twice, order), wide_dy(wide_x), wide_residual(wide_x), wide_y(wide_x), wide_sum(wide_x),
      wide_dx(wide_x);
  Buffer mean({shape[0], shape[1]}, {0, 1}), rstd(mean), wide_mean(mean), wide_rstd(mean);
  Buffer dweight({shape[1]}, {0}), wide_dweight(dweight);
  const auto wide_at = [&](Buffer& wide, std::int64_t n, std::int64_t c, std::int64_t s,
                           std::int64_t beside) -> float& {
    return wide(n * (1 + (axis == 0)) + (axis == 0) * beside, c * (1 + (axis == 1)) + (axis == 1) * beside,
                s * (1 + (axis == 2)) + (axis == 2) * beside);
  };
  const auto each = [&](auto f) {
    for (std::int64_t n = 0; n < shape[0]; ++n)
      for (std::int64_t c = 0; c < shape[1]; ++c)
        for (std::int64_t s = 0; s < shape[2]; ++s) f(n, c, s);
  };
  float value = 0;
  each([&](auto n, auto c, auto s) {
    for (auto [dense, wide] : {std::pair{&x, &wide_x}, {&dy, &wide_dy}, {&residual, &wide_residual}}) {
      value = std::fmod(value * 1.7f + 0.61f, 3.1f);
      (*dense)(n, c, s) = wide_at(*wide, n, c, s, 0) = value;
    }
  });
  Shape steps = wide_x.strides;
  steps[axis] *= 2;
  const auto seen = [&](Buffer& wide) {
    return Array{wide.view().data, Dtype::float32, true, false, shape, steps, {}};
  };
  const normkit::Spec spec = normkit::instance_spec(3);
  normkit::Args dense, wide;
  dense.x = x.view(), dense.residual = residual.view(), dense.out = y.view(), dense.sum = sum.view();
  dense.mean = mean.view(), dense.rstd = rstd.view();
  wide.x = seen(wide_x), wide.residual = seen(wide_residual), wide.out = seen(wide_y), wide.sum = seen(wide_sum);
  wide.mean = wide_mean.view(), wide.rstd = wide_rstd.view();
  normkit::forward(dense, spec), normkit::forward(wide, spec);
  dense.dy = dy.view(), dense.out = dx.view(), dense.dweight = dweight.view();
  wide.dy = seen(wide_dy), wide.out = seen(wide_dx), wide.dweight = wide_dweight.view();
  normkit::backward(dense, spec), normkit::backward(wide, spec);
  bool same = true;
  each([&](auto n, auto c, auto s) {
    for (auto [one, other] : {std::pair{&y, &wide_y}, {&sum, &wide_sum}, {&dx, &wide_dx}}) {
      same = same && (*one)(n, c, s) == wide_at(*other, n, c, s, 0) && std::isnan(wide_at(*other, n, c, s, 1));
      same = same && other->guards_whole();
    }
  });
  for (auto [one, other] : {std::pair{&mean, &wide_mean}, {&rstd, &wide_rstd}, {&dweight, &wide_dweight}})
    for (std::size_t k = 0; k < one->size(); ++k) same = same && one->data()[k] == other->data()[k];
  expect(same, label + "every second index");
}

/// Few channels last of bytes, whose memory ends with the last of them, have the bits of the same numbers in float32.
void run_bytes(std::int64_t channels, std::int64_t positions, const std::string& label) {
  const Shape shape{2, channels, positions};
  const std::vector<int> order{0, 2, 1};
  Buffer x(shape, order), expected(x), y(x);
  std::vector<std::uint8_t> bytes(x.size());
  std::mt19937 random(static_cast<unsigned>(channels * positions));
  for (std::size_t k = 0; k < bytes.size(); ++k) x.data()[k] = bytes[k] = static_cast<std::uint8_t>(random());
  Shape strides = x.strides;
  for (std::int64_t& stride : strides) stride /= static_cast<std::int64_t>(sizeof(float));
  normkit::Args args;
  args.x = x.view(), args.out = expected.view();
  normkit::forward(args, normkit::instance_spec(3));
  args.x = {reinterpret_cast<std::byte*>(bytes.data()), Dtype::uint8, true, false, shape, strides, {}};
  args.out = y.view();
  normkit::forward(args, normkit::instance_spec(3));
  expect(std::memcmp(y.data(), expected.data(), y.size() * sizeof(float)) == 0, label + "bytes of few channels");
  expect(y.guards_whole(), label + "bytes of few channels are written past the end");
}

using Call = void (*)(const normkit::Args&, const normkit::Spec&);

/// A call with all that it can have, and what it is of.
struct Whole {
  Buffer x{{2, 3, 4}, {0, 1, 2}}, dy{x}, ddx{x}, y{x}, d_dy{x}, rstd{{2, 3}, {0, 1}}, mean{rstd};
  Buffer running_mean{{3}, {0}}, running_var{running_mean};
  Doubles count{{2, 3}, {0, 1}}, sums{{2, 3, 3}, {0, 1, 2}}, moments{{2, 3, 4}, {0, 1, 2}};
  normkit::Args args;
  normkit::Spec spec = normkit::instance_spec(3);

  Whole() {
    args.x = x.view(), args.dy = dy.view(), args.ddx = ddx.view(), args.out = y.view(), args.d_dy = d_dy.view();
    args.mean = mean.view(), args.rstd = rstd.view(), args.count = count.view(), args.sums = sums.view();
    args.moments = moments.view();
  }
  void refuses(Call call, const std::string& wanted) {
    const std::string message = message_of([&] { call(args, spec); });
    expect(message == wanted, "message: " + message + ", wanted: " + wanted);
    for (Buffer* b : {&y, &d_dy})
      for (std::size_t k = 0; k < b->size(); ++k) expect(std::isnan(b->data()[k]), wanted + ": came after a write");
  }
};

/// What the table of Args says is never absent.
void run_absences() {
  using normkit::Args;
  const std::vector<std::pair<Call, std::vector<Array Args::*>>> needs = {
      {&normkit::forward, {&Args::x, &Args::out}},
      {&normkit::moments, {&Args::x, &Args::moments}},
      {&normkit::apply, {&Args::x, &Args::mean, &Args::rstd, &Args::out}},
      {&normkit::backward, {&Args::x, &Args::dy, &Args::mean, &Args::rstd}},
      {&normkit::backward_sums, {&Args::x, &Args::dy, &Args::mean, &Args::rstd, &Args::sums}},
      {&normkit::apply_backward,
       {&Args::x, &Args::dy, &Args::mean, &Args::rstd, &Args::sums, &Args::count, &Args::out}},
      {&normkit::double_backward, {&Args::x, &Args::dy, &Args::mean, &Args::rstd, &Args::out, &Args::d_dy}},
  };
  const std::vector<std::pair<Array Args::*, std::string>> messages = {
      {&Args::x, "x is None, expected an array"},
      {&Args::dy, "dy is None, expected an array like x"},
      {&Args::out, "out is None, expected an array like x"},
      {&Args::d_dy, "d_dy is None, expected an array like x"},
      {&Args::mean, "mean is None, expected an array: one element per statistic"},
      {&Args::rstd, "rstd is None, expected an array: one element per statistic"},
      {&Args::count, "count is None, expected an array: one element per statistic"},
      {&Args::sums, "sums is None, expected an array: three numbers per statistic"},
      {&Args::moments, "moments is None, expected an array: four numbers per statistic"},
  };
  for (const auto& [call, arrays] : needs)
    for (const auto array : arrays)
      for (const auto& [absent, message] : messages) {
        if (absent != array) continue;
        Whole whole;
        whole.args.*array = {};
        whole.refuses(call, message);
      }
}

/// Arrays that are none, and specs that do not go with x.
void run_misfits() {
  const auto refused = [](auto change, const std::string& wanted, Call call = & normkit::forward) {
    Whole whole;
    change(whole, whole.args, whole.spec);
    whole.refuses(call, wanted);
  };
  static const Shape many(65, 1), negative{2, 3, -4}, two{16, 4}, four{4};
  static const Shape interlaced{20, 20, 4}, windows{48, 16, 4}, reversed{-48, 16, -4};
  refused([](auto&, auto& a, auto&) { a.x.shape = many, a.x.strides = {}; }, "x has 65 axes, expected at most 64");
  refused([](auto&, auto& a, auto&) { a.x.shape = negative; },
          "x has shape (2, 3, -4), expected extents that are at least 0");
  refused([](auto&, auto& a, auto&) { a.x.strides = two; }, "x has strides (16, 4), expected 3: one for each axis");
  refused([](auto&, auto& a, auto&) { a.out.strides = four; }, "out has strides (4,), expected 3: one for each axis");
  refused([](auto&, auto& a, auto&) { a.x.data = nullptr; },
          "x has no memory, expected an array that holds its elements");
  refused([](auto&, auto& a, auto&) { a.dy.data = nullptr; },
          "dy has no memory, expected an array that holds its elements", &normkit::backward);
  const std::string shared = " has elements that share memory, expected distinct ones";
  refused([](auto&, auto& a, auto&) { a.out.strides = interlaced; }, "out" + shared);
  refused([](auto& w, auto& a, auto&) {
    a.running_mean = w.running_mean.view(), a.running_var = w.running_var.view();
    static const Shape overlapping{2};
    a.running_var.strides = overlapping;
  }, "running_var" + shared);
  refused([](auto&, auto& a, auto&) { a.out_dtype = Dtype::uint8; },
          "out_dtype is uint8, expected float32, float64, float16 or bfloat16");
  refused([](auto&, auto&, auto& s) { s.reduce_axes = 1 << 5; },
          "an axis of reduce_axes is 5, expected 0 to 2: x has 3 axes");
  refused([](auto&, auto&, auto& s) { s.param_axes[1] = 1 << 3; },
          "an axis of param_axes is 3, expected 0 to 2: x has 3 axes");
  refused([](auto&, auto&, auto& s) { s.param_forms = 4; }, "param_forms is 4, expected 0 to 3");
  for (const int axis : {-1, 3})
    refused([axis](auto&, auto&, auto& s) { s.num_groups = 1, s.channel_axis = axis; },
            "channel_axis is " + std::to_string(axis) + ", expected 0 to 2: x has 3 axes");
  refused([](auto&, auto&, auto& s) { s.num_groups = 2; },
          "num_groups is 2, expected a divisor of 3, the channels of x");
  const auto runs = [](Whole& w) {
    w.args.running_mean = w.running_mean.view(), w.args.running_var = w.running_var.view();
  };
  refused([&](auto& w, auto&, auto& s) { runs(w), s.channel_axis = 7; },
          "channel_axis is 7, expected 0 to 2: x has 3 axes");
  refused([&](auto& w, auto&, auto& s) { runs(w), s.channel_axis = 2; },
          "channel_axis is 2, expected an axis that is not in reduce_axes");
  refused([&](auto& w, auto&, auto& s) { runs(w), s.num_groups = 3; },
          "running_mean is given, expected None: groups of channels have no running statistics");
  const std::string none = message_of([] { normkit::layer_spec(65, std::vector<std::int64_t>{-1}); });
  expect(none == "x has 65 axes, expected at most 64", "message: " + none);
  const std::string channels = message_of([] { normkit::batch_spec(65); });
  expect(channels == "x has 65 axes, expected at most 64", "message: " + channels);
  for (const Shape* strides : {&windows, &reversed}) {  // any order and direction of distinct elements will do
    Whole whole;
    for (std::size_t k = 0; k < whole.x.size(); ++k) whole.x.data()[k] = static_cast<float>(k % 5);
    if (strides == &reversed) whole.args.out.data += 48 + 12;
    whole.args.out.strides = *strides;
    normkit::forward(whole.args, whole.spec);
  }
}

/// Of no images at all, gradients are 0 wherever they lie, and the statistics of an evaluation are those that run.
void run_no_images() {
  float memory[] = {7, 7, 7, 7, 7};
  const Shape none{0, 3, 5}, statistics{0, 3}, channels{3}, backwards{-4}, steps{8};
  normkit::Args args;
  args.x = args.dy = Array::dense(nullptr, Dtype::float32, none);
  args.mean = args.rstd = Array::dense(nullptr, Dtype::float32, statistics);
  args.dweight = Array::dense(memory + 2, Dtype::float32, channels), args.dweight.strides = backwards;
  normkit::backward(args, normkit::instance_spec(3));
  const float expected[] = {0, 0, 0, 7, 7};
  expect(std::memcmp(memory, expected, sizeof memory) == 0, "gradients of nothing that lie backwards");
  double mean[] = {1, 2, 3}, var[] = {3, 0, -1};
  float means[] = {7, 7, 7, 7, 7}, rstds[] = {7, 7, 7};
  normkit::Args evaluation;
  evaluation.x = evaluation.out = args.x;
  evaluation.running_mean = Array::dense(mean, Dtype::float64, channels);
  evaluation.running_var = Array::dense(var, Dtype::float64, channels);
  evaluation.mean = Array::dense(means, Dtype::float32, channels), evaluation.mean.strides = steps;
  evaluation.rstd = Array::dense(rstds, Dtype::float32, channels);
  normkit::Spec spec = normkit::batch_spec(3);
  spec.use_input_stats = false, spec.eps = 1;
  normkit::forward(evaluation, spec);
  expect(means[0] == 1 && means[1] == 7 && means[2] == 2 && means[4] == 3, "running means of nothing");
  expect(rstds[0] == 0.5f && rstds[1] == 1 && rstds[2] == 0, "running deviations of nothing");
  const std::uint16_t ones[] = {0x3c00, 0x4000, 0x4200};  // 1, 2 and 3
  evaluation.running_mean = Array::dense(ones, Dtype::float16, channels);
  normkit::forward(evaluation, spec);
  expect(means[0] == 1 && means[2] == 2 && means[4] == 3, "running means of float16 of nothing");
  normkit::Args norm;
  const Shape empty_rows{3, 0};
  norm.x = norm.out = Array::dense(nullptr, Dtype::float32, empty_rows), norm.rstd = evaluation.rstd;
  normkit::Spec l2 = normkit::l2_spec(2, std::vector<std::int64_t>{1});
  l2.eps = 0.25;
  normkit::forward(norm, l2);
  expect(rstds[0] == 4 && rstds[1] == 4 && rstds[2] == 4, "the norm of nothing");
}

/// Over no positions at all: statistics are 0, whatever was in memory.
void run_empty() {
  Buffer x({2, 3, 0}, {0, 1, 2}), mean({2, 3}, {0, 1}), rstd(mean);
  normkit::Args args;
  args.x = args.out = x.view(), args.mean = mean.view(), args.rstd = rstd.view();
  normkit::forward(args, normkit::instance_spec(3));
  for (Buffer* b : {&mean, &rstd})
    for (std::size_t k = 0; k < b->size(); ++k) expect(b->data()[k] == 0, "statistics of nothing");
}

/// What only C++ callers can get wrong: arrays of statistics that do not lie as the kernels count, or are not there.
void run_phase_errors() {
  const normkit::Spec spec = normkit::instance_spec(3);
  Buffer x({2, 3, 4}, {0, 1, 2}), y(x), other({2, 3, 4}, {2, 1, 0}), dweight({3}, {0});
  for (std::size_t k = 0; k < x.size(); ++k) x.data()[k] = other.data()[k] = static_cast<float>(k);
  Doubles triples({2, 3, 3}, {0, 1, 2}), turned({2, 3, 3}, {1, 0, 2}), pairs({2, 3, 2}, {0, 1, 2});
  Doubles moments({2, 3, 4}, {0, 1, 2}), turned_moments({2, 3, 4}, {1, 0, 2});
  Doubles statistic({2, 3}, {0, 1}), turned_statistic({2, 3}, {1, 0}), few({3}, {0});
  const std::string order = ", aligned: dense, its axes in the order in which they lie in x";
  const auto forward = [&](void (*call)(const normkit::Args&, const normkit::Spec&), auto change,
                           const std::string& wanted) {
    normkit::Args args;
    args.x = x.view(), args.out = y.view(), args.moments = moments.view();
    args.mean = args.rstd = call == &normkit::apply ? statistic.view() : Array{};
    change(args);
    const std::string message = message_of([&] { call(args, spec); });
    expect(message == wanted, "message: " + message + ", wanted: " + wanted);
  };
  const auto backward = [&](void (*call)(const normkit::Args&, const normkit::Spec&), auto change,
                            const std::string& wanted) {
    normkit::Args args;
    args.x = args.dy = x.view(), args.out = y.view(), args.mean = args.rstd = statistic.view();
    args.sums = triples.view(), args.count = statistic.view();
    change(args);
    const std::string message = message_of([&] { call(args, spec); });
    expect(message == wanted, "message: " + message + ", wanted: " + wanted);
  };
  const std::string shape3 = ", expected (2, 3, 3): three numbers per statistic";
  const std::string shape4 = ", expected (2, 3, 4): four numbers per statistic";
  const std::string strides3 = " has strides (24, 48, 8), expected (72, 24, 8)" + order;
  const std::string strides4 = " has strides (32, 64, 8), expected (96, 32, 8)" + order;
  const std::string strides = " has strides (8, 16), expected (24, 8)" + order;
  forward(&normkit::moments, [&](auto& a) { a.moments = {}; },
          "moments is None, expected an array: four numbers per statistic");
  forward(&normkit::moments, [&](auto& a) { a.moments = turned_moments.view(); }, "moments" + strides4);
  forward(&normkit::moments, [&](auto& a) { a.moments = pairs.view(); }, "moments has shape (2, 3, 2)" + shape4);
  forward(&normkit::moments, [&](auto& a) { a.moments.read_only = true; },
          "moments is read-only, expected a writable array");
  forward(&normkit::moments, [&](auto& a) { a.residual = x.view(); },
          "sum is None, expected an array like x: there is no y of its dtype to hold x + residual");
  forward(&normkit::forward, [&](auto& a) { a.sum = other.view(); },
          "residual is None, expected an array like x: sum is x + residual");
  forward(&normkit::forward, [&](auto& a) { a.residual = x.view(), a.sum = y.view(); },
          "sum overlaps out, expected memory apart");
  forward(&normkit::apply, [&](auto& a) { a.rstd = turned_statistic.view(); }, "rstd" + strides);
  forward(&normkit::apply, [&](auto& a) { a.mean_low = turned_statistic.view(); }, "mean_low" + strides);
  forward(&normkit::apply, [&](auto& a) { a.mean_low = few.view(); },
          "mean_low has shape (3,), expected (2, 3): one element per statistic");
  backward(&normkit::backward_sums, [&](auto& a) { a.sums = {}; },
           "sums is None, expected an array: three numbers per statistic");
  backward(&normkit::backward_sums, [&](auto& a) { a.sums = turned.view(); }, "sums" + strides3);
  backward(&normkit::backward_sums, [&](auto& a) { a.sums = pairs.view(); }, "sums has shape (2, 3, 2)" + shape3);
  backward(&normkit::backward_sums, [&](auto& a) { a.dweight = dweight.view(); },
           "dweight is given, expected None: phases have no such gradient");
  backward(&normkit::apply_backward, [&](auto& a) { a.out = {}; }, "out is None, expected an array like x");
  backward(&normkit::apply_backward, [&](auto& a) { a.sums = turned.view(); }, "sums" + strides3);
  backward(&normkit::apply_backward, [&](auto& a) { a.count = {}; },
           "count is None, expected an array: one element per statistic");
  backward(&normkit::apply_backward, [&](auto& a) { a.count = few.view(); },
           "count has shape (3,), expected (2, 3): one element per statistic");
  backward(&normkit::apply_backward, [&](auto& a) { a.count = turned_statistic.view(); }, "count" + strides);
  backward(&normkit::apply_backward, [&](auto& a) { a.count.dtype = Dtype::float32; },
           "count has dtype float32, expected float64");
  for (Doubles* b : {&triples, &turned, &pairs, &moments, &turned_moments, &statistic, &turned_statistic, &few})
    for (std::size_t k = 0; k < b->size(); ++k) expect(std::isnan(b->data()[k]), "an error came after a write");
  for (std::size_t k = 0; k < y.size(); ++k) expect(std::isnan(y.data()[k]), "an error came after a write");
}

}  // namespace

int main() {
  const std::vector<Case> cases = {
      {{2, 3, 1}, {0, 1, 2}, "one member"},           {{2, 3, 49}, {0, 1, 2}, "rows in registers"},
      {{2, 2, 4097}, {0, 1, 2}, "a chunk and one"},   {{1, 1, 70001}, {0, 1, 2}, "spans shared by threads"},
      {{2, 17, 65}, {0, 2, 1}, "channels-last"},      {{1, 70, 1500}, {0, 2, 1}, "channels-last spans"},
      {{3, 5, 33}, {1, 0, 2}, "channels outermost"},  {{40, 8, 300}, {0, 1, 2}, "many rows"},
      {{2, 3, 1101}, {0, 2, 1}, "few channels last"},
  };
  const std::vector<int> contiguous{0, 1, 2}, channels_last{0, 2, 1};
  const std::vector<OptionCase> options = {
      {{2, 3, 1}, contiguous, false, {2, 3, 1}, true, "one member or none"},
      {{2, 3, 49}, contiguous, false, {}, true, "rows in registers"},
      {{2, 3, 49}, contiguous, false, {2, 3, 49}, false, "masked rows"},
      {{2, 3, 49}, contiguous, false, {2, 3, 1}, true, "rows in or out"},
      {{2, 2, 4097}, contiguous, false, {2, 1, 4097}, true, "a chunk and one, a mask for all channels"},
      {{1, 2, 35003}, contiguous, false, {1, 2, 35003}, false, "spans shared by threads"},
      {{1, 2, 35003}, contiguous, false, {1, 1, 35003}, true, "spans shared by threads, a mask for all channels"},
      {{2, 17, 65}, channels_last, false, {2, 17, 65}, true, "channels-last"},
      {{2, 17, 65}, channels_last, false, {2, 1, 65}, false, "channels-last, a mask for all channels"},
      {{2, 17, 65}, channels_last, false, {2, 17, 1}, true, "channels-last, channels in or out"},
      {{1, 70, 1500}, channels_last, false, {}, true, "channels-last spans"},
      {{1, 70, 1500}, channels_last, false, {1, 70, 1500}, false, "channels-last spans, masked"},
      {{1, 70, 1500}, channels_last, false, {1, 1, 1500}, true, "channels-last spans, a mask for all channels"},
      {{5, 3, 77}, contiguous, true, {5, 3, 77}, true, "batch"},
      {{5, 3, 77}, contiguous, true, {5, 1, 77}, false, "batch, a mask for all channels"},
      {{5, 3, 77}, contiguous, true, {5, 1, 1}, true, "batch, images in or out"},
      {{9, 3, 33}, contiguous, true, {9, 3, 33}, false, "batch across steps"},
      {{9, 3, 33}, contiguous, true, {9, 1, 1}, true, "batch across steps, images in or out"},
  };
  for (const std::string& isa : normkit::isas()) {
    normkit::use_isa(isa);
    for (const int threads : {1, 3}) {
      normkit::set_num_threads(threads);
      const std::string label = isa + ", " + std::to_string(threads) + " threads, ";
      for (const Case& c : cases) {
        run_case(c, label + c.name);
        run_double<float>(c, label + "double backward, " + c.name);
        // The shim's build of this test has kernels for float32 alone.
        if (isa != "shim") run_double<double>(c, label + "double backward of float64, " + c.name);
      }
      if (isa != "shim") run_double_with_gaps(label);
      for (const int k : {1, 2, 3, 4, 7})
        run_prelu(cases[static_cast<std::size_t>(k)], label + "prelu, " + cases[k].name);
      for (const OptionCase& c : options) run_options(c, label + "options, " + c.name);
      if (isa == "shim") continue;  // kernels of a GPU, which take no views
      const std::vector<int> first{0, 1, 2}, last{0, 2, 1};
      run_elsewhere({4, 3, 50}, first, 2, label + "rows, ");
      run_elsewhere({2, 2, 150000}, first, 2, label + "long rows, ");
      run_elsewhere({5, 3, 301}, last, 1, label + "channels last, ");
      run_elsewhere({7, 5, 30000}, last, 1, label + "long, channels last, ");
      run_elsewhere({1, 5, 30000}, last, 1, label + "one image, channels last, ");
      for (const std::int64_t positions : {15, 17, 512, 1103})
        for (const std::int64_t channels : {2, 3, 15}) run_bytes(channels, positions, label);
    }
  }
  run_together();
  run_errors();
  run_phase_errors();
  run_absences();
  run_misfits();
  run_empty();
  run_no_images();
  std::printf("%s\n", failures ? "core test failed" : "core test passed");
  return failures;
}
