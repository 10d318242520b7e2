// The kernels of all storage types, one table for each. They are so alike that together they take a third less room
// when packed. With NORMKIT_STORAGE and its name, this file has the kernels of one type alone, for builds that do not
// pack them and can compile the types side by side.
#include "lanes.cuh"
#include "runs.cuh"

namespace normkit::cuda {
namespace {

template <class X, Special kSpecial, class F> auto with_runs(Direction direction, F f) {
  return direction == Direction::forward ? f(Type<RunsForward<X, kSpecial>>{}) : f(Type<RunsBackward<X, kSpecial>>{});
}
template <class X, Special kSpecial, class F> auto with_lanes(Direction direction, F f) {
  return direction == Direction::forward ? f(Type<LanesForward<X, kSpecial>>{}) : f(Type<LanesBackward<X, kSpecial>>{});
}
/// Calls f(Type<K>{}) with the kernel K for the work. double has the fewest kernels: most GPUs compute it more slowly
/// than they read it, and a wheel is to stay small.
template <class X, class F> auto with_kernel(const Work& work, F f) {
  constexpr bool kMany = sizeof(X) < 8;
  const Direction direction = work.policy.direction;
  const Special special = special_of(work);
  if (work.policy.traversal == Traversal::lanes) {
    if constexpr (kMany) {
      if (special == Special::none) return with_lanes<X, Special::none>(direction, f);
    }
    return with_lanes<X, Special::anything>(direction, f);
  }
  if constexpr (kMany) {
    if (special == Special::along) return with_runs<X, Special::along>(direction, f);
    if (special == Special::none) return with_runs<X, Special::none>(direction, f);
  }
  return with_runs<X, Special::anything>(direction, f);
}

template <class X> void run(const Work& work, Stream stream) {
  Work ready = work;
  ready.shape = Shape::of(work.policy, work.task.geometry, work.stage);
  with_kernel<X>(work, [&](auto type) { launch(typename decltype(type)::type{ready}, work.grid(), stream); });
}

template <class X> void row_gradients(const Work& work, Stream stream) {
  launch(RowGradients<X>{work}, RowGradients<X>::grid(work), stream);
}

template <class X> Room room(const Work& work, int device) {
  return with_kernel<X>(work, [&](auto type) { return room_of<typename decltype(type)::type>(device); });
}

template <class X> constexpr Kernels kTable{run<X>, row_gradients<X>, room<X>};

}  // namespace

#if defined(NORMKIT_STORAGE)
#define NORMKIT_JOIN(a, b) a##b
#define NORMKIT_SYMBOL(name) NORMKIT_JOIN(kernels_, name)
extern const Kernels NORMKIT_SYMBOL(NORMKIT_STORAGE_NAME);
const Kernels NORMKIT_SYMBOL(NORMKIT_STORAGE_NAME) = kTable<NORMKIT_STORAGE>;
#else
extern const Kernels kernels_float32, kernels_float64, kernels_float16, kernels_bfloat16;
const Kernels kernels_float32 = kTable<float>, kernels_float64 = kTable<double>, kernels_float16 = kTable<Half>,
              kernels_bfloat16 = kTable<Bfloat>;
#endif

}  // namespace normkit::cuda
