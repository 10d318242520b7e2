// What core_test.cpp cannot ask of the CUDA kernels: arrays without a byte to spare, so that the address sanitizer sees each one
// that is touched beside them; teams against other schedules; offsets beyond 32 bits; and the arithmetic of policy and workspace
// for sizes that nobody can run. Takes names of scenarios; exits with the number of failures.
#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cuda.hpp"
#include "lanes.cuh"
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

/// Instance norm of `rows` rows of n floats each, which are `stride` floats apart and their elements `step`, forward and backward,
/// against double.
void check_rows(const float* x, float* y, float* dx, std::int64_t rows, std::int64_t n, std::int64_t stride,
                const std::string& name, std::int64_t step = 1) {
  const Shape shape{rows, 1, n}, strides{stride * 4, stride * 4, step * 4}, kept{rows, 1};
  std::vector<float> mean(static_cast<std::size_t>(rows)), rstd(mean);
  const Array view{
      reinterpret_cast<std::byte*>(const_cast<float*>(x)), Dtype::float32, true, false, shape, strides, {}};
  const auto like = [&](float* data) {
    Array a = view;
    a.data = reinterpret_cast<std::byte*>(data);
    return a;
  };
  const auto apart = [](const Array&, const Array&) { return false; };  // rows of each lie between those of the others
  normkit::Args forward;
  forward.x = view, forward.out = like(y), forward.share_elements = apart;
  forward.mean = Array::dense(mean.data(), Dtype::float32, kept);
  forward.rstd = Array::dense(rstd.data(), Dtype::float32, kept);
  normkit::forward(forward, normkit::instance_spec(3));
  normkit::Args backward;
  backward.x = view, backward.dy = view, backward.out = like(dx), backward.share_elements = apart;
  backward.mean = forward.mean, backward.rstd = forward.rstd;
  normkit::backward(backward, normkit::instance_spec(3));
  double worst = 0;
  const auto off_by = [&](double error) { worst = error <= worst ? worst : error; };  // NaN stays
  for (std::int64_t r = 0; r < rows; ++r) {
    const float* row = x + r * stride;
    double sum = 0, squares = 0, products = 0;
    for (std::int64_t i = 0; i < n; ++i) sum += row[i * step];
    const double m = sum / static_cast<double>(n);
    for (std::int64_t i = 0; i < n; ++i) {
      const double far = row[i * step] - m;
      squares += far * far, products += row[i * step] * far;
    }
    const double s = 1 / std::sqrt(squares / static_cast<double>(n) + 1e-5);
    const double slope = products / static_cast<double>(n) * s * s;
    for (std::int64_t i = 0; i < n; ++i) {
      const double far = row[i * step] - m;
      off_by(std::fabs(y[r * stride + i * step] - far * s));
      const double product = std::fabs(s * row[i * step]);  // s * dy, which is rounded before most of it may vanish
      off_by(std::fabs(dx[r * stride + i * step] - s * (far - far * slope)) / std::max(product, 1.0));
    }
  }
  expect(worst < 2e-6, name + ": error " + std::to_string(worst));
}

namespace cuda = normkit::cuda;

/// Three arrays of the very size, `offset` floats into their memory. `across`: rows are columns.
void check_exact(std::int64_t rows, std::int64_t n, int offset, const std::string& name, bool across = false) {
  std::mt19937 random(3);
  std::normal_distribution<float> normal(1, 2);
  const auto size = static_cast<std::size_t>(rows * n + offset);
  const std::unique_ptr<float[]> x(new float[size]), y(new float[size]), dx(new float[size]);
  for (std::size_t k = 0; k < size; ++k) x[k] = normal(random), y[k] = dx[k] = NAN;
  check_rows(x.get() + offset, y.get() + offset, dx.get() + offset, rows, n, across ? 1 : n, name, across ? rows : 1);
}

/// A multiply-add has the bits that it has on a GPU: it is rounded once, and nothing else becomes one.
void rounding() {
  const volatile double a = 1 + 0x1p-30, b = 1 - 0x1p-30;
  const volatile float c = 1 + 0x1p-13f, d = 1 - 0x1p-13f;
  expect(normkit::mul_add(a, b, -1) == -0x1p-60, "a multiply-add of doubles is rounded twice");
  expect(normkit::mul_add(c, d, -1.0f) == -0x1p-26f, "a multiply-add of floats is rounded twice");
  expect(a * b - 1 == 0 && c * d - 1 == 0, "a product and a sum are rounded once");
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

/// Columns that a block has all of, and that several have.
void columns() {
  for (const auto& [steps, lanes] : std::vector<std::pair<int, int>>{{5, 3}, {49, 70}, {256, 20}, {300, 7}})
    check_exact(lanes, steps, 0, std::to_string(lanes) + " columns of " + std::to_string(steps), true);
}

/// Where there are no clusters one block takes all tiles of a row: two tiles forward, three backward; three forward.
void crowds() {
  setenv("NORMKIT_SHIM_EXTENT", "large", 1);
  check_exact(5, 11268, 0, "rows of two tiles");
  check_exact(5, 20001, 1, "rows of three tiles");
  unsetenv("NORMKIT_SHIM_EXTENT");
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

#ifdef __SANITIZE_THREAD__
constexpr const char* kExtents[] = {"clusters", "plain"};  // all ways of synchronizing, in half the time
#else
constexpr const char* kExtents[] = {"clusters", "portable", "large", "plain"};
#endif

/// results() with each of kExtents: all give the same bits.
void expect_same_bits(const std::string& name, const std::function<std::vector<float>(const std::string&)>& results) {
  std::vector<float> first;
  for (const char* extent : kExtents) {
    setenv("NORMKIT_SHIM_EXTENT", extent, 1);
    const std::vector<float> found = results(name + ", " + extent);
    if (first.empty()) first = found;
    expect(found == first, name + ", " + extent + ": the same bits whoever has which tiles");
  }
  unsetenv("NORMKIT_SHIM_EXTENT");
}

std::vector<float> random_floats(std::int64_t n, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(1, 2);
  std::vector<float> v(static_cast<std::size_t>(n));
  for (float& element : v) element = normal(random);
  return v;
}

/// Statistics of 2, 4, 8, 9 and 33 tiles: by clusters of blocks with one tile or several, by launches that follow each other, and
/// where a block asks for much shared memory.
void teams() {
  for (const auto& [rows, n] :
       std::vector<std::pair<std::int64_t, std::int64_t>>{{3, 12225}, {2, 30001}, {1, 65536}, {1, 70001}, {1, 262145}})
    expect_same_bits(std::to_string(rows) + " rows of " + std::to_string(n), [&](const std::string& name) {
      const std::vector<float> x = random_floats(rows * n, 7);
      std::vector<float> y(x.size(), NAN), dx(x.size(), NAN);
      check_rows(x.data(), y.data(), dx.data(), rows, n, n, name);
      y.insert(y.end(), dx.begin(), dx.end());
      return y;
    });
}

void expect_near(const std::vector<float>& found, const std::vector<double>& right, double bound,
                 const std::string& what) {
  double worst = 0;
  for (std::size_t k = 0; k < found.size(); ++k) {
    const double error = std::fabs(found[k] - right[k]);
    worst = error <= worst ? worst : error;  // NaN stays
  }
  expect(worst <= bound, what + " " + std::to_string(worst));
}

/// Gradients of layer norm (one group) or group norm with weights, `rows` times `n` elements in `groups` pieces with a weight each,
/// or a weight for each element: against double, with bounds of float sums of so many terms.
std::vector<float> gradients(std::int64_t rows, std::int64_t n, std::int64_t pieces, const std::string& name) {
  const bool by_element = pieces == 0;
  const std::int64_t weights = by_element ? n : pieces, each = n / weights;
  const std::vector<float> x = random_floats(rows * n, 5), dy = random_floats(rows * n, 6),
                           weight = random_floats(weights, 8);
  std::vector<float> mean(static_cast<std::size_t>(rows)), rstd(mean), dx(x.size(), NAN);
  std::vector<float> dweight(weight.size(), NAN), dbias(dweight);
  std::vector<double> right_dx(x.size()), right_dweight(weight.size()), right_dbias(weight.size());
  for (std::int64_t r = 0; r < rows; ++r) {
    const float *row = x.data() + r * n, *in = dy.data() + r * n;
    double sum = 0, squares = 0, g = 0, gx = 0;
    for (std::int64_t i = 0; i < n; ++i) sum += row[i];
    const double m = sum / static_cast<double>(n);
    for (std::int64_t i = 0; i < n; ++i) squares += (row[i] - m) * (row[i] - m);
    const double s = 1 / std::sqrt(squares / static_cast<double>(n) + 1e-5);
    mean[static_cast<std::size_t>(r)] = static_cast<float>(m),
    rstd[static_cast<std::size_t>(r)] = static_cast<float>(s);
    for (std::int64_t i = 0; i < n; ++i) {
      const auto own = static_cast<std::size_t>(i / each);
      const double w = weight[own], x_hat = (row[i] - m) * s;
      g += in[i] * w, gx += in[i] * w * x_hat;
      right_dweight[own] += in[i] * x_hat, right_dbias[own] += in[i];
    }
    for (std::int64_t i = 0; i < n; ++i) {
      const double x_hat = (row[i] - m) * s, w = weight[static_cast<std::size_t>(i / each)];
      right_dx[static_cast<std::size_t>(r * n + i)] =
          s * (in[i] * w - g / static_cast<double>(n) - x_hat * gx / static_cast<double>(n));
    }
  }
  const Shape shape{rows, weights, each}, kept = by_element ? Shape{rows} : Shape{rows, 1},
                                          of_weight = by_element ? Shape{weights, each} : Shape{weights};
  const auto array = [&](const std::vector<float>& v, const Shape& extents) {
    return Array::dense(const_cast<float*>(v.data()), Dtype::float32, extents);
  };
  normkit::Args args;
  args.x = array(x, shape), args.dy = array(dy, shape), args.out = array(dx, shape);
  args.share_elements = [](const Array&, const Array&) { return false; };
  args.mean = array(mean, kept), args.rstd = array(rstd, kept);
  args.weight = array(weight, of_weight), args.dweight = array(dweight, of_weight),
  args.dbias = array(dbias, of_weight);
  const std::int64_t axes[] = {1, 2};
  normkit::backward(args, by_element ? normkit::layer_spec(3, axes) : normkit::group_spec(shape, 1));
  const auto check = [&](const std::vector<float>& found, const std::vector<double>& right, double bound,
                         const std::string& what) { expect_near(found, right, bound, name + ": error of " + what); };
  // Terms are below 100. No sum of floats has more than 64 + 256 + 4 terms one after another, nor, within a thread, more than 80.
  const double unit = 1.0 / (1 << 24), terms = static_cast<double>(rows * each);
  check(dx, right_dx, 400 * 100 * unit, "dx");
  check(dweight, right_dweight, 100 * unit * (8 + std::min(terms, 400.0)) * std::sqrt(terms), "dweight");
  check(dbias, right_dbias, 100 * unit * (8 + std::min(terms, 400.0)) * std::sqrt(terms), "dbias");
  std::vector<float> all = dx;
  all.insert(all.end(), dweight.begin(), dweight.end());
  all.insert(all.end(), dbias.begin(), dbias.end());
  return all;
}

/// Weights along rows: rows of a part of a warp, of one, of a block, of two tiles, three and nine; groups of rows that end early.
void weighted() {
  for (const auto& [rows, n] : std::vector<std::pair<std::int64_t, std::int64_t>>{
           {600, 8}, {70, 129}, {70, 300}, {12, 4096}, {9, 9000}, {2, 14000}, {2, 36002}})
    expect_same_bits(std::to_string(rows) + " weighted rows of " + std::to_string(n),
                     [&](const std::string& name) { return gradients(rows, n, 0, name); });
}

/// Group norm: channels of a part of a warp, of a block, of two tiles; few and many of them.
void pieces() {
  for (const auto& [channels, each] : std::vector<std::pair<std::int64_t, std::int64_t>>{
           {3, 9}, {40, 49}, {10, 512}, {10, 4096}, {3, 9001}, {300, 16}})
    expect_same_bits(std::to_string(channels) + " channels of " + std::to_string(each),
                     [&](const std::string& name) { return gradients(3, channels * each, channels, name); });
}

/// `n` images of `steps` pixels with `channels` last, of which `group` share a statistic, or batch norm where it is 0; with weights.
/// Forward and backward against double, with bounds of float sums of so many terms.
struct Images {
  std::int64_t n, steps, channels, group;
  bool batch() const { return group == 0; }
  std::int64_t statistics() const { return batch() ? channels : n * (channels / group); }
  std::int64_t members() const { return batch() ? n * steps : steps * group; }
};

std::vector<float> images(const Images& g, bool masked, bool in_place, const std::string& name) {
  const std::int64_t size = g.n * g.steps * g.channels;
  const auto statistics = static_cast<std::size_t>(g.statistics());
  const std::vector<float> x = random_floats(size, 5), dy = random_floats(size, 6),
                           weight = random_floats(g.channels, 8), bias = random_floats(g.channels, 9);
  std::vector<std::uint8_t> where(x.size(), 1);
  std::mt19937 random(4);
  if (masked)
    for (std::uint8_t& member : where) member = random() % 4 != 0;
  std::vector<float> mean(statistics, NAN), rstd(mean), y(x.size(), NAN), dx(y), sum(x);
  std::vector<float> dweight(weight.size(), NAN), dbias(dweight);
  std::vector<double> m(statistics), s(statistics), count(statistics), grad(statistics), grad_x(statistics);
  const auto statistic = [&](std::int64_t k) {
    const std::int64_t c = k % g.channels, image = k / (g.channels * g.steps);
    return static_cast<std::size_t>(g.batch() ? c : image * (g.channels / g.group) + c / g.group);
  };
  const auto at = [](std::int64_t k) { return static_cast<std::size_t>(k); };
  const auto for_all = [&](const auto& f) {
    for (std::int64_t k = 0; k < size; ++k) f(at(k), at(k % g.channels), statistic(k));
  };
  for_all([&](auto k, auto, auto r) { m[r] += where[k] * x[k], count[r] += where[k]; });
  for (std::size_t r = 0; r < statistics; ++r) m[r] = count[r] > 0 ? m[r] / count[r] : 0;
  for_all([&](auto k, auto, auto r) { s[r] += where[k] * (x[k] - m[r]) * (x[k] - m[r]); });
  for (std::size_t r = 0; r < statistics; ++r) s[r] = count[r] > 0 ? 1 / std::sqrt(s[r] / count[r] + 1e-5) : 0;
  std::vector<double> right_y(x.size()), right_dx(x.size()), right_dweight(weight.size()), right_dbias(weight.size());
  for_all([&](auto k, auto c, auto r) {
    const double x_hat = (x[k] - m[r]) * s[r];
    right_y[k] = x_hat * weight[c] + bias[c];
    right_dweight[c] += dy[k] * x_hat, right_dbias[c] += dy[k];
    grad[r] += dy[k] * weight[c], grad_x[r] += dy[k] * weight[c] * x_hat;
  });
  for_all([&](auto k, auto c, auto r) {
    const double x_hat = (x[k] - m[r]) * s[r], through = count[r] > 0 ? (grad[r] + x_hat * grad_x[r]) / count[r] : 0;
    right_dx[k] = s[r] * (dy[k] * weight[c] - where[k] * through);
  });
  const std::int64_t groups = g.batch() ? 1 : g.channels / g.group;
  const Shape shape{g.n, g.channels, g.steps}, of_weight{g.channels},
      kept = g.batch() ? Shape{g.channels} : Shape{g.n, groups};
  const auto last = [&](std::int64_t bytes) { return Shape{g.steps * g.channels * bytes, bytes, g.channels * bytes}; };
  const Shape strides = last(4), bytes = last(1);
  const auto like_x = [&](const std::vector<float>& v) {
    return Array{
        reinterpret_cast<std::byte*>(const_cast<float*>(v.data())), Dtype::float32, true, false, shape, strides, {}};
  };
  const auto array = [](const std::vector<float>& v, const Shape& extents) {
    return Array::dense(v.data(), Dtype::float32, extents);
  };
  const normkit::Spec spec = g.batch()      ? normkit::batch_spec(3)
                             : g.group == 1 ? normkit::instance_spec(3)
                                            : normkit::group_spec(shape, groups);
  const Array members{reinterpret_cast<std::byte*>(where.data()), Dtype::boolean, true, false, shape, bytes, {}};
  normkit::Args forward, backward;
  if (!in_place) forward.share_elements = backward.share_elements = [](const Array&, const Array&) { return false; };
  forward.x = like_x(in_place ? sum : x), forward.out = like_x(in_place ? sum : y);
  forward.weight = array(weight, of_weight), forward.bias = array(bias, of_weight);
  forward.mean = array(mean, kept), forward.rstd = array(rstd, kept);
  if (masked) forward.where = members;
  normkit::forward(forward, spec);
  if (in_place) y = sum;
  std::vector<float> gradient = dy;
  backward.x = like_x(x), backward.dy = like_x(in_place ? gradient : dy);
  backward.out = like_x(in_place ? gradient : dx);
  backward.mean = forward.mean, backward.rstd = forward.rstd, backward.weight = forward.weight;
  backward.dweight = array(dweight, of_weight), backward.dbias = array(dbias, of_weight);
  if (masked) backward.where = members;
  normkit::backward(backward, spec);
  if (in_place) dx = gradient;
  const auto check = [&](const std::vector<float>& found, const std::vector<double>& right, double bound,
                         const std::string& what) { expect_near(found, right, bound, name + ": error of " + what); };
  // Terms are below 100, and their factors below 10. Strands sum 16 of them in float, all else is double.
  const double unit = 1.0 / (1 << 24), terms = static_cast<double>(g.n * g.steps);
  check(y, right_y, 10 * 16 * unit * 10, "y");
  check(dx, right_dx, 100 * 32 * unit * 10, "dx");
  check(dweight, right_dweight, 100 * 20 * unit * std::sqrt(terms), "dweight");
  check(dbias, right_dbias, 100 * 20 * unit * std::sqrt(terms), "dbias");
  std::vector<float> all = y;
  for (const auto* v : {&mean, &rstd, &dx, &dweight, &dbias}) all.insert(all.end(), v->begin(), v->end());
  return all;
}

/// Channels last: a part of a strand, a tile, several tiles; parts of vectors, slabs of whole groups; images that share a block.
void slabs() {
  for (const Images g : {Images{1, 20000, 4, 1},
                         {2, 1100, 20, 1},
                         {2, 300, 70, 1},
                         {40, 49, 24, 1},
                         {300, 9, 3, 1},
                         {1, 2100, 60, 10},
                         {2, 1030, 36, 3},
                         {7, 300, 24, 8},
                         {5, 60, 40, 20},
                         {1, 257, 45, 15},
                         {5, 500, 12, 0},
                         {60, 10, 10, 0}})
    expect_same_bits(std::to_string(g.n) + " images of " + std::to_string(g.steps) + " pixels and " +
                         std::to_string(g.channels) + " channels, " + std::to_string(g.group) + " to a group",
                     [&](const std::string& name) { return images(g, false, false, name); });
}

/// slabs() in place, and with members that a mask chooses.
void slabs_in_place() {
  for (const Images g : {Images{2, 700, 20, 1}, {1, 2000, 30, 10}, {4, 200, 9, 0}, {30, 20, 8, 4}})
    for (const bool masked : {false, true})
      expect_same_bits(
          std::to_string(g.n) + " images in place of " + std::to_string(g.steps) + (masked ? " with a mask" : ""),
          [&](const std::string& name) { return images(g, masked, true, name); });
}

// ---- arithmetic that nobody can run ------------------------------------------------------------------------------

using normkit::ceil_div;
using normkit::Geometry;
using normkit::Traversal;

/// One way to see a shape: a normalization as the geometry has it.
struct View {
  std::string name;
  Geometry geometry;
  Traversal traversal = Traversal::runs;
};

/// The shapes of images and rows that are measured, as every normalization sees them, in both orders of memory; and some that
/// are too large for 32 bits.
std::vector<View> views() {
  std::vector<View> all;
  const auto add = [&](const std::string& name, Geometry g) {
    all.push_back({name, g, g.lanes > 1 && g.steps > 1 && g.run < 64 ? Traversal::lanes : Traversal::runs});
  };
  struct Image { std::int64_t n, c, s; };
  for (const auto& [n, c, s] : std::vector<Image>{{16, 64, 256 * 256},
                                                  {8, 64, 512 * 512},
                                                  {32, 256, 56 * 56},
                                                  {64, 512, 49},
                                                  {1, 3, 1 << 20},
                                                  {2, 32, 1 << 21},
                                                  {2, 320, 512},
                                                  {1, 64, 35 * 45},
                                                  {1, 1, 1 << 24},
                                                  {70000, 8, 9},
                                                  {1, 4, std::int64_t{1} << 33},
                                                  {std::int64_t{1} << 33, 1, 2},
                                                  {3, std::int64_t{1} << 32, 5}}) {
    const std::string name = std::to_string(n) + "x" + std::to_string(c) + "x" + std::to_string(s);
    const std::int64_t groups = c % 4 == 0 ? c / 4 : 1, of_group = c / groups;
    add(name + " instance", {1, 1, n * c, s, {0, s, c}});
    add(name + " instance, last", {n, s, c, 1, {0, 1, c}});
    add(name + " group", {1, 1, n * groups, of_group * s, {0, s, c}});
    add(name + " group, last", {n, s, groups, of_group, {0, 1, c}});
    add(name + " batch", {1, n, c, s, {0, s, c}});
    add(name + " batch, last", {1, n * s, c, 1, {0, 1, c}});
    add(name + " layer over c", {n, c, s, 1, {0, s, c}});
  }
  for (const auto& [rows, columns] : std::vector<std::pair<std::int64_t, std::int64_t>>{
           {16384, 4096}, {131072, 128}, {1024, 12288}, {8192, 65536}, {std::int64_t{1} << 33, 64}, {4194305, 512}})
    add("layer " + std::to_string(rows) + "x" + std::to_string(columns), {1, 1, rows, columns, {0, 1, columns}});
  add("over the first of two axes", {1, 5, 430000003, 1, {0, 1, 430000003}});
  add("over the first of two axes, 2^33 elements", {1, 4, std::int64_t{1} << 31, 1, {0, 1, std::int64_t{1} << 31}});
  std::mt19937_64 random(11);
  for (int k = 0; k < 3000; ++k) {  // 2^36 elements at most, split among the extents at random
    int left = static_cast<int>(random() % 37);
    std::int64_t extents[4];
    for (std::int64_t& extent : extents) {
      const int power = static_cast<int>(random() % static_cast<unsigned>(left + 1));
      extent = static_cast<std::int64_t>(random() % (std::uint64_t{1} << power)) + 1, left -= power;
    }
    add("random " + std::to_string(k), {extents[0], extents[1], extents[2], extents[3], {0, 1, 1}});
  }
  return all;
}

/// An H200, a GPU whose clusters are of eight, one without any, and what all of them give.
constexpr cuda::Room kRooms[] = {{227 << 10, 16, 132}, {99 << 10, 8, 48}, {99 << 10, 1, 84}, cuda::kPlainRoom};

template <class F> void for_policies(F f) {
  for (const View& view : views())
    for (const int bytes : {2, 4, 8})
      for (const auto direction : {cuda::Direction::forward, cuda::Direction::backward})
        for (const bool pieces : {false, true}) {
          const Geometry& g = view.geometry;
          const bool backward =
              direction == cuda::Direction::backward && view.traversal == Traversal::runs && g.steps == 1;
          if (pieces && !(backward && g.params.stride > 1 && g.run % g.params.stride == 0)) continue;
          for (const cuda::Room room : kRooms)
            for (const bool collects : {false, true}) {
              if (collects && (pieces || !backward)) continue;
              cuda::Policy p = cuda::policy_for(g, view.traversal, bytes, direction, pieces);
              cuda::settle(p, g, room, collects);
              f(view, p, room,
                view.name + ", " + std::to_string(bytes) + " bytes" +
                    (direction == cuda::Direction::forward ? "" : ", backward") + (collects ? " by rows" : "") +
                    ", clusters of " + std::to_string(room.cluster));
            }
        }
}

/// Fails where a GPU with this room would not take the launch.
void check_grid(const View& view, const cuda::Policy& p, cuda::Stage stage, cuda::Room room, const std::string& name) {
  const cuda::Grid grid = p.grid(view.geometry, stage);
  expect(grid.blocks >= 1 && grid.blocks <= cuda::kMostBlocks, name + ": " + std::to_string(grid.blocks) + " blocks");
  expect(grid.threads >= cuda::kWarp && grid.threads <= cuda::kBlockThreads && grid.threads % cuda::kWarp == 0,
         name + ": whole warps, a block at most");
  expect(grid.cluster >= 1 && grid.cluster <= room.cluster && grid.blocks % grid.cluster == 0,
         name + ": whole clusters");
  expect(grid.shared_bytes <= (stage == cuda::Stage::all ? room.shared_bytes : 48 << 10),
         name + ": " + std::to_string(grid.shared_bytes) + " bytes of shared memory");
  expect(stage == cuda::Stage::all || grid.cluster == 1, name + ": clusters are teams");
}

/// Tile by tile as kernels find them, at random places: each ends where the next begins, so that no element is in two of them or
/// in none.
void check_tiles(const View& view, const cuda::Policy& p, std::mt19937_64& random, const std::string& name) {
  const Geometry& g = view.geometry;
  cuda::Work work;
  work.task.geometry = g, work.policy = p, work.shape = cuda::Shape::of(p, g, cuda::Stage::sums);
  const std::int64_t tiles = p.runs.tiles, units = g.statistics() * p.units;
  expect(p.units * p.unit_run == g.run, name + ": units are pieces of the run");
  expect(p.runs.group >= 1 && p.runs.group <= cuda::kBlockThreads && (p.runs.group & (p.runs.group - 1)) == 0,
         name + ": threads of a group");
  expect(tiles == 1 || p.runs.group == cuda::kBlockThreads, name + ": many tiles, one block each");
  const cuda::Group group{0, p.runs.group};
  for (int k = 0; k < 8; ++k) {
    const auto unit = static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(units));
    const auto number =
        k < 2 ? k * (tiles - 1) : static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(tiles));
    const std::int64_t r = unit / p.units, first = (unit - r * p.units) * p.unit_run, end = first + p.unit_run;
    const cuda::Turn turn{r, r + 1, r / g.lanes, r % g.lanes, (unit - r * p.units) * tiles + number, 1, 1};
    const cuda::Tile t = cuda::tile_of<float>(work, group, turn, 0);
    bool right = t.at.o == r / g.lanes && t.at.lane == r % g.lanes && t.rows >= 1 && t.width >= 1;
    right = right && turn.index(work) == unit * tiles + number;
    if (number == 0) right = right && t.at.step == 0 && t.at.i == first;
    if (number == tiles - 1) {
      right = right && t.at.step + t.rows == g.steps && t.at.i + t.width == end;
    } else {
      const cuda::Tile next = cuda::tile_of<float>(work, group, turn, 1);
      const bool row_ends = t.at.i + t.width == end;
      right = right && next.at.i == (row_ends ? first : t.at.i + t.width) &&
              next.at.step == t.at.step + (row_ends ? t.rows : 0);
      right = right && (t.rows == 1 || (t.at.i == first && row_ends));
    }
    expect(right, name + ": tile " + std::to_string(number) + " of unit " + std::to_string(unit));
    const int vector = cuda::vector_for(p.element_bytes);
    expect(t.rows * ceil_div(t.width, vector) <= std::int64_t{p.runs.group} * p.runs.held(vector),
           name + ": a tile has its place");
  }
  if (!p.team.exists()) return;
  const std::int64_t parts = p.units * tiles;
  expect(std::int64_t{p.team.blocks} * p.team.tiles >= parts && (p.team.blocks - 1) * p.team.tiles < parts,
         name + ": a team has all tiles, and each of its blocks some");
  expect(p.meeting <= cuda::kWarp, name + ": a warp puts together what a team found");
}

/// Every row is in one turn of one group, and no group of rows is without any.
void check_rows_of(const View& view, const cuda::Policy& p, const std::string& name) {
  const Geometry& g = view.geometry;
  const std::int64_t of_block = std::int64_t{p.rows.turns} * p.groups(cuda::Stage::all),
                     of_group = of_block * p.rows.blocks;
  expect(p.rows.rows == g.statistics() || p.rows.rows == g.lanes, name + ": rows that share parameters");
  expect(of_group * p.rows.count >= p.rows.rows && of_group * (p.rows.count - 1) < p.rows.rows,
         name + ": groups of rows");
  expect(p.depth >= 1 && p.depth <= 8 && p.depth <= p.rows.turns, name + ": rows on their way");
  expect(!p.joins_rows || p.team.blocks * p.rows.blocks <= 8,
         name + ": groups of rows are clusters that all GPUs have");
}

void policy() {
  std::mt19937_64 random(12);
  for_policies([&](const View& view, const cuda::Policy& p, cuda::Room room, const std::string& name) {
    if (p.collects) return check_grid(view, p, cuda::Stage::all, room, name), check_rows_of(view, p, name);
    if (p.team.exists()) check_grid(view, p, cuda::Stage::all, room, name);
    if (p.team.exists() && view.traversal == Traversal::lanes) return;
    check_grid(view, p, cuda::Stage::sums, room, name);
    check_grid(view, p, cuda::Stage::rest, room, name);
    if (view.traversal == Traversal::runs && p.element_bytes == 4) check_tiles(view, p, random, name);
  });
}

/// The columns of tiles, at random places: there is one slot of one block in one round that has each, and its strands have each of the
/// tile's steps once. A team has all columns of its statistics, solves each once, and its threads know where it is told.
void lanes() {
  std::mt19937_64 random(13);
  const auto below = [&](std::int64_t n) {
    return static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(n));
  };
  cuda::shim::cluster.shared.resize(1);
  for_policies([&](const View& view, const cuda::Policy& p, cuda::Room, const std::string& name) {
    if (view.traversal != Traversal::lanes || p.element_bytes != 4) return;
    const Geometry& g = view.geometry;
    cuda::Work work;
    work.task.geometry = g, work.policy = p, work.shape = cuda::Shape::of(p, g, cuda::Stage::sums);
    work.stage = p.team.exists() ? cuda::Stage::all : cuda::Stage::sums;
    const cuda::LanesTiling& t = p.lanes;
    const std::int64_t blocks = p.grid(g, work.stage).blocks;
    const int of_team = p.team.exists() ? p.team.blocks : 1;
    cuda::shim::cluster.threads = t.threads();
    expect(t.slots >= 1 && t.slots <= t.width && t.slabs * t.columns >= g.columns() &&
               (t.slabs - 1) * t.columns < g.columns(),
           name + ": slots");
    expect((t.width & (t.width - 1)) == 0 && t.width <= cuda::kSlots && t.threads() >= 2 * cuda::kWarp,
           name + ": whole warps");
    for (int k = 0; k < 4; ++k) {
      const std::int64_t o = below(g.outer), tile = below(t.tiles), column = below(g.columns()),
                         row = o * t.tiles + tile;
      const std::int64_t within = row % t.rows, of_block = within % t.own_rows();
      const std::int64_t block =
          (row / t.rows * t.slabs + column / t.columns) * of_team + (p.team.exists() ? within / t.own_rows() : 0);
      const auto round = static_cast<int>(of_block / t.abreast);
      std::int64_t steps = 0;
      bool right = block < blocks && round < t.rounds;
      const cuda::Slab slab = cuda::slab_of<float>(work, block);
      for (int thread = 0; thread < t.threads(); ++thread) {
        cuda::shim::cluster.running = thread;
        const cuda::Strand s = cuda::strand_of<float>(work, slab, round, thread % t.width);
        if (s.at.o != o || s.tile != tile || column < s.at.i || column >= s.at.i + s.n) continue;
        right = right && s.at.i + s.n <= g.columns() && s.n <= 4 && (s.n < 4 || s.at.i % 4 == 0) && s.steps <= t.steps;
        right = right &&
                (s.steps == 0 || s.at.step + s[s.steps - 1].row < std::min(g.steps, (tile + 1) * cuda::kTileSteps));
        steps += s.steps;
      }
      right = right && steps == std::min<std::int64_t>(cuda::kTileSteps, g.steps - tile * cuda::kTileSteps);
      expect(right, name + ": column " + std::to_string(column) + " of tile " + std::to_string(row));
    }
    if (!p.team.exists()) return;
    const std::int64_t team = below(blocks / of_team);
    struct Solved { int threads = 0, place = 0; };
    std::map<std::int64_t, Solved> solved;  // each statistic
    for (int rank = 0; rank < of_team; ++rank)
      for (int thread = 0; thread < t.threads(); ++thread) {
        cuda::shim::cluster.running = thread;
        const cuda::Slab slab = cuda::slab_of<float>(work, team * of_team + rank);
        expect(slab.rank == rank, name + ": blocks of a team follow each other");
        cuda::for_statistics(work, slab, [&](int place, std::int64_t o, std::int64_t lane, cuda::Group) {
          Solved& one = solved[o * g.lanes + lane];
          ++one.threads, one.place = place;
          expect(o < g.outer && lane < g.lanes && place < (t.rows + t.tiles - 1) / t.tiles * (t.columns / g.run),
                 name + ": there is a place for what is known");
        });
      }
    for (const auto& [r, one] : solved) expect(one.threads == p.meeting, name + ": each statistic is solved once");
    for (int rank = 0; rank < of_team; ++rank)
      for (int round = 0; round < t.rounds; ++round)
        for (int slot = 0; slot < t.width; ++slot) {
          cuda::shim::cluster.running = slot;
          const cuda::Slab slab = cuda::slab_of<float>(work, team * of_team + rank);
          const cuda::Strand s = cuda::strand_of<float>(work, slab, round, slot);
          if (s.n == 0) continue;
          cuda::Cycle columns = cuda::columns_in_team<float>(work, slab, s);
          for (int e = 0; e < s.n; ++e, columns.next()) {
            const auto found = solved.find(s.at.o * g.lanes + (s.at.i + e) / g.run);
            expect(found != solved.end() && found->second.place == columns.index,
                   name + ": each column's statistic is one of the team's");
          }
        }
  });
}

/// Bytes of workspace, in arithmetic that cannot overflow: a fifth of x at most, however many elements there are, but for short
/// statistics with more neighbors in a row than a block of the lanes traversal has room for. Pairs of sums that wait for those of
/// other statistics, in gradients of parameters, come on top.
void workspace() {
  std::byte byte{};
  for (const View& view : views())
    for (const Dtype dtype : {Dtype::float16, Dtype::float32, Dtype::float64}) {
      normkit::Task task;
      task.geometry = view.geometry, task.traversal = view.traversal, task.x.dtype = dtype;
      const Geometry& g = view.geometry;
      const __int128 x = static_cast<__int128>(g.size()) * normkit::size_of(dtype);
      const std::int64_t room = (cuda::kSlots - 1) * cuda::vector_for(normkit::size_of(dtype)) + 1;
      const bool is_cut = view.traversal == Traversal::lanes && g.run > room && g.steps < 32;
      const auto check = [&](__int128 bytes, __int128 most, const std::string& what) {
        expect(is_cut || bytes <= most,
               view.name + ", " + std::to_string(normkit::size_of(dtype)) + " bytes: workspace of " + what + " is " +
                   std::to_string(static_cast<double>(bytes) / static_cast<double>(x)) + " of x");
      };
      constexpr int kVectors = 4 * cuda::kVectorBytes;  // to which arrays are rounded up
      normkit::Job forward;
      forward.task = task;
      check(static_cast<__int128>(cuda::workspace_bytes(forward)), x / 5 + kVectors, "forward");
      forward.task.frozen = true;
      check(static_cast<__int128>(cuda::workspace_bytes(forward)), 0, "frozen forward");
      normkit::Job backward;
      backward.task = task, backward.is_backward = true;
      backward.task.dx.data = &byte, backward.task.geometry.params = {};
      check(static_cast<__int128>(cuda::workspace_bytes(backward)), x / 5 + kVectors, "backward");
    }
}

const std::map<std::string, std::function<void()>> kScenarios = {
    {"tails", tails},       {"misaligned", misaligned},
    {"blocks", blocks},     {"columns", columns},
    {"teams", teams},       {"crowds", crowds},
    {"weighted", weighted}, {"pieces", pieces},
    {"slabs", slabs},       {"slabs_in_place", slabs_in_place},
    {"far", far_apart},     {"policy", policy},
    {"lanes", lanes},       {"workspace", workspace},
    {"rounding", rounding}};

}  // namespace

int main(int argc, char** argv) {
  for (int k = 1; k < argc; ++k) kScenarios.at(argv[k])();
  std::printf("%s\n", failures ? "shim test failed" : "shim test passed");
  return failures != 0;
}
