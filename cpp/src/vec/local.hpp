// Per-ISA code is local to its object file: every function is in an anonymous namespace, so that nothing compiled for a
// newer machine can be linked into the path of an older one.
#pragma once

#include <cstdint>

#include "normkit/dtype.hpp"

#define NORMKIT_LOCAL [[gnu::always_inline]] inline
#define NORMKIT_INLINE_LAMBDA __attribute__((always_inline))

namespace normkit {
namespace {

NORMKIT_LOCAL std::int64_t least(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

}  // namespace
}  // namespace normkit
