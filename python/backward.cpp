// Backward, and its two phases: views of NumPy arrays in, one planned call, NumPy arrays out. Judgment is the core's; what does
// not fit the fast path (other libraries, arrays to be packed) is answered with NotImplemented and handled by _arrays.py.
#include <string>

#include "calls.hpp"
#include "options.hpp"

namespace calls {
namespace {

using namespace nb::literals;
using arrays::data_of;
using arrays::view;
using arrays::View;
using normkit::BackwardData;
using normkit::BackwardNeed;
using normkit::BackwardPlan;
using normkit::Error;
using normkit::Phase;
using normkit::Shapes;

struct BackwardCall {
  using Plan = BackwardPlan;
  enum Slot {
    // clang-format off
    kDy, kX, kMean, kRstd, kWeight, kBias, kWhere, kDresidual, kOut, kArrays,
    kWeightOffset = kArrays, kAxes, kNumGroups, kNumbers,
    kActivation = kNumbers, kNeed, kFlags,
    kUseInputStats = kFlags, kCenter, kSlots
    // clang-format on
  };
  static constexpr std::uint32_t kMayBeOut = 1U << kDy | 1U << kX;

  int kind;
  PyObject* const* value;

  BackwardCall(int k, PyObject* const* v)
      : kind(k == options::kNormalize && v[kCenter] == Py_False ? options::kNormalizeRms : k), value(v) {}

  nb::handle at(Slot slot) const { return value[slot]; }
  bool is(Slot flag) const { return value[flag] == Py_True; }

  static BackwardData data(std::byte* const* at) {
    BackwardData d;
    d.dy = at[kDy], d.x = at[kX], d.dx = at[kOut], d.mean = at[kMean], d.rstd = at[kRstd], d.weight = at[kWeight];
    d.bias = at[kBias], d.where = at[kWhere], d.dresidual = at[kDresidual];
    return d;
  }
  nb::object run(const BackwardPlan& plan, BackwardData data) const;
  template <class Keep> nb::object plan_and_run(Keep keep) const;
  nb::object plan_and_run() const {
    return plan_and_run([](const BackwardPlan&, const View*) {});
  }
};

BackwardNeed need_of(nb::handle need) {
  BackwardNeed n{false, false, false};
  for (nb::handle item : nb::borrow<nb::iterable>(need)) {
    const std::string name = PyUnicode_Check(item.ptr()) ? nb::str(item).c_str() : "";
    bool* known = name == "dx" ? &n.dx : name == "dweight" ? &n.dweight : name == "dbias" ? &n.dbias : nullptr;
    if (!known)
      throw Error(Error::Kind::value, std::string("need has ") + nb::repr(item).c_str() +
                                          ", expected names from ('dx', 'dweight', 'dbias')");
    *known = true;
  }
  return n;
}

/// The arrays of backward, or of one of its phases, and their plan.
struct BackwardViews {
  using Call = BackwardCall;
  View v[Call::kArrays], sums, count;
  normkit::Spec spec;
  BackwardNeed need{false, false, false};

  BackwardPlan planned(Phase phase) {
    const bool apart = out_is_apart();
    BackwardPlan plan = normkit::plan_backward(args(apart), spec, need, phase);
    const Shapes& s = plan.shapes;
    if (!s.fits || (phase != Phase::apply && !s.repack_params && !s.repack_stats)) return plan;
    arrays::repack(v[Call::kWeight], s.param_strides.data());
    arrays::repack(v[Call::kBias], s.bias_strides.data());
    if (spec.centered) arrays::repack(v[Call::kMean], s.stat_strides.data());
    arrays::repack(v[Call::kRstd], s.stat_strides.data());
    arrays::repack_triples(sums, s);
    arrays::repack(count, s.stat_strides.data());
    plan = normkit::plan_backward(args(apart), spec, need, phase);
    return plan;
  }
  BackwardData data() const {
    std::byte* at[Call::kArrays];
    for (int slot = 0; slot < Call::kArrays; ++slot) at[slot] = v[slot].array.data;
    BackwardData d = Call::data(at);
    d.sums = sums.array.data, d.count = count.array.data;
    return d;
  }

 private:
  /// Where `out` interleaves with an input, NumPy is asked.
  bool out_is_apart() const {
    const View& out = v[Call::kOut];
    bool near = false;
    for (const Call::Slot slot : {Call::kX, Call::kDy}) {
      if (!out.array.present || !normkit::may_overlap(out.array, v[slot].array)) continue;
      if (!arrays::known_apart(out, v[slot])) return false;
      near = true;
    }
    return near;
  }
  normkit::BackwardArgs args(bool dx_is_apart) const {
    normkit::BackwardArgs a;
    a.dy = v[Call::kDy].array, a.x = v[Call::kX].array, a.dx = v[Call::kOut].array;
    a.mean = spec.centered ? v[Call::kMean].array : normkit::Array{};
    a.rstd = v[Call::kRstd].array, a.weight = v[Call::kWeight].array, a.bias = v[Call::kBias].array;
    a.where = v[Call::kWhere].array, a.dresidual = v[Call::kDresidual].array;
    a.sums = sums.array, a.count = count.array, a.dx_is_apart = dx_is_apart;
    return a;
  }
};

nb::object new_dx(nb::handle out, nb::handle x, const Shapes& shapes) {
  return out.is_none() ? arrays::new_like_x(shapes.x_dtype, x, shapes) : nb::borrow(out);
}

/// Makes the arrays that are still missing.
nb::object BackwardCall::run(const BackwardPlan& plan, BackwardData data) const {
  const Shapes& shapes = plan.shapes;
  const nb::handle like = at(kWeight).is_none() ? nb::handle() : at(kWeight);
  nb::object dx, dweight, dbias;
  if (plan.need.dx) dx = new_dx(at(kOut), at(kX), shapes);
  if (plan.need.dweight) dweight = arrays::new_gradient(like, shapes);
  if (plan.need.dbias) dbias = arrays::new_gradient(like, shapes);
  data.dx = data_of_new(dx), data.dweight = data_of_new(dweight), data.dbias = data_of_new(dbias);
  normkit::BackwardJob job = plan.job;  // its own: the plan serves other calls meanwhile
  normkit::point(job, data);
  if (!shapes.empty) run_job(job);
  const auto or_none = [](const nb::object& result) { return result.is_valid() ? result : nb::none(); };
  return nb::make_tuple(or_none(dx), or_none(dweight), or_none(dbias));
}

/// `keep` gets the plan and the views that it is of.
template <class Keep> nb::object BackwardCall::plan_and_run(Keep keep) const {
  BackwardViews views;
  if (at(kDy).is_none() || at(kX).is_none()) return nb::borrow(Py_NotImplemented);
  for (int slot = 0; slot < kArrays; ++slot)
    if (!view(value[slot], views.v[slot])) return nb::borrow(Py_NotImplemented);
  views.spec = options::spec_of(kind, at(kAxes), at(kNumGroups), views.v[kX].array);
  views.spec.use_input_stats = is(kUseInputStats);
  options::put_epilogue(views.spec, at(kActivation), at(kWeightOffset));
  views.need = need_of(at(kNeed));
  const BackwardPlan plan = views.planned(Phase::both);
  if (!plan.shapes.fits) return nb::borrow(Py_NotImplemented);
  keep(plan, views.v);
  return run(plan, views.data());
}

/// `axes`: with groups, the channel axis and their number.
nb::object backward(int kind, nb::handle axes, nb::handle dy, nb::handle x, nb::handle mean, nb::handle rstd,
                    nb::handle weight, bool use_input_stats, nb::handle need, nb::handle out, nb::handle where,
                    nb::handle bias, nb::handle activation, nb::handle weight_offset, nb::handle dresidual) {
  const nb::object axis = kind == options::kGroup ? nb::object(axes[0]) : nb::borrow(axes);
  const nb::object groups = kind == options::kGroup ? nb::object(axes[1]) : nb::none();
  PyObject* const values[] = {
      dy.ptr(),   x.ptr(),      mean.ptr(),       rstd.ptr(), weight.ptr(),
      bias.ptr(), where.ptr(),  dresidual.ptr(),  out.ptr(),  weight_offset.ptr(),
      axis.ptr(), groups.ptr(), activation.ptr(), need.ptr(), use_input_stats ? Py_True : Py_False,
      Py_True};
  static_assert(std::size(values) == BackwardCall::kSlots);
  return BackwardCall(kind, values).plan_and_run();
}

/// A function of functional.py with a short way to backward().
nb::object backward_function(nb::handle type, int kind, nb::handle python) {
  using Call = BackwardCall;
  PyObject *const none = Py_None, *const yes = Py_True;
  const function::Parameter parameters[] = {{"dy", Call::kDy, nullptr},
                                            {"x", Call::kX, nullptr},
                                            {"mean", Call::kMean, none},
                                            {"rstd", Call::kRstd, nullptr},
                                            {"weight", Call::kWeight, none},
                                            {"bias", Call::kBias, none},
                                            {"where", Call::kWhere, none},
                                            {"dresidual", Call::kDresidual, none},
                                            {"out", Call::kOut, none},
                                            {"weight_offset", Call::kWeightOffset, nullptr},
                                            {"axis", Call::kAxes, nullptr},
                                            {"channel_axis", Call::kAxes, nullptr},
                                            {"num_groups", Call::kNumGroups, none},
                                            {"activation", Call::kActivation, none},
                                            {"need", Call::kNeed, nullptr},
                                            {"use_input_stats", Call::kUseInputStats, yes},
                                            {"training", Call::kUseInputStats, yes},
                                            {"center", Call::kCenter, yes}};
  return function::with_short_way(type, python, parameters, std::make_unique<Way<Call>>(kind));
}

// ---- the phases --------------------------------------------------------------------------------------------------

nb::object backward_sums(int kind, nb::handle axes, nb::handle dy, nb::handle x, nb::handle mean, nb::handle rstd,
                         nb::handle weight, nb::handle where, nb::handle bias, nb::handle activation,
                         nb::handle weight_offset) {
  using Call = BackwardCall;
  BackwardViews views;
  View* v = views.v;
  if (dy.is_none() || x.is_none() || !view(dy, v[Call::kDy]) || !view(x, v[Call::kX]) || !view(mean, v[Call::kMean]) ||
      !view(rstd, v[Call::kRstd]) || !view(weight, v[Call::kWeight]) || !view(where, v[Call::kWhere]) ||
      !view(bias, v[Call::kBias]))
    return nb::borrow(Py_NotImplemented);
  views.spec = options::spec_of(kind, axes, v[Call::kX].array);
  options::put_epilogue(views.spec, activation, weight_offset);
  BackwardPlan plan = views.planned(Phase::reduce);
  if (!plan.shapes.fits) return nb::borrow(Py_NotImplemented);
  const nb::object sums = arrays::new_triples(plan.shapes);
  BackwardData data = views.data();
  data.sums = data_of(sums);
  normkit::point(plan.job, data);
  if (!plan.shapes.empty) run_job(plan.job);
  return sums;
}

nb::object apply_backward(int kind, nb::handle axes, nb::handle dy, nb::handle x, nb::handle mean, nb::handle rstd,
                          nb::handle sums, nb::handle count, nb::handle weight, nb::handle out, nb::handle where,
                          nb::handle bias, nb::handle activation, nb::handle weight_offset, nb::handle dresidual) {
  using Call = BackwardCall;
  BackwardViews views;
  View* v = views.v;
  if (dy.is_none() || x.is_none() || !view(dy, v[Call::kDy]) || !view(x, v[Call::kX]) || !view(mean, v[Call::kMean]) ||
      !view(rstd, v[Call::kRstd]) || !view(weight, v[Call::kWeight]) || !view(out, v[Call::kOut]) ||
      !view(where, v[Call::kWhere]) || !view(bias, v[Call::kBias]) || !view(dresidual, v[Call::kDresidual]) ||
      !view(sums, views.sums) || !view(count, views.count))
    return nb::borrow(Py_NotImplemented);
  arrays::widen(views.count);
  views.spec = options::spec_of(kind, axes, v[Call::kX].array);
  options::put_epilogue(views.spec, activation, weight_offset);
  views.need.dx = true;
  BackwardPlan plan = views.planned(Phase::apply);
  if (!plan.shapes.fits) return nb::borrow(Py_NotImplemented);
  const nb::object dx = new_dx(out, x, plan.shapes);
  BackwardData data = views.data();
  data.dx = data_of(dx);
  normkit::point(plan.job, data);
  if (!plan.shapes.empty) run_job(plan.job);
  return dx;
}

}  // namespace

void add_backward(nb::module_& m, nb::handle function_type) {
  m.def("backward", &backward, "kind"_a, "axes"_a.none(), "dy"_a.none(), "x"_a.none(), "mean"_a.none(), "rstd"_a.none(),
        "weight"_a.none(), "use_input_stats"_a, "need"_a.none(), "out"_a.none(), "where"_a.none(), "bias"_a.none(),
        "activation"_a.none(), "weight_offset"_a.none(), "dresidual"_a.none());
  m.def("backward_function", [type = nb::borrow(function_type)](int kind, nb::handle python) {
    return backward_function(type, kind, python);
  }, "kind"_a, "function"_a);
  m.def("backward_sums", &backward_sums, "kind"_a, "axes"_a.none(), "dy"_a.none(), "x"_a.none(), "mean"_a.none(),
        "rstd"_a.none(), "weight"_a.none(), "where"_a.none(), "bias"_a.none(), "activation"_a.none(),
        "weight_offset"_a.none());
  m.def("apply_backward", &apply_backward, "kind"_a, "axes"_a.none(), "dy"_a.none(), "x"_a.none(), "mean"_a.none(),
        "rstd"_a.none(), "sums"_a.none(), "count"_a.none(), "weight"_a.none(), "out"_a.none(), "where"_a.none(),
        "bias"_a.none(), "activation"_a.none(), "weight_offset"_a.none(), "dresidual"_a.none());
}

}  // namespace calls
