// x86-64-v2: 16 floats are four registers, 8 doubles are four. No fused multiply-add, so its bits are its own.
#pragma once

#include <immintrin.h>

namespace normkit {
namespace {

using Reg32 = __m128;
using Reg64 = __m128d;
constexpr int kLanes32 = 4, kLanes64 = 2;
constexpr int kRegisters = 16;
constexpr bool kMaskedParts = false;

inline Reg32 reg_set(float v) { return _mm_set1_ps(v); }
inline Reg32 reg_add(Reg32 a, Reg32 b) { return _mm_add_ps(a, b); }
inline Reg32 reg_sub(Reg32 a, Reg32 b) { return _mm_sub_ps(a, b); }
inline Reg32 reg_mul(Reg32 a, Reg32 b) { return _mm_mul_ps(a, b); }
inline Reg32 reg_mul_add(Reg32 a, Reg32 b, Reg32 c) { return _mm_add_ps(_mm_mul_ps(a, b), c); }
inline Reg64 reg_set(double v) { return _mm_set1_pd(v); }
inline Reg64 reg_add(Reg64 a, Reg64 b) { return _mm_add_pd(a, b); }
inline Reg64 reg_sub(Reg64 a, Reg64 b) { return _mm_sub_pd(a, b); }
inline Reg64 reg_mul(Reg64 a, Reg64 b) { return _mm_mul_pd(a, b); }
inline Reg64 reg_mul_add(Reg64 a, Reg64 b, Reg64 c) { return _mm_add_pd(_mm_mul_pd(a, b), c); }
inline Reg32 reg_div(Reg32 a, Reg32 b) { return _mm_div_ps(a, b); }
inline Reg64 reg_div(Reg64 a, Reg64 b) { return _mm_div_pd(a, b); }

inline Reg32 reg_positive(Reg32 z, Reg32 a, Reg32 b) { return _mm_blendv_ps(b, a, _mm_cmpgt_ps(z, _mm_setzero_ps())); }
inline Reg64 reg_positive(Reg64 z, Reg64 a, Reg64 b) { return _mm_blendv_pd(b, a, _mm_cmpgt_pd(z, _mm_setzero_pd())); }
inline Reg32 reg_where(Reg32 m, Reg32 v) { return _mm_and_ps(v, _mm_cmpneq_ps(m, _mm_setzero_ps())); }
inline Reg64 reg_where(Reg64 m, Reg64 v) { return _mm_and_pd(v, _mm_cmpneq_pd(m, _mm_setzero_pd())); }
inline Reg32 reg_shift_exponent(Reg32 t) { return _mm_castsi128_ps(_mm_slli_epi32(_mm_castps_si128(t), 23)); }
inline Reg64 reg_shift_exponent(Reg64 t) { return _mm_castsi128_pd(_mm_slli_epi64(_mm_castpd_si128(t), 52)); }

inline Reg32 reg_keep(Reg32 v, int n) {
  return _mm_and_ps(v, _mm_castsi128_ps(_mm_cmpgt_epi32(_mm_set1_epi32(n), _mm_setr_epi32(0, 1, 2, 3))));
}
inline Reg64 reg_keep(Reg64 v, int n) {
  return _mm_and_pd(v, _mm_castsi128_pd(_mm_cmpgt_epi64(_mm_set1_epi64x(n), _mm_set_epi64x(1, 0))));
}

inline __m128i bits16(const void* p) { return _mm_loadl_epi64(static_cast<const __m128i*>(p)); }
inline __m128i bits8(const void* p) { return _mm_loadu_si32(p); }
inline Reg32 reg_load(const float* p) { return _mm_loadu_ps(p); }
inline Reg64 reg_load(const double* p) { return _mm_loadu_pd(p); }
[[gnu::noinline]] Reg32 reg_load(const Half* p) {
  return _mm_setr_ps(widen(p[0]), widen(p[1]), widen(p[2]), widen(p[3]));
}
inline Reg32 reg_load(const Bfloat* p) { return _mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(bits16(p)), 16)); }
inline Reg32 reg_load(const std::uint16_t* p) { return _mm_cvtepi32_ps(_mm_cvtepu16_epi32(bits16(p))); }
inline Reg32 reg_load(const std::int16_t* p) { return _mm_cvtepi32_ps(_mm_cvtepi16_epi32(bits16(p))); }
inline Reg32 reg_load(const std::uint8_t* p) { return _mm_cvtepi32_ps(_mm_cvtepu8_epi32(bits8(p))); }

inline void reg_store(float* p, Reg32 v) { _mm_storeu_ps(p, v); }
inline void reg_store(double* p, Reg64 v) { _mm_storeu_pd(p, v); }
template <class T> [[gnu::noinline]] void reg_store(T* p, Reg32 v) {
  alignas(16) float lane[4];
  _mm_store_ps(lane, v);
  for (int i = 0; i < 4; ++i) p[i] = narrow(p, lane[i]);
}
inline void reg_stream(float* p, Reg32 v) { _mm_stream_ps(p, v); }
inline void reg_stream(double* p, Reg64 v) { _mm_stream_pd(p, v); }
template <class T> inline void reg_stream(T* p, Reg32 v) { reg_store(p, v); }
inline void stream_fence() { _mm_sfence(); }

inline Reg64 reg_load_wide(const float* p) {
  return _mm_cvtps_pd(_mm_castsi128_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
inline Reg64 widen_piece(const Reg32* r, int piece) {
  return _mm_cvtps_pd(piece % 2 ? _mm_movehl_ps(r[piece / 2], r[piece / 2]) : r[piece / 2]);
}

inline float fold(const Reg32* r) {
  const __m128 b = _mm_add_ps(_mm_add_ps(r[0], r[2]), _mm_add_ps(r[1], r[3]));
  const __m128 c = _mm_add_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_add_ss(c, _mm_movehdup_ps(c)));
}
inline double fold(const Reg64* r) {
  const __m128d b = _mm_add_pd(_mm_add_pd(r[0], r[2]), _mm_add_pd(r[1], r[3]));
  return _mm_cvtsd_f64(_mm_add_sd(b, _mm_unpackhi_pd(b, b)));
}
inline float first_lane(const Reg32* r) { return _mm_cvtss_f32(r[0]); }
inline double first_lane(const Reg64* r) { return _mm_cvtsd_f64(r[0]); }

}  // namespace
}  // namespace normkit
