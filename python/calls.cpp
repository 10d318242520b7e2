#include "calls.hpp"

#include <array>
#include <bit>
#include <cstring>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "arrays.hpp"
#include "memory.hpp"
#include "normkit/formula.hpp"
#include "options.hpp"
#include "plan.hpp"
#include "recent.hpp"
#include "xla.hpp"

namespace calls {
namespace {

using arrays::Library;
using arrays::python_module;
using arrays::View;
using memory::Memory;
using normkit::Addresses;
using normkit::Args;
using normkit::Array;
using normkit::contains;
using normkit::Dense;
using normkit::kOperandTable;
using normkit::Op;
using normkit::operand_bit;
using normkit::OperandIndex;
using normkit::OperandMask;
using normkit::OperandRow;
using normkit::Plan;
using normkit::Role;
using normkit::Temporary;
using normkit::type_error;

// ---- whose arrays they are ---------------------------------------------------------------------------------------

std::string not_an_array(const char* name, nb::handle array) {
  const std::string type =
      nb::str(nb::handle(reinterpret_cast<PyObject*>(Py_TYPE(array.ptr()))).attr("__name__")).c_str();
  const bool vowel = std::strchr("aeiouAEIOU", type[0]) != nullptr;
  const std::string library = arrays::library_of(array).name, named(name);
  if (library == "jax") python_module("normkit._memory").attr("readable")(name, array, false);  // refuses tracers
  std::string way;
  if (library == "pandas") way = ": pass " + named + ".to_numpy()";
  if (library == "xarray")
    way = ": pass " + (type == "DataArray" ? named + ".values" : "the values of a variable of " + named) +
          ", or call through xarray.apply_ufunc";
  if (library == "torch") way = ": use normkit.torch, whose functions torch.fx knows";
  if (library == "dask") way = ": pass " + named + ".compute()";
  return named + " is " + (vowel ? "an " : "a ") + type + ", expected a NumPy array or an object with __dlpack__" + way;
}

constexpr int kCuda = 2, kManaged = 13, kCpu = 1, kPinned = 3;  // DLPack device types

void require_dlpack(const char* name, nb::handle array) {
  // The type is asked: there are objects that show whatever they are asked for.
  const nb::handle type = reinterpret_cast<PyObject*>(Py_TYPE(array.ptr()));
  if (!nb::hasattr(type, "__dlpack__") || !nb::hasattr(type, "__dlpack_device__"))
    type_error(not_an_array(name, array));
}

/// The kind of device by DLPack, and its number.
std::pair<int, std::int64_t> device_of(const char* name, nb::handle array, const Library& library) {
  if (library.kind == Library::Kind::cupy) return {kCuda, nb::cast<std::int64_t>(array.attr("device").attr("id"))};
  require_dlpack(name, array);
  if (library.kind == Library::Kind::torch) {
    if (nb::cast<bool>(array.attr("is_cuda"))) return {kCuda, nb::cast<std::int64_t>(array.attr("get_device")())};
    for (const char* elsewhere : {"is_cpu", "is_meta"})  // meta tensors are refused when they are read
      if (nb::getattr(array, elsewhere, nb::none()).is(nb::handle(Py_True))) return {kCpu, 0};
  }
  const nb::object device = array.attr("__dlpack_device__")();
  return {nb::cast<int>(nb::int_(device[0])), nb::cast<std::int64_t>(nb::int_(device[1]))};
}

bool is_cuda(int kind) { return kind == kCuda || kind == kManaged; }

/// The library and the device of a call's arrays, which the first array tells; and the views of the arrays.
class Arrays {
 public:
  Arrays(const char* name, nb::handle first) : name_(name), first_(first), library_(arrays::library_of(first)) {
    if (PyArray_Check(first.ptr())) return;
    if (library_.name == "dask") throw function::ForModule("normkit.dask", not_an_array(name, first));
    if (first.is_none()) type_error(not_an_array(name, first));
    const auto [kind, number] = device_of(name, first, library_);
    if (is_cuda(kind)) device_ = number;
  }

  /// Returns the memory of the call; on a GPU its device becomes the current one. All arrays must have been judged
  /// before.
  const Memory& open() {
    if (device_ >= 0) return memory_.emplace<memory::Device>(first_, library_, device_);
    if (library_.kind == Library::Kind::numpy) return memory::of_numpy();
    return memory_.emplace<memory::Other>(first_);
  }
  bool is_on_device() const { return device_ >= 0; }

  /// Throws for what is no array of this library and device. `may_be_wide`: an array of the library that makes outputs
  /// will do beside JAX, whose arrays may not hold float64.
  void judge(const char* name, nb::handle array, bool may_be_wide = false) const {
    const Library& library = arrays::library_of(array);
    const bool is_maker = library.kind == (device_ < 0 ? Library::Kind::numpy : Library::Kind::cupy);
    const bool is_beside = may_be_wide && is_maker && library_.name == "jax";
    const bool is_numpy = PyArray_Check(array.ptr());
    if (is_numpy && device_ < 0) refuse_masked(name, array);
    if (is_numpy && library_.kind == Library::Kind::numpy) return;
    if (!is_numpy && library.kind != Library::Kind::cupy) require_dlpack(name, array);
    if (device_ < 0) judge_on_cpu(name, array, library);
    if (library.name != library_.name && !is_beside)
      type_error(std::string(name) + " is a " + library.name + " array, expected " + library_.name +
                 (device_ >= 0 ? std::string(", as ") + name_ + " is" : "") + ": all arrays of a call share a library");
    if (device_ < 0) return;
    const auto [kind, number] = device_of(name, array, library);
    if (is_cuda(kind) && number == device_) return;
    const std::string place = is_cuda(kind) ? "device " + std::to_string(number) : "the CPU";
    type_error(std::string(name) + " is on " + place + ", expected device " + std::to_string(device_) + ", that of " +
               name_ + ": all arrays of a call share a device");
  }

  void view(const char* name, nb::handle array, bool is_written, View& v) const {
    if (arrays::view_numpy(array, v)) return;
    if (library_.kind != Library::Kind::cupy) {
      v.held = python_module("normkit._memory").attr("readable")(name, array, is_written);
      array = v.held;
    }
    const bool tells = library_.kind == Library::Kind::cupy || library_.kind == Library::Kind::torch;
    const auto* device = std::get_if<memory::Device>(&memory_);
    if (!device && arrays::view_tensor(array, arrays::library_of(array).exchange, v)) return;
    if (device && tells) arrays::view_device(name, array, library_, v);
    else arrays::import_dlpack(name, array, device ? device->dlpack_stream() : nb::object(), v);
    if (device) normkit::check_on_elements(name, v.array);
    if (library_.frozen) v.array.read_only = true;
  }

 private:
  static void refuse_masked(const char* name, nb::handle array) {
    if (PyArray_CheckExact(array.ptr())) return;
    if (PyObject_IsInstance(array.ptr(), python_module("numpy.ma").attr("MaskedArray").ptr()) == 1)
      type_error(std::string(name) + " is a masked array, expected a plain one: a mask would be ignored; pass " + name +
                 ".data" + (std::strcmp(name, "x") == 0 ? ", and where=~x.mask" : ""));
  }
  static void judge_on_cpu(const char* name, nb::handle array, const Library& library) {
    if (PyArray_Check(array.ptr())) return;
    if (library.kind == Library::Kind::cupy)
      type_error(std::string(name) + " is a CuPy array, expected a NumPy array in this call: pass " + name + ".get()");
    const auto [kind, number] = device_of(name, array, library);
    if (kind != kCpu && kind != kPinned)
      type_error(std::string(name) + " is on DLPack device type " + std::to_string(kind) +
                 ", expected the CPU, or CUDA for all of a call");
  }

  const char* name_;
  nb::handle first_;
  const Library& library_;
  std::int64_t device_ = -1;
  std::variant<std::monostate, memory::Other, memory::Device> memory_;
};

/// True where two arrays whose memory interleaves share an element, as NumPy tells.
bool share_elements(const Array& a, const Array& b) {
  const auto seen = [](const Array& array) {
    return arrays::numpy_over(array.data, arrays::numpy_dtype(array.dtype), array.ndim(), array.shape.data(),
                              array.strides.data(), false, {});
  };
  return nb::cast<bool>(python_module("normkit._memory").attr("share_memory")(seen(a), seen(b)));
}

// ---- running a plan ----------------------------------------------------------------------------------------------

using Views = std::array<View, normkit::kOperands>;

/// Makes an output that the caller has not passed.
nb::object made(OperandIndex k, const Dense& lying, const Plan& plan, const Memory& memory) {
  nb::object array = memory.empty(lying);
  // No kernel writes it: it is what it is of an empty set.
  if (plan.empty)
    array[nb::ellipsis()] = k == normkit::kRstd ? rstd_of(normkit::Moments<double>{}, plan.job.task.denominator) : 0.0;
  return array;
}

/// The outputs of a call, by operand. All of them are kMean or come after it.
class Results {
 public:
  nb::object& operator[](int operand) { return results_[static_cast<std::size_t>(operand - normkit::kMean)]; }
  const nb::object& operator[](int operand) const { return const_cast<Results&>(*this)[operand]; }

 private:
  std::array<nb::object, normkit::kOperands - normkit::kMean> results_;
};

/// Runs a plan that has temporaries, in the place of the arrays that kernels do not take as they lie.
[[gnu::noinline, gnu::cold]] void run_packed(const Plan& plan, Addresses at, const Results& results,
                                             const Memory& memory, const Views& views) {
  std::vector<nb::object> temporaries;
  const auto copy_out = [&](const Temporary& t, nb::handle from) {
    if (!results[t.operand].is_valid()) return;
    const bool is_given = views[t.operand].array.present;
    const nb::object into = is_given ? memory.of_view(views[t.operand]) : results[t.operand];
    normkit::Extents shape;
    nb::list axes;
    for (int axis = 0; axis < t.ndim; ++axis) {
      const bool repeats = t.shape[axis] > 1 && t.seen_strides[axis] == 0;
      shape[axis] = repeats ? 1 : t.shape[axis];
      if (repeats) axes.append(axis);
    }
    const nb::object seen = memory.seen(into, shape, t.seen_strides, t.ndim);
    memory.copy(seen, from, nb::len(axes) ? nb::object(nb::tuple(axes)) : nb::none());
  };
  for (const Temporary& t : plan.temporaries) {
    if (t.operand == normkit::kDbias && !plan.writes(t.operand)) {  // before dx may be written over dy
      copy_out(t, temporaries.emplace_back(memory.of_view(views[normkit::kDy])));
      at[t.operand] = nullptr;
      continue;
    }
    const nb::object& array = temporaries.emplace_back(memory.empty(t));
    at[t.operand] = memory.data_of(array);
    if (!contains(kOperandTable[t.operand].reads, plan.op)) continue;
    nb::object from = nb::int_(1);  // a weight that is not there
    if (const View& v = views[t.operand]; v.array.present)
      from = memory.seen(memory.of_view(v), t.shape, t.seen_strides, t.ndim);
    memory.copy(array, from, nb::none());
  }
  normkit::Job job = plan.job;
  normkit::point(job, plan.op, at);
  memory.run(job);
  for (std::size_t k = 0; k < temporaries.size(); ++k)
    if (plan.writes(plan.temporaries[k].operand)) copy_out(plan.temporaries[k], temporaries[k]);
}

/// Has the statistics of an evaluation on no elements, which no kernel writes, be those that run.
[[gnu::noinline, gnu::cold]] void put_running(Results& results, const Memory& memory, const Views& views, double eps) {
  const auto given = [&](OperandIndex k) { return memory.of_view(views[k]); };
  const auto made = [&](OperandIndex k) { return results[k].is_valid() ? results[k] : nb::object(nb::none()); };
  memory.python().attr("put_running")(made(normkit::kMean), made(normkit::kRstd), given(normkit::kRunningMean),
                                      given(normkit::kRunningVar), eps);
}

/// The order in which a call returns its outputs.
constexpr OperandIndex kReturned[] = {normkit::kDdy,   normkit::kOut,     normkit::kMean, normkit::kRstd,
                                      normkit::kSum,   normkit::kMoments, normkit::kSums, normkit::kDweight,
                                      normkit::kDbias, normkit::kDslopes};

/// What a call returns. `alone`: a backward returns dx and no tuple, as there are no parameters whose gradients could
/// be wanted.
nb::object returned(const Plan& plan, Results& results, bool alone) {
  OperandMask all = plan.wanted;  // and others, which are None
  if (plan.op == Op::double_backward)
    all |= operand_bit(normkit::kDweight) | (has_activation(plan.job.task) ? operand_bit(normkit::kDbias) : 0);
  if (plan.op == Op::backward && !alone)
    all |= operand_bit(normkit::kOut) | operand_bit(normkit::kDweight) | operand_bit(normkit::kDbias);
  if ((all & (all - 1)) == 0) return std::move(results[std::countr_zero(all)]);  // one
  const nb::object tuple = nb::steal(PyTuple_New(std::popcount(all)));
  if (!tuple.is_valid()) throw nb::python_error();
  Py_ssize_t next = 0;
  for (const OperandIndex k : kReturned) {
    if (plan.wanted & operand_bit(k)) PyTuple_SetItem(tuple.ptr(), next++, results[k].release().ptr());
    else if (all & operand_bit(k)) PyTuple_SetItem(tuple.ptr(), next++, Py_NewRef(Py_None));
  }
  return tuple;
}

nb::object run(const Plan& plan, Addresses& at, PyObject* const* values, const Memory& memory, const Views* views,
               bool alone) {
  Results results;
  for (const auto& [k, lying] : plan.outputs) {
    if (values[k] != Py_None) {
      results[k] = nb::borrow(values[k]);
      continue;
    }
    results[k] = made(k, lying, plan, memory);
    at[k] = memory.data_of(results[k]);
  }
  if (!plan.empty && !plan.temporaries.empty()) {
    run_packed(plan, at, results, memory, *views);
  } else if (!plan.empty) {
    normkit::Job job = plan.job;  // its own: the plan serves other calls meanwhile
    normkit::point(job, plan.op, at);
    memory.run(job);
  } else if (plan.op == Op::forward && plan.job.task.frozen) {
    put_running(results, memory, *views, plan.job.task.denominator.eps);
  }
  if (&memory != &memory::of_numpy() && plan.op != Op::moments)
    for (OperandMask left = plan.wanted; left; left &= left - 1) {
      const int k = std::countr_zero(left);
      if (values[k] == Py_None) results[k] = memory.handed_over(std::move(results[k]));
    }
  return returned(plan, results, alone);
}

// ---- a function --------------------------------------------------------------------------------------------------

std::int64_t epoch = 0;

/// True where a mask is True itself, of Python or of NumPy: all elements are members, as without a mask.
bool is_every(nb::handle where) {
  return where.ptr() == Py_True || (PyArray_IsScalar(where.ptr(), Bool) && PyObject_IsTrue(where.ptr()) == 1);
}

/// The body of one function, which keeps the plans of its last calls.
class Function final : public function::Body {
 public:
  Function(Op op, options::Kind kind) : op_(op), kind_(kind) {}

  /// Learns of a parameter of the signature.
  void take(int slot, bool is_flag, const char* name) {
    if (slot < normkit::kOperands) arrays_.push_back(static_cast<OperandIndex>(slot)), names_[slot] = name;
    else if (is_flag) flags_.emplace_back(slot, name);
    else options_.push_back(slot);
    if (slot == options::kActivation) take(normkit::kSlopes, false, "slopes");
    if (slot == normkit::kMean && op_ == Op::apply) take(normkit::kMeanLow, false, "mean_low");
  }

  nb::object call(PyObject** values) override {
    const Held held = prepare(values);
    recent::Key key;
    Addresses at{};
    for (const OperandIndex k : arrays_) {
      if (!key.add_array(values[k])) return call_elsewhere(values);
      if (values[k] != Py_None) at[k] = arrays::data_of(values[k]);
    }
    if (nb::object result = run_known(key, at, values, memory::of_numpy); result.is_valid()) return result;
    return plan_and_run(values, &key);
  }

  /// xla::description() of a call on NumPy's arrays, which are dense; their memory is not looked at.
  nb::object describe(PyObject** values) override {
    const Held held = prepare(values);
    return plan_and_run(values, nullptr, {}, true);
  }

 private:
  /// What values that were changed borrow.
  struct Held {
    std::pair<nb::object, nb::object> moments;
    nb::object slopes;
  };
  Held prepare(PyObject** values) const {
    for (const auto& [slot, name] : flags_)
      if (!PyBool_Check(values[slot])) values[slot] = truth(name, values[slot]);
    Held held{take_moments(values), {}};
    if (values[options::kCenter] == Py_None)
      values[options::kCenter] = values[normkit::kMean] == Py_None ? Py_False : Py_True;
    if (is_every(values[normkit::kWhere])) values[normkit::kWhere] = Py_None;
    held.slopes = options::take_slopes(values);
    return held;
  }

  /// In a phase, Moments in the place of a mean become arrays of the call, which are returned: `values` borrow them.
  std::pair<nb::object, nb::object> take_moments(PyObject** values) const {
    const nb::handle given = values[normkit::kMean];
    if (op_ == Op::forward || op_ == Op::backward || op_ == Op::double_backward || given.is_none() ||
        PyArray_Check(given.ptr()))
      return {};
    if (PyObject_IsInstance(given.ptr(), python_module("normkit.phases").attr("Moments").ptr()) != 1) return {};
    std::pair<nb::object, nb::object> mean{given.attr("mean"), given.attr("mean_low")};
    values[normkit::kMean] = mean.first.ptr();
    if (op_ == Op::apply && !mean.first.is_none()) values[normkit::kMeanLow] = mean.second.ptr();
    return mean;
  }

  bool is_alone() const { return names_[normkit::kWeight].empty(); }

  static PyObject* truth(const std::string& name, nb::handle value) {
    if (!PyLong_Check(value.ptr()) && !PyArray_IsScalar(value.ptr(), Bool))
      type_error(name + " is " + nb::repr(value).c_str() + ", expected True or False");
    return PyObject_IsTrue(value.ptr()) ? Py_True : Py_False;
  }

  void add_options(recent::Key& key, PyObject* const* values) const {
    key.put(epoch);
    for (const int slot : options_) key.add_value(values[slot]);
    for (const auto& [slot, name] : flags_) key.add(values[slot]);
    key.add(values[options::kCenter]);
  }

  /// Runs by the plan of a like call, or returns nothing. `key` has the arrays, and gets the options.
  nb::object run_known(recent::Key& key, Addresses& at, PyObject* const* values, auto memory_of) {
    add_options(key, values);
    const std::shared_ptr<const recent::Known> known = recent_.find(key);
    if (!known || !known->placement.allows(at)) return {};
    const auto& memory = memory_of();
    return run(known->plan, at, values, memory, nullptr, is_alone());
  }

  /// Calls with arrays that are not all NumPy's: tensors of the CPU, or what call_on_device() takes.
  [[gnu::noinline]] nb::object call_elsewhere(PyObject* const* values) {
    const Library& library = arrays::library_of(values[normkit::kX]);
    const arrays::Exchange* const exchange = library.exchange;
    if (arrays::may_have_tangents(library)) return plan_and_run(values, nullptr);
    const bool records = arrays::records_gradients(library);
    for (const OperandIndex k : arrays_) {  // before any is read, since asking a tensor may run anything
      if (values[k] == Py_None) continue;
      if (!exchange || arrays::library_of(values[k]).exchange != exchange || !arrays::is_plain(values[k], records))
        return call_on_device(values, records);
    }
    recent::Key key;
    Addresses at{};
    Views views;
    key.put(reinterpret_cast<std::intptr_t>(exchange));
    for (const OperandIndex k : arrays_) {
      if (values[k] == Py_None) {
        key.put(0);
        continue;
      }
      if (!arrays::view_tensor(values[k], exchange, views[k]) || !key.add_view(views[k].array))
        return call_on_device(values, records);
      at[k] = views[k].array.data;
    }
    const auto memory = [&] { return memory::Tensors(*exchange); };
    if (nb::object result = run_known(key, at, values, memory); result.is_valid()) return result;
    return plan_and_run(values, &key, {}, false, std::move(views));
  }

  /// Calls by a plan that is known where arrays are on a GPU and their library tells enough of them, else as if it were
  /// the first call.
  [[gnu::noinline, gnu::cold]] nb::object call_on_device(PyObject* const* values, bool records) {
    const Library* library = nullptr;
    std::int64_t device = 0;
    recent::Key key;
    Addresses at{};
    std::vector<nb::object> held;
    for (const OperandIndex k : arrays_) {
      const nb::handle array = values[k];
      if (array.is_none()) {
        key.put(0);
        continue;
      }
      const Library& its = arrays::library_of(array);
      arrays::OnDevice found;
      if ((library && library != &its) || !arrays::read_if_plain(array, its, records, found))
        return plan_and_run(values, nullptr);
      if (library && found.device != device) return plan_and_run(values, nullptr);
      library = &its, device = found.device, at[k] = found.data;
      key.add(found.dtype);
      if (!key.add_layout(found.shape, found.strides)) return plan_and_run(values, nullptr);
      held.push_back(std::move(found.dtype));
    }
    if (values[normkit::kX] == Py_None) return plan_and_run(values, nullptr);
    key.add(reinterpret_cast<PyObject*>(const_cast<Library*>(library))), key.put(device);
    const auto memory = [&] { return memory::Device(values[normkit::kX], *library, device); };
    if (nb::object result = run_known(key, at, values, memory); result.is_valid()) return result;
    return plan_and_run(values, &key, std::move(held));
  }

  /// Plans and runs a call, or describes it alone. `key`: by which a like call will find the plan; may be null. `held`
  /// keeps alive the objects that the key names, beside options. `views` of plain tensors are there where these were read
  /// for the key, which is to be of what the plan is of.
  [[gnu::noinline]] nb::object plan_and_run(PyObject* const* values, const recent::Key* key,
                                            std::vector<nb::object> held = {}, bool describes = false,
                                            Views&& views = {}) {
    Arrays whose("x", values[normkit::kX]);
    const auto is_number = [&](OperandIndex k) {
      const OperandRow& row = kOperandTable[k];
      const bool may_be = row.role == Role::statistic || row.role == Role::count || k == normkit::kSlopes;
      return may_be && contains(row.reads, op_) && arrays::is_number(values[k]);
    };
    const auto is_there = [&](OperandIndex k) { return values[k] != Py_None || k == normkit::kX || k == normkit::kDy; };
    const auto is_of_phases = [&](OperandIndex k) {
      return normkit::phase_of(op_) != normkit::Phase::both && normkit::is_of_statistics(kOperandTable[k].role);
    };
    for (const OperandIndex k : arrays_)
      if (is_there(k) && !views[k].array.present && !is_number(k))
        whose.judge(names_[k].c_str(), values[k], is_of_phases(k));
    const Memory& memory = whose.open();
    Args args;
    std::vector<nb::object> numbers;  // as arrays of the call
    for (const OperandIndex k : arrays_) {
      if (!is_there(k)) continue;
      const OperandRow& row = kOperandTable[k];
      nb::object given = nb::borrow(values[k]);
      if (is_number(k)) {
        const normkit::Dtype dtype =
            k == normkit::kSlopes ? normkit::compute_dtype(args.x.dtype) : normkit::Dtype::float64;
        if (row.role == Role::count && !(options::number("count", given, "a number") >= 0))
          normkit::value_error(std::string("count is ") + nb::repr(given).c_str() +
                               ", expected the number of members of each statistic");
        numbers.push_back(given = memory.empty({dtype, 0, {}, {}}));
        memory.copy(given, values[k], nb::none());
      }
      if (!views[k].array.present) whose.view(names_[k].c_str(), given, contains(row.writes, op_), views[k]);
      row.of(args) = views[k].array;
    }
    const normkit::Spec spec = options::spec_of(kind_, op_, values, args.x);
    const OperandMask wanted = options::wanted_of(op_, values);
    args.out_dtype = options::dtype_named(values[options::kOutDtype]);
    args.share_elements = share_elements;
    if (!spec.centered) args.mean = args.mean_low = {};
    if (describes) return xla::description(args, spec, op_, wanted);
    const Plan plan = normkit::plan(args, spec, op_, wanted, !whose.is_on_device());
    Addresses at{};
    for (const OperandIndex k : arrays_) at[k] = kOperandTable[k].of(args).data;
    if (key) keep(*key, values, plan, {args, op_}, at, views, std::move(held));
    nb::object result = run(plan, at, values, memory, &views, is_alone());
    if (op_ != Op::moments) return result;
    return nb::make_tuple(result, memory.python(), args.x.dtype == normkit::Dtype::float64);
  }

  /// Keeps a plan for like calls, unless anything has to be copied first, or could change unseen, or arrays lie so that a
  /// call is judged in full each time.
  void keep(const recent::Key& key, PyObject* const* values, const Plan& plan, const normkit::Placement& placement,
            const Addresses& at, const Views& views, std::vector<nb::object> held) {
    if (plan.empty || !plan.temporaries.empty() || op_ == Op::moments || !placement.allows(at)) return;
    for (const OperandIndex k : arrays_) {
      if (views[k].array.present && PyArray_Check(values[k]))
        held.push_back(nb::borrow(reinterpret_cast<PyObject*>(PyArray_DESCR(arrays::as_array(values[k])))));
    }
    for (const int slot : options_) {
      if (!recent::immutable(values[slot])) return;
      if (!recent::is_single(values[slot])) held.push_back(nb::borrow(values[slot]));
    }
    recent_.keep(key, plan, placement, std::move(held));
  }

  Op op_;
  options::Kind kind_;
  std::vector<OperandIndex> arrays_;
  std::array<std::string, normkit::kOperands> names_;
  std::vector<int> options_;
  std::vector<std::pair<int, std::string>> flags_;
  recent::Recent recent_;
};

int index_of(const char* word, std::span<const char* const> names) {
  for (std::size_t k = 0; k < names.size(); ++k)
    if (std::strcmp(word, names[k]) == 0) return static_cast<int>(k);
  throw std::invalid_argument(std::string("there is no ") + word);
}

}  // namespace

nb::object function(nb::handle type, nb::handle python, const char* op, const char* kind, nb::dict fixed) {
  constexpr const char* kOpNames[] = {"forward",       "moments",        "apply",          "backward",
                                      "backward_sums", "apply_backward", "double_backward"};
  auto body = std::make_unique<Function>(static_cast<Op>(index_of(op, kOpNames)),
                                         static_cast<options::Kind>(index_of(kind, options::kKindNames)));
  function::Arguments arguments(options::kSlots);
  const nb::object none = nb::none(), zero = nb::float_(0.0), yes = nb::bool_(true), no = nb::bool_(false);
  for (int slot = 0; slot < options::kSlots; ++slot) arguments.set(slot, none);
  for (const int slot : {options::kMomentum, options::kWeightOffset}) arguments.set(slot, zero);
  for (const int slot : {options::kReturnStats, options::kReturnResidual}) arguments.set(slot, no);
  for (const int slot : {options::kUseInputStats, options::kCenter}) arguments.set(slot, yes);
  const auto place_of = [&](const std::string& name) -> std::pair<int, bool> {
    for (int k = 0; k < normkit::kOperands; ++k)
      if (name == kOperandTable[k].name) return {k, false};
    for (const options::Row& row : options::kTable)
      if (name == row.name) return {row.slot, row.is_flag};
    throw std::invalid_argument("no slot for the parameter " + name);
  };
  for (const auto& [name, value] : fixed) arguments.set(place_of(nb::str(name).c_str()).first, value);
  arguments.read_signature(python, [&](const char* name) {
    const auto [slot, is_flag] = place_of(name);
    body->take(slot, is_flag, name);
    return slot;
  });
  return function::make(type, python, std::move(arguments), std::move(body));
}

nb::object views(nb::kwargs arrays) {
  if (arrays.contains("where") && is_every(arrays["where"])) arrays["where"] = nb::none();
  std::optional<Arrays> whose;
  std::string first;
  nb::dict result;
  for (const auto& [name, array] : arrays) {
    const std::string named = nb::str(name).c_str();
    const bool required = named == "x" || named == "dy" || named == "content" || named == "style";
    if (!whose) first = named, whose.emplace(first.c_str(), array);
    if (!array.is_none() || required) whose->judge(named.c_str(), array);
  }
  const Memory& memory = whose->open();
  for (const auto& [name, array] : arrays) {
    result[name] = nb::none();
    if (array.is_none()) continue;
    View v;
    whose->view(nb::str(name).c_str(), array, nb::str(name).equal(nb::str("out")), v);
    result[name] = memory.of_view(v);
  }
  return nb::make_tuple(result, memory.python());
}

void forget_plans() { ++epoch; }

}  // namespace calls
