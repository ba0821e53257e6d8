/* The verbs for one instruction set: compiled once for each, with LEVEL its name. */
#include <stdlib.h>

#include "call.h"
#include "numbers.h"
#include "shape.h"

#define JOINED(a, b) a##_##b
#define JOIN(a, b) JOINED(a, b)

static inline f64 at_least_one(f64 count) { return count < 1 ? 1 : count; }

#ifdef __FMA__
#define FUSED(sum, a, b) __builtin_fma(a, b, sum)
#else
#define FUSED(sum, a, b) (sum + (f64)(a) * (f64)(b))
#endif

#define T float
#define NAME(name) JOIN(name, f32)
#define INTEGER int32_t
#define ADD_PRODUCT(sum, a, b) FUSED(sum, a, b) /* of 24 bits each: exact in float64 */
#define DEGREE 8
#define LARGEST_EXPONENT 150
#define ROUNDER 12582912.0f /* 1.5·2^23 */
#define LN2_HIGH 0.693359375f
#define LN2_LOW -2.12194440e-4f
INLINE float two_to_f32(int32_t k) { return float_of((u32)(k + 127) << 23); }
#include "stages.h"
#include "verbs.h"
#undef T
#undef NAME
#undef INTEGER
#undef ADD_PRODUCT
#undef DEGREE
#undef LARGEST_EXPONENT
#undef ROUNDER
#undef LN2_HIGH
#undef LN2_LOW

#define T double
#define NAME(name) JOIN(name, f64)
#define INTEGER i64
#define ADD_PRODUCT(sum, a, b) (sum + a * b)
#define DEGREE 14
#define LARGEST_EXPONENT 750
#define ROUNDER 6755399441055744.0 /* 1.5·2^52 */
#define LN2_HIGH 6.93147180369123816490e-01
#define LN2_LOW 1.90821492927058770002e-10
INLINE double two_to_f64(i64 k) {
    i64 bits = (k + 1023) << 52;
    double value;
    memcpy(&value, &bits, 8);
    return value;
}
#include "stages.h"
#include "verbs.h"

#define OF_DTYPE(verb)                                                                                                 \
    static int verb(const Call* call) { return call->dtype == FLOAT64 ? verb##_f64(call) : verb##_f32(call); }
OF_DTYPE(batch_sums)
OF_DTYPE(normalize)
OF_DTYPE(grad_sums)
OF_DTYPE(grad_input)

const Verbs JOIN(verbs, LEVEL) = {batch_sums, normalize, grad_sums, grad_input};
