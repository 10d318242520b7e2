// What an argument is and what is wrong with it. Every check names the argument, says what it is, and what would be right.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "normkit/normkit.hpp"

namespace normkit {

using Extents = std::array<std::int64_t, kMaxAxes>;

[[noreturn]] void fail(Error::Kind kind, const std::string& message);
[[noreturn]] void type_error(const std::string& message);
[[noreturn]] void value_error(const std::string& message);

/// "(2, 3)", as Python writes a shape.
std::string tuple(std::span<const std::int64_t> values);

// ---- one array ---------------------------------------------------------------------------------------------------

/// `integers`: those are data too.
void check_data_dtype(const char* name, const Array& a, bool integers);
void check_same_dtype(const char* name, const Array& a, Dtype expected, const char* because);
void check_wide_dtype(const char* name, const Array& a);
void check_param_dtype(const char* name, const Array& a, Dtype x);
void check_shape(const char* name, const Array& a, std::span<const std::int64_t> expected, const char* because);
void check_writable(const char* name, const Array& a);

/// Strides in elements.
void element_strides(const Array& a, Extents& out);
bool same_strides(const Array& a, const Array& b);
/// `strides` count elements. True too where an axis has one index, whatever its stride.
bool has_strides(const Array& a, const Extents& strides);
/// True where every element lies where one of its size may.
bool on_elements(const Array& a);

// ---- several arrays ----------------------------------------------------------------------------------------------

/// True where the memory between the first and the last byte of both overlaps, and they are not one and the same view.
bool may_overlap(const Array& a, const Array& b);

/// An output may be `other` itself, where that is elementwise safe, or lie apart from it.
void check_apart(const char* name, const Array& out, const char* other_name, const Array& other, bool may_be_same,
                 bool known_apart);

/// The bytes that an array reaches over, seen from its address, and those of an element.
struct Reach { std::int64_t first = 0, last = 0, element = 1; };

/// What was judged of the addresses of a call's arrays, for like calls whose arrays lie elsewhere.
class Placement {
 public:
  Placement() = default;
  /// arrays[out] is written, and may be one of those whose bits are set in `same` itself.
  Placement(std::span<const Array> arrays, int out, std::uint32_t same);
  /// True where all arrays that there are lie on their elements, and the output apart from the others or on such a one.
  /// Where it is false, they have to be judged.
  bool allows(const std::byte* const* data) const;

 private:
  static constexpr int kMostArrays = 12;
  std::array<Reach, kMostArrays> reach_;
  int count_ = 0, out_ = 0;
  std::uint32_t same_ = 0;
};

// ---- arrays beside x ---------------------------------------------------------------------------------------------

/// The axes of x that weight or bias varies along; its shape is judged.
AxisMask match_params(const char* name, const Array& a, std::span<const std::int64_t> x, const Spec& spec);
/// The axis of x that axis `axis` of a parameter array of `ndim` axes lies along.
int param_axis(const Spec& spec, AxisMask axes, int x_ndim, int ndim, int axis);

void check_spec(const Spec& spec, const Array& x);
void check_where(const Array& where, const Array& x);
/// A companion of x: the same shape and floating dtype.
void check_like_x(const char* name, const Array& a, const Array& x);
void check_residual(const ForwardArgs& args);
/// `statistics` are the extents of the statistics: an element of float64 for each, or three.
void check_counts(const Array& a, std::span<const std::int64_t> statistics);
void check_triples(const char* name, const Array& a, std::span<const std::int64_t> statistics);
void check_running(const Array& mean, const Array& var, const Array& x, const Spec& spec);

}  // namespace normkit
