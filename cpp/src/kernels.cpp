// Both traversals, forward, backward and the gradient of that, compiled once for every row of isas.def. This file exports one symbol: the
// Isa.
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "backend.hpp"
#include "normkit/activation.hpp"
#include "normkit/formula.hpp"
#include "vec/local.hpp"
#include "vec/half.hpp"
#include NORMKIT_VEC  // clang-format keeps this order: the registers, then what is made of them
#include "vec/pack.hpp"
#include "kernels/common.hpp"
#include "kernels/runs.hpp"
#include "kernels/batches.hpp"
#include "kernels/runs_backward.hpp"
#include "kernels/batches_backward.hpp"
#include "kernels/lanes.hpp"
#include "kernels/lanes_backward.hpp"
#include "kernels/double_backward.hpp"

namespace normkit {
namespace {

/// Calls f with the types of x and of y: y has the type of x, or the compute type.
template <class F> void visit_output(const Task& t, F f) {
  visit_read(t.x.dtype, [&](auto x) {
    using X = typename decltype(x)::type;
    if constexpr (sizeof(X) == 2 && kFloating<X>) {
      if (t.y.dtype == t.x.dtype) return f(x, x);
    }
    return f(x, Type<ScalarOf<X>>{});
  });
}

/// Calls f with the type of x, which in backward is floating.
template <class F> void visit_floating(const Task& t, F f) {
  visit_read(t.x.dtype, [&](auto x) {
    using X = typename decltype(x)::type;
    if constexpr (kFloating<X>) f(x);
  });
}

void forward(const Task& t, std::int64_t begin, std::int64_t end, double* scratch) {
  visit_output(t, [&](auto x, auto y) {
    using X = typename decltype(x)::type;
    using Y = typename decltype(y)::type;
    if (t.traversal == Traversal::lanes) return lanes_forward<X, Y>(t, begin, end, scratch);
    if constexpr (goes_in_batches(kDtypeOf<X>, kDtypeOf<Y>)) {
      if (t.walk.batched) return batches_forward<X, Y>(t, begin, end, scratch);
    }
    runs_forward<X, Y>(t, begin, end);
  });
  if (t.walk.stream_stores) stream_fence();
}

void forward_sums(const Task& t, std::int64_t begin, std::int64_t end, double* scratch) {
  visit_read(t.x.dtype, [&](auto x) {
    using X = typename decltype(x)::type;
    t.traversal == Traversal::runs ? runs_forward_sums<X>(t, begin, end)
                                   : lanes_forward_sums<X>(t, begin, end, scratch);
  });
}

void forward_finish(const Task& t, std::int64_t begin, std::int64_t end) {
  visit_read(t.x.dtype, [&](auto x) {
    using X = typename decltype(x)::type;
    t.traversal == Traversal::runs ? runs_forward_finish<X>(t, begin, end) : lanes_forward_finish<X>(t, begin, end);
  });
}

void forward_apply(const Task& t, std::int64_t begin, std::int64_t end) {
  visit_output(t, [&](auto x, auto y) {
    using X = typename decltype(x)::type;
    using Y = typename decltype(y)::type;
    t.traversal == Traversal::runs ? runs_forward_apply<X, Y>(t, begin, end) : lanes_forward_apply<X, Y>(t, begin, end);
  });
  if (t.walk.stream_stores) stream_fence();
}

void backward(const Task& t, std::int64_t begin, std::int64_t end, double* scratch) {
  visit_floating(t, [&](auto x) {
    using X = typename decltype(x)::type;
    if (t.traversal == Traversal::lanes) lanes_backward<X>(t, begin, end, scratch);
    else t.walk.batched ? batches_backward<X>(t, begin, end, scratch) : runs_backward<X>(t, begin, end);
  });
  if (t.walk.stream_stores) stream_fence();
}

void backward_sums(const Task& t, std::int64_t begin, std::int64_t end, double* scratch) {
  visit_floating(t, [&](auto x) {
    using X = typename decltype(x)::type;
    t.traversal == Traversal::runs ? runs_backward_sums<X>(t, begin, end)
                                   : lanes_backward_sums<X>(t, begin, end, scratch);
  });
}

void backward_finish(const Task& t, std::int64_t begin, std::int64_t end) {
  visit_floating(t, [&](auto x) {
    using X = typename decltype(x)::type;
    t.traversal == Traversal::runs ? runs_backward_finish<X>(t, begin, end) : lanes_backward_finish<X>(t, begin, end);
  });
}

void backward_apply(const Task& t, std::int64_t begin, std::int64_t end) {
  visit_floating(t, [&](auto x) {
    using X = typename decltype(x)::type;
    t.traversal == Traversal::runs ? runs_backward_apply<X>(t, begin, end) : lanes_backward_apply<X>(t, begin, end);
  });
  if (t.walk.stream_stores) stream_fence();
}

/// Calls f with the type that values of x are computed in.
template <class F> void visit_compute(const Task& t, F f) {
  t.x.dtype == Dtype::float64 ? f(Type<double>{}) : f(Type<float>{});
}

void double_backward(const Task& t, std::int64_t begin, std::int64_t end, double* scratch) {
  visit_compute(t, [&](auto x) { second_fused<typename decltype(x)::type>(t, begin, end, scratch); });
  if (t.walk.stream_stores) stream_fence();
}

void double_backward_sums(const Task& t, std::int64_t begin, std::int64_t end, double* scratch) {
  visit_compute(t, [&](auto x) { second_sums<typename decltype(x)::type>(t, begin, end, scratch); });
}

void double_backward_finish(const Task& t, std::int64_t begin, std::int64_t end) {
  visit_compute(t, [&](auto x) { second_finish<typename decltype(x)::type>(t, begin, end); });
}

void double_backward_apply(const Task& t, std::int64_t begin, std::int64_t end) {
  visit_compute(t, [&](auto x) { second_apply<typename decltype(x)::type>(t, begin, end); });
  if (t.walk.stream_stores) stream_fence();
}

void merge_moments(double* into, const double* from, std::int64_t n, Dtype compute) {
  compute == Dtype::float64 ? merge_all<double>(into, from, n) : merge_all<float>(into, from, n);
}

}  // namespace

#define NORMKIT_STRING(name) #name
#define NORMKIT_NAME_OF(name) NORMKIT_STRING(name)
#define NORMKIT_JOIN(a, b) a##b
#define NORMKIT_SYMBOL(name) NORMKIT_JOIN(isa_, name)

extern const Isa NORMKIT_SYMBOL(NORMKIT_ISA_NAME);
const Isa NORMKIT_SYMBOL(NORMKIT_ISA_NAME){
    NORMKIT_NAME_OF(NORMKIT_ISA_NAME),
    {forward, forward_sums, forward_finish, forward_apply},
    {backward, backward_sums, backward_finish, backward_apply},
    {double_backward, double_backward_sums, double_backward_finish, double_backward_apply},
    merge_moments,
    kHeldVectors};

}  // namespace normkit
