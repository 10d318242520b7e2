// The kernels of one storage type, compiled once for each: NORMKIT_STORAGE. Exports one table.
#include "lanes.cuh"
#include "runs.cuh"

namespace normkit::cuda {
namespace {

using X = NORMKIT_STORAGE;

Grid grid_for_tiles(const Work& work, std::int64_t shared_bytes) {
  const Tiling& t = work.runs;
  const int threads = t.group > kWarp ? t.group : kBlockThreads;
  const std::int64_t tiles = work.task.geometry.statistics() * work.units * t.tiles;
  return {blocks_for(tiles, threads / t.group), threads, static_cast<int>(shared_bytes)};
}

Grid grid_for_strands(const Work& work, int shared_bytes) {
  return {blocks_for(lanes_blocks(work), 1), kBlockThreads, shared_bytes};
}

/// y has the type of x, or the compute type.
template <template <class, class> class Kernel> void launch_forward(const Work& work, Grid grid, Stream stream) {
  if constexpr (sizeof(X) == 2 && kFloating<X>) {
    if (work.task.y.dtype == work.task.x.dtype) return launch(Kernel<X, X>{work}, grid, stream);
  }
  launch(Kernel<X, ComputeOf<X>>{work}, grid, stream);
}

template <class In, class Out> using PlainForward = RunsForward<In, Out, true>;
template <class In, class Out> using AnyForward = RunsForward<In, Out, false>;

void forward(const Work& work, Stream stream) {
  const Grid grid = grid_for_tiles(work, held_bytes<X>(work));
  if constexpr (kFloating<X>) {
    if (is_plain(work)) return launch_forward<PlainForward>(work, grid, stream);
  }
  launch_forward<AnyForward>(work, grid, stream);
}
void sums(const Work& work, Stream stream) {
  launch(RunsSums<X>{work}, grid_for_tiles(work, held_bytes<X>(work)), stream);
}
void lanes_sums(const Work& work, Stream stream) {
  launch(LanesSums<X>{work}, grid_for_strands(work, kMeetingBytes<X, Moments>), stream);
}
void lanes_apply(const Work& work, Stream stream) {
  launch_forward<LanesApply>(work, grid_for_strands(work, 0), stream);
}

template <template <class> class Kernel> void launch_backward(const Work& work, Grid grid, Stream stream) {
  if constexpr (kFloating<X>) launch(Kernel<X>{work}, grid, stream);
}

void backward_sums(const Work& work, Stream stream) {
  launch_backward<RunsBackwardSums>(work, grid_for_tiles(work, kGroupBytes), stream);
}
void backward_apply(const Work& work, Stream stream) {
  launch_backward<RunsBackwardApply>(work, grid_for_tiles(work, 0), stream);
}
void lanes_backward_sums(const Work& work, Stream stream) {
  launch_backward<LanesBackwardSums>(work, grid_for_strands(work, kMeetingBytes<X, Reduced>), stream);
}
void lanes_backward_apply(const Work& work, Stream stream) {
  launch_backward<LanesBackwardApply>(work, grid_for_strands(work, 0), stream);
}
void row_gradients(const Work& work, Stream stream) {
  const Geometry& g = work.task.geometry;
  const std::int64_t items = g.outer * row_groups(g) * ceil_div(g.run, kVector<X>);
  launch_backward<RowGradients>(work, {blocks_for(items, kBlockThreads), kBlockThreads, 0}, stream);
}

}  // namespace

#define NORMKIT_JOIN(a, b) a##b
#define NORMKIT_SYMBOL(name) NORMKIT_JOIN(kernels_, name)

extern const Kernels NORMKIT_SYMBOL(NORMKIT_STORAGE_NAME);
const Kernels NORMKIT_SYMBOL(NORMKIT_STORAGE_NAME){
    forward,       sums,           lanes_sums,          lanes_apply,
    backward_sums, backward_apply, lanes_backward_sums, lanes_backward_apply,
    row_gradients};

}  // namespace normkit::cuda
