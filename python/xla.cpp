#include "xla.hpp"

#include <bit>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <span>
#include <type_traits>
#include <vector>

#include "cuda.hpp"
#include "memory.hpp"
#include "xla_ffi.hpp"

namespace xla {
namespace {

using namespace xla_ffi;
using normkit::Addresses;
using normkit::Args;
using normkit::Array;
using normkit::kOperandTable;
using normkit::Op;
using normkit::OperandMask;
using normkit::Plan;
using normkit::Spec;

// ---- a call as numbers -------------------------------------------------------------------------------------------

struct Call {
  Op op;
  OperandMask wanted;
  Spec spec;

  /// Calls f with everything of a call that is no array.
  template <class F> void each(F f) {
    f(op), f(wanted);
    f(spec.reduce_axes), f(spec.centered), f(spec.eps), f(spec.use_input_stats), f(spec.momentum);
    f(spec.weight_offset), f(spec.activation.kind), f(spec.activation.parameter);
    for (normkit::AxisMask& axes : spec.param_axes) f(axes);
    f(spec.param_forms), f(spec.channel_axis), f(spec.num_groups);
  }
};

class Reader {
 public:
  explicit Reader(std::span<const std::int64_t> numbers) : numbers_(numbers) {}

  std::int64_t next() { return span(1)[0]; }
  std::span<const std::int64_t> span(std::int64_t count) {
    if (count < 0 || static_cast<std::size_t>(count) > numbers_.size()) refuse();
    const std::span<const std::int64_t> first = numbers_.first(static_cast<std::size_t>(count));
    numbers_ = numbers_.subspan(first.size());
    return first;
  }
  int operand() {
    const std::int64_t k = next();
    if (k < 0 || k >= normkit::kOperands) refuse();
    return static_cast<int>(k);
  }
  [[noreturn]] static void refuse() { normkit::value_error("these are not the numbers of a call of this normkit"); }

 private:
  std::span<const std::int64_t> numbers_;
};

/// The plan of a GPU, which packs arrays whole and gathers nothing: all that is packed is packed by XLA. No array has an
/// address yet; they lie apart from each other.
Plan planned(Args args, const Call& call) {
  for (int k = 0; k < normkit::kOperands; ++k)
    (args.*kOperandTable[k].array).data = reinterpret_cast<std::byte*>(static_cast<std::uintptr_t>(k + 1) << 58);
  return normkit::plan(args, call.spec, call.op, call.wanted, false);
}

Plan read(Reader& reader) {
  Call call;
  call.each([&](auto& value) {
    using T = std::remove_reference_t<decltype(value)>;
    const std::int64_t number = reader.next();
    if constexpr (std::is_same_v<T, double>) value = std::bit_cast<double>(number);
    else value = static_cast<T>(number);
  });
  Args args;
  for (std::int64_t left = reader.next(); left > 0; --left) {
    Array& a = args.*kOperandTable[reader.operand()].array;
    a.dtype = static_cast<normkit::Dtype>(reader.next()), a.present = true;
    a.shape = reader.span(reader.next());
  }
  return planned(args, call);
}

// ---- handlers ----------------------------------------------------------------------------------------------------

/// An error of XLA's own.
struct Failed { Error* error; };

template <class Asked> Asked answer(Error* (*function)(Asked*), Asked asked) {
  asked.struct_size = sizeof(asked);
  if (Error* error = function(&asked)) throw Failed{error};
  return asked;
}

/// Enqueues a job. Its scratch goes back to XLA, which has it used again by what is enqueued later alone.
void run_on_device(const CallFrame& frame, const normkit::Job& job) {
  namespace cuda = normkit::cuda;
  const Api& api = *frame.api;
  void* const stream = answer(api.get_stream, StreamGet{.context = frame.context}).stream;
  const int device = answer(api.get_device, DeviceGet{.context = frame.context}).device;
  const std::size_t bytes = cuda::workspace_bytes(job);
  if (!bytes) return cuda::run(job, nullptr, stream, device);
  const auto scratch = answer(api.allocate, MemoryAllocate{.context = frame.context, .bytes = bytes, .alignment = 256});
  const auto give_back = [&] {
    answer(api.free, MemoryFree{.context = frame.context, .bytes = bytes, .data = scratch.data});
  };
  try {
    cuda::run(job, scratch.data, stream, device);
  } catch (...) {
    give_back();
    throw;
  }
  give_back();
}

void execute(const CallFrame& frame, bool on_device) {
  const Attributes& attributes = frame.attributes;
  if (attributes.count != 1 || attributes.types[0] != kArray) Reader::refuse();
  const Numbers& given = *static_cast<const Numbers*>(attributes.values[0]);
  if (given.dtype != kInt64) Reader::refuse();
  Reader reader({static_cast<const std::int64_t*>(given.data), given.count});
  const Plan plan = read(reader);
  Addresses at{};
  if (reader.next() != frame.arguments.count) Reader::refuse();
  for (const Buffers* buffers : {&frame.arguments, &frame.results})
    for (std::int64_t k = 0; k < buffers->count; ++k)
      at[reader.operand()] = static_cast<std::byte*>(buffers->buffers[k]->data);
  normkit::Job job = plan.job;
  normkit::point(job, plan.op, at);
  if (on_device) run_on_device(frame, job);
  else memory::run_as_it_is(job);
}

Error* failure(const CallFrame& frame, int code, const char* message) {
  ErrorCreate made{.struct_size = sizeof(made), .message = message, .code = code};
  return frame.api->create_error(&made);
}

template <bool on_device> Error* handle(CallFrame* frame) {
  if (frame->extensions && frame->extensions->type == kMetadata) {
    // XLA refuses versions that it does not know: it is told its own, or the newest of those that are known here. It says
    // which is its own since 0.2.
    Version& told = reinterpret_cast<MetadataExtension*>(frame->extensions)->metadata->version;
    const Version its = frame->api ? frame->api->version : Version{0, nullptr, kMajor, kOldestMinor};
    const bool known = its.major == kMajor && its.minor >= kOldestMinor && its.minor < kNewestMinor;
    told.major = kMajor, told.minor = known ? its.minor : kNewestMinor;
    return nullptr;
  }
  if (frame->stage != kExecute) return nullptr;
  try {
    execute(*frame, on_device);
    return nullptr;
  } catch (const Failed& failed) {
    return failed.error;
  } catch (const normkit::Error& error) {
    return failure(*frame, kInvalidArgument, error.what());
  } catch (const std::exception& error) {
    return failure(*frame, kInternal, error.what());
  }
}

nb::object tuple_of(const normkit::Extents& numbers, int count) {
  nb::list list;
  for (int k = 0; k < count; ++k) list.append(numbers[k]);
  return nb::tuple(list);
}

}  // namespace

nb::object description(Args args, const Spec& spec, Op op, OperandMask wanted) {
  Call call{op, wanted, spec};
  nb::list numbers, packed, arrays;
  call.each([&](const auto& value) {
    using T = std::remove_cvref_t<decltype(value)>;
    if constexpr (std::is_same_v<T, double>) numbers.append(std::bit_cast<std::int64_t>(value));
    else numbers.append(static_cast<std::int64_t>(value));
  });
  std::int64_t count = 0;
  for (int k = 0; k < normkit::kOperands; ++k) {
    Array& a = args.*kOperandTable[k].array;
    if (!a.present) continue;
    ++count, a.strides = {};
    arrays.append(k), arrays.append(static_cast<std::int64_t>(a.dtype)), arrays.append(a.ndim());
    for (const std::int64_t extent : a.shape) arrays.append(extent);
  }
  numbers.append(count);
  numbers.extend(arrays);
  for (const normkit::Temporary& t : planned(args, call).temporaries)
    packed.append(nb::make_tuple(static_cast<int>(t.operand), normkit::name_of(t.dtype), tuple_of(t.shape, t.ndim),
                                 tuple_of(t.strides, t.ndim), tuple_of(t.seen_strides, t.ndim)));
  return nb::make_tuple(numbers, packed);
}

nb::object handler(bool on_device) {
  return nb::capsule(reinterpret_cast<void*>(on_device ? &handle<true> : &handle<false>), "xla._CUSTOM_CALL_TARGET");
}

}  // namespace xla
