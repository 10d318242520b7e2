// The kernels of one storage type, compiled once for each: NORMKIT_STORAGE. Exports one table.
#include "lanes.cuh"
#include "runs.cuh"

namespace normkit::cuda {
namespace {

using X = NORMKIT_STORAGE;

/// f(Type<K>{}) with the kernel K that the work is for.
template <class F> auto with_kernel(const Work& work, F f) {
  const bool lanes = work.policy.traversal == Traversal::lanes;
  if (work.policy.direction == Direction::backward)
    return lanes ? f(Type<LanesBackward<X>>{}) : f(Type<RunsBackward<X>>{});
  if (lanes) return f(Type<LanesForward<X>>{});
  return is_plain(work) ? f(Type<RunsForward<X, true>>{}) : f(Type<RunsForward<X, false>>{});
}

void run(const Work& work, Stream stream) {
  with_kernel(work, [&](auto type) { launch(typename decltype(type)::type{work}, work.grid(), stream); });
}

void row_gradients(const Work& work, Stream stream) {
  const Geometry& g = work.task.geometry;
  const std::int64_t items = g.outer * row_groups(g) * ceil_div(g.run, kVector<X>);
  launch(RowGradients<X>{work}, grid_for_items(items, 1), stream);
}

bool has_team(const Work& work, int device) {
  const Grid grid = work.policy.grid(work.task.geometry, Stage::all);
  const Extent wanted = grid.cluster > 1                       ? Extent::clusters
                        : grid.shared_bytes > kFreeSharedBytes ? Extent::large
                                                               : Extent::plain;
  if (wanted == Extent::plain) return true;
  return with_kernel(work, [&](auto type) { return extent_of<typename decltype(type)::type>(device) >= wanted; });
}

}  // namespace

#define NORMKIT_JOIN(a, b) a##b
#define NORMKIT_SYMBOL(name) NORMKIT_JOIN(kernels_, name)

extern const Kernels NORMKIT_SYMBOL(NORMKIT_STORAGE_NAME);
const Kernels NORMKIT_SYMBOL(NORMKIT_STORAGE_NAME){run, row_gradients, has_team};

}  // namespace normkit::cuda
