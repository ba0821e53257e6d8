/* What Python hands over: one struct for all verbs, fields of eight bytes each, in the order of cpu_library.py. */
#pragma once
#include <stdint.h>

typedef int64_t i64;
typedef double f64;

enum { FLOAT32, FLOAT64, BFLOAT16, FLOAT16 };
enum { NONE, RELU, LEAKY_RELU, SILU };

/* Numbers (i), floating ones (d) and pointers (p), once as fields and once as the names that both sides compare.
   An activation is (samples, channels, pixels) or, with is_rows, (samples·pixels, channels), without gaps; all of a
   call are of `dtype`. What belongs to a channel says what it holds; mean and invstd are of the computing dtype, sums
   and dsums of float64. What is not given is 0. */
#define FIELDS(i, d, p)                                                                                                \
    i(is_rows) i(samples) i(channels) i(pixels) i(dtype) i(threads) p(x) p(mask) d(tag) p(sums)                        \
    p(weight) i(weight_dtype) p(bias) i(bias_dtype) p(mean) p(invstd) i(activation) d(leaky_slope) p(residual)         \
    p(y) d(eps) p(running_mean) i(running_mean_dtype) p(running_var) i(running_var_dtype) p(counter) d(momentum)       \
    d(most) p(dy) p(dsums) p(count) p(dweight) p(dbias) p(dx) p(dresidual)

#define AS_INTEGER(name) i64 name;
#define AS_FLOATING(name) f64 name;
#define AS_POINTER(name) void* name;

typedef struct {
    FIELDS(AS_INTEGER, AS_FLOATING, AS_POINTER)
} Call;

/* The verbs for one instruction set; they return 0, or 1 where memory ran out. */
typedef struct {
    int (*batch_sums)(const Call*);
    int (*normalize)(const Call*);
    int (*grad_sums)(const Call*);
    int (*grad_input)(const Call*);
} Verbs;
