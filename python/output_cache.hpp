// Memory of large outputs, kept for the next one when an array is freed.
//
// New memory of this size comes from the system page by page, each filled with zeros when it is first touched: three times
// the time of a normalization that writes into memory it has seen. NumPy gives the memory of an array back through the
// handler that it came from, whoever frees it and when, so arrays may outlive everything.
#pragma once

#include <cstddef>

namespace output_cache {

/// Outputs from here on are cached; below, malloc is fast.
inline constexpr std::size_t kLeastBytes = std::size_t{1} << 20;

/// A PyDataMem_Handler, for PyDataMem_SetHandler; called with or without the interpreter lock, from any thread.
void* handler();

/// Memory of an output that NumPy does not hold, from the cache or from malloc; null where there is none. Who gives it back needs
/// no lock.
struct Memory {
  void* data = nullptr;
  bool is_cached = false;
};
Memory take(std::size_t bytes);
void give_back(void* data, bool is_cached);

/// The most bytes of freed memory that are kept; 0 switches the cache off. The limit starts at NORMKIT_CACHE_BYTES, or
/// 256 MB.
std::size_t limit();
void set_limit(std::size_t bytes);

/// The bytes that are kept at the moment.
std::size_t held();

}  // namespace output_cache
