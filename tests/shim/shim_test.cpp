// What core_test.cpp cannot ask of the CUDA kernels: arrays without a byte to spare, so that the address sanitizer sees each one
// that is touched beside them; offsets beyond 32 bits; and the arithmetic of tiles for sizes that nobody can run. Takes names of
// scenarios; exits with the number of failures.
#include <sys/mman.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "normkit/normkit.hpp"
#include "runs.cuh"

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

/// Instance norm of `rows` rows of n floats each, `stride` floats apart, forward and backward, against double.
void check_rows(const float* x, float* y, float* dx, std::int64_t rows, std::int64_t n, std::int64_t stride,
                const std::string& name) {
  const Shape shape{rows, 1, n}, strides{stride * 4, stride * 4, 4}, kept{rows, 1};
  std::vector<float> mean(static_cast<std::size_t>(rows)), rstd(mean);
  const Array view{
      reinterpret_cast<std::byte*>(const_cast<float*>(x)), Dtype::float32, true, false, shape, strides, {}};
  const auto like = [&](float* data) {
    Array a = view;
    a.data = reinterpret_cast<std::byte*>(data);
    return a;
  };
  normkit::ForwardArgs forward;
  forward.x = view, forward.y = like(y), forward.y_is_apart = true;
  forward.mean = Array::dense(mean.data(), Dtype::float32, kept);
  forward.rstd = Array::dense(rstd.data(), Dtype::float32, kept);
  normkit::forward(forward, normkit::instance_spec(3));
  normkit::BackwardArgs backward;
  backward.x = view, backward.dy = view, backward.dx = like(dx), backward.dx_is_apart = true;
  backward.mean = forward.mean, backward.rstd = forward.rstd;
  normkit::backward(backward, normkit::instance_spec(3));
  double worst = 0;
  for (std::int64_t r = 0; r < rows; ++r) {
    const float* row = x + r * stride;
    double sum = 0, squares = 0, products = 0;
    for (std::int64_t i = 0; i < n; ++i) sum += row[i];
    const double m = sum / static_cast<double>(n);
    for (std::int64_t i = 0; i < n; ++i) squares += (row[i] - m) * (row[i] - m), products += row[i] * (row[i] - m);
    const double s = 1 / std::sqrt(squares / static_cast<double>(n) + 1e-5);
    const double slope = products / static_cast<double>(n) * s * s;
    for (std::int64_t i = 0; i < n; ++i) {
      const double far = row[i] - m;
      worst = std::fmax(worst, std::fabs(y[r * stride + i] - far * s));
      worst = std::fmax(worst, std::fabs(dx[r * stride + i] - s * (far - far * slope)));
    }
  }
  expect(worst < 2e-6, name + ": error " + std::to_string(worst));
}

/// Three arrays of the very size, `offset` floats into their memory.
void check_exact(std::int64_t rows, std::int64_t n, int offset, const std::string& name) {
  std::mt19937 random(3);
  std::normal_distribution<float> normal(1, 2);
  const auto size = static_cast<std::size_t>(rows * n + offset);
  const std::unique_ptr<float[]> x(new float[size]), y(new float[size]), dx(new float[size]);
  for (std::size_t k = 0; k < size; ++k) x[k] = normal(random), y[k] = dx[k] = NAN;
  check_rows(x.get() + offset, y.get() + offset, dx.get() + offset, rows, n, n, name);
}

void tails() {
  for (const std::int64_t n : {1, 2, 3, 5, 15, 16, 17, 49, 127, 129, 1023, 4099, 12223, 12225, 16385})
    check_exact(3, n, 0, "rows of " + std::to_string(n));
}

void misaligned() {
  for (const std::int64_t n : {16, 100, 4096})
    for (const int offset : {1, 2, 3}) check_exact(2, n, offset, "an offset of " + std::to_string(offset));
}

/// A whole block at a statistic, with threads to spare.
void blocks() {
  for (const std::int64_t n : {1300, 2100, 9000, 40000}) check_exact(2, n, 0, "a block on " + std::to_string(n));
}

/// Rows 4 GB apart, in memory that nobody backs but where it is touched.
void far_apart() {
  constexpr std::int64_t kRows = 4, kLength = 40, kStride = std::int64_t{1} << 30;
  const std::size_t bytes = static_cast<std::size_t>((kRows - 1) * kStride + kLength) * 4;
  float* arrays[3];
  for (float*& a : arrays) {
    void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) return std::printf("skipped: no such address space\n"), void();
    a = static_cast<float*>(p);
  }
  for (std::int64_t r = 0; r < kRows; ++r)
    for (std::int64_t i = 0; i < kLength; ++i) arrays[0][r * kStride + i] = static_cast<float>((r + 2) * (i * i % 11));
  check_rows(arrays[0], arrays[1], arrays[2], kRows, kLength, kStride, "rows 4 GB apart");
  for (float* a : arrays) munmap(a, bytes);
}

// ---- policy ------------------------------------------------------------------------------------------------------

void check_tiling(std::int64_t steps, std::int64_t run, int bytes) {
  using namespace normkit::cuda;
  const std::string name = std::to_string(steps) + " x " + std::to_string(run) + " of " + std::to_string(bytes);
  const int vector = vector_for(bytes);
  const Tiling t = tiling_for(steps, run, bytes);
  const std::int64_t row_tiles = t.per_run > 1 ? steps : normkit::ceil_div(steps, t.rows);
  expect(t.tiles == row_tiles * t.per_run && t.tiles >= 1, name + ": tiles");
  expect(t.per_run == 1 || t.rows == 1, name + ": tiles of part of several rows");
  expect(t.per_run == 1 ? t.width == run : t.width % vector == 0 && (t.per_run - 1) * t.width < run, name + ": width");
  expect(t.per_run * t.width >= run, name + ": covers the run");
  expect(t.group >= 1 && t.group <= kBlockThreads && (t.group & (t.group - 1)) == 0, name + ": group");
  expect(t.tiles == 1 || t.group == kBlockThreads, name + ": many tiles, one block each");
  const std::int64_t threads = t.group > 32 ? t.group : kBlockThreads;
  expect(kGroupBytes + threads * t.held(vector) * vector * bytes <= (48 << 10), name + ": shared memory");
  expect(t.held(vector) >= 1, name + ": every thread has a place");
}

/// Tiles of a statistic, as kernels find them: no element twice, none left out.
void check_cover(std::int64_t steps, std::int64_t run) {
  normkit::cuda::Work work;
  work.task.geometry = {.outer = 2, .steps = steps, .lanes = 3, .run = run, .params = {}};
  work.unit_run = run, work.runs = normkit::cuda::tiling_for(steps, run, 4);
  std::int64_t covered = 0;
  for (std::int64_t k = 0; k < 6 * work.runs.tiles; ++k) {
    const normkit::cuda::Tile t = normkit::cuda::tile_at<float>(work, k);
    covered += std::int64_t{t.rows} * t.width;
    expect(t.o * 3 + t.lane == k / work.runs.tiles && t.step + t.rows <= steps && t.begin + t.width <= run,
           "tile " + std::to_string(k) + " of " + std::to_string(steps) + " x " + std::to_string(run));
  }
  expect(covered == work.task.geometry.size(), "cover of " + std::to_string(steps) + " x " + std::to_string(run));
}

void policy() {
  std::mt19937_64 random(11);
  for (int k = 0; k < 20000; ++k) {
    const int scale = static_cast<int>(random() % 34), split = static_cast<int>(random() % (scale + 1));
    const auto below = [&](int power) { return static_cast<std::int64_t>(random() % (std::uint64_t{1} << power)) + 1; };
    check_tiling(below(split), below(scale - split), 1 << random() % 4);
  }
  for (const std::int64_t steps : {1, 2, 7, 300})
    for (const std::int64_t run : {1, 3, 64, 1023, 8192, 12224, 12225, 70001}) check_cover(steps, run);
}

const std::map<std::string, std::function<void()>> kScenarios = {
    {"tails", tails}, {"misaligned", misaligned}, {"blocks", blocks}, {"far", far_apart}, {"policy", policy}};

}  // namespace

int main(int argc, char** argv) {
  for (int k = 1; k < argc; ++k) kScenarios.at(argv[k])();
  std::printf("%s\n", failures ? "shim test failed" : "shim test passed");
  return failures != 0;
}
