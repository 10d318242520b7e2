// Element types: how they lie in memory. Arithmetic happens in float, or in double where the storage is double.
#pragma once

#include <cstdint>

namespace normkit {

/// The type of an array's elements. Integers, and `boolean` but for masks, are read as float32, to which those of 32 and 64
/// bits are rounded once. `other` is any type that the library does not compute with; it exists to be named in an error.
enum class Dtype : std::uint8_t {
  float32,
  float64,
  float16,
  bfloat16,
  uint8,
  uint16,
  int16,
  int8,
  int32,
  uint32,
  int64,
  uint64,
  boolean,
  other
};

/// Storage of IEEE binary16 and of bfloat16: bits only, converted by the load and store of an instruction set.
struct Half { std::uint16_t bits; };
struct Bfloat { std::uint16_t bits; };

/// A storage type as a value, so that a generic lambda can receive it.
template <class T> struct Type { using type = T; };

/// Calls f(Type<T>{}) with the storage type T of `dtype`, and returns what f returns. An element of a dtype that the
/// library does not know is taken for a float.
template <class F> constexpr auto visit(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::float64: return f(Type<double>{});
    case Dtype::float16: return f(Type<Half>{});
    case Dtype::bfloat16: return f(Type<Bfloat>{});
    case Dtype::boolean:
    case Dtype::uint8: return f(Type<std::uint8_t>{});
    case Dtype::uint16: return f(Type<std::uint16_t>{});
    case Dtype::int16: return f(Type<std::int16_t>{});
    case Dtype::int8: return f(Type<std::int8_t>{});
    case Dtype::int32: return f(Type<std::int32_t>{});
    case Dtype::uint32: return f(Type<std::uint32_t>{});
    case Dtype::int64: return f(Type<std::int64_t>{});
    case Dtype::uint64: return f(Type<std::uint64_t>{});
    default: return f(Type<float>{});
  }
}

/// Bytes of an element of `dtype`.
[[gnu::always_inline]] constexpr int size_of(Dtype dtype) {
  return visit(dtype, [](auto t) { return static_cast<int>(sizeof(typename decltype(t)::type)); });
}

/// True of the dtypes that outputs may have, and x in a backward.
constexpr bool is_floating(Dtype dtype) { return dtype <= Dtype::bfloat16; }

/// The type of statistics, of parameter gradients and of all arithmetic for data of `dtype`.
constexpr Dtype compute_dtype(Dtype dtype) { return dtype == Dtype::float64 ? Dtype::float64 : Dtype::float32; }

/// What NumPy calls `dtype`, as messages say it.
constexpr const char* name_of(Dtype dtype) {
  constexpr const char* names[] = {"float32", "float64", "float16", "bfloat16", "uint8",  "uint16", "int16",
                                   "int8",    "int32",   "uint32",  "int64",    "uint64", "bool",   "other"};
  return names[static_cast<int>(dtype)];
}

}  // namespace normkit
