/* What is done with one block, in the computing dtype T: loops over lines, a few operations for each element.

   Included once for float, once for double. A stage takes elements from where they are, or from the scratch where the
   stage before left them. COLUMNS is a constant wherever these are inlined: whether a channel is a column, else a line.
   Every operation is rounded by itself, so that all instruction sets give the same bits; ADD_PRODUCT may fuse where the
   product is exact, which rounds the same. */

typedef struct {
    const T* at;
    i64 step; /* from one line to the next */
} NAME(Source);

typedef struct {
    T* at;
    i64 step;
} NAME(Target);

/* By channel: z = (x - mean)·scale + shift; dx = (dz - mean_dz - (x - mean)·slope)·scale. */
typedef struct {
    T *mean, *scale, *shift, *mean_dz, *slope;
} NAME(Channels);

/* 0 where masked out. */
OUTLINE void NAME(drop)(const Call* call, Block b, NAME(Target) t) {
    const uint8_t* mask = (const uint8_t*)call->mask + b.position;
    for (i64 i = 0; i < b.lines; i++) {
        T* line = t.at + i * t.step;
        if (!call->is_rows) {
            for (i64 j = 0; j < b.length; j++) line[j] = mask[j] ? line[j] : 0;
        } else if (!mask[i]) {
            memset(line, 0, b.length * sizeof(T));
        }
    }
}

/* Elements as T, 0 where masked out: where they are if they are so already, else in scratch. */
OUTLINE NAME(Source) NAME(load)(const Call* call, const void* from, Block b, T* scratch) {
    int is_half = sizeof(T) == sizeof(float) && call->dtype != FLOAT32;
    if (!is_half && !call->mask) return (NAME(Source)){(const T*)from + b.at, b.step};
    for (i64 i = 0; i < b.lines; i++) {
        const u16* half = (const u16*)from + b.at + i * b.step;
        T* line = scratch + i * b.length;
        if (!is_half) memcpy(line, (const T*)from + b.at + i * b.step, b.length * sizeof(T));
        else if (call->dtype == BFLOAT16) for (i64 j = 0; j < b.length; j++) line[j] = from_bfloat16(half[j]);
        else for (i64 j = 0; j < b.length; j++) line[j] = from_float16(half[j]);
    }
    if (call->mask) NAME(drop)(call, b, (NAME(Target)){scratch, b.length});
    return (NAME(Source)){scratch, b.length};
}

/* Where a stage is to leave what `store` then takes: the place itself, or scratch if it is to be rounded there. */
INLINE NAME(Target) NAME(target)(const Call* call, void* to, Block b, T* scratch) {
    int is_half = sizeof(T) == sizeof(float) && call->dtype != FLOAT32;
    return is_half ? (NAME(Target)){scratch, b.length} : (NAME(Target)){(T*)to + b.at, b.step};
}

/* 0 where masked out, and in the dtype of the activations. */
OUTLINE void NAME(store)(const Call* call, NAME(Target) from, void* to, Block b) {
    if (call->mask) NAME(drop)(call, b, from);
    if (sizeof(T) != sizeof(float) || call->dtype == FLOAT32) return;
    for (i64 i = 0; i < b.lines; i++) {
        const T* line = from.at + i * from.step;
        u16* half = (u16*)to + b.at + i * b.step;
        if (call->dtype == BFLOAT16) for (i64 j = 0; j < b.length; j++) half[j] = to_bfloat16(line[j]);
        else for (i64 j = 0; j < b.length; j++) half[j] = to_float16(line[j]);
    }
}

/* e^z = 2^k·e^r, |r| <= ln2 / 2, e^r as its Taylor polynomial: of the degree whose remainder is beyond T's last place.
   Factors of two in two steps, so that what is too large becomes infinite, and too small 0. */
INLINE T NAME(exponential)(T z) {
    T bounded = z > LARGEST_EXPONENT ? LARGEST_EXPONENT : z < -LARGEST_EXPONENT ? -LARGEST_EXPONENT : z; /* keeps NaN */
    T k = (bounded * (T)1.44269504088896341 + ROUNDER) - ROUNDER;
    T r = (bounded - k * LN2_HIGH) - k * LN2_LOW, e = 1;
    for (int n = DEGREE; n > 0; n--) e = e * (r * ((T)1 / n)) + 1;
    INTEGER first = (INTEGER)(k * (T)0.5), rest = (INTEGER)k - first;
    return e * NAME(two_to)(first) * NAME(two_to)(rest);
}

/* At z = 0 relu is 0 and so is its derivative; leaky_relu has its slope there. NaN stays. */
INLINE T NAME(activate)(T z, int activation, T leaky_slope) {
    if (activation == RELU) return z <= 0 ? 0 : z;
    if (activation == LEAKY_RELU) return z <= 0 ? z * leaky_slope : z;
    return activation == SILU ? z / (1 + NAME(exponential)(-z)) : z;
}

INLINE T NAME(activate_grad)(T dy, T z, int activation, T leaky_slope) {
    if (activation == RELU) return z > 0 ? dy : 0;
    if (activation == LEAKY_RELU) return z > 0 ? dy : dy * leaky_slope;
    if (activation == NONE) return dy;
    T sigmoid = 1 / (1 + NAME(exponential)(-z));
    return dy * sigmoid * (1 + z * (1 - sigmoid));
}

/* y = activation(z + residual) or, given dy, dz = dy·activation'(z + residual): z is rounded alike in both. */
INLINE void NAME(pointwise)(Block b, NAME(Source) x, NAME(Source) residual, NAME(Source) dy, NAME(Channels) c,
                            T leaky_slope, NAME(Target) out, int COLUMNS, int activation, int has_residual, int is_grad) {
    for (i64 i = 0; i < b.lines; i++) {
        const T *xs = x.at + i * x.step, *rs = residual.at + i * residual.step, *dys = dy.at + i * dy.step;
        T* restrict to = out.at + i * out.step;
        for (i64 j = 0; j < b.length; j++) {
            i64 channel = b.channel + (COLUMNS ? j : i);
            T z = (xs[j] - c.mean[channel]) * c.scale[channel] + c.shift[channel];
            if (has_residual) z += rs[j];
            to[j] = is_grad ? NAME(activate_grad)(dys[j], z, activation, leaky_slope)
                            : NAME(activate)(z, activation, leaky_slope);
        }
    }
}

INLINE void NAME(input_grad)(Block b, NAME(Source) dz, NAME(Source) x, NAME(Channels) c, NAME(Target) out, int COLUMNS) {
    for (i64 i = 0; i < b.lines; i++) {
        const T *xs = x.at + i * x.step, *dzs = dz.at + i * dz.step;
        T* restrict to = out.at + i * out.step;
        for (i64 j = 0; j < b.length; j++) {
            i64 k = b.channel + (COLUMNS ? j : i);
            to[j] = (dzs[j] - c.mean_dz[k] - (xs[j] - c.mean[k]) * c.slope[k]) * c.scale[k];
        }
    }
}

/* Σu and Σu·v of a few elements, into as many partial sums. v is x - mean if there is a mean. */
INLINE void NAME(add)(const T* u, const T* x, const T* mean, i64 per_element, i64 count, f64* first, f64* second) {
    for (i64 l = 0; l < count; l++) {
        T v = mean ? x[l] - mean[l * per_element] : x[l];
        first[l] += u[l];
        second[l] = ADD_PRODUCT(second[l], u[l], v);
    }
}

/* The sums of planes: LANES of partial sums for each line. */
INLINE void NAME(sum_lines)(Block b, NAME(Source) u, NAME(Source) x, const T* mean, f64* sums, f64* products) {
    for (i64 i = 0; i < b.lines; i++) {
        const T *us = u.at + i * u.step, *xs = x.at + i * x.step, *m = mean ? mean + b.channel + i : 0;
        f64 first[LANES], second[LANES];
        memcpy(first, sums + i * LANES, sizeof first);
        memcpy(second, products + i * LANES, sizeof second);
        i64 j = 0;
        for (; j + LANES <= b.length; j += LANES) NAME(add)(us + j, xs + j, m, 0, LANES, first, second);
        NAME(add)(us + j, xs + j, m, 0, b.length - j, first, second);
        memcpy(sums + i * LANES, first, sizeof first);
        memcpy(products + i * LANES, second, sizeof second);
    }
}

/* The sums of rows: one partial sum for each column, LANES columns at a time. */
INLINE void NAME(sum_columns)(Block b, NAME(Source) u, NAME(Source) x, const T* mean, f64* sums, f64* products) {
    i64 j = 0;
    for (; j + LANES <= b.length; j += LANES) {
        f64 first[LANES], second[LANES];
        memcpy(first, sums + j, sizeof first);
        memcpy(second, products + j, sizeof second);
        for (i64 i = 0; i < b.lines; i++) {
            const T *us = u.at + i * u.step + j, *xs = x.at + i * x.step + j;
            NAME(add)(us, xs, mean ? mean + b.channel + j : 0, 1, LANES, first, second);
        }
        memcpy(sums + j, first, sizeof first);
        memcpy(products + j, second, sizeof second);
    }
    for (i64 i = 0; i < b.lines; i++) {
        const T *us = u.at + i * u.step + j, *xs = x.at + i * x.step + j;
        NAME(add)(us, xs, mean ? mean + b.channel + j : 0, 1, b.length - j, sums + j, products + j);
    }
}
