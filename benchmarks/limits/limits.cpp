// The fastest ways to move bytes: what every time of this suite is divided by. Compiled where it runs, for that machine.
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
struct Vec {
  __m512i v;
  static Vec load(const char* p) { return {_mm512_loadu_si512(p)}; }
  void store(char* p) const { _mm512_storeu_si512(p, v); }
  void stream(char* p) const { _mm512_stream_si512(reinterpret_cast<__m512i*>(p), v); }
  Vec operator^(Vec b) const { return {_mm512_xor_si512(v, b.v)}; }
};
#elif defined(__AVX2__)
struct Vec {
  __m256i v;
  static Vec load(const char* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
  void store(char* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
  void stream(char* p) const { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), v); }
  Vec operator^(Vec b) const { return {_mm256_xor_si256(v, b.v)}; }
};
#else
struct Vec {
  std::uint64_t v[4];
  static Vec load(const char* p) {
    Vec r;
    std::memcpy(r.v, p, sizeof(r.v));
    return r;
  }
  void store(char* p) const { std::memcpy(p, v, sizeof(v)); }
  void stream(char* p) const { store(p); }
  Vec operator^(Vec b) const { return {{v[0] ^ b.v[0], v[1] ^ b.v[1], v[2] ^ b.v[2], v[3] ^ b.v[3]}}; }
};
#endif

void drain() {
#if defined(__AVX512F__) || defined(__AVX2__)
  _mm_sfence();
#endif
}

constexpr std::size_t kBlock = 256, kLine = 64, kAhead = 4096;

/// c = a ^ b, or a copy of a where b is null. Exclusive or, because additions of arbitrary bits meet denormal numbers.
/// c has kTimes the bytes of a: each of its blocks repeats what it has read.
template <bool kStream, bool kPrefetch, int kTimes>
void move(const char* a, const char* b, char* c, std::size_t bytes) {
  const auto put = [&](std::size_t at, std::size_t j) {
    const std::size_t from = at / kTimes + j % (kBlock / kTimes);
    const Vec v = b ? Vec::load(a + from) ^ Vec::load(b + from) : Vec::load(a + from);
    kStream ? v.stream(c + at + j) : v.store(c + at + j);
  };
  const auto put_bytes = [&](std::size_t at, std::size_t to) {
    for (; at < to; ++at) c[at] = static_cast<char>(b ? a[at / kTimes] ^ b[at / kTimes] : a[at / kTimes]);
  };
  std::size_t at = -reinterpret_cast<std::uintptr_t>(c) % kLine;  // streams want whole lines
  at = at < bytes ? at : bytes;
  put_bytes(0, at);
  for (; at + kBlock <= bytes; at += kBlock) {
    for (std::size_t line = 0; kPrefetch && line < kBlock / kTimes; line += kLine) {
      __builtin_prefetch(a + at / kTimes + kAhead + line);
      if (b) __builtin_prefetch(b + at / kTimes + kAhead + line);
    }
    for (std::size_t j = 0; j < kBlock; j += sizeof(Vec)) put(at, j);
  }
  put_bytes(at, bytes);
  if (kStream) drain();
}

template <int kTimes> void libc(const char* a, const char* b, char* c, std::size_t bytes) {
  b || kTimes > 1 ? move<false, false, kTimes>(a, b, c, bytes) : static_cast<void>(std::memcpy(c, a, bytes));
}

using Kernel = void (*)(const char*, const char*, char*, std::size_t);
template <int kTimes>
constexpr Kernel kKernels[] = {libc<kTimes>, move<false, false, kTimes>, move<false, true, kTimes>,
                               move<true, false, kTimes>, move<true, true, kTimes>};

/// Threads that stand ready before the clock starts, so that waking them is not part of the limit.
class Crew {
 public:
  template <class Part> double seconds(int threads, const Part& part) {
    using Clock = std::chrono::steady_clock;
    while (workers_ < threads - 1) std::thread(&Crew::work, this, ++workers_).detach();
    {
      const std::lock_guard lock(mutex_);
      part_ = [](const void* p, int k) { (*static_cast<const Part*>(p))(k); };
      argument_ = &part, wanted_ = threads, ready_ = 1, done_ = 1, go_ = false, ++round_;
    }
    wake_.notify_all();
    wait_for(ready_, threads);
    const Clock::time_point start = Clock::now();
    go_ = true;
    part(0);
    wait_for(done_, threads);
    return std::chrono::duration<double>(Clock::now() - start).count();
  }

 private:
  static void wait_for(const std::atomic<int>& count, int threads) {
    while (count != threads) std::this_thread::yield();
  }

  void work(int k) {
    for (std::uint64_t seen = 0;;) {
      std::unique_lock lock(mutex_);
      wake_.wait(lock, [&] { return round_ != seen; });
      seen = round_;
      if (k >= wanted_) continue;
      lock.unlock();
      ++ready_;
      while (!go_) std::this_thread::yield();
      part_(argument_, k);
      ++done_;
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  std::uint64_t round_ = 0;
  int workers_ = 0, wanted_ = 0;
  void (*part_)(const void*, int) = nullptr;
  const void* argument_ = nullptr;
  std::atomic<int> ready_{0}, done_{0};
  std::atomic<bool> go_{false};
};

}  // namespace

extern "C" int limit_kernels() { return static_cast<int>(std::size(kKernels<1>)); }

/// Seconds that `threads` threads take to write the bytes of c = a, or c = a ^ b where b is given, or to write four bytes
/// for each of a: `times` is 1 or 4.
extern "C" double limit_seconds(int kernel, int threads, const char* a, const char* b, char* c, std::size_t bytes,
                                int times) {
  static Crew* const crew = new Crew;  // never destroyed: its threads run until the process ends
  const Kernel run = times == 4 ? kKernels<4>[kernel] : kKernels<1>[kernel];
  const std::size_t share = (bytes / threads / kBlock + 1) * kBlock;
  return crew->seconds(threads, [&](int k) {
    const std::size_t from = k * share < bytes ? k * share : bytes;
    const std::size_t size = from + share < bytes ? share : bytes - from;
    run(a + from / times, b ? b + from / times : nullptr, c + from, size);
  });
}
