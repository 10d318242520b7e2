// What the options of functional.py mean.
#pragma once

#include <nanobind/nanobind.h>

#include "normkit/normkit.hpp"

namespace options {

namespace nb = nanobind;
using normkit::Dtype;

/// What is normalized. functional.py has the same names.
enum Kind { kNormalize, kNormalizeRms, kInstance, kGroup, kBatch, kLayer, kLayerRms };
inline constexpr const char* kKindNames[] = {"NORMALIZE", "NORMALIZE_RMS", "INSTANCE", "GROUP",
                                             "BATCH",     "LAYER",         "LAYER_RMS"};

inline bool is_centered(int kind) { return kind != kNormalizeRms && kind != kLayerRms; }

/// `axes` are the axes or the channel axis; only groups have a number.
normkit::Spec spec_of(int kind, nb::handle axes, nb::handle num_groups, const normkit::Array& x);
/// `axes` are (channel axis, number of groups) where there are groups.
normkit::Spec spec_of(int kind, nb::handle axes, const normkit::Array& x);

/// `expected` says in messages what `h` should have been.
double number(const char* name, nb::handle h, const char* expected);

/// The eps of RMS norm, where the caller leaves it open, is the distance from 1 to the next number of the compute type.
double eps_of(nb::handle eps, int kind, Dtype x);

/// The options that every function but moments() has.
void put_epilogue(normkit::Spec& spec, nb::handle activation, nb::handle weight_offset);

/// None is Dtype::other. What is neither that nor a string is for _arrays.py to name.
bool names_dtype(nb::handle h);
Dtype dtype_named(nb::handle h);

}  // namespace options
