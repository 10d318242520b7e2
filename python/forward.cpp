// Forward, and its two phases: views of NumPy arrays in, one planned call, NumPy arrays out. Judgment is the core's; what does
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
using normkit::Dtype;
using normkit::Error;
using normkit::ForwardData;
using normkit::ForwardPlan;
using normkit::Phase;
using normkit::Shapes;

struct ForwardCall {
  using Plan = ForwardPlan;
  enum Slot {
    // clang-format off
    kX, kWeight, kBias, kRunningMean, kRunningVar, kOut, kResidual, kWhere, kArrays,
    kEps = kArrays, kMomentum, kWeightOffset, kAxes, kNumGroups, kNumbers,
    kActivation = kNumbers, kOutDtype, kFlags,
    kUseInputStats = kFlags, kReturnStats, kReturnResidual, kCenter, kSlots
    // clang-format on
  };
  static constexpr std::uint32_t kMayBeOut = 1U << kX;

  int kind;
  PyObject* const* value;

  ForwardCall(int k, PyObject* const* v)
      : kind(k == options::kNormalize && v[kCenter] == Py_False ? options::kNormalizeRms : k), value(v) {}

  nb::handle at(Slot slot) const { return value[slot]; }
  bool is(Slot flag) const { return value[flag] == Py_True; }

  static ForwardData data(std::byte* const* at) {
    ForwardData d;
    d.x = at[kX], d.y = at[kOut], d.weight = at[kWeight], d.bias = at[kBias], d.running_mean = at[kRunningMean];
    d.running_var = at[kRunningVar], d.residual = at[kResidual], d.where = at[kWhere];
    return d;
  }
  nb::object run(const ForwardPlan& plan, ForwardData data) const;
  template <class Keep> nb::object plan_and_run(Keep keep) const;
  nb::object plan_and_run() const {
    return plan_and_run([](const ForwardPlan&, const View*) {});
  }
};

/// The arrays of forward, or of one of its phases, and their plan.
struct ForwardViews {
  using Call = ForwardCall;
  View v[Call::kArrays], mean, rstd;
  normkit::Spec spec;
  Dtype out_dtype = Dtype::other;

  /// `keep_sum`: x + residual is wanted. Some kilobytes: returned in place, never copied.
  ForwardPlan planned(Phase phase, bool keep_sum = false) {
    const bool apart = arrays::known_apart(v[Call::kOut], v[Call::kX]);
    ForwardPlan plan = normkit::plan_forward(args(apart), spec, phase, keep_sum);
    const Shapes& s = plan.shapes;
    if (!s.fits || !(s.repack_params || s.repack_stats)) return plan;
    arrays::repack(v[Call::kWeight], s.param_strides.data());
    arrays::repack(v[Call::kBias], s.bias_strides.data());
    arrays::repack(mean, s.stat_strides.data());
    arrays::repack(rstd, s.stat_strides.data());
    plan = normkit::plan_forward(args(apart), spec, phase, keep_sum);
    return plan;
  }
  ForwardData data() const {
    std::byte* at[Call::kArrays];
    for (int slot = 0; slot < Call::kArrays; ++slot) at[slot] = v[slot].array.data;
    ForwardData d = Call::data(at);
    d.mean = mean.array.data, d.rstd = rstd.array.data;
    return d;
  }

 private:
  normkit::ForwardArgs args(bool y_is_apart) const {
    normkit::ForwardArgs a;
    a.x = v[Call::kX].array, a.y = v[Call::kOut].array, a.weight = v[Call::kWeight].array;
    a.bias = v[Call::kBias].array, a.running_mean = v[Call::kRunningMean].array;
    a.running_var = v[Call::kRunningVar].array, a.residual = v[Call::kResidual].array;
    a.where = v[Call::kWhere].array, a.mean = mean.array, a.rstd = rstd.array;
    a.y_dtype = out_dtype, a.y_is_apart = y_is_apart;
    return a;
  }
};

/// Makes the arrays that are still missing.
nb::object ForwardCall::run(const ForwardPlan& plan, ForwardData data) const {
  const Shapes& shapes = plan.shapes;
  const Dtype statistic = normkit::compute_dtype(shapes.x_dtype);
  nb::object results[4];  // y, mean, rstd, sum
  auto& [y, mean, rstd, sum] = results;
  y = at(kOut).is_none() ? arrays::new_like_x(shapes.out_dtype, at(kX), shapes) : nb::borrow(at(kOut));
  if (is(kReturnStats) && options::is_centered(kind)) mean = arrays::new_statistic(statistic, shapes);
  if (is(kReturnStats)) rstd = arrays::new_statistic(statistic, shapes);
  if (shapes.wants_sum) sum = arrays::new_like_x(shapes.x_dtype, at(kX), shapes);
  data.y = data_of_new(y), data.mean = data_of_new(mean), data.rstd = data_of_new(rstd), data.sum = data_of_new(sum);
  normkit::ForwardJob job = plan.job;  // its own: the plan serves other calls meanwhile
  normkit::point(job, data);
  if (!shapes.empty) run_job(job);

  if (!is(kReturnResidual)) sum = nb::object();
  Py_ssize_t count = 0;
  for (const nb::object& result : results) count += result.is_valid();
  if (count == 1) return y;
  const nb::object tuple = nb::steal(PyTuple_New(count));
  if (!tuple.is_valid()) throw nb::python_error();
  Py_ssize_t next = 0;
  for (nb::object& result : results)
    if (result.is_valid()) PyTuple_SetItem(tuple.ptr(), next++, result.release().ptr());
  return tuple;
}

/// `keep` gets the plan and the views that it is of.
template <class Keep> nb::object ForwardCall::plan_and_run(Keep keep) const {
  ForwardViews views;
  if (at(kX).is_none() || !options::names_dtype(at(kOutDtype))) return nb::borrow(Py_NotImplemented);
  for (int slot = 0; slot < kArrays; ++slot)
    if (!view(value[slot], views.v[slot])) return nb::borrow(Py_NotImplemented);
  const normkit::Array& x = views.v[kX].array;
  normkit::Spec& spec = views.spec;
  spec = options::spec_of(kind, at(kAxes), at(kNumGroups), x);
  spec.eps = options::eps_of(at(kEps), kind, x.dtype), spec.use_input_stats = is(kUseInputStats);
  if (at(kMomentum).is_none())
    throw Error(Error::Kind::value, "momentum is None, expected a number from 0 to 1: keep the count yourself");
  spec.momentum = options::number("momentum", at(kMomentum), "a number from 0 to 1");
  options::put_epilogue(spec, at(kActivation), at(kWeightOffset));
  if (is(kReturnResidual) && at(kResidual).is_none())
    throw Error(Error::Kind::value, "residual is None, expected an array like x: return_residual is True");
  views.out_dtype = options::dtype_named(at(kOutDtype));
  const ForwardPlan plan = views.planned(Phase::both, is(kReturnResidual));
  if (!plan.shapes.fits) return nb::borrow(Py_NotImplemented);
  keep(plan, views.v);
  return run(plan, views.data());
}

/// `axes`: with groups, the channel axis and their number.
nb::object forward(int kind, nb::handle axes, nb::handle x, nb::handle weight, nb::handle bias, nb::handle eps,
                   nb::handle running_mean, nb::handle running_var, bool use_input_stats, nb::handle momentum,
                   nb::handle out, nb::handle out_dtype, bool return_stats, nb::handle where, nb::handle residual,
                   bool return_residual, nb::handle activation, nb::handle weight_offset) {
  const auto flag = [](bool set) { return set ? Py_True : Py_False; };
  const nb::object axis = kind == options::kGroup ? nb::object(axes[0]) : nb::borrow(axes);
  const nb::object groups = kind == options::kGroup ? nb::object(axes[1]) : nb::none();
  PyObject* const values[] = {x.ptr(),
                              weight.ptr(),
                              bias.ptr(),
                              running_mean.ptr(),
                              running_var.ptr(),
                              out.ptr(),
                              residual.ptr(),
                              where.ptr(),
                              eps.ptr(),
                              momentum.ptr(),
                              weight_offset.ptr(),
                              axis.ptr(),
                              groups.ptr(),
                              activation.ptr(),
                              out_dtype.ptr(),
                              flag(use_input_stats),
                              flag(return_stats),
                              flag(return_residual),
                              Py_True};
  static_assert(std::size(values) == ForwardCall::kSlots);
  return ForwardCall(kind, values).plan_and_run();
}

/// A function of functional.py with a short way to forward().
nb::object forward_function(nb::handle type, int kind, nb::handle python) {
  using Call = ForwardCall;
  const nb::object zero = nb::float_(0.0);
  PyObject *const none = Py_None, *const yes = Py_True, *const no = Py_False;
  const function::Parameter parameters[] = {{"x", Call::kX, nullptr},
                                            {"weight", Call::kWeight, none},
                                            {"bias", Call::kBias, none},
                                            {"running_mean", Call::kRunningMean, none},
                                            {"running_var", Call::kRunningVar, none},
                                            {"out", Call::kOut, none},
                                            {"residual", Call::kResidual, none},
                                            {"where", Call::kWhere, none},
                                            {"eps", Call::kEps, nullptr},
                                            {"momentum", Call::kMomentum, zero.ptr()},
                                            {"weight_offset", Call::kWeightOffset, zero.ptr()},
                                            {"axis", Call::kAxes, nullptr},
                                            {"channel_axis", Call::kAxes, nullptr},
                                            {"num_groups", Call::kNumGroups, none},
                                            {"activation", Call::kActivation, none},
                                            {"out_dtype", Call::kOutDtype, none},
                                            {"use_input_stats", Call::kUseInputStats, yes},
                                            {"training", Call::kUseInputStats, yes},
                                            {"return_stats", Call::kReturnStats, no},
                                            {"return_residual", Call::kReturnResidual, no},
                                            {"center", Call::kCenter, yes}};
  return function::with_short_way(type, python, parameters, std::make_unique<Way<Call>>(kind));
}

// ---- the phases --------------------------------------------------------------------------------------------------

nb::object moments(int kind, nb::handle axes, nb::handle x, nb::handle where) {
  using Call = ForwardCall;
  ForwardViews views;
  if (x.is_none() || !view(x, views.v[Call::kX]) || !view(where, views.v[Call::kWhere]))
    return nb::borrow(Py_NotImplemented);
  views.spec = options::spec_of(kind, axes, views.v[Call::kX].array);
  ForwardPlan plan = views.planned(Phase::reduce);
  if (!plan.shapes.fits) return nb::borrow(Py_NotImplemented);
  const nb::object result = arrays::new_triples(plan.shapes);
  ForwardData data = views.data();
  data.moments = data_of(result);
  normkit::point(plan.job, data);
  if (!plan.shapes.empty) run_job(plan.job);
  return result;
}

nb::object apply(int kind, nb::handle axes, nb::handle x, nb::handle mean, nb::handle rstd, nb::handle weight,
                 nb::handle bias, nb::handle out, nb::handle out_dtype, nb::handle activation,
                 nb::handle weight_offset) {
  using Call = ForwardCall;
  ForwardViews views;
  if (x.is_none() || !view(x, views.v[Call::kX]) || !view(mean, views.mean) || !view(rstd, views.rstd) ||
      !view(weight, views.v[Call::kWeight]) || !view(bias, views.v[Call::kBias]) || !view(out, views.v[Call::kOut]) ||
      !options::names_dtype(out_dtype))
    return nb::borrow(Py_NotImplemented);
  views.spec = options::spec_of(kind, axes, views.v[Call::kX].array);
  views.spec.use_input_stats = false;
  options::put_epilogue(views.spec, activation, weight_offset);
  views.out_dtype = options::dtype_named(out_dtype);
  ForwardPlan plan = views.planned(Phase::apply);
  if (!plan.shapes.fits) return nb::borrow(Py_NotImplemented);
  const nb::object y = out.is_none() ? arrays::new_like_x(plan.shapes.out_dtype, x, plan.shapes) : nb::borrow(out);
  ForwardData data = views.data();
  data.y = data_of(y);
  normkit::point(plan.job, data);
  if (!plan.shapes.empty) run_job(plan.job);
  return y;
}

}  // namespace

void add_forward(nb::module_& m, nb::handle function_type) {
  m.def("forward", &forward, "kind"_a, "axes"_a.none(), "x"_a.none(), "weight"_a.none(), "bias"_a.none(),
        "eps"_a.none(), "running_mean"_a.none(), "running_var"_a.none(), "use_input_stats"_a, "momentum"_a.none(),
        "out"_a.none(), "out_dtype"_a.none(), "return_stats"_a, "where"_a.none(), "residual"_a.none(),
        "return_residual"_a, "activation"_a.none(), "weight_offset"_a.none());
  m.def("forward_function", [type = nb::borrow(function_type)](int kind, nb::handle python) {
    return forward_function(type, kind, python);
  }, "kind"_a, "function"_a);
  m.def("moments", &moments, "kind"_a, "axes"_a.none(), "x"_a.none(), "where"_a.none());
  m.def("apply", &apply, "kind"_a, "axes"_a.none(), "x"_a.none(), "mean"_a.none(), "rstd"_a.none(), "weight"_a.none(),
        "bias"_a.none(), "out"_a.none(), "out_dtype"_a.none(), "activation"_a.none(), "weight_offset"_a.none());
}

}  // namespace calls
