// Calls of the core from Python: what both directions share.
//
// A direction is a struct that has the arguments of a call by slot: arrays, then numbers, then what is told by its identity,
// then flags. plan_and_run() does all that a call takes; run() what is left to do where a like call has been planned before.
#pragma once

#include <nanobind/nanobind.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#include "arrays.hpp"
#include "device.hpp"
#include "function.hpp"
#include "library.hpp"
#include "plan.hpp"
#include "recent.hpp"
#include "unlocked.hpp"

namespace calls {

namespace nb = nanobind;

/// Functions of _core.
void add_forward(nb::module_& m, nb::handle function_type);
void add_backward(nb::module_& m, nb::handle function_type);

/// Scratch of a call: on the stack where it is small, since most calls on small arrays want none or little.
class Workspace {
 public:
  explicit Workspace(std::size_t doubles) {
    if (doubles > kOnStack) heap_.reset(static_cast<double*>(::operator new[](doubles * sizeof(double), kLine)));
  }
  double* data() { return heap_ ? heap_.get() : stack_; }

 private:
  static constexpr std::size_t kOnStack = 512;
  static constexpr std::align_val_t kLine{64};
  struct Delete {
    void operator()(double* p) const { ::operator delete[](p, kLine); }
  };
  alignas(64) double stack_[kOnStack];
  std::unique_ptr<double[], Delete> heap_;
};

/// Elements from which other Python threads get to run meanwhile: letting go of the lock and taking it back costs as much as
/// some thousands of elements.
constexpr std::int64_t kReleaseElements = 16384;

/// Of an array that is not there, or has just been made.
inline std::byte* data_of_new(const nb::object& array) {
  return !array.is_valid() || PyArray_CheckExact(array.ptr()) ? arrays::data_of(array) : library::data_of(array);
}

template <class Job> void run_job(Job& job) {
  if (const device::Call* call = device::call()) return device::run_job(*call, job);
  Workspace workspace(workspace_doubles(job));
  if (job.task.geometry.size() < kReleaseElements) return run(job, workspace.data());
  unlocked::run([&] { run(job, workspace.data()); });
}

/// The short way to a direction: it keeps the plans of the last calls.
template <class Call> class Way final : public function::ShortWay {
 public:
  explicit Way(int kind) : kind_(kind) {}

  nb::object call(PyObject* const* values) override {
    for (int slot = Call::kFlags; slot < Call::kSlots; ++slot)
      if (!PyBool_Check(values[slot])) return nb::borrow(Py_NotImplemented);
    const Call call(kind_, values);
    static_assert(Call::kArrays <= recent::Key::kMostArrays);
    static_assert(Call::kSlots - Call::kArrays + (Call::kNumbers - Call::kArrays) + 2 <= recent::Key::kMostOptions);
    recent::Key key;
    for (int slot = 0; slot < Call::kArrays; ++slot)
      if (!key.add_array(values[slot])) return call_elsewhere(call);
    add_options(key, values);
    if (const std::shared_ptr<const Known> known = recent_.find(key)) {
      std::byte* data[Call::kArrays];
      for (int slot = 0; slot < Call::kArrays; ++slot)
        data[slot] = values[slot] == Py_None ? nullptr : arrays::data_of(values[slot]);
      if (known->placement.allows(data)) return call.run(known->plan, Call::data(data));
    }
    return call.plan_and_run([&](const auto& plan, const arrays::View* views) {
      keep(key, values, plan, views, [&](int slot) { return arrays::descr_of(values[slot]); });
    });
  }

 private:
  static void add_options(recent::Key& key, PyObject* const* values) {
    for (int slot = Call::kArrays; slot < Call::kNumbers; ++slot) key.add_number(values[slot]);
    for (int slot = Call::kNumbers; slot < Call::kSlots; ++slot) key.add(values[slot]);
  }

  /// The same with arrays of a GPU.
  [[gnu::noinline, gnu::cold]] nb::object call_elsewhere(const Call& call) {
    library::Array arrays[Call::kArrays];
    const library::Array* first = nullptr;
    std::byte* data[Call::kArrays] = {};
    recent::Key key;
    for (int slot = 0; slot < Call::kArrays; ++slot) {
      if (call.value[slot] == Py_None) {
        key.put(0);
        continue;
      }
      library::Array& a = arrays[slot];
      if (!library::read(call.value[slot], key, a) || (first && !a.shares(*first))) return call.plan_and_run();
      if (!first) first = &a;
      data[slot] = a.data;
    }
    if (!first || call.at(Call::kX).is_none()) return call.plan_and_run();
    key.put(reinterpret_cast<std::intptr_t>(first->library)), key.put(first->device);
    add_options(key, call.value);
    const std::shared_ptr<const Known> known = recent_.find(key);
    const bool direct = known && known->placement.allows(data);
    const device::Session session(call.value[Call::kX], first->device);
    const device::Call on = session.call(direct);
    const device::Current current(&on);
    return direct ? call.run(known->plan, Call::data(data)) : plan_elsewhere(call, on, key, arrays);
  }

  /// A plan is made of what stands for arrays.
  nb::object plan_elsewhere(const Call& call, const device::Call& on, const recent::Key& key,
                            const library::Array* arrays) {
    nb::object views[Call::kArrays];
    PyObject* values[Call::kSlots];
    for (int slot = 0; slot < Call::kSlots; ++slot) values[slot] = call.value[slot];
    for (int slot = 0; slot < Call::kArrays; ++slot) {
      if (values[slot] == Py_None) continue;
      views[slot] = on.arrays.attr("view_of")(nb::handle(values[slot]));
      values[slot] = views[slot].ptr();
    }
    const nb::object result = Call(kind_, values).plan_and_run([&](const auto& plan, const arrays::View* of) {
      keep(key, call.value, plan, of, [&](int slot) { return arrays[slot].dtype; });
    });
    if (result.is(nb::handle(Py_NotImplemented))) return result;
    const nb::object hand_back = nb::module_::import_("normkit._arrays").attr("hand_back");
    return hand_back(result, on.arrays.attr("give_back"), call.at(Call::kOut));
  }

  struct Known {
    typename Call::Plan plan;
    normkit::Placement placement;
  };

  /// Not where anything had to be copied first, or could change unseen.
  template <class DtypeOf>
  void keep(const recent::Key& key, PyObject* const* values, const typename Call::Plan& plan, const arrays::View* views,
            DtypeOf dtype_of) {
    if (plan.shapes.empty) return;
    std::vector<nb::object> held;
    normkit::Array all[Call::kArrays];
    for (int slot = 0; slot < Call::kArrays; ++slot) {
      if (views[slot].copy.is_valid()) return;
      all[slot] = views[slot].array;
      if (all[slot].present) held.push_back(nb::borrow(dtype_of(slot)));
    }
    for (int slot = Call::kArrays; slot < Call::kSlots; ++slot) {
      if (!recent::immutable(values[slot])) return;
      if (!recent::is_single(values[slot])) held.push_back(nb::borrow(values[slot]));
    }
    recent_.keep(key, std::move(held), [&](Known& known) {
      known.plan = plan;
      known.placement = normkit::Placement(all, Call::kOut, Call::kMayBeOut);
    });
  }

  int kind_;
  recent::Recent<Known> recent_;
};

}  // namespace calls
