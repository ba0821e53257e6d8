/* Conversions of eight numbers: between float32 and the halves, and of float32 to float64. */
#pragma once
#include "numbers.h"

typedef float Floats __attribute__((vector_size(32)));
typedef f64 Doubles __attribute__((vector_size(32)));

INLINE void add_four(f64* to, Doubles more) {
    Doubles value;
    memcpy(&value, to, sizeof value);
    value += more;
    memcpy(to, &value, sizeof value);
}

#ifdef __AVX2__
#include <immintrin.h>

INLINE Floats unpack_bfloat16(const u16* from) {
    return (Floats)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)from)), 16);
}

INLINE void pack_bfloat16(u16* to, Floats value) {
    __m256i bits = (__m256i)value, odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), (__m256i)(value != value));
    rounded = _mm256_srli_epi32(rounded, 16);
    __m128i halves = _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
    _mm_storeu_si128((__m128i*)to, halves);
}

INLINE Floats unpack_float16(const u16* from) {
    return (Floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from));
}

INLINE void pack_float16(u16* to, Floats value) {
    _mm_storeu_si128((__m128i*)to, _mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT));
}

INLINE Doubles lower(Floats value) { return (Doubles)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)value)); }
INLINE Doubles upper(Floats value) { return (Doubles)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)value, 1)); }

/* sum + a·b of numbers that were float32: their product is exact in float64, so that fusing changes no bit. */
INLINE Doubles add_exact(Doubles sum, Doubles a, Doubles b) {
    return (Doubles)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)sum);
}

#else

#define EIGHT(expression) for (int l = 0; l < 8; l++) expression

INLINE Floats unpack_bfloat16(const u16* from) {
    Floats value;
    EIGHT(value[l] = from_bfloat16(from[l]));
    return value;
}

INLINE Floats unpack_float16(const u16* from) {
    Floats value;
    EIGHT(value[l] = from_float16(from[l]));
    return value;
}

INLINE void pack_bfloat16(u16* to, Floats value) { EIGHT(to[l] = to_bfloat16(value[l])); }
INLINE void pack_float16(u16* to, Floats value) { EIGHT(to[l] = to_float16(value[l])); }

INLINE Doubles lower(Floats value) { return (Doubles){value[0], value[1], value[2], value[3]}; }
INLINE Doubles upper(Floats value) { return (Doubles){value[4], value[5], value[6], value[7]}; }
INLINE Doubles add_exact(Doubles sum, Doubles a, Doubles b) { return sum + a * b; }

#endif
