// The core without Python, small enough to run under sanitizers: every instruction set, both traversals, both schedules, forward
// and backward, against sums in long double. Exits with the number of failures.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
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
struct Buffer {
  Shape shape, strides;  // bytes
  std::vector<float> memory;
  static constexpr std::size_t kGuard = 32;

  Buffer(const Shape& extents, const std::vector<int>& order) : shape(extents), strides(extents.size()) {
    std::int64_t elements = 1;
    for (std::size_t k = order.size(); k-- > 0;) {
      strides[order[k]] = elements * static_cast<std::int64_t>(sizeof(float));
      elements *= shape[order[k]];
    }
    memory.assign(static_cast<std::size_t>(elements) + 2 * kGuard, std::nanf(""));
  }
  float* data() { return memory.data() + kGuard; }
  std::size_t size() const { return memory.size() - 2 * kGuard; }
  Array view() { return {reinterpret_cast<std::byte*>(data()), Dtype::float32, true, false, shape, strides, {}}; }
  float& operator()(std::int64_t n, std::int64_t c, std::int64_t s) {
    return data()[(n * strides[0] + c * strides[1] + s * strides[2]) / static_cast<std::int64_t>(sizeof(float))];
  }
  bool guards_whole() const {
    for (std::size_t k = 0; k < kGuard; ++k)
      if (!std::isnan(memory[k]) || !std::isnan(memory[memory.size() - 1 - k])) return false;
    return true;
  }
};

struct Truth { long double mean = 0, rstd = 0, g = 0, gx = 0; };

struct Case {
  Shape shape;  // images, channels, positions
  std::vector<int> order;
  const char* name;
};

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
  normkit::ForwardArgs forward;
  forward.x = x.view(), forward.y = y.view(), forward.weight = weight.view(), forward.bias = bias.view();
  forward.mean = mean.view(), forward.rstd = rstd.view();
  normkit::forward(forward, spec);
  normkit::BackwardArgs backward;
  backward.x = x.view(), backward.dy = dy.view(), backward.dx = dx.view(), backward.weight = weight.view();
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
        normkit::ForwardArgs args;
        args.x = x.view(), args.y = y.view();
        normkit::forward(args, normkit::instance_spec(3));
      }
    });
  for (std::thread& t : threads) t.join();
  for (Buffer& y : results)
    expect(std::memcmp(y.data(), results[0].data(), y.size() * sizeof(float)) == 0, "calls at once differ");
}

void run_errors() {
  Buffer x({2, 3, 4}, {0, 1, 2}), y({2, 3, 4}, {0, 1, 2}), weight({4}, {0});
  normkit::ForwardArgs args;
  args.x = x.view(), args.y = y.view(), args.weight = weight.view();
  std::string message;
  try {
    normkit::forward(args, normkit::instance_spec(3));
  } catch (const normkit::Error& e) {
    message = e.what();
  }
  expect(message == "weight has shape (4,), expected (3,), (2, 3) or (2, 3, 4): one element per channel of x",
         "message: " + message);
  for (std::size_t k = 0; k < y.size(); ++k) expect(std::isnan(y.data()[k]), "an error came after a write");
}

}  // namespace

int main() {
  const std::vector<Case> cases = {
      {{2, 3, 1}, {0, 1, 2}, "one member"},          {{2, 3, 49}, {0, 1, 2}, "rows in registers"},
      {{2, 2, 4097}, {0, 1, 2}, "a chunk and one"},  {{1, 1, 70001}, {0, 1, 2}, "spans shared by threads"},
      {{2, 17, 65}, {0, 2, 1}, "channels-last"},     {{1, 70, 1500}, {0, 2, 1}, "channels-last spans"},
      {{3, 5, 33}, {1, 0, 2}, "channels outermost"}, {{40, 8, 300}, {0, 1, 2}, "many rows"},
  };
  for (const std::string& isa : normkit::isas()) {
    normkit::use_isa(isa);
    for (const int threads : {1, 3}) {
      normkit::set_num_threads(threads);
      for (const Case& c : cases) run_case(c, isa + ", " + std::to_string(threads) + " threads, " + c.name);
    }
  }
  run_together();
  run_errors();
  std::printf("%s\n", failures ? "core test failed" : "core test passed");
  return failures;
}
