/* The verbs for one instruction set: compiled once for each, with LEVEL its name. */
#include <stdlib.h>

#include "call.h"
#include "instructions.h"
#include "numbers.h"
#include "shape.h"

#define JOINED(a, b) a##_##b
#define JOIN(a, b) JOINED(a, b)

#define VECTOR SIZED(Vector)
#define INTEGERS SIZED(Integers)

static inline f64 at_least_one(f64 count) { return count < 1 ? 1 : count; }

/* Computed with in float32: float32 itself and both halves. */
#define T float
#define INTEGER int32_t
#define SIZED(name) JOIN(name, t32)
#define BIAS 127
#define MANTISSA 23
#define DEGREE 8
#define LARGEST_EXPONENT 150
#define ROUNDER 12582912.0f /* 1.5·2^23 */
#define LN2_HIGH 0.693359375f
#define LN2_LOW -2.12194440e-4f
#define ADD_PRODUCT add_exact
#include "vectors.h"

INLINE void widen_t32(Floats value, Doubles* to) {
    to[0] = lower(value);
    to[1] = upper(value);
}

#define E float
#define NAME(name) JOIN(name, float32)
#define READ take_t32
#define WRITE put_t32
#define ONE(at) (*(at))
#include "stages.h"
#include "verbs.h"
#undef E
#undef NAME
#undef READ
#undef WRITE
#undef ONE

#define E u16
#define NAME(name) JOIN(name, bfloat16)
#define READ unpack_bfloat16
#define WRITE pack_bfloat16
#define ONE(at) from_bfloat16(*(at))
#include "stages.h"
#include "verbs.h"
#undef NAME
#undef READ
#undef WRITE
#undef ONE

#define NAME(name) JOIN(name, float16)
#define READ unpack_float16
#define WRITE pack_float16
#define ONE(at) from_float16(*(at))
#include "stages.h"
#include "verbs.h"
#undef E
#undef NAME
#undef READ
#undef WRITE
#undef ONE

#undef T
#undef INTEGER
#undef SIZED
#undef BIAS
#undef MANTISSA
#undef DEGREE
#undef LARGEST_EXPONENT
#undef ROUNDER
#undef LN2_HIGH
#undef LN2_LOW
#undef ADD_PRODUCT

#define T double
#define INTEGER i64
#define SIZED(name) JOIN(name, t64)
#define BIAS 1023
#define MANTISSA 52
#define DEGREE 14
#define LARGEST_EXPONENT 750
#define ROUNDER 6755399441055744.0 /* 1.5·2^52 */
#define LN2_HIGH 6.93147180369123816490e-01
#define LN2_LOW 1.90821492927058770002e-10
#define ADD_PRODUCT(sum, a, b) (sum + a * b)
#include "vectors.h"

INLINE void widen_t64(Doubles value, Doubles* to) { *to = value; }

#define E double
#define NAME(name) JOIN(name, float64)
#define READ take_t64
#define WRITE put_t64
#define ONE(at) (*(at))
#include "stages.h"
#include "verbs.h"

#define FOR_DTYPE(verb)                                                                                                \
    static int verb(const Call* call) {                                                                                \
        switch (call->dtype) {                                                                                         \
            case FLOAT32: return verb##_float32(call);                                                                 \
            case FLOAT64: return verb##_float64(call);                                                                 \
            case BFLOAT16: return verb##_bfloat16(call);                                                               \
            default: return verb##_float16(call);                                                                      \
        }                                                                                                              \
    }
FOR_DTYPE(batch_sums)
FOR_DTYPE(normalize)
FOR_DTYPE(grad_sums)
FOR_DTYPE(grad_input)

const Verbs JOIN(verbs, LEVEL) = {batch_sums, normalize, grad_sums, grad_input};
