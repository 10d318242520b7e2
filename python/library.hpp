// Arrays of a GPU as their libraries show them: read here for calls whose plan is known, and by _cuda.py for all others.
#pragma once

#include <nanobind/nanobind.h>

#include <cstddef>
#include <cstdint>

#include "recent.hpp"

namespace library {

namespace nb = nanobind;

struct Library;

struct Array {
  const Library* library = nullptr;
  std::int64_t device = -1;
  std::byte* data = nullptr;
  nb::object dtype;  // alive as long as a key names it
  bool shares(const Array& other) const { return library == other.library && device == other.device; }
};

/// Adds to `key` what there is to tell of an array of CuPy or PyTorch. False for anything else, and for what these two hand to
/// nobody: a tensor that requires grad, say.
bool read(nb::handle array, recent::Key& key, Array& into);

/// Of an array that one of these has made.
std::byte* data_of(nb::handle array);

}  // namespace library
