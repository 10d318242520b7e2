// Ends the process where a kernel touches memory at an address that is no multiple of what it reads or writes there, as a GPU
// does. Sources of kernels are compiled with -fsanitize=alignment, which has a function called then, and linked without that
// sanitizer: this function takes its place.
#include <cstdint>
#include <cstdio>

#include "work.hpp"

namespace {

/// The part that is used here of what the compiler passes.
struct Mismatch {
  const char* file;
  std::uint32_t line, column;
  const void* type;
  std::uint8_t log2_of_alignment;
};

}  // namespace

extern "C" [[noreturn]] void __ubsan_handle_type_mismatch_v1_abort(const Mismatch* found, const void* address) {
  char what[512];
  std::snprintf(what, sizeof(what), "%s:%u: address %p, expected a multiple of %d", found->file, found->line, address,
                1 << found->log2_of_alignment);
  normkit::cuda::shim::stop(what);
}
