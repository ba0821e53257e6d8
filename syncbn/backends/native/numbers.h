/* Half-precision numbers, one by one: those of a channel's vector, and where there is no instruction for several. */
#pragma once
#include <string.h>

#include "call.h"

#define INLINE static inline __attribute__((always_inline))
#define OUTLINE static __attribute__((noinline))

typedef uint16_t u16;
typedef uint32_t u32;

INLINE u32 bits_of(float value) {
    u32 bits;
    memcpy(&bits, &value, 4);
    return bits;
}

INLINE float float_of(u32 bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

INLINE float from_bfloat16(u16 half) { return float_of((u32)half << 16); }

/* To the nearest, ties to even. */
INLINE u16 to_bfloat16(float value) {
    u32 bits = bits_of(value);
    return value != value ? 0x7fc0 : (u16)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

/* Exponent and mantissa move up 13 places and the exponent's bias grows by 112, that of infinity by as much again. A
   subnormal is what the number made of its bits and the exponent of 2^-14 has beyond 2^-14. */
INLINE float from_float16(u16 half) {
    u32 low = (u32)(half & 0x7fff) << 13, exponent = low & 0x0f800000;
    u32 normal = low + (112u << 23) + (exponent == 0x0f800000 ? 112u << 23 : 0);
    u32 subnormal = bits_of(float_of(low + (113u << 23)) - float_of(113u << 23));
    return float_of((exponent == 0 ? subnormal : normal) | (u32)(half & 0x8000) << 16);
}

/* To the nearest, ties to even; what is subnormal is rounded by adding 0.5, of which 2^-24 is the last place. */
INLINE u16 to_float16(float value) {
    u32 bits = bits_of(value), sign = bits & 0x80000000, size = bits ^ sign;
    u32 normal = (size - (112u << 23) + 0xfff + ((size >> 13) & 1)) >> 13;
    u32 subnormal = bits_of(float_of(size) + 0.5f) - bits_of(0.5f);
    u32 not_finite = size > 0x7f800000 ? 0x7e00 : 0x7c00;
    u32 half = size >= (143u << 23) ? not_finite : size < (113u << 23) ? subnormal : normal;
    return (u16)(half | sign >> 16);
}

/* Element c of a channel's vector. */
static inline f64 get(const void* from, i64 dtype, i64 c) {
    switch (dtype) {
        case FLOAT32: return ((const float*)from)[c];
        case FLOAT64: return ((const f64*)from)[c];
        case BFLOAT16: return from_bfloat16(((const u16*)from)[c]);
        default: return from_float16(((const u16*)from)[c]);
    }
}

/* By way of float32 where it is a half, as torch rounds. */
static inline void set(void* to, i64 dtype, i64 c, f64 value) {
    switch (dtype) {
        case FLOAT32: ((float*)to)[c] = (float)value; break;
        case FLOAT64: ((f64*)to)[c] = value; break;
        case BFLOAT16: ((u16*)to)[c] = to_bfloat16((float)value); break;
        default: ((u16*)to)[c] = to_float16((float)value);
    }
}
