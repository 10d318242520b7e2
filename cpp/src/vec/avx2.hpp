// x86-64-v3: 16 floats are two registers, 8 doubles are two.
#pragma once

#include <immintrin.h>

namespace normkit {
namespace {

using Reg32 = __m256;
using Reg64 = __m256d;
constexpr int kLanes32 = 8, kLanes64 = 4;
constexpr int kRegisters = 16;
constexpr bool kMaskedParts = false;

inline Reg32 reg_set(float v) { return _mm256_set1_ps(v); }
inline Reg32 reg_add(Reg32 a, Reg32 b) { return _mm256_add_ps(a, b); }
inline Reg32 reg_sub(Reg32 a, Reg32 b) { return _mm256_sub_ps(a, b); }
inline Reg32 reg_mul(Reg32 a, Reg32 b) { return _mm256_mul_ps(a, b); }
inline Reg32 reg_mul_add(Reg32 a, Reg32 b, Reg32 c) { return _mm256_fmadd_ps(a, b, c); }
inline Reg64 reg_set(double v) { return _mm256_set1_pd(v); }
inline Reg64 reg_add(Reg64 a, Reg64 b) { return _mm256_add_pd(a, b); }
inline Reg64 reg_sub(Reg64 a, Reg64 b) { return _mm256_sub_pd(a, b); }
inline Reg64 reg_mul(Reg64 a, Reg64 b) { return _mm256_mul_pd(a, b); }
inline Reg64 reg_mul_add(Reg64 a, Reg64 b, Reg64 c) { return _mm256_fmadd_pd(a, b, c); }
inline Reg32 reg_div(Reg32 a, Reg32 b) { return _mm256_div_ps(a, b); }
inline Reg64 reg_div(Reg64 a, Reg64 b) { return _mm256_div_pd(a, b); }

inline Reg32 reg_positive(Reg32 z, Reg32 a, Reg32 b) {
  return _mm256_blendv_ps(b, a, _mm256_cmp_ps(z, _mm256_setzero_ps(), _CMP_GT_OQ));
}
inline Reg64 reg_positive(Reg64 z, Reg64 a, Reg64 b) {
  return _mm256_blendv_pd(b, a, _mm256_cmp_pd(z, _mm256_setzero_pd(), _CMP_GT_OQ));
}
inline Reg32 reg_where(Reg32 m, Reg32 v) {
  return _mm256_and_ps(v, _mm256_cmp_ps(m, _mm256_setzero_ps(), _CMP_NEQ_UQ));
}
inline Reg64 reg_where(Reg64 m, Reg64 v) {
  return _mm256_and_pd(v, _mm256_cmp_pd(m, _mm256_setzero_pd(), _CMP_NEQ_UQ));
}
inline Reg32 reg_shift_exponent(Reg32 t) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(t), 23)); }
inline Reg64 reg_shift_exponent(Reg64 t) { return _mm256_castsi256_pd(_mm256_slli_epi64(_mm256_castpd_si256(t), 52)); }

inline Reg32 reg_keep(Reg32 v, int n) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_and_ps(v, _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane)));
}
inline Reg64 reg_keep(Reg64 v, int n) {
  const __m256i lane = _mm256_setr_epi64x(0, 1, 2, 3);
  return _mm256_and_pd(v, _mm256_castsi256_pd(_mm256_cmpgt_epi64(_mm256_set1_epi64x(n), lane)));
}

// The first n elements, zeros elsewhere; nothing past them is touched. There is no such load of halves.
inline Reg32 reg_load_part(const float* p, int n) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_maskload_ps(p, _mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane));
}
inline Reg64 reg_load_part(const double* p, int n) {
  const __m256i lane = _mm256_setr_epi64x(0, 1, 2, 3);
  return _mm256_maskload_pd(p, _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), lane));
}

inline __m128i bits16(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
inline __m128i bits8(const void* p) { return _mm_loadl_epi64(static_cast<const __m128i*>(p)); }
inline Reg32 reg_load(const float* p) { return _mm256_loadu_ps(p); }
inline Reg64 reg_load(const double* p) { return _mm256_loadu_pd(p); }
inline Reg32 reg_load(const Half* p) { return _mm256_cvtph_ps(bits16(p)); }
inline Reg32 reg_load(const Bfloat* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits16(p)), 16));
}
inline Reg32 reg_load(const std::uint16_t* p) { return _mm256_cvtepi32_ps(_mm256_cvtepu16_epi32(bits16(p))); }
inline Reg32 reg_load(const std::int16_t* p) { return _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(bits16(p))); }
inline Reg32 reg_load(const std::uint8_t* p) { return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bits8(p))); }

inline __m128i to_bits(const Half*, Reg32 v) {
  return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline __m128i to_bits(const Bfloat*, Reg32 v) {  // to nearest even; a NaN keeps its sign and becomes quiet
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, odd), _mm256_set1_epi32(0x7fff));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
}
inline void reg_store(float* p, Reg32 v) { _mm256_storeu_ps(p, v); }
inline void reg_store(double* p, Reg64 v) { _mm256_storeu_pd(p, v); }
template <class T> inline void reg_store(T* p, Reg32 v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), to_bits(p, v));
}
inline void reg_stream(float* p, Reg32 v) { _mm256_stream_ps(p, v); }
inline void reg_stream(double* p, Reg64 v) { _mm256_stream_pd(p, v); }
template <class T> inline void reg_stream(T* p, Reg32 v) {
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), to_bits(p, v));
}
inline void stream_fence() { _mm_sfence(); }

inline Reg64 reg_load_wide(const float* p) { return _mm256_cvtps_pd(_mm_loadu_ps(p)); }
inline Reg64 widen_piece(const Reg32* r, int piece) {
  return _mm256_cvtps_pd(piece % 2 ? _mm256_extractf128_ps(r[piece / 2], 1) : _mm256_castps256_ps128(r[piece / 2]));
}

inline float fold(const Reg32* r) {
  const __m256 a = _mm256_add_ps(r[0], r[1]);
  const __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  const __m128 c = _mm_add_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_add_ss(c, _mm_movehdup_ps(c)));
}
inline double fold(const Reg64* r) {
  const __m256d a = _mm256_add_pd(r[0], r[1]);
  const __m128d b = _mm_add_pd(_mm256_castpd256_pd128(a), _mm256_extractf128_pd(a, 1));
  return _mm_cvtsd_f64(_mm_add_sd(b, _mm_unpackhi_pd(b, b)));
}

// Sixteen calls of fold() at a time: lane k is the sum of rows[k], taken in the order of fold() and so with its bits.
inline void fold_rows(const Reg32 (*rows)[2], Reg32* sums) {
  const auto halves = [](Reg32 a, Reg32 b) {  // i with i + 4: a and b side by side
    return _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
  };
  const auto pairs = [](Reg32 a, Reg32 b) {  // i with i + 2
    return _mm256_add_ps(_mm256_shuffle_ps(a, b, 0x44), _mm256_shuffle_ps(a, b, 0xee));
  };
  for (int s = 0; s < 2; ++s, rows += 8) {
    Reg32 four[4];
    for (int k = 0; k < 4; ++k)  // rows k, k + 4, so that all end in order
      four[k] = halves(_mm256_add_ps(rows[k][0], rows[k][1]), _mm256_add_ps(rows[k + 4][0], rows[k + 4][1]));
    const Reg32 a = pairs(four[0], four[1]), b = pairs(four[2], four[3]);
    sums[s] = _mm256_add_ps(_mm256_shuffle_ps(a, b, 0x88), _mm256_shuffle_ps(a, b, 0xdd));
  }
}
inline float first_lane(const Reg32* r) { return _mm256_cvtss_f32(r[0]); }
inline double first_lane(const Reg64* r) { return _mm256_cvtsd_f64(r[0]); }

}  // namespace
}  // namespace normkit
