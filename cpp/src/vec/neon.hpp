// AArch64: 16 floats are four registers, 8 doubles are four; fused multiply-add and half conversions are there.
#pragma once

#include <arm_neon.h>

namespace normkit {
namespace {

using Reg32 = float32x4_t;
using Reg64 = float64x2_t;
constexpr int kLanes32 = 4, kLanes64 = 2;
constexpr int kRegisters = 32;
constexpr bool kMaskedParts = false;

inline Reg32 reg_set(float v) { return vdupq_n_f32(v); }
inline Reg32 reg_add(Reg32 a, Reg32 b) { return vaddq_f32(a, b); }
inline Reg32 reg_sub(Reg32 a, Reg32 b) { return vsubq_f32(a, b); }
inline Reg32 reg_mul(Reg32 a, Reg32 b) { return vmulq_f32(a, b); }
inline Reg32 reg_mul_add(Reg32 a, Reg32 b, Reg32 c) { return vfmaq_f32(c, a, b); }
inline Reg64 reg_set(double v) { return vdupq_n_f64(v); }
inline Reg64 reg_add(Reg64 a, Reg64 b) { return vaddq_f64(a, b); }
inline Reg64 reg_sub(Reg64 a, Reg64 b) { return vsubq_f64(a, b); }
inline Reg64 reg_mul(Reg64 a, Reg64 b) { return vmulq_f64(a, b); }
inline Reg64 reg_mul_add(Reg64 a, Reg64 b, Reg64 c) { return vfmaq_f64(c, a, b); }
inline Reg32 reg_div(Reg32 a, Reg32 b) { return vdivq_f32(a, b); }
inline Reg64 reg_div(Reg64 a, Reg64 b) { return vdivq_f64(a, b); }

inline Reg32 reg_positive(Reg32 z, Reg32 a, Reg32 b) { return vbslq_f32(vcgtzq_f32(z), a, b); }
inline Reg64 reg_positive(Reg64 z, Reg64 a, Reg64 b) { return vbslq_f64(vcgtzq_f64(z), a, b); }
inline Reg32 reg_where(Reg32 m, Reg32 v) {
  return vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(v), vceqzq_f32(m)));
}
inline Reg64 reg_where(Reg64 m, Reg64 v) {
  return vreinterpretq_f64_u64(vbicq_u64(vreinterpretq_u64_f64(v), vceqzq_f64(m)));
}
inline Reg32 reg_shift_exponent(Reg32 t) { return vreinterpretq_f32_u32(vshlq_n_u32(vreinterpretq_u32_f32(t), 23)); }
inline Reg64 reg_shift_exponent(Reg64 t) { return vreinterpretq_f64_u64(vshlq_n_u64(vreinterpretq_u64_f64(t), 52)); }

inline Reg32 reg_keep(Reg32 v, int n) {
  const int32x4_t lane = {0, 1, 2, 3};
  return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(v), vcgtq_s32(vdupq_n_s32(n), lane)));
}
inline Reg64 reg_keep(Reg64 v, int n) {
  const int64x2_t lane = {0, 1};
  return vreinterpretq_f64_u64(vandq_u64(vreinterpretq_u64_f64(v), vcgtq_s64(vdupq_n_s64(n), lane)));
}

inline Reg32 reg_load(const float* p) { return vld1q_f32(p); }
inline Reg64 reg_load(const double* p) { return vld1q_f64(p); }
inline Reg32 reg_load(const Half* p) {
  return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const std::uint16_t*>(p))));
}
inline Reg32 reg_load(const Bfloat* p) {
  return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(reinterpret_cast<const std::uint16_t*>(p)), 16));
}
inline Reg32 reg_load(const std::uint16_t* p) { return vcvtq_f32_u32(vmovl_u16(vld1_u16(p))); }
inline Reg32 reg_load(const std::int16_t* p) { return vcvtq_f32_s32(vmovl_s16(vld1_s16(p))); }
inline Reg32 reg_load(const std::uint8_t* p) {
  return Reg32{static_cast<float>(p[0]), static_cast<float>(p[1]), static_cast<float>(p[2]), static_cast<float>(p[3])};
}

inline void reg_store(float* p, Reg32 v) { vst1q_f32(p, v); }
inline void reg_store(double* p, Reg64 v) { vst1q_f64(p, v); }
inline void reg_store(Half* p, Reg32 v) {
  vst1_u16(reinterpret_cast<std::uint16_t*>(p), vreinterpret_u16_f16(vcvt_f16_f32(v)));
}
inline void reg_store(Bfloat* p, Reg32 v) {  // to nearest even; a NaN keeps its sign and becomes quiet
  const uint32x4_t bits = vreinterpretq_u32_f32(v);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const uint32x4_t rounded = vaddq_u32(vaddq_u32(bits, odd), vdupq_n_u32(0x7fff));
  const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
  vst1_u16(reinterpret_cast<std::uint16_t*>(p), vshrn_n_u32(vbslq_u32(vceqq_f32(v, v), rounded, quiet), 16));
}
// AArch64 has no store that a C compiler reliably turns into a non-temporal one of 16 bytes: plain stores.
template <class T, class Reg> inline void reg_stream(T* p, Reg v) { reg_store(p, v); }
inline void stream_fence() {}

inline Reg64 reg_load_wide(const float* p) { return vcvt_f64_f32(vld1_f32(p)); }
inline Reg64 widen_piece(const Reg32* r, int piece) {
  return piece % 2 ? vcvt_high_f64_f32(r[piece / 2]) : vcvt_f64_f32(vget_low_f32(r[piece / 2]));
}

inline float fold(const Reg32* r) {
  const Reg32 b = vaddq_f32(vaddq_f32(r[0], r[2]), vaddq_f32(r[1], r[3]));
  const float32x2_t c = vadd_f32(vget_low_f32(b), vget_high_f32(b));
  return vget_lane_f32(c, 0) + vget_lane_f32(c, 1);
}
inline double fold(const Reg64* r) {
  const Reg64 b = vaddq_f64(vaddq_f64(r[0], r[2]), vaddq_f64(r[1], r[3]));
  return vgetq_lane_f64(b, 0) + vgetq_lane_f64(b, 1);
}
inline float first_lane(const Reg32* r) { return vgetq_lane_f32(r[0], 0); }
inline double first_lane(const Reg64* r) { return vgetq_lane_f64(r[0], 0); }

}  // namespace
}  // namespace normkit
