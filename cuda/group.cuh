// Threads that work on one statistic together: 1 to 32 of a warp, or a whole block of warps. Sums and merges over them come
// out the same in all of them, in an order that depends on their number alone.
#pragma once

#include "device.cuh"

namespace normkit::cuda {

inline constexpr int kWarp = 32;
/// Shared memory that a block keeps for what its warps tell each other: 8 values of up to 64 bytes.
inline constexpr int kGroupBytes = 512;

/// `size` threads: a power of two up to 32, or the block. `scratch`: kGroupBytes, used where there is more than one warp.
struct Group {
  int rank, size;
  std::byte* scratch;

  NORMKIT_DEVICE static Group of(int size) { return {thread_index() % size, size, shared_memory()}; }
  /// The lanes of this warp that belong to the group, as a mask.
  NORMKIT_DEVICE unsigned members() const {
    if (size >= kWarp) return ~0u;
    return ((1u << size) - 1) << (thread_index() % kWarp / size * size);
  }
  NORMKIT_DEVICE int width() const { return size < kWarp ? size : kWarp; }
};

/// join(...join(join(v of thread 0, v of 1), ...)) as a tree: neighbors first. join need not be commutative.
template <class T, class Join> NORMKIT_DEVICE T all_join(Group group, T v, Join join) {
  const int lane = thread_index() % kWarp;
  for (int distance = 1; distance < group.width(); distance *= 2) {
    const T other = shuffle(v, lane ^ distance, group.members());
    v = lane & distance ? join(other, v) : join(v, other);
  }
  if (group.size <= kWarp) return v;
  static_assert(sizeof(T) * 8 <= kGroupBytes);
  T* const warp = reinterpret_cast<T*>(group.scratch);
  if (lane == 0) warp[group.rank / kWarp] = v;
#if !defined(NORMKIT_PLANT_MISSING_BARRIER)
  sync_block();
#endif
  v = warp[0];
  for (int k = 1; k < group.size / kWarp; ++k) v = join(v, warp[k]);
  sync_block();  // scratch may be written again
  return v;
}

template <class T> NORMKIT_DEVICE T all_sum(Group group, T v) {
  return all_join(group, v, [](T a, T b) { return a + b; });
}

NORMKIT_DEVICE Moments all_merge(Group group, Moments m) {
  return all_join(group, m, [](Moments a, Moments b) { return merge(a, b); });
}

/// `v` of thread 0.
template <class T> NORMKIT_DEVICE T from_first(Group group, T v) {
  const int lane = thread_index() % kWarp;
  if (group.size > 1) v = shuffle(v, lane / group.width() * group.width(), group.members());
  if (group.size <= kWarp) return v;
  T* const shared = reinterpret_cast<T*>(group.scratch);
  if (group.rank == 0) *shared = v;
  sync_block();
  v = *shared;
  sync_block();
  return v;
}

}  // namespace normkit::cuda
