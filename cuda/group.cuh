// Threads that work on one statistic together: 1 to 32 of a warp, or a whole block of warps. Sums and merges over them come
// out the same in all of them, in an order that depends on their number alone.
#pragma once

#include "device.cuh"

namespace normkit::cuda {

/// `size` threads: a power of two up to 32, or the block, which meets in the first kGroupBytes of its shared memory.
struct Group {
  int rank, size;

  NORMKIT_DEVICE static Group of(int size) { return {thread_index() & (size - 1), size}; }
  /// The threads of this warp that belong to the group, as a mask.
  NORMKIT_DEVICE unsigned members() const {
    if (size >= kWarp) return ~0u;
    return ((1u << size) - 1) << (thread_index() % kWarp - rank);
  }
  NORMKIT_DEVICE int width() const { return size < kWarp ? size : kWarp; }
  /// Waits for all threads of the group.
  NORMKIT_DEVICE void sync() const {
    if (size <= kWarp) sync_warp(members());
    else sync_block();
  }
};

/// The item of this thread's group, where groups of `size` threads take one item each. Some groups of the last block
/// get a number beyond the last item.
NORMKIT_DEVICE std::int64_t own_item(int size) {
  const int shift = log2_of(size);
  return block_index() * (block_threads() >> shift) + (thread_index() >> shift);
}

/// Waits for all threads of a team that has several tiles; after it, what any of them posted before can be read.
NORMKIT_DEVICE void meet_team(int blocks) {
  if (blocks == 1) return sync_block();
  if (NORMKIT_PLANTED(missing_cluster_barrier)) return;
  arrive_at_cluster();
  if (!NORMKIT_PLANTED(early_leave)) wait_for_cluster();
}

/// Puts v at byte `at` of the shared memory of all blocks of a team: the blocks of the cluster from rank `first` on,
/// which must be known to run. All threads of the group have v, and write to some of the blocks each.
template <class T> NORMKIT_DEVICE void tell(Group group, int first, int blocks, int at, T v) {
  NORMKIT_ROLL
  for (int k = group.rank; k < blocks; k += group.size)
    *reinterpret_cast<T*>((blocks == 1 ? shared_memory() : peer_memory(first + k)) + at) = v;
}

/// What the tiles of a team found, as one T a tile. Each block of the team has a copy in its shared memory and reads no
/// other, so that it may leave when it has read its own.
template <class T> struct Board {
  static_assert(sizeof(T) <= kPostBytes);

  NORMKIT_DEVICE static T* of(std::byte* shared) { return reinterpret_cast<T*>(shared + kGroupBytes); }
  NORMKIT_DEVICE static void post(Group group, int first, int blocks, int place, T v) {
    tell(group, first, blocks, kGroupBytes + place * static_cast<int>(sizeof(T)), v);
  }
  NORMKIT_DEVICE static T read(int place) {
    if (NORMKIT_PLANTED(read_of_peer)) return of(peer_memory((cluster_rank() + 1) % 2))[place];
    return of(shared_memory())[place];
  }
};

/// The parts of kGroupBytes of shared memory: first kWarpBytes for what each warp found; from kMadeAt on two places of
/// kMadeBytes, for what one warp makes for all.
inline constexpr int kWarpBytes = 32, kMadeAt = kBlockThreads / kWarp * kWarpBytes, kMadeBytes = 96;
static_assert(kMadeAt + 2 * kMadeBytes <= kGroupBytes);

/// True in the threads of a group that made_once() calls f in.
NORMKIT_DEVICE bool makes(Group group) { return group.size <= kWarp || group.rank < kWarp; }

/// Returns f() in all threads of the group. The threads of the first warp alone call it, together, so that they may
/// join what they know; where `all` is true, every thread does. Between two calls with one `place` the block must meet
/// once more.
template <int place, class F> NORMKIT_DEVICE auto made_once(Group group, F f, bool all = false) {
  using T = decltype(f());
  static_assert(sizeof(T) <= kMadeBytes);
  const bool each = all || group.size <= kWarp;
  T v{};
  if (each || group.rank < kWarp) v = f();
  if (each) return v;
  T* const made = reinterpret_cast<T*>(shared_memory() + kMadeAt + place * kMadeBytes);
  if (group.rank == 0) *made = v;
  if (!NORMKIT_PLANTED(missing_second_barrier)) sync_block();
  return *made;
}

/// f(join(...join(join(v of thread 0, v of thread 1), ...))) in all threads of the group, joined as a tree, neighbors
/// first. kCommutes: join(a, b) and join(b, a) have the same bits, which saves two selections a step.
template <bool kCommutes = false, class T, class Join, class F>
NORMKIT_DEVICE auto all_join(Group group, T v, Join join, F f) {
  const int lane = thread_index() % kWarp;
  NORMKIT_ROLL
  for (int distance = 1; distance < group.width(); distance *= 2) {
    const T other = shuffle(v, lane ^ distance, group.members());
    const bool swaps = !kCommutes && (lane & distance) != 0;
    v = join(swaps ? other : v, swaps ? v : other);
  }
  static_assert(sizeof(T) <= kWarpBytes);
  T* const warp = reinterpret_cast<T*>(shared_memory());
  if (group.size > kWarp) {
    if (lane == 0) warp[group.rank / kWarp] = v;
    if (!NORMKIT_PLANTED(missing_barrier)) sync_block();
  }
  return made_once<0>(group, [&] {
    T all = group.size > kWarp ? warp[0] : v;
    NORMKIT_ROLL
    for (int k = 1; k < group.size / kWarp; ++k) all = join(all, warp[k]);
    return f(all);
  });
}
template <bool kCommutes = false, class T, class Join> NORMKIT_DEVICE T all_join(Group group, T v, Join join) {
  return all_join<kCommutes>(group, v, join, [](T all) { return all; });
}

template <class T> NORMKIT_DEVICE T all_sum(Group group, T v) {
  return all_join<true>(group, v, [](T a, T b) { return a + b; });
}

/// Returns f() in all threads of `group`. f joins what tiles found, by the threads of `meeting`.
template <class F> NORMKIT_DEVICE auto met(Group group, Group meeting, F f) {
  return made_once<1>(group, f, meeting.size > kWarp);
}

/// Joins at(0), at(1), .. at(count - 1): threads take them in turn, then meet as a tree. Wherever tiles meet they meet
/// here, in a group of Policy::meeting threads, so that no schedule shows in the bits. A thread reads kAhead values
/// before it joins them.
template <class T, int kAhead = 1, class At, class Join>
NORMKIT_DEVICE T joined(Group meeting, std::int64_t count, At at, Join join) {
  T all{};
  NORMKIT_ROLL
  for (std::int64_t k = meeting.rank; k < count; k += kAhead * meeting.size) {
    T next[kAhead];
    NORMKIT_UNROLL
    for (int j = 0; j < kAhead; ++j)
      if (k + j * meeting.size < count) next[j] = at(k + j * meeting.size);
    NORMKIT_UNROLL
    for (int j = 0; j < kAhead; ++j)
      if (k + j * meeting.size < count) all = join(all, next[j]);
  }
  return all_join(meeting, all, join);
}

}  // namespace normkit::cuda
