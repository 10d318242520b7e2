// Python's header chooses what the system's declare, so it comes before them.
#include <Python.h>

#include "output_cache.hpp"

#if !defined(_WIN32)
#include <pthread.h>
#include <sys/mman.h>
#endif

#include <charconv>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <system_error>
#include <vector>

#define NPY_NO_DEPRECATED_API NPY_2_0_API_VERSION
#define NPY_TARGET_VERSION NPY_2_0_API_VERSION
#include <numpy/ndarraytypes.h>

namespace output_cache {
namespace {

constexpr std::size_t kLine = 64;
constexpr std::align_val_t kAlign{kLine};
constexpr std::size_t kDefaultLimit = std::size_t{256} << 20;

/// Lies in front of the elements, which begin at the next line of memory.
struct Header { std::size_t capacity; };

Header* header_of(void* elements) { return reinterpret_cast<Header*>(static_cast<std::byte*>(elements) - kLine); }
void* elements_of(Header* h) { return reinterpret_cast<std::byte*>(h) + kLine; }

void* from_system(std::size_t bytes) {
  const std::size_t capacity = (bytes + kLine - 1) / kLine * kLine;
  void* memory = ::operator new(kLine + capacity, kAlign, std::nothrow);
  if (!memory) return nullptr;
#if defined(MADV_HUGEPAGE)
  // Bytes from which on memory is worth the system's large pages, of which there are fewer to fill.
  constexpr std::size_t kHugePages = std::size_t{4} << 20;
  if (capacity >= kHugePages) {
    constexpr std::uintptr_t kPage = 4096;
    const std::uintptr_t begin = (reinterpret_cast<std::uintptr_t>(memory) + kPage - 1) / kPage * kPage;
    const std::uintptr_t end = (reinterpret_cast<std::uintptr_t>(memory) + kLine + capacity) / kPage * kPage;
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // a wish: refused, it changes nothing
  }
#endif
  Header* h = static_cast<Header*>(memory);
  h->capacity = capacity;
  return elements_of(h);
}

/// Memory that has been freed, the oldest first. The cache is never destroyed: arrays may be freed after everything
/// else is gone.
class Cache {
 public:
  std::mutex mutex;

  Cache() {
    const char* wanted = std::getenv("NORMKIT_CACHE_BYTES");
    std::size_t bytes = 0;
    if (!wanted || !*wanted) return;
    const std::from_chars_result read = std::from_chars(wanted, wanted + std::strlen(wanted), bytes);
    if (read.ec == std::errc{} && !*read.ptr) limit_ = bytes;  // else _config.py warns
  }

  /// Takes the newest memory, which may still be in the processor's caches, that is large enough, and at most twice as
  /// large.
  void* take(std::size_t bytes) {
    const std::lock_guard lock(mutex);
    for (std::size_t k = free_.size(); k-- > 0;) {
      Header* h = free_[k];
      if (h->capacity < bytes || h->capacity / 2 > bytes) continue;
      free_.erase(free_.begin() + static_cast<std::ptrdiff_t>(k));
      held_ -= h->capacity;
      return elements_of(h);
    }
    return nullptr;
  }
  /// Keeps memory that has been freed, if it fits, and lets the oldest go for it.
  void give(void* elements) {
    Header* h = header_of(elements);
    const std::lock_guard lock(mutex);
    free_.push_back(h);
    held_ += h->capacity;
    shrink();
  }
  std::size_t limit() {
    const std::lock_guard lock(mutex);
    return limit_;
  }
  void set_limit(std::size_t bytes) {
    const std::lock_guard lock(mutex);
    limit_ = bytes;
    shrink();
  }
  std::size_t held() {
    const std::lock_guard lock(mutex);
    return held_;
  }

 private:
  void shrink() {
    std::size_t gone = 0;
    for (; held_ > limit_; ++gone) {
      held_ -= free_[gone]->capacity;
      ::operator delete(free_[gone], kAlign);
    }
    free_.erase(free_.begin(), free_.begin() + static_cast<std::ptrdiff_t>(gone));
  }

  std::vector<Header*> free_;
  std::size_t held_ = 0, limit_ = kDefaultLimit;
};

Cache& cache() {
  static Cache* const all = [] {
    Cache* made = new Cache;
    [[maybe_unused]] static Cache* shared = made;
#if !defined(_WIN32)
    // A fork while another thread holds the lock would leave the child with a lock that nobody opens.
    pthread_atfork([] { shared->mutex.lock(); }, [] { shared->mutex.unlock(); }, [] { shared->mutex.unlock(); });
#endif
    return made;
  }();
  return *all;
}

void* allocate(void*, std::size_t bytes) {
  void* elements = cache().take(bytes);
  return elements ? elements : from_system(bytes);
}

void* allocate_zeros(void*, std::size_t count, std::size_t size) {
  void* elements = allocate(nullptr, count * size);
  if (elements) std::memset(elements, 0, count * size);
  return elements;
}

void release(void*, void* elements, std::size_t) {
  if (elements) cache().give(elements);
}

/// Moves elements to memory of another size: ndarray.resize calls this on an array of ours.
void* reallocate(void*, void* elements, std::size_t bytes) {
  void* fresh = from_system(bytes);
  if (!fresh || !elements) return fresh;
  const std::size_t old = header_of(elements)->capacity;
  std::memcpy(fresh, elements, old < bytes ? old : bytes);
  cache().give(elements);
  return fresh;
}

PyDataMem_Handler the_handler = {"normkit_output_cache", 1, {nullptr, allocate, allocate_zeros, reallocate, release}};

}  // namespace

void* handler() { return &the_handler; }

Memory take(std::size_t bytes) {
  const bool is_cached = bytes >= kLeastBytes && limit() > 0;
  return {is_cached ? allocate(nullptr, bytes) : std::malloc(bytes), is_cached};
}

void give_back(void* data, bool is_cached) {
  if (is_cached) cache().give(data);
  else std::free(data);
}

std::size_t limit() { return cache().limit(); }
void set_limit(std::size_t bytes) { cache().set_limit(bytes); }
std::size_t held() { return cache().held(); }

}  // namespace output_cache
