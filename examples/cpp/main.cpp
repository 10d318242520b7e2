// Normalizes a few images on raw pointers, and checks every pixel against the formula in double.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <vector>

#include <normkit/normkit.hpp>

int main() {
  const std::int64_t shape[] = {4, 3, 48, 64};  // images, channels, height, width
  const std::int64_t per_channel[] = {3}, per_image[] = {4, 3};
  const int pixels = 48 * 64;
  const float weight[] = {1, 2, 0.5f}, bias[] = {0, -1, 3};

  std::vector<float> x(4 * 3 * pixels), y(x.size()), mean(4 * 3), rstd(4 * 3);
  for (std::size_t i = 0; i < x.size(); ++i) x[i] = 100 + 10 * std::sin(0.37f * static_cast<float>(i));

  using normkit::Array, normkit::Dtype;
  normkit::Args args;
  args.x = Array::dense(x.data(), Dtype::float32, shape);
  args.out = Array::dense(y.data(), Dtype::float32, shape);
  args.weight = Array::dense(weight, Dtype::float32, per_channel);
  args.bias = Array::dense(bias, Dtype::float32, per_channel);
  args.mean = Array::dense(mean.data(), Dtype::float32, per_image);
  args.rstd = Array::dense(rstd.data(), Dtype::float32, per_image);
  normkit::forward(args, normkit::instance_spec(4));

  double error = 0, largest = 0;
  for (int statistic = 0; statistic < 4 * 3; ++statistic) {
    const float* from = x.data() + statistic * pixels;
    double sum = 0, squares = 0;
    for (int i = 0; i < pixels; ++i) sum += from[i];
    for (int i = 0; i < pixels; ++i) squares += (from[i] - sum / pixels) * (from[i] - sum / pixels);
    const double want_rstd = 1 / std::sqrt(squares / pixels + 1e-5);
    error = std::max(error, std::abs(rstd[statistic] - want_rstd));
    for (int i = 0; i < pixels; ++i) {
      const double want = (from[i] - sum / pixels) * want_rstd * weight[statistic % 3] + bias[statistic % 3];
      error = std::max(error, std::abs(y[statistic * pixels + i] - want));
      largest = std::max(largest, std::abs(want));
    }
  }
  // A handful of float roundings, of numbers up to `largest`.
  const double bound = 4 * std::ldexp(largest, -24);
  std::printf("%s: first channel has mean %.4f and std %.4f; largest error %.1e, allowed %.1e\n",
              normkit::isa().c_str(), mean[0], 1 / rstd[0], error, bound);

  try {  // bad input is refused by name, before anything is written
    const std::int64_t too_many[] = {4};
    args.weight = Array::dense(weight, Dtype::float32, too_many);
    normkit::forward(args, normkit::instance_spec(4));
    return 1;
  } catch (const normkit::Error& e) {
    std::printf("refused: %s\n", e.what());
  }
  return error <= bound ? 0 : 1;
}
