/* What Python hands over: one struct for all verbs, fields of eight bytes each, in the order of cpu_library.py. */
#pragma once
#include <stdint.h>

typedef int64_t i64;
typedef double f64;

enum { FLOAT32, FLOAT64, BFLOAT16, FLOAT16 };
enum { NONE, RELU, LEAKY_RELU, SILU };

/* Numbers (i), floating ones (d) and addresses (p), once as fields and once as the names that both sides compare: first
   what calls that are alike share. An activation is (samples, channels, pixels) or, with is_rows, (samples·pixels,
   channels), without gaps; all of a call are of `dtype`. Of a vector of the channels, *_dtype tells what it holds; mean
   and invstd are of the computing dtype, sums, dsums and counted of float64. What is not given is 0. */
#define FIELDS(i, d, p)                                                                                                \
    i(is_rows) i(samples) i(channels) i(pixels) i(dtype) i(activation) d(leaky_slope) i(weight_dtype) i(bias_dtype)    \
    i(running_mean_dtype) i(running_var_dtype) d(most)                                                                 \
    i(threads) d(tag) p(x) p(residual) p(mask) p(weight) p(bias) p(mean) p(invstd) p(sums)                             \
    p(y) p(running_mean) p(running_var) p(counter) d(eps) d(momentum)                                                  \
    p(dy) p(dsums) p(counted) p(dweight) p(dbias) p(dx) p(dresidual)

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
