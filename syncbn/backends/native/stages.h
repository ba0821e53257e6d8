/* What is done with one block: loops over its lines, a vector of T at a time. Included once for each dtype of the
   activations, E: READ makes a vector of T of WIDTH elements, and WRITE elements of it. COLUMNS is a constant wherever
   these are inlined: whether a channel is a column, else a line. */

typedef struct {
    const void* at; /* E, or T where is_wide */
    i64 step;       /* from one line to the next */
    int is_wide;
} NAME(Source);

typedef struct {
    E* at;
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
        E* line = t.at + i * t.step;
        if (!call->is_rows) {
            for (i64 j = 0; j < b.length; j++) line[j] = mask[j] ? line[j] : 0;
        } else if (!mask[i]) {
            memset(line, 0, b.length * sizeof(E));
        }
    }
}

/* The elements of a block: where they are or, if lines are shorter than a vector or some elements are masked out, in
   scratch, in longer lines, with 0 in their place. Nothing of nothing. */
OUTLINE NAME(Source) NAME(load)(const Call* call, const void* from, Block b, E* scratch) {
    const E* at = (const E*)from + b.at;
    i64 step = at_least(SIZED(WIDTH), b.length);
    if (!from || (!call->mask && step == b.length)) return (NAME(Source)){from ? at : 0, b.step, 0};
    for (i64 i = 0; i < b.lines; i++) {
        E* line = scratch + i * step;
        for (i64 j = b.length; j < step; j++) line[j] = 0;
        memcpy(line, at + i * b.step, b.length * sizeof(E));
    }
    if (call->mask) NAME(drop)(call, b, (NAME(Target)){scratch, step});
    return (NAME(Source)){scratch, step, 0};
}

/* Where a stage leaves what `store` finishes: the place itself or, for lines shorter than a vector, scratch. */
INLINE NAME(Target) NAME(target)(void* to, Block b, E* scratch) {
    if (b.length < SIZED(WIDTH)) return (NAME(Target)){scratch, SIZED(WIDTH)};
    return (NAME(Target)){(E*)to + b.at, b.step};
}

OUTLINE void NAME(store)(const Call* call, NAME(Target) from, void* to, Block b) {
    E* at = (E*)to + b.at;
    for (i64 i = 0; from.at != at && i < b.lines; i++)
        memcpy(at + i * b.step, from.at + i * from.step, b.length * sizeof(E));
    if (call->mask) NAME(drop)(call, b, (NAME(Target)){at, b.step});
}

INLINE VECTOR NAME(read)(NAME(Source) s, i64 i, i64 j, int is_wide) {
    if (is_wide) return SIZED(take)((const T*)s.at + i * s.step + j);
    return READ((const E*)s.at + i * s.step + j);
}

/* `Channels` of a vector of columns, or of a line. */
typedef struct {
    VECTOR mean, scale, shift, mean_dz, slope;
} NAME(Numbers);

INLINE NAME(Numbers) NAME(of_columns)(NAME(Channels) c, i64 k) {
    return (NAME(Numbers)){SIZED(take)(c.mean + k), SIZED(take)(c.scale + k), SIZED(take)(c.shift + k),
                           SIZED(take)(c.mean_dz + k), SIZED(take)(c.slope + k)};
}

INLINE NAME(Numbers) NAME(of_line)(NAME(Channels) c, i64 k) {
    return (NAME(Numbers)){SIZED(all)(c.mean[k]), SIZED(all)(c.scale[k]), SIZED(all)(c.shift[k]),
                           SIZED(all)(c.mean_dz[k]), SIZED(all)(c.slope[k])};
}

/* Does something with every vector of a line, at its end again with some elements if it is no multiple of a vector. */
#define ALONG(length, j, something)                                                                                    \
    do {                                                                                                               \
        i64 line = at_least(SIZED(WIDTH), length), j = 0;                                                              \
        for (; j + SIZED(WIDTH) <= line; j += SIZED(WIDTH)) something;                                                 \
        if (j < line) {                                                                                                \
            j = line - SIZED(WIDTH);                                                                                   \
            something;                                                                                                 \
        }                                                                                                              \
    } while (0)

typedef struct {
    NAME(Source) x, residual, dy, dz;
    NAME(Target) y, dx;
    NAME(Channels) channels;
    T* room; /* for dz */
    T leaky_slope;
} NAME(Stage);

/* y = activation(z + residual) or, given dy, dz = dy·activation'(z + residual): z is rounded alike in both. */
INLINE void NAME(pointwise_at)(NAME(Stage) s, Block b, i64 i, i64 j, NAME(Numbers) n, int COLUMNS, int activation,
                               int has_residual, int is_grad) {
    if (COLUMNS) n = NAME(of_columns)(s.channels, b.channel + j);
    VECTOR z = (NAME(read)(s.x, i, j, 0) - n.mean) * n.scale + n.shift;
    if (has_residual) z += NAME(read)(s.residual, i, j, 0);
    if (!is_grad) {
        WRITE(s.y.at + i * s.y.step + j, SIZED(activate)(z, activation, s.leaky_slope));
        return;
    }
    VECTOR dz = SIZED(activate_grad)(NAME(read)(s.dy, i, j, 0), z, activation, s.leaky_slope);
    SIZED(put)(s.room + i * at_least(SIZED(WIDTH), b.length) + j, dz);
}

INLINE void NAME(pointwise)(NAME(Stage) s, Block b, int COLUMNS, int activation, int has_residual, int is_grad) {
    for (i64 i = 0; i < b.lines; i++) {
        NAME(Numbers) n = NAME(of_line)(s.channels, b.channel + (COLUMNS ? 0 : i));
        ALONG(b.length, j, NAME(pointwise_at)(s, b, i, j, n, COLUMNS, activation, has_residual, is_grad));
    }
}

INLINE void NAME(input_grad_at)(NAME(Stage) s, Block b, i64 i, i64 j, NAME(Numbers) n, int COLUMNS, int is_wide) {
    if (COLUMNS) n = NAME(of_columns)(s.channels, b.channel + j);
    VECTOR rest = NAME(read)(s.dz, i, j, is_wide) - n.mean_dz - (NAME(read)(s.x, i, j, 0) - n.mean) * n.slope;
    WRITE(s.dx.at + i * s.dx.step + j, rest * n.scale);
}

INLINE void NAME(input_grad)(NAME(Stage) s, Block b, int COLUMNS, int is_wide) {
    for (i64 i = 0; i < b.lines; i++) {
        NAME(Numbers) n = NAME(of_line)(s.channels, b.channel + (COLUMNS ? 0 : i));
        ALONG(b.length, j, NAME(input_grad_at)(s, b, i, j, n, COLUMNS, is_wide));
    }
}

INLINE void NAME(round_to)(Block b, NAME(Source) from, NAME(Target) to, int is_wide) {
    for (i64 i = 0; i < b.lines; i++)
        ALONG(b.length, j, WRITE(to.at + i * to.step + j, NAME(read)(from, i, j, is_wide)));
}

/* Of so many elements, LANES side by side and the next of them a number of lines down or of columns along: LANES sums
   each of x and x², in float64, in which the square of a float32 is exact ... */
INLINE void NAME(sum_squares)(NAME(Source) x, i64 i, i64 j, i64 down, i64 along, i64 times, f64* sums, f64* squares) {
    Doubles first[LANES / 4] = {{0}}, second[LANES / 4] = {{0}}, values[LANES / 4];
    for (i64 n = 0; n < times; n++) {
        for (int l = 0; l < LANES; l += SIZED(WIDTH))
            SIZED(widen)(NAME(read)(x, i + n * down, j + n * along + l, 0), values + l / 4);
        for (int q = 0; q < LANES / 4; q++) {
            first[q] += values[q];
            second[q] = ADD_PRODUCT(second[q], values[q], values[q]);
        }
    }
    for (int q = 0; q < LANES / 4; q++) add_four(sums + 4 * q, first[q]), add_four(squares + 4 * q, second[q]);
}

INLINE void NAME(flush)(VECTOR from, f64* into) {
    Doubles values[SIZED(WIDTH) / 4];
    SIZED(widen)(from, values);
    for (int q = 0; q < SIZED(WIDTH) / 4; q++) add_four(into + 4 * q, values[q]);
}

/* ... or of dz and dz·(x - mean), whose product is rounded to T anyway: RUN of them in T, then on in float64. */
INLINE void NAME(sum_products)(Block b, NAME(Source) dz, NAME(Source) x, const T* mean, i64 i, i64 j, i64 down,
                               i64 along, i64 times, f64* sums, f64* products, int COLUMNS, int is_wide) {
    enum { VECTORS = LANES / SIZED(WIDTH) };
    VECTOR m[VECTORS];
    for (int v = 0; v < VECTORS; v++)
        m[v] = COLUMNS ? SIZED(take)(mean + b.channel + j + v * SIZED(WIDTH)) : SIZED(all)(mean[b.channel + i]);
    for (i64 start = 0; start < times; start += RUN) {
        VECTOR first[VECTORS] = {{0}}, second[VECTORS] = {{0}};
        for (i64 n = start; n < at_most(times, start + RUN); n++) {
            for (int v = 0; v < VECTORS; v++) {
                i64 row = i + n * down, column = j + n * along + v * SIZED(WIDTH);
                VECTOR d = NAME(read)(dz, row, column, is_wide);
                first[v] += d;
                second[v] += d * (NAME(read)(x, row, column, 0) - m[v]);
            }
        }
        for (int v = 0; v < VECTORS; v++) {
            NAME(flush)(first[v], sums + v * SIZED(WIDTH));
            NAME(flush)(second[v], products + v * SIZED(WIDTH));
        }
    }
}

/* Of one element, likewise, into sums of its own. */
INLINE void NAME(sum_one)(Block b, NAME(Source) dz, NAME(Source) x, const T* mean, i64 i, i64 j, f64* sum, f64* product,
                          int COLUMNS, int is_wide, int is_grad) {
    T value = ONE((const E*)x.at + i * x.step + j);
    if (!is_grad) {
        *sum += value;
        *product += (f64)value * (f64)value;
        return;
    }
    T d = is_wide ? ((const T*)dz.at)[i * dz.step + j] : ONE((const E*)dz.at + i * dz.step + j);
    *sum += d;
    *product += d * (value - mean[b.channel + (COLUMNS ? j : i)]);
}

/* A block of planes: LANES of partial sums for each line; what is left of a line takes the first of them. */
INLINE void NAME(sum_lines)(Block b, NAME(Source) dz, NAME(Source) x, const T* mean, f64* sums, f64* products,
                            int is_wide, int is_grad) {
    i64 whole = b.length / LANES;
    for (i64 i = 0; i < b.lines; i++) {
        f64 *first = sums + i * LANES, *second = products + i * LANES;
        if (is_grad) NAME(sum_products)(b, dz, x, mean, i, 0, 0, LANES, whole, first, second, 0, is_wide);
        else NAME(sum_squares)(x, i, 0, 0, LANES, whole, first, second);
        for (i64 j = whole * LANES, l = 0; j < b.length; j++, l++)
            NAME(sum_one)(b, dz, x, mean, i, j, first + l, second + l, 0, is_wide, is_grad);
    }
}

/* A block of rows: one partial sum for each column. */
INLINE void NAME(sum_columns)(Block b, NAME(Source) dz, NAME(Source) x, const T* mean, f64* sums, f64* products,
                              int is_wide, int is_grad) {
    i64 j = 0;
    for (; j + LANES <= b.length; j += LANES) {
        if (is_grad) NAME(sum_products)(b, dz, x, mean, 0, j, 1, 0, b.lines, sums + j, products + j, 1, is_wide);
        else NAME(sum_squares)(x, 0, j, 1, 0, b.lines, sums + j, products + j);
    }
    for (; j < b.length; j++) {
        f64 sum = 0, product = 0;
        for (i64 i = 0; i < b.lines; i++) NAME(sum_one)(b, dz, x, mean, i, j, &sum, &product, 1, is_wide, is_grad);
        sums[j] += sum;
        products[j] += product;
    }
}
