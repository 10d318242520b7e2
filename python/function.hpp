// A function whose signature and docstring are Python's, and whose body is C++.
//
// Calling a function that is written in Python costs as much as normalizing a thousand elements, most of it for finding the
// defaults of what was not passed. Here arguments are taken as they come; names and defaults are those of the function in
// Python, which is called only to say what is wrong with the arguments.
#pragma once

#include <nanobind/nanobind.h>

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "normkit/normkit.hpp"

namespace function {

namespace nb = nanobind;

/// The body of a function. It is called with one value for each slot; it may change the values, and throw.
class Body {
 public:
  virtual ~Body() = default;
  virtual nb::object call(PyObject** values) = 0;
  /// What a call would be, for those who make it later: `_description` in Python.
  virtual nb::object describe(PyObject** values) = 0;
};

/// Thrown by a body whose arrays are for the function of the same name in another module, which is then called. Where that
/// has none, it is the error that it says.
struct ForModule : normkit::Error {
  const char* module;
  ForModule(const char* name, const std::string& message) : Error(Kind::type, message), module(name) {}
};

/// How the arguments of a function are laid out in slots, and the values of those that are not passed.
class Arguments {
 public:
  static constexpr int kMostSlots = 40;

  explicit Arguments(int slots) : slots_(slots) {}
  void set(int slot, nb::handle value);
  /// Takes names and defaults from the signature of `function`; slot_of(name) is the slot of a parameter.
  void read_signature(nb::handle function, const std::function<int(const char*)>& slot_of);
  /// Puts the arguments of a call into slots; false where they are wrong.
  bool place(PyObject* const* args, Py_ssize_t count, PyObject* names, PyObject** values) const;

 private:
  std::vector<nb::object> names_;  // interned, so that a name in a call is as a rule the same object
  std::vector<int> slot_, required_;
  int positional_ = 0, slots_;
  PyObject* value_[kMostSlots] = {};  // by slot; null: has to be passed
  nb::list held_;  // the values: a list counts its references as the interpreter does
};

/// Makes the type of the functions that make() makes: one type for each interpreter.
nb::object new_type();

nb::object make(nb::handle type, nb::handle python, Arguments arguments, std::unique_ptr<Body> body);

/// Sets the error of Python that stands for the exception of C++ that is being caught. Called in a catch clause.
void set_error();

}  // namespace function
