// A function of Python that C++ answers where it can.
//
// Calling a function that is written in Python costs as much as normalizing a thousand elements, most of it for finding the
// defaults of what was not passed. A short way takes the arguments as they come, reads names and defaults from the
// function itself, and leaves to it whatever is out of the ordinary.
#pragma once

#include <nanobind/nanobind.h>

#include <memory>
#include <span>

namespace function {

namespace nb = nanobind;

/// A parameter that the short way knows: several names may mean the same one. Functions that do not have it give it `value`.
struct Parameter {
  const char* name;
  int slot;
  PyObject* value;
};

/// What is called with one value for each slot. Answers NotImplemented where the function itself is to be called; throws.
class ShortWay {
 public:
  virtual ~ShortWay() = default;
  virtual nb::object call(PyObject* const* values) = 0;
};

inline constexpr int kMaxSlots = 24;

/// The type of functions with a short way: one for each interpreter.
nb::object new_type();

/// `function`, whose parameters are among `parameters`, with a short way.
nb::object with_short_way(nb::handle type, nb::handle function, std::span<const Parameter> parameters,
                          std::unique_ptr<ShortWay> way);

/// Sets the error of Python that an exception of C++ stands for; within a catch clause.
void set_error();

}  // namespace function
