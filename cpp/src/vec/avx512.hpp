// x86-64-v4: 16 floats or 8 doubles are one register each, and masks make every tail a single load or store.
#pragma once

#include <immintrin.h>

namespace normkit {
namespace {

using Reg32 = __m512;
using Reg64 = __m512d;
constexpr int kLanes32 = 16, kLanes64 = 8;
constexpr int kRegisters = 32;
constexpr bool kMaskedParts = true;

inline Reg32 reg_set(float v) { return _mm512_set1_ps(v); }
inline Reg32 reg_add(Reg32 a, Reg32 b) { return _mm512_add_ps(a, b); }
inline Reg32 reg_sub(Reg32 a, Reg32 b) { return _mm512_sub_ps(a, b); }
inline Reg32 reg_mul(Reg32 a, Reg32 b) { return _mm512_mul_ps(a, b); }
inline Reg32 reg_mul_add(Reg32 a, Reg32 b, Reg32 c) { return _mm512_fmadd_ps(a, b, c); }
inline Reg64 reg_set(double v) { return _mm512_set1_pd(v); }
inline Reg64 reg_add(Reg64 a, Reg64 b) { return _mm512_add_pd(a, b); }
inline Reg64 reg_sub(Reg64 a, Reg64 b) { return _mm512_sub_pd(a, b); }
inline Reg64 reg_mul(Reg64 a, Reg64 b) { return _mm512_mul_pd(a, b); }
inline Reg64 reg_mul_add(Reg64 a, Reg64 b, Reg64 c) { return _mm512_fmadd_pd(a, b, c); }
inline Reg32 reg_div(Reg32 a, Reg32 b) { return _mm512_div_ps(a, b); }
inline Reg64 reg_div(Reg64 a, Reg64 b) { return _mm512_div_pd(a, b); }

// z > 0 ? a : b in every lane; v where m is not 0, else 0; the last bits of t moved to where the exponent is.
inline Reg32 reg_positive(Reg32 z, Reg32 a, Reg32 b) {
  return _mm512_mask_mov_ps(b, _mm512_cmp_ps_mask(z, _mm512_setzero_ps(), _CMP_GT_OQ), a);
}
inline Reg64 reg_positive(Reg64 z, Reg64 a, Reg64 b) {
  return _mm512_mask_mov_pd(b, _mm512_cmp_pd_mask(z, _mm512_setzero_pd(), _CMP_GT_OQ), a);
}
inline Reg32 reg_where(Reg32 m, Reg32 v) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(m, _mm512_setzero_ps(), _CMP_NEQ_UQ), v);
}
inline Reg64 reg_where(Reg64 m, Reg64 v) {
  return _mm512_maskz_mov_pd(_mm512_cmp_pd_mask(m, _mm512_setzero_pd(), _CMP_NEQ_UQ), v);
}
inline Reg32 reg_shift_exponent(Reg32 t) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(t), 23)); }
inline Reg64 reg_shift_exponent(Reg64 t) { return _mm512_castsi512_pd(_mm512_slli_epi64(_mm512_castpd_si512(t), 52)); }

inline __mmask16 first16(int n) { return static_cast<__mmask16>((1u << n) - 1u); }
inline __mmask8 first8(int n) { return static_cast<__mmask8>((1u << n) - 1u); }
inline Reg32 reg_keep(Reg32 v, int n) { return _mm512_maskz_mov_ps(first16(n), v); }
inline Reg64 reg_keep(Reg64 v, int n) { return _mm512_maskz_mov_pd(first8(n), v); }

// v where the first n bytes are not 0, else 0.
inline Reg32 reg_where(const std::uint8_t* p, int n, Reg32 v) {
  const __m128i bytes = _mm_maskz_loadu_epi8(first16(n), p);
  return _mm512_maskz_mov_ps(_mm_test_epi8_mask(bytes, bytes), v);
}
inline Reg64 reg_where(const std::uint8_t* p, int n, Reg64 v) {
  const __m128i bytes = _mm_maskz_loadu_epi8(first8(n), p);
  return _mm512_maskz_mov_pd(static_cast<__mmask8>(_mm_test_epi8_mask(bytes, bytes)), v);
}

// Sixteen 16-bit or 8-bit integers to floats and back.
inline Reg32 from_bits(const Half*, __m256i v) { return _mm512_cvtph_ps(v); }
// The words of a vector, each in the upper half of a double word, and back: one permutation each way.
inline Reg32 from_bits(const Bfloat*, __m256i v) {
  const __m512i where = _mm512_slli_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), 16);
  return _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, where, _mm512_castsi256_si512(v)));
}
inline __m256i upper_words(__m512i v) {
  const __m512i where = _mm512_set_epi32(0, 0, 0, 0, 0, 0, 0, 0, 0x1f001d, 0x1b0019, 0x170015, 0x130011, 0xf000d,
                                         0xb0009, 0x70005, 0x30001);
  return _mm512_castsi512_si256(_mm512_permutexvar_epi16(where, v));
}
inline Reg32 from_bits(const std::uint16_t*, __m256i v) { return _mm512_cvtepi32_ps(_mm512_cvtepu16_epi32(v)); }
inline Reg32 from_bits(const std::int16_t*, __m256i v) { return _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(v)); }
inline Reg32 from_bits(const std::uint8_t*, __m128i v) { return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(v)); }
inline __m256i to_bits(const Half*, Reg32 v) {
  return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline __m256i to_bits(const Bfloat*, Reg32 v) {  // to nearest even; a NaN keeps its sign and becomes quiet
  const __m512i bits = _mm512_castps_si512(v), half = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
  const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
  const __m512i rounded = _mm512_mask_add_epi32(half, odd, half, _mm512_set1_epi32(1));
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  return upper_words(_mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000)));
}

inline Reg32 reg_load(const float* p) { return _mm512_loadu_ps(p); }
inline Reg64 reg_load(const double* p) { return _mm512_loadu_pd(p); }
template <class T> inline Reg32 reg_load(const T* p) {
  if constexpr (sizeof(T) == 2) return from_bits(p, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  else return from_bits(p, _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline Reg32 reg_load_part(const float* p, int n) { return _mm512_maskz_loadu_ps(first16(n), p); }
inline Reg64 reg_load_part(const double* p, int n) { return _mm512_maskz_loadu_pd(first8(n), p); }
template <class T> inline Reg32 reg_load_part(const T* p, int n) {
  if constexpr (sizeof(T) == 2) return from_bits(p, _mm256_maskz_loadu_epi16(first16(n), p));
  else return from_bits(p, _mm_maskz_loadu_epi8(first16(n), p));
}

inline void reg_store(float* p, Reg32 v) { _mm512_storeu_ps(p, v); }
inline void reg_store(double* p, Reg64 v) { _mm512_storeu_pd(p, v); }
template <class T> inline void reg_store(T* p, Reg32 v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_bits(p, v));
}
inline void reg_store_part(float* p, Reg32 v, int n) { _mm512_mask_storeu_ps(p, first16(n), v); }
inline void reg_store_part(double* p, Reg64 v, int n) { _mm512_mask_storeu_pd(p, first8(n), v); }
template <class T> inline void reg_store_part(T* p, Reg32 v, int n) {
  _mm256_mask_storeu_epi16(p, first16(n), to_bits(p, v));
}
inline void reg_stream(float* p, Reg32 v) { _mm512_stream_ps(p, v); }
inline void reg_stream(double* p, Reg64 v) { _mm512_stream_pd(p, v); }
template <class T> inline void reg_stream(T* p, Reg32 v) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), to_bits(p, v));
}
inline void stream_fence() { _mm_sfence(); }

// The n-th kLanes64 of 16 floats, as doubles.
inline Reg64 reg_load_wide(const float* p) { return _mm512_cvtps_pd(_mm256_loadu_ps(p)); }
inline Reg64 widen_piece(const Reg32* r, int piece) {
  return _mm512_cvtps_pd(piece ? _mm512_extractf32x8_ps(r[0], 1) : _mm512_castps512_ps256(r[0]));
}

// The sum of 16 (8) lanes, always folded in halves: i with i + 8, i + 4, i + 2, i + 1.
inline float fold(const Reg32* r) {
  const __m256 a = _mm256_add_ps(_mm512_castps512_ps256(r[0]), _mm512_extractf32x8_ps(r[0], 1));
  const __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  const __m128 c = _mm_add_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_add_ss(c, _mm_movehdup_ps(c)));
}
inline double fold(const Reg64* r) {
  const __m256d a = _mm256_add_pd(_mm512_castpd512_pd256(r[0]), _mm512_extractf64x4_pd(r[0], 1));
  const __m128d b = _mm_add_pd(_mm256_castpd256_pd128(a), _mm256_extractf128_pd(a, 1));
  return _mm_cvtsd_f64(_mm_add_sd(b, _mm_unpackhi_pd(b, b)));
}

// Sixteen (eight) calls of fold() at a time: lane k is the sum of rows[k], taken in the order of fold() and so with its
// bits.
inline void fold_rows(const Reg32 (*rows)[1], Reg32* sums) {
  const auto halves = [](Reg32 a, Reg32 b) {  // i with i + 8: a and b side by side
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
  };
  const auto quarters = [](Reg32 a, Reg32 b) {  // i with i + 4
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  };
  const auto pairs = [](Reg32 a, Reg32 b) {  // i with i + 2
    return _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
  };
  Reg32 four[4];
  for (int k = 0; k < 4; ++k)  // rows k, k + 4, k + 8, k + 12, so that all end in order
    four[k] = quarters(halves(rows[k][0], rows[k + 4][0]), halves(rows[k + 8][0], rows[k + 12][0]));
  const Reg32 a = pairs(four[0], four[1]), b = pairs(four[2], four[3]);
  sums[0] = _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x88), _mm512_shuffle_ps(a, b, 0xdd));
}
inline void fold_rows(const Reg64 (*rows)[1], Reg64* sums) {
  const auto halves = [](Reg64 a, Reg64 b) {  // i with i + 4
    return _mm512_add_pd(_mm512_shuffle_f64x2(a, b, 0x44), _mm512_shuffle_f64x2(a, b, 0xee));
  };
  const auto quarters = [](Reg64 a, Reg64 b) {  // i with i + 2
    return _mm512_add_pd(_mm512_shuffle_f64x2(a, b, 0x88), _mm512_shuffle_f64x2(a, b, 0xdd));
  };
  const Reg64 a = quarters(halves(rows[0][0], rows[2][0]), halves(rows[4][0], rows[6][0]));
  const Reg64 b = quarters(halves(rows[1][0], rows[3][0]), halves(rows[5][0], rows[7][0]));
  sums[0] = _mm512_add_pd(_mm512_unpacklo_pd(a, b), _mm512_unpackhi_pd(a, b));
}
inline float first_lane(const Reg32* r) { return _mm512_cvtss_f32(r[0]); }
inline double first_lane(const Reg64* r) { return _mm512_cvtsd_f64(r[0]); }

}  // namespace
}  // namespace normkit
