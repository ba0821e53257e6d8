/* The four verbs in the computing dtype T: the channels' numbers, and the activations block by block. The formulas are
   those of reference.py. Included once for float, once for double, after stages.h. */

/* `Channels` of a call, repeated where several rows are taken as one. */
static int NAME(channels_of)(const Call* call, const Shape* s, NAME(Channels)* c) {
    i64 width = s->width;
    T* room = malloc(5 * width * sizeof(T));
    *c = (NAME(Channels)){room, room + width, room + 2 * width, room + 3 * width, room + 4 * width};
    if (!room) return 1;
    f64 count = call->dx ? at_least_one(*(const f64*)call->count) : 1;
    for (i64 k = 0; k < width; k++) {
        i64 channel = k % call->channels;
        T invstd = ((const T*)call->invstd)[channel];
        c->mean[k] = ((const T*)call->mean)[channel];
        c->scale[k] = call->weight ? invstd * (T)get(call->weight, call->weight_dtype, channel) : invstd;
        c->shift[k] = call->bias ? (T)get(call->bias, call->bias_dtype, channel) : 0;
        if (!call->dx) continue;
        const f64* dsums = (const f64*)call->dsums + channel;
        c->mean_dz[k] = (T)(dsums[0] / count);
        c->slope[k] = (T)(dsums[call->channels] / count * invstd);
    }
    return 0;
}

/* `pointwise`, a variant for each activation, with and without a residual. */
INLINE void NAME(pointwise_as)(const Call* call, Block b, NAME(Source) x, NAME(Source) residual, NAME(Source) dy,
                               NAME(Channels) c, NAME(Target) out, int COLUMNS, int is_grad) {
    T leaky_slope = (T)call->leaky_slope;
#define VARIANT(activation)                                                                                            \
    case activation:                                                                                                   \
        if (residual.at) NAME(pointwise)(b, x, residual, dy, c, leaky_slope, out, COLUMNS, activation, 1, is_grad);    \
        else NAME(pointwise)(b, x, residual, dy, c, leaky_slope, out, COLUMNS, activation, 0, is_grad);                \
        break;
    switch (call->activation) {
        VARIANT(NONE)
        VARIANT(RELU)
        VARIANT(LEAKY_RELU)
        VARIANT(SILU)
    }
#undef VARIANT
}

OUTLINE void NAME(pointwise_of)(const Call* call, Block b, NAME(Source) x, NAME(Source) residual, NAME(Source) dy,
                                NAME(Channels) c, NAME(Target) out) {
    if (call->is_rows && dy.at) NAME(pointwise_as)(call, b, x, residual, dy, c, out, 1, 1);
    else if (call->is_rows) NAME(pointwise_as)(call, b, x, residual, dy, c, out, 1, 0);
    else if (dy.at) NAME(pointwise_as)(call, b, x, residual, dy, c, out, 0, 1);
    else NAME(pointwise_as)(call, b, x, residual, dy, c, out, 0, 0);
}

/* dz of a block, 0 where masked out. */
OUTLINE NAME(Source) NAME(dz_of)(const Call* call, Block b, NAME(Channels) c, NAME(Source) x, T scratch[3][BLOCK]) {
    NAME(Source) dy = NAME(load)(call, call->dy, b, scratch[0]), residual = {0, 0};
    if (call->activation == NONE) return dy;
    if (call->residual) residual = NAME(load)(call, call->residual, b, scratch[1]);
    NAME(Target) out = {scratch[2], b.length};
    NAME(pointwise_of)(call, b, x, residual, dy, c, out);
    return (NAME(Source)){out.at, out.step};
}

/* Partial sums of one group of units, for the channels of one side. */
INLINE void NAME(sum_group)(const Call* call, const Shape* s, NAME(Channels) c, i64 group, i64 side, f64* partial,
                            int COLUMNS, int is_grad) {
    T scratch[4][BLOCK];
    f64 sums[2][MOST_LINES * LANES] = {{0}};
    i64 first = s->units * group / s->groups, last = s->units * (group + 1) / s->groups;
    for (i64 unit = first; unit < last; unit++) {
        Block b = block_of(s, unit, side);
        NAME(Source) x = NAME(load)(call, call->x, b, scratch[3]);
        NAME(Source) u = is_grad ? NAME(dz_of)(call, b, c, x, scratch) : x;
        if (COLUMNS) NAME(sum_columns)(b, u, x, is_grad && sizeof(T) == 8 ? c.mean : 0, sums[0], sums[1]);
        else NAME(sum_lines)(b, u, x, is_grad && sizeof(T) == 8 ? c.mean : 0, sums[0], sums[1]);
    }
    i64 channel = side * s->per_block, channels = at_most(s->per_block, s->width - channel);
    for (i64 k = 0; k < channels; k++) {
        for (int which = 0; which < 2; which++) {
            f64 total = COLUMNS ? sums[which][k] : 0;
            for (int l = 0; l < LANES && !COLUMNS; l++) total += sums[which][k * LANES + l];
            partial[which * s->width + channel + k] = total;
        }
    }
}

/* Both sums of each channel over all positions, (2, C): groups of units side by side, added up in their order. */
static int NAME(sum_all)(const Call* call, const Shape* s, NAME(Channels) c, f64* out, int is_grad) {
    i64 tasks = s->groups * s->blocks, columns = call->channels;
    f64* partials = malloc(s->groups * 2 * s->width * sizeof(f64));
    if (!partials) return 1;
    int threads = threads_for(call, s->elements);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (i64 task = 0; task < tasks; task++) {
        i64 group = task / s->blocks, side = task % s->blocks;
        f64* partial = partials + group * 2 * s->width;
        if (s->is_rows && is_grad) NAME(sum_group)(call, s, c, group, side, partial, 1, 1);
        else if (s->is_rows) NAME(sum_group)(call, s, c, group, side, partial, 1, 0);
        else if (is_grad) NAME(sum_group)(call, s, c, group, side, partial, 0, 1);
        else NAME(sum_group)(call, s, c, group, side, partial, 0, 0);
    }
    memset(out, 0, 2 * columns * sizeof(f64));
    for (i64 group = 0; group < s->groups; group++) {
        const f64* partial = partials + group * 2 * s->width;
        for (i64 k = 0; k < 2 * s->width; k++) out[k / s->width * columns + k % s->width % columns] += partial[k];
    }
    free(partials);
    return 0;
}

static int NAME(batch_sums)(const Call* call) {
    Shape s = shape_of(call, 1);
    return NAME(sum_all)(call, &s, (NAME(Channels)){0}, call->sums, 0);
}

static int NAME(grad_sums)(const Call* call) {
    Shape s = shape_of(call, 1);
    NAME(Channels) c;
    int failed = NAME(channels_of)(call, &s, &c) || NAME(sum_all)(call, &s, c, call->dsums, 1);
    free(c.mean);
    return failed;
}

OUTLINE void NAME(normalize_block)(const Call* call, Block b, NAME(Channels) c) {
    T scratch[3][BLOCK];
    NAME(Source) x = NAME(load)(call, call->x, b, scratch[0]), residual = {0, 0}, none = {0, 0};
    if (call->residual) residual = NAME(load)(call, call->residual, b, scratch[1]);
    NAME(Target) out = NAME(target)(call, call->y, b, scratch[2]);
    NAME(pointwise_of)(call, b, x, residual, none, c, out);
    NAME(store)(call, out, call->y, b);
}

OUTLINE void NAME(grad_block)(const Call* call, Block b, NAME(Channels) c) {
    T scratch[5][BLOCK];
    NAME(Source) x = NAME(load)(call, call->x, b, scratch[3]);
    NAME(Source) dz = NAME(dz_of)(call, b, c, x, scratch);
    if (call->dx) {
        NAME(Target) out = NAME(target)(call, call->dx, b, scratch[4]);
        if (call->is_rows) NAME(input_grad)(b, dz, x, c, out, 1);
        else NAME(input_grad)(b, dz, x, c, out, 0);
        NAME(store)(call, out, call->dx, b);
    }
    if (call->dresidual) {
        NAME(Target) out = NAME(target)(call, call->dresidual, b, (T*)dz.at);
        for (i64 i = 0; i < b.lines && out.at != dz.at; i++)
            memcpy(out.at + i * out.step, dz.at + i * dz.step, b.length * sizeof(T));
        NAME(store)(call, out, call->dresidual, b);
    }
}

/* Every block by itself, in the order of memory. */
static int NAME(each_block)(const Call* call, int is_grad) {
    Shape s = shape_of(call, 0);
    NAME(Channels) c;
    if (NAME(channels_of)(call, &s, &c)) return 1;
    i64 tasks = s.units * s.blocks;
    int threads = threads_for(call, s.elements);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (i64 task = 0; task < tasks; task++) {
        i64 piece = task % s.pieces, side = task / s.pieces % s.blocks, sample = task / s.pieces / s.blocks;
        Block b = block_of(&s, sample * s.pieces + piece, side);
        if (is_grad) NAME(grad_block)(call, b, c);
        else NAME(normalize_block)(call, b, c);
    }
    free(c.mean);
    return 0;
}

static int NAME(normalize)(const Call* call) { return NAME(each_block)(call, 0); }
static int NAME(grad_input)(const Call* call) { return NAME(each_block)(call, 1); }
