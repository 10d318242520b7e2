// The C interface through which XLA calls functions of others, as far as it is used here: version 0.1 to 0.3, in which none of
// this differs. A later minor version adds to it; another major version is another interface. tests/test_jax.py
// compares the offsets with those of the header that jaxlib has.
#pragma once

#include <cstddef>
#include <cstdint>

namespace xla_ffi {

constexpr int kMajor = 0, kOldestMinor = 1, kNewestMinor = 3;

/// What follows the size of a struct: further structs, which say more.
struct Extension {
  std::size_t struct_size;
  int type;
  Extension* next;
};
constexpr int kMetadata = 1;  // a type of extensions

struct Version {
  std::size_t struct_size;
  Extension* extensions;
  int major, minor;
};

/// What XLA asks of a handler when it is registered, in a call that does nothing else.
struct Metadata {
  std::size_t struct_size;
  Version version;  // written: the version that the handler speaks
  std::uint32_t traits;
};
struct MetadataExtension {
  Extension base;
  Metadata* metadata;
};

struct Error;  // null: none
struct ErrorCreate {
  std::size_t struct_size = 0;
  Extension* extensions = nullptr;
  const char* message = nullptr;
  int code = 0;
};
constexpr int kInvalidArgument = 3, kInternal = 13;

struct Context;
struct StreamGet {
  std::size_t struct_size = 0;
  Extension* extensions = nullptr;
  Context* context = nullptr;
  void* stream = nullptr;  // written
};
struct DeviceGet {
  std::size_t struct_size = 0;
  Extension* extensions = nullptr;
  Context* context = nullptr;
  std::int32_t device = 0;  // written
};
struct MemoryAllocate {
  std::size_t struct_size = 0;
  Extension* extensions = nullptr;
  Context* context = nullptr;
  std::size_t bytes = 0, alignment = 0;
  void* data = nullptr;  // written
};
struct MemoryFree {
  std::size_t struct_size = 0;
  Extension* extensions = nullptr;
  Context* context = nullptr;
  std::size_t bytes = 0;
  void* data = nullptr;
};

/// The functions of XLA. Those that return an Error hand it over.
struct Api {
  std::size_t struct_size;
  Extension* extensions;
  Version version;
  const void* internal;
  Error* (*create_error)(ErrorCreate*);
  void *error_message, *destroy_error, *register_handler;
  Error* (*get_stream)(StreamGet*);
  void *register_type, *get_context, *set_state, *get_state;
  Error* (*allocate)(MemoryAllocate*);
  Error* (*free)(MemoryFree*);
  void *schedule, *count_threads, *create_future, *set_future, *fail_future, *get_run;
  Error* (*get_device)(DeviceGet*);
};

/// A dense array, its last axis the fastest.
struct Buffer {
  std::size_t struct_size;
  Extension* extensions;
  int dtype;
  void* data;
  std::int64_t rank;
  std::int64_t* extents;
};

/// Arguments, or results.
struct Buffers {
  std::size_t struct_size;
  Extension* extensions;
  std::int64_t count;
  int* types;
  Buffer** buffers;
};

/// The value of an attribute that is an array.
struct Numbers {
  int dtype;
  std::size_t count;
  void* data;
};
constexpr int kArray = 1, kInt64 = 5;  // types of an attribute, and of the numbers in one

struct Attributes {
  std::size_t struct_size;
  Extension* extensions;
  std::int64_t count;
  int* types;
  void** names;
  void** values;
};

constexpr int kExecute = 3;  // the stage in which a handler computes

struct CallFrame {
  std::size_t struct_size;
  Extension* extensions;
  const Api* api;
  Context* context;
  int stage;
  Buffers arguments, results;
  Attributes attributes;
};

using Handler = Error*(CallFrame*);

}  // namespace xla_ffi
