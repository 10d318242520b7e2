#include "xla.hpp"

#include <bit>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <span>
#include <type_traits>
#include <vector>

#include "arrays.hpp"
#include "cuda.hpp"
#include "xla_ffi.hpp"

namespace xla {
namespace {

using namespace xla_ffi;
using arrays::tuple_of;
using normkit::Addresses;
using normkit::Args;
using normkit::Array;
using normkit::kOperandTable;
using normkit::Op;
using normkit::OperandMask;
using normkit::Plan;
using normkit::Spec;

// ---- a call as numbers -------------------------------------------------------------------------------------------

/// Everything of a call that is no array.
struct Call {
  Op op = Op::forward;
  OperandMask wanted = 0;
  Spec spec;
};

/// Calls f with each field of a Call, in the order of its numbers.
template <class AnyCall, class F> void for_each_field(AnyCall& call, F f) {
  auto& s = call.spec;
  f(call.op), f(call.wanted), f(s.reduce_axes), f(s.centered), f(s.use_input_stats), f(s.activation.kind);
  for (auto& axes : s.param_axes) f(axes);
  f(s.param_forms), f(s.channel_axis), f(s.num_groups), f(s.eps), f(s.momentum), f(s.weight_offset);
  f(s.activation.parameter);
}

std::int64_t number_of(double field) { return std::bit_cast<std::int64_t>(field); }
std::int64_t number_of(auto field) { return static_cast<std::int64_t>(field); }

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
  int below(int limit) {
    const std::int64_t number = next();
    if (number < 0 || number >= limit) refuse();
    return static_cast<int>(number);
  }
  [[noreturn]] static void refuse() { normkit::value_error("these are not the numbers of a call of this normkit"); }

 private:
  std::span<const std::int64_t> numbers_;
};

/// The plan of a GPU, which packs arrays whole and gathers nothing: all that is packed is packed by XLA. No array has an
/// address yet; they lie apart from each other.
Plan planned(Args& args, const Spec& spec, Op op, OperandMask wanted) {
  for (int k = 0; k < normkit::kOperands; ++k)
    kOperandTable[k].of(args).data = reinterpret_cast<std::byte*>(static_cast<std::uintptr_t>(k + 1) << 58);
  return normkit::plan(args, spec, op, wanted, false);
}

Plan read(Reader& reader) {
  Call call;
  for_each_field(call, [&](auto& field) {
    using Field = std::remove_reference_t<decltype(field)>;
    const std::int64_t number = reader.next();
    if constexpr (std::is_same_v<Field, double>) field = std::bit_cast<double>(number);
    else field = static_cast<Field>(number);
    if (number_of(field) != number) Reader::refuse();
  });
  if (call.op > Op::apply_backward || static_cast<int>(call.spec.activation.kind) >= normkit::kActivationKinds)
    Reader::refuse();
  Args args;
  for (std::int64_t left = reader.next(); left > 0; --left) {
    Array& a = kOperandTable[reader.below(normkit::kOperands)].of(args);
    a.dtype = static_cast<normkit::Dtype>(reader.below(static_cast<int>(normkit::Dtype::other))), a.present = true;
    a.shape = reader.span(reader.next());
  }
  return planned(args, call.spec, call.op, call.wanted);
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
  Plan plan = read(reader);
  Addresses at{};
  if (reader.next() != frame.arguments.count) Reader::refuse();
  for (const Buffers* buffers : {&frame.arguments, &frame.results})
    for (std::int64_t k = 0; k < buffers->count; ++k)
      at[reader.below(normkit::kOperands)] = static_cast<std::byte*>(buffers->buffers[k]->data);
  normkit::point(plan.job, plan.op, at);
  if (on_device) run_on_device(frame, plan.job);
  else normkit::run(plan.job);
}

Error* failure(const CallFrame& frame, int code, const char* message) {
  ErrorCreate made{.struct_size = sizeof(made), .message = message, .code = code};
  return frame.api->create_error(&made);
}

Error* handle(CallFrame* frame, bool on_device) {
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

}  // namespace

nb::object description(Args args, const Spec& spec, Op op, OperandMask wanted) {
  nb::list numbers, packed;
  const auto put = [&](std::int64_t number) { numbers.append(number); };
  const Call call{op, wanted, spec};
  for_each_field(call, [&](auto field) { put(number_of(field)); });
  std::int64_t count = 0;
  for (const normkit::OperandRow& row : kOperandTable) count += row.of(args).present;
  put(count);
  for (int k = 0; k < normkit::kOperands; ++k) {
    Array& a = kOperandTable[k].of(args);
    if (!a.present) continue;
    a.strides = {};
    put(k), put(static_cast<std::int64_t>(a.dtype)), put(a.ndim());
    for (const std::int64_t extent : a.shape) put(extent);
  }
  for (const normkit::Temporary& t : planned(args, spec, op, wanted).temporaries)
    packed.append(nb::make_tuple(static_cast<int>(t.operand), normkit::name_of(t.dtype),
                                 tuple_of(t.shape.data(), t.ndim), tuple_of(t.strides.data(), t.ndim),
                                 tuple_of(t.seen_strides.data(), t.ndim)));
  return nb::make_tuple(numbers, packed);
}

nb::object handlers() {
  const auto capsule = [](Handler* handler) {
    return nb::capsule(reinterpret_cast<void*>(handler), "xla._CUSTOM_CALL_TARGET");
  };
  return nb::make_tuple(capsule([](CallFrame* frame) { return handle(frame, false); }),
                        capsule([](CallFrame* frame) { return handle(frame, true); }));
}

}  // namespace xla
