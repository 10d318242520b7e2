// IEEE binary16 in integer arithmetic, for instruction sets without a conversion, and for single parameters.
// bfloat16 is converted so too. Both round to nearest even, and keep subnormals, infinities and NaN.
#pragma once

#include "vec/local.hpp"

namespace normkit {
namespace {

NORMKIT_LOCAL float float_of(std::uint32_t bits) { return __builtin_bit_cast(float, bits); }
NORMKIT_LOCAL std::uint32_t bits_of(float v) { return __builtin_bit_cast(std::uint32_t, v); }

NORMKIT_LOCAL float widen(Half h) {
  const std::uint32_t sign = (h.bits & 0x8000u) << 16, magnitude = h.bits & 0x7fffu;
  // Scaling by 2^112 moves the exponent from the bias of binary16 to that of binary32, subnormals included.
  const float scaled = float_of(magnitude << 13) * 0x1p112f;
  return float_of(bits_of(scaled) | sign | (magnitude >= 0x7c00u ? 0x7f800000u : 0u));
}
NORMKIT_LOCAL float widen(Bfloat b) { return float_of(std::uint32_t{b.bits} << 16); }

NORMKIT_LOCAL Half narrow(const Half*, float v) {
  const std::uint32_t bits = bits_of(v), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  std::uint32_t half;
  if (magnitude > 0x7f800000u) half = 0x7e00u | ((magnitude >> 13) & 0x3ffu);
  else if (magnitude >= 0x477ff000u) half = 0x7c00u;  // 65520, halfway to the first that does not fit
  else if (magnitude < 0x38800000u)  // subnormal: adding 0.5 leaves the rounded value in the low bits
    half = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  else half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  return {static_cast<std::uint16_t>(sign | half)};
}
NORMKIT_LOCAL Bfloat narrow(const Bfloat*, float v) {
  const std::uint32_t bits = bits_of(v);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  const std::uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  return {static_cast<std::uint16_t>((nan ? bits | 0x400000u : rounded) >> 16)};
}

}  // namespace
}  // namespace normkit
