#include "views.hpp"

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#include "vec/half.hpp"

namespace normkit {
namespace {

/// Rows and columns of elements, the steps between them in bytes.
struct Lattice { std::int64_t row, column; };

/// Copies elements of kBytes bytes. Steps that the compiler knows make the loop one of vectors.
template <int kBytes>
void copy_row(std::byte* to, auto to_step, const std::byte* from, auto from_step, std::int64_t columns) {
  for (std::int64_t k = 0; k < columns; ++k) std::memcpy(to + k * to_step, from + k * from_step, kBytes);
}

/// Copies bytes by lines, and fetches what is `ahead`. For memcpy() of a row glibc may take "rep movsb", which took five times as
/// long to a place that is no multiple of 16.
void copy_bytes(std::byte* to, const std::byte* from, std::int64_t bytes, std::int64_t ahead) {
  std::int64_t k = 0;
  for (; k + 64 <= bytes; k += 64) {
    __builtin_prefetch(from + k + ahead);
    std::memcpy(to + k, from + k, 64);
  }
  std::memcpy(to + k, from + k, static_cast<std::size_t>(bytes - k));
}

/// Bytes that copies run ahead: rows that are far apart are not foreseen, and what is foreseen comes late, 1.25 of the time of a
/// call.
constexpr std::int64_t kRowsAhead = 4096;

/// Rows of up to so many columns are copied without a loop over these: the channels of a picture, turned around or a row of it.
constexpr std::int64_t kShortRow = 4;

template <int kBytes, int kColumns>
void copy_short_rows(std::byte* to, Lattice to_step, const std::byte* from, Lattice from_step, std::int64_t rows) {
  constexpr std::int64_t kTogether = 16, kRow = kColumns * kBytes;
  const std::int64_t line = std::max<std::int64_t>(64, from_step.row);
  const auto copy = [&](std::int64_t begin, std::int64_t end, auto copy_row) {
    for (std::int64_t row = begin; row < end; row += kTogether) {
      for (std::int64_t byte = 0; byte < kTogether * from_step.row; byte += line)
        __builtin_prefetch(from + kRowsAhead + byte);
      for (std::int64_t k = std::min(kTogether, end - row); k > 0; --k, to += to_step.row, from += from_step.row)
        copy_row();
    }
  };
  const auto each = [&] {
    for (int column = 0; column < kColumns; ++column)
      std::memcpy(to + column * to_step.column, from + column * from_step.column, kBytes);
  };
  const bool is_dense =
      to_step.column == kBytes && from_step.column == kBytes && std::abs(to_step.row) == kRow && from_step.row >= kRow;
  if (kColumns != 3 || !is_dense) return copy(0, rows, each);
  // With every row but the first and the last a fourth element is copied, in whose place the next row comes.
  const std::int64_t fourth = to_step.row < 0 ? -kBytes : 0;
  copy(0, 1, each);
  copy(1, rows - 1, [&] { std::memcpy(to + fourth, from + fourth, kRow + kBytes); });
  copy(rows - 1, rows, each);
}

/// Copies rows x columns elements of kBytes bytes each; the columns of one side are dense.
template <int kBytes>
void copy_lattice(std::byte* to, Lattice to_step, const std::byte* from, Lattice from_step, std::int64_t rows,
                  std::int64_t columns) {
  constexpr std::integral_constant<std::int64_t, kBytes> dense;
  if (from_step.row < 0) {  // memory is read in its order
    to += (rows - 1) * to_step.row, from += (rows - 1) * from_step.row;
    to_step.row = -to_step.row, from_step.row = -from_step.row;
  }
  if (columns <= kShortRow && rows > 1) {
    if (columns == 1) return copy_short_rows<kBytes, 1>(to, to_step, from, from_step, rows);
    if (columns == 2) return copy_short_rows<kBytes, 2>(to, to_step, from, from_step, rows);
    if (columns == 3) return copy_short_rows<kBytes, 3>(to, to_step, from, from_step, rows);
    return copy_short_rows<kBytes, 4>(to, to_step, from, from_step, rows);
  }
  const std::int64_t reach = (columns - 1) * from_step.column, row_bytes = std::abs(reach) + kBytes;
  const std::int64_t ahead = row_bytes < kRowsAhead ? kRowsAhead / row_bytes * from_step.row : 0;
  for (std::int64_t row = 0; row < rows; ++row, to += to_step.row, from += from_step.row) {
    if (to_step.column == kBytes && from_step.column == kBytes) {
      copy_bytes(to, from, columns * kBytes, ahead != 0 ? ahead : kRowsAhead);
      continue;
    }
    if (ahead != 0)
      for (std::int64_t byte = 0; byte < row_bytes; byte += 64)
        __builtin_prefetch(from + std::min<std::int64_t>(reach, 0) + ahead + byte);
    const auto copied = [&](auto step) {
      if (to_step.column == kBytes) copy_row<kBytes>(to, dense, from, step, columns);
      else copy_row<kBytes>(to, step, from, dense, columns);
    };
    const std::int64_t step = to_step.column == kBytes ? from_step.column : to_step.column;
    if (step == -kBytes) copied(std::integral_constant<std::int64_t, -kBytes>());
    else if (step == 0) copied(std::integral_constant<std::int64_t, 0>());
    else if (step == 2 * kBytes) copied(std::integral_constant<std::int64_t, 2 * kBytes>());
    else copied(step);
  }
}

/// 16 bytes as elements of kBytes.
template <int kBytes> struct Lanes;
template <> struct Lanes<1> { using Type [[gnu::vector_size(16)]] = std::uint8_t; };
template <> struct Lanes<2> { using Type [[gnu::vector_size(16)]] = std::uint16_t; };
template <> struct Lanes<4> { using Type [[gnu::vector_size(16)]] = std::uint32_t; };

/// The first halves of a and b, or the second ones, element by element.
template <int kBytes, class V> V zip(const V& a, const V& b, bool second) {
  if constexpr (kBytes == 4)
    return second ? __builtin_shufflevector(a, b, 2, 6, 3, 7) : __builtin_shufflevector(a, b, 0, 4, 1, 5);
  else if constexpr (kBytes == 2)
    return second ? __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15)
                  : __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
  else
    return second ? __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)
                  : __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}

/// Copies as many rows and columns as 16 bytes have elements. One side has dense columns, the other dense rows.
template <int kBytes>
void turn_square(std::byte* to, Lattice to_step, const std::byte* from, Lattice from_step) {
  using V = typename Lanes<kBytes>::Type;
  constexpr int kLines = 16 / kBytes;
  const bool reads_rows = from_step.column == kBytes;
  const std::int64_t from_line = reads_rows ? from_step.row : from_step.column;
  const std::int64_t to_line = reads_rows ? to_step.column : to_step.row;
  V line[kLines], zipped[kLines];
  for (int k = 0; k < kLines; ++k) std::memcpy(&line[k], from + k * from_line, sizeof(V));
  for (int stage = 1; stage < kLines; stage *= 2) {
    for (int k = 0; k < kLines / 2; ++k) {
      zipped[2 * k] = zip<kBytes>(line[k], line[k + kLines / 2], false);
      zipped[2 * k + 1] = zip<kBytes>(line[k], line[k + kLines / 2], true);
    }
    for (int k = 0; k < kLines; ++k) line[k] = zipped[k];
  }
  for (int k = 0; k < kLines; ++k) std::memcpy(to + k * to_line, &line[k], sizeof(V));
}

/// Copies a lattice whose columns are dense on one side, and whose rows are on the other: in squares, and what is left over
/// element by element.
template <int kBytes>
void turn_lattice(std::byte* to, Lattice to_step, const std::byte* from, Lattice from_step, std::int64_t rows,
                  std::int64_t columns) {
  constexpr std::int64_t kSquare = 16 / kBytes;
  const std::int64_t whole_rows = rows / kSquare * kSquare, whole_columns = columns / kSquare * kSquare;
  const auto out = [&](std::int64_t row, std::int64_t k) { return to + row * to_step.row + k * to_step.column; };
  const auto in = [&](std::int64_t row, std::int64_t k) { return from + row * from_step.row + k * from_step.column; };
  for (std::int64_t row = 0; row < whole_rows; row += kSquare)
    for (std::int64_t k = 0; k < whole_columns; k += kSquare)
      turn_square<kBytes>(out(row, k), to_step, in(row, k), from_step);
  if (whole_columns < columns)
    copy_lattice<kBytes>(out(0, whole_columns), to_step, in(0, whole_columns), from_step, whole_rows,
                         columns - whole_columns);
  if (whole_rows < rows)
    copy_lattice<kBytes>(out(whole_rows, 0), to_step, in(whole_rows, 0), from_step, rows - whole_rows, columns);
}

/// Copies a lattice one side of which is dense. Where the other one's columns are further apart than its rows, tiles are copied,
/// so that what shares a line of memory is copied together, while the lines of the tile beside are fetched.
template <int kBytes>
void copy_block(std::byte* to, Lattice to_step, const std::byte* from, Lattice from_step, std::int64_t rows,
                std::int64_t columns) {
  const auto wide = [](Lattice s) { return std::abs(s.column) > std::abs(s.row); };
  if (rows == 1 || !(wide(to_step) || wide(from_step)))
    return copy_lattice<kBytes>(to, to_step, from, from_step, rows, columns);
  constexpr std::int64_t kTile = 64 / kBytes;
  [[maybe_unused]] const bool turns = (wide(to_step) ? to_step : from_step).row == kBytes;
  for (std::int64_t column = 0; column < columns; column += kTile)
    for (std::int64_t row = 0; row < rows; row += kTile) {
      std::byte* const tile = to + row * to_step.row + column * to_step.column;
      const std::byte* const seen = from + row * from_step.row + column * from_step.column;
      const std::int64_t height = std::min(kTile, rows - row), width = std::min(kTile, columns - column);
      for (std::int64_t k = kTile; k < kTile + width; ++k)
        wide(to_step) ? __builtin_prefetch(tile + k * to_step.column, 1)
                      : __builtin_prefetch(seen + k * from_step.column);
      if constexpr (kBytes < 8) {  // there are but two of 8 bytes in a square
        if (turns) {
          turn_lattice<kBytes>(tile, to_step, seen, from_step, height, width);
          continue;
        }
      }
      copy_lattice<kBytes>(tile, to_step, seen, from_step, height, width);
    }
}

/// Calls f(place in the array, its steps, place in dense memory, steps there, rows, columns) for the elements [first, first + count)
/// of an array, as many rows of the fastest axis at a time as lie evenly. Places are in bytes.
template <class F> void for_blocks(const View& view, std::int64_t first, std::int64_t count, F f) {
  const std::size_t axes = view.axes.size();
  std::array<std::int64_t, kMaxAxes> index;
  std::int64_t place = 0;
  for (std::size_t axis = axes, rest = static_cast<std::size_t>(first); axis-- > 0;) {
    const auto extent = static_cast<std::size_t>(view.axes[axis].extent);
    index[axis] = static_cast<std::int64_t>(rest % extent), rest /= extent;
    place += index[axis] * view.axes[axis].stride;
  }
  const std::size_t column = axes - 1;
  const std::int64_t columns = view.axes[column].extent, bytes = size_of(view.dtype);
  const Lattice step{axes > 1 ? view.axes[axes - 2].stride : 0, view.axes[column].stride},
      dense{columns * bytes, bytes};
  for (std::int64_t done = 0; done < count;) {
    std::int64_t rows = 1, n = std::min(columns - index[column], count - done);
    if (axes > 1 && n == columns)
      rows = std::min(view.axes[axes - 2].extent - index[axes - 2], (count - done) / columns);
    f(place, step, done * bytes, dense, rows, n);
    done += rows * n;
    // The next index: the columns end here, or all that is asked for does.
    place -= index[column] * view.axes[column].stride;
    index[column] = 0;
    if (axes == 1) continue;
    index[axes - 2] += rows, place += rows * view.axes[axes - 2].stride;
    for (std::size_t axis = axes - 2; axis > 0 && index[axis] == view.axes[axis].extent; --axis) {
      place += view.axes[axis - 1].stride - index[axis] * view.axes[axis].stride;
      index[axis] = 0, ++index[axis - 1];
    }
  }
}

using Copy = void (*)(std::byte* to, Lattice to_step, const std::byte* from, Lattice from_step, std::int64_t rows,
                      std::int64_t columns);
/// copy_block() for elements of a dtype.
Copy copy_of(Dtype dtype) {
  return visit(dtype, [](auto t) -> Copy { return copy_block<sizeof(typename decltype(t)::type)>; });
}

/// gather() and scatter() without a conversion.
void read(const View& view, const std::byte* array, std::int64_t first, std::int64_t count, std::byte* to) {
  const Copy copy = copy_of(view.dtype);
  for_blocks(view, first, count,
             [&](std::int64_t place, Lattice step, std::int64_t at, Lattice dense, auto... extents) {
    copy(to + at, dense, array + place, step, extents...);
  });
}
void write(const View& view, std::byte* array, std::int64_t first, std::int64_t count, const std::byte* from) {
  const Copy copy = copy_of(view.dtype);
  for_blocks(view, first, count,
             [&](std::int64_t place, Lattice step, std::int64_t at, Lattice dense, auto... extents) {
    copy(array + place, step, from + at, dense, extents...);
  });
}

/// The nearest float, or, where `v` lies between two, the odd one of them: rounded on to a half type, it gives what `v`
/// itself would.
float to_odd(double v) {
  const float nearest = static_cast<float>(v);
  if (nearest == v || nearest != nearest) return nearest;
  return float_of((bits_of(nearest) - (std::abs(static_cast<double>(nearest)) > std::abs(v))) | 1u);
}
float to_odd(float v) { return v; }

/// Converts n elements, each rounded once: anything to float, or float and double to any floating type.
void convert(const std::byte* from, Dtype dtype, std::int64_t n, std::byte* to, Dtype seen) {
  visit(dtype, [&](auto a) {
    using From = typename decltype(a)::type;
    visit(seen, [&](auto b) {
      using To = typename decltype(b)::type;
      const From* const x = reinterpret_cast<const From*>(from);
      To* const y = reinterpret_cast<To*>(to);
      if constexpr (std::is_class_v<From>) {
        if constexpr (std::is_same_v<To, float>)
          for (std::int64_t k = 0; k < n; ++k) y[k] = widen(x[k]);
      } else if constexpr (std::is_class_v<To>) {
        if constexpr (std::is_floating_point_v<From>)
          for (std::int64_t k = 0; k < n; ++k) y[k] = narrow(y, to_odd(x[k]));
      } else if constexpr (std::is_same_v<To, float> || (std::is_same_v<To, double> && std::is_same_v<From, float>)) {
        if (dtype == Dtype::boolean)
          for (std::int64_t k = 0; k < n; ++k) y[k] = x[k] != 0;
        else
          for (std::int64_t k = 0; k < n; ++k) y[k] = static_cast<To>(x[k]);
      }
    });
  });
}

/// Elements that are converted at a time.
constexpr std::int64_t kPart = 1024;

/// Calls f(part, is it a copy, first element, elements) for parts of an array, of its dtype: where they lie if they are
/// dense, else where a copy of them is to be.
template <class Byte, class F>
void in_parts(const View& view, Byte* array, std::int64_t first, std::int64_t count, F f) {
  const std::int64_t bytes = size_of(view.dtype);
  const bool is_dense = view.axes.size() == 1 && view.axes[0].stride == bytes &&
                        reinterpret_cast<std::uintptr_t>(array) % static_cast<std::uintptr_t>(bytes) == 0;
  if (is_dense) return f(const_cast<std::byte*>(array) + first * bytes, false, first, count);
  alignas(64) std::byte part[kPart * sizeof(double)];
  for (std::int64_t done = 0; done < count; done += kPart) f(part, true, first + done, std::min(kPart, count - done));
}

}  // namespace

View view_along(const AxisOrder& order, std::span<const std::int64_t> shape, std::span<const std::int64_t> strides,
                Dtype dtype, Dtype seen) {
  View view{dtype, seen, {}};
  for (int at = 0; at < order.count; ++at) {
    const int axis = order.axis[at];
    const View::Axis here{shape[axis], strides[axis]};
    if (!view.axes.empty() && view.axes.back().stride == here.extent * here.stride)
      view.axes.back() = {view.axes.back().extent * here.extent, here.stride};
    else view.axes.push_back(here);
  }
  if (view.axes.empty()) view.axes.push_back({1, size_of(dtype)});
  return view;
}

const std::byte* address(const View& view, const std::byte* array, std::int64_t element) {
  for (std::size_t axis = view.axes.size(); axis-- > 0; element /= view.axes[axis].extent)
    array += element % view.axes[axis].extent * view.axes[axis].stride;
  return array;
}

void gather(const View& view, const std::byte* array, std::int64_t first, std::int64_t count, std::byte* to) {
  if (view.dtype == view.seen) return read(view, array, first, count, to);
  in_parts(view, array, first, count, [&](std::byte* part, bool is_copy, std::int64_t begin, std::int64_t n) {
    if (is_copy) read(view, array, begin, n, part);
    convert(part, view.dtype, n, to + (begin - first) * size_of(view.seen), view.seen);
  });
}

void scatter(const View& view, std::byte* array, std::int64_t first, std::int64_t count, const std::byte* from) {
  if (view.dtype == view.seen) return write(view, array, first, count, from);
  in_parts(view, array, first, count, [&](std::byte* part, bool is_copy, std::int64_t begin, std::int64_t n) {
    convert(from + (begin - first) * size_of(view.seen), view.seen, n, part, view.dtype);
    if (is_copy) write(view, array, begin, n, part);
  });
}

}  // namespace normkit
