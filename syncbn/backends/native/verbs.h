/* The four verbs for activations of one dtype: the channels' numbers, then block by block. The formulas are those of
   reference.py. Included after stages.h. */

/* `Channels` of a call, repeated where several rows are taken as one. */
static int NAME(channels_of)(const Call* call, const Shape* s, NAME(Channels)* c) {
    i64 width = s->width;
    i64 size = width + SIZED(WIDTH); /* a vector may be read at the last channel */
    T* room = calloc(5 * size, sizeof(T));
    *c = (NAME(Channels)){room, room + size, room + 2 * size, room + 3 * size, room + 4 * size};
    if (!room) return 1;
    f64 count = call->dx ? at_least_one(*(const f64*)call->counted) : 1;
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
INLINE void NAME(pointwise_as)(const Call* call, NAME(Stage) s, Block b, int COLUMNS, int is_grad) {
#define VARIANT(activation)                                                                                            \
    case activation:                                                                                                   \
        if (s.residual.at) NAME(pointwise)(s, b, COLUMNS, activation, 1, is_grad);                                     \
        else NAME(pointwise)(s, b, COLUMNS, activation, 0, is_grad);                                                   \
        break;
    switch (call->activation) {
        VARIANT(NONE)
        VARIANT(RELU)
        VARIANT(LEAKY_RELU)
        VARIANT(SILU)
    }
#undef VARIANT
}

/* y or, given room for it, dz. */
OUTLINE void NAME(pointwise_of)(const Call* call, NAME(Stage) s, Block b) {
    if (call->is_rows && s.room) NAME(pointwise_as)(call, s, b, 1, 1);
    else if (call->is_rows) NAME(pointwise_as)(call, s, b, 1, 0);
    else if (s.room) NAME(pointwise_as)(call, s, b, 0, 1);
    else NAME(pointwise_as)(call, s, b, 0, 0);
}

/* What the stages of a block leave for the next ones. */
typedef struct {
    E x[BLOCK], dy[BLOCK], residual[BLOCK], out[BLOCK];
    T dz[BLOCK];
} NAME(Scratch);

/* dz of a block, 0 where masked out. */
OUTLINE NAME(Source) NAME(dz_of)(const Call* call, Block b, NAME(Channels) c, NAME(Source) x, NAME(Scratch)* scratch) {
    NAME(Source) dy = NAME(load)(call, call->dy, b, scratch->dy);
    if (call->activation == NONE) return dy;
    NAME(Source) residual = NAME(load)(call, call->residual, b, scratch->residual);
    NAME(Stage) s = {.x = x, .residual = residual, .dy = dy, .channels = c, .room = scratch->dz};
    s.leaky_slope = (T)call->leaky_slope;
    NAME(pointwise_of)(call, s, b);
    return (NAME(Source)){scratch->dz, at_least(SIZED(WIDTH), b.length), sizeof(E) != sizeof(T)};
}

/* Partial sums of one group of units, for the channels of one side. */
INLINE void NAME(sum_group)(const Call* call, const Shape* s, NAME(Channels) c, i64 group, i64 side, f64* partial,
                            int COLUMNS, int is_grad) {
    NAME(Scratch) scratch;
    f64 sums[2][MOST_LINES * LANES] = {{0}};
    for (i64 unit = s->units * group / s->groups; unit < s->units * (group + 1) / s->groups; unit++) {
        Block b = block_of(s, unit, side);
        NAME(Source) x = NAME(load)(call, call->x, b, scratch.x);
        NAME(Source) dz = is_grad ? NAME(dz_of)(call, b, c, x, &scratch) : x;
        int is_wide = sizeof(E) != sizeof(T) && dz.is_wide;
        if (COLUMNS && is_wide) NAME(sum_columns)(b, dz, x, c.mean, sums[0], sums[1], 1, is_grad);
        else if (COLUMNS) NAME(sum_columns)(b, dz, x, c.mean, sums[0], sums[1], 0, is_grad);
        else if (is_wide) NAME(sum_lines)(b, dz, x, c.mean, sums[0], sums[1], 1, is_grad);
        else NAME(sum_lines)(b, dz, x, c.mean, sums[0], sums[1], 0, is_grad);
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
    for (i64 from = 0; from < s->groups * 2 * s->width; from += columns) { /* width is so many times columns */
        f64* to = out + from / s->width % 2 * columns;
        for (i64 k = 0; k < columns; k++) to[k] += partials[from + k];
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
    NAME(Scratch) scratch;
    NAME(Stage) s = {.x = NAME(load)(call, call->x, b, scratch.x), .channels = c, .leaky_slope = (T)call->leaky_slope};
    s.residual = NAME(load)(call, call->residual, b, scratch.residual);
    s.y = NAME(target)(call->y, b, scratch.out);
    NAME(pointwise_of)(call, s, b);
    NAME(store)(call, s.y, call->y, b);
}

OUTLINE void NAME(grad_block)(const Call* call, Block b, NAME(Channels) c) {
    NAME(Scratch) scratch;
    NAME(Stage) s = {.x = NAME(load)(call, call->x, b, scratch.x), .channels = c};
    NAME(Source) dz = s.dz = NAME(dz_of)(call, b, c, s.x, &scratch);
    int is_wide = sizeof(E) != sizeof(T) && dz.is_wide;
    if (call->dx) {
        s.dx = NAME(target)(call->dx, b, scratch.out);
        if (call->is_rows && is_wide) NAME(input_grad)(s, b, 1, 1);
        else if (call->is_rows) NAME(input_grad)(s, b, 1, 0);
        else if (is_wide) NAME(input_grad)(s, b, 0, 1);
        else NAME(input_grad)(s, b, 0, 0);
        NAME(store)(call, s.dx, call->dx, b);
    }
    if (call->dresidual) {
        NAME(Target) dresidual = NAME(target)(call->dresidual, b, scratch.out);
        if (is_wide) NAME(round_to)(b, dz, dresidual, 1);
        else NAME(round_to)(b, dz, dresidual, 0);
        NAME(store)(call, dresidual, call->dresidual, b);
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
