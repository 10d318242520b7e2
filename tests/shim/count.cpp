// Counts what kernels read and write of global memory. Their sources are compiled with -fsanitize=thread, which has a function
// called for every access, and linked without the thread sanitizer: these functions take its place. No line of a kernel has to
// be written for it, and none can be forgotten. -DNORMKIT_SHIM_COUNTS tells shim.hpp, in all sources.
//
// Global memory is what is neither on a thread's stack, nor shared memory, nor an argument of the kernel, nor static.
#include <cstddef>
#include <cstdint>
#include <sstream>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "work.hpp"

// The first byte of this program or library, and the byte after its last.
extern "C" [[gnu::visibility("hidden")]] const char __ehdr_start, _end;

namespace {

namespace shim = normkit::cuda::shim;

constexpr std::int64_t kSectorBytes = 32;

bool is_within(const void* p, const void* begin, std::size_t bytes) {
  return reinterpret_cast<std::uintptr_t>(p) - reinterpret_cast<std::uintptr_t>(begin) < bytes;
}

bool is_global(const void* p) {
  const shim::Cluster& c = shim::cluster;
  if (is_within(p, shim::stack(c.running), shim::kStackBytes) || is_within(p, c.argument, c.argument_bytes))
    return false;
  if (is_within(p, &__ehdr_start, static_cast<std::size_t>(&_end - &__ehdr_start))) return false;
  for (const auto& memory : c.shared)
    if (is_within(p, memory.get(), static_cast<std::size_t>(c.shared_bytes))) return false;
  return true;
}

/// Sectors that a launch has touched: by each block of the cluster that runs, with the number of the barrier after which it did so
/// last; and by any.
struct Touched {
  std::vector<std::unordered_map<std::uintptr_t, int>> after;
  std::unordered_set<std::uintptr_t> all;
  std::int64_t launch = 0, cluster = -1;

  void come_to_date() {
    const std::int64_t now = shim::launch_number;
    if (launch == now && cluster == shim::cluster.first) return;
    after.assign(shim::cluster.shared.size(), {});
    if (launch != now) all.clear();
    launch = now, cluster = shim::cluster.first;
  }
  /// True where its block touches the sector for the first time since its last barrier.
  bool add(std::uintptr_t sector) {
    const shim::Fiber& fiber = shim::current();
    const int barrier = fiber.barriers + fiber.cluster_barriers + 1;
    int& last = after[static_cast<std::size_t>(shim::cluster.running / shim::cluster.threads)][sector];
    if (last == barrier) return false;
    return last = barrier, true;
  }
};
Touched loads, stores;

void count(const void* p, std::size_t bytes, Touched& touched, std::int64_t shim::Bytes::* kind) {
  if (!shim::counts || !shim::records || shim::launches.empty() || !is_global(p)) return;
  shim::Launched& launch = shim::launches.back();
  shim::Traffic& traffic = shim::workspace.holds(p) ? launch.workspace : launch.arrays;
  traffic.asked.*kind += static_cast<std::int64_t>(bytes);
  touched.come_to_date();
  const auto first = reinterpret_cast<std::uintptr_t>(p);
  for (std::uintptr_t sector = first / kSectorBytes; sector <= (first + bytes - 1) / kSectorBytes; ++sector) {
    if (!touched.add(sector)) continue;
    traffic.by_block.*kind += kSectorBytes;
    if (touched.all.insert(sector).second) traffic.once.*kind += kSectorBytes;
  }
}

void load(const void* p, std::size_t bytes) { count(p, bytes, loads, &shim::Bytes::loaded); }
void store(const void* p, std::size_t bytes) { count(p, bytes, stores, &shim::Bytes::stored); }

std::ostream& operator<<(std::ostream& out, shim::Bytes bytes) {
  return out << "[" << bytes.loaded << ", " << bytes.stored << "]";
}
std::ostream& operator<<(std::ostream& out, const shim::Traffic& t) {
  return out << R"({"asked": )" << t.asked << R"(, "by_block": )" << t.by_block << R"(, "once": )" << t.once << "}";
}
std::ostream& operator<<(std::ostream& out, const shim::Launched& l) {
  out << R"({"kernel": ")" << l.kernel << R"(", "blocks": )" << l.grid.blocks << R"(, "threads": )" << l.grid.threads;
  out << R"(, "shared_bytes": )" << l.grid.shared_bytes << R"(, "cluster": )" << l.grid.cluster;
  out << R"(, "resident_blocks": )" << l.resident_blocks << R"(, "in_flight_bytes": )" << l.in_flight_bytes;
  return out << R"(, "arrays": )" << l.arrays << R"(, "workspace": )" << l.workspace << R"(, "answer": )" << l.answer
             << "}";
}

}  // namespace

extern "C" {

#define NORMKIT_OF_SIZE(size)                                  \
  void __tsan_read##size(void* p) { load(p, size); }           \
  void __tsan_write##size(void* p) { store(p, size); }         \
  void __tsan_unaligned_read##size(void* p) { load(p, size); } \
  void __tsan_unaligned_write##size(void* p) { store(p, size); }
NORMKIT_OF_SIZE(1)
NORMKIT_OF_SIZE(2)
NORMKIT_OF_SIZE(4)
NORMKIT_OF_SIZE(8)
NORMKIT_OF_SIZE(16)
void __tsan_read_range(void* p, std::size_t bytes) { load(p, bytes); }
void __tsan_write_range(void* p, std::size_t bytes) { store(p, bytes); }
void __tsan_vptr_update(void**, void*) {}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
/// All launches since the last call as JSON, for tests in Python: see tests/launches.py. Later launches call `question`
/// first.
[[gnu::visibility("default")]] const char* normkit_shim_launches(int (*question)()) {
  static std::string text;
  std::ostringstream out;
  for (const shim::Launched& launch : shim::launches) out << (out.tellp() > 0 ? ", " : "") << launch;
  text = "[" + out.str() + "]";
  shim::launches.clear(), shim::records = true, shim::question = question;
  return text.c_str();
}

// What the shim itself does: guards of static variables.
unsigned char __tsan_atomic8_load(const volatile unsigned char* p, int) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }

}  // extern "C"
