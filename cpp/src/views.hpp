// Arrays whose elements do not lie as the kernels want them, or have a dtype that these have no loops for. Parts of such
// arrays are copied to where they do, and back: into caches, never whole.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "normkit/dtype.hpp"
#include "normkit/geometry.hpp"

namespace normkit {

/// How an array lies: its axes in the order in which it is walked, the slowest first. Strides are in bytes; any will do,
/// also of elements that do not lie on multiples of their size. `seen` is the dtype of the copies.
struct View {
  struct Axis { std::int64_t extent, stride; };

  Dtype dtype = Dtype::float32, seen = Dtype::float32;
  std::vector<Axis> axes;
};

/// The view of an array with these extents and strides in bytes, walked in this order.
View view_along(const AxisOrder& order, std::span<const std::int64_t> shape, std::span<const std::int64_t> strides,
                Dtype dtype, Dtype seen);

/// The address of an element, counted as the array is walked.
const std::byte* address(const View& view, const std::byte* array, std::int64_t element);

/// Copies elements [first, first + count) of an array, counted as it is walked, to dense memory.
void gather(const View& view, const std::byte* array, std::int64_t first, std::int64_t count, std::byte* to);
/// Copies dense memory to elements [first, first + count) of an array, each rounded once.
void scatter(const View& view, std::byte* array, std::int64_t first, std::int64_t count, const std::byte* from);

}  // namespace normkit
