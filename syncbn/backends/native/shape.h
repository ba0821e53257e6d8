/* How a call's activations are cut. Where, and in which order parts are added up, depends on the shape alone, not on
   the number of threads, so that the sums have the same bits with any. */
#pragma once
#include "call.h"

enum {
    LANES = 16,           /* partial sums of a line, side by side */
    RUN = 32,             /* numbers that are added up in float32 before they go on in float64 */
    BLOCK = 2048,         /* elements of a block, three of which are kept in the first-level cache */
    SHORT = 8,            /* numbers of the longest vector: shorter lines are made as long, in scratch */
    MOST_LINES = 64,      /* channels of a block of planes */
    SUM_COLUMNS = 64,     /* channels of a block of rows, where they are added up: the more rows the better, */
    WIDE_COLUMNS = 256,   /* but not so many that their addresses fall on few cache lines */
    MOST_COLUMNS = 512,   /* channels of a block of rows elsewhere */
    NARROW = 32,          /* rows of fewer channels are added up LANES at a time */
    TASK = 16 * 1024,     /* elements that are worth a partial sum of their own */
    MOST_TASKS = 64,
    THREAD = 32 * 1024    /* elements that are worth a thread */
};

/* A rectangle of the activations. Planes: a line for each channel. Rows: a column for each channel. */
typedef struct {
    i64 at, lines, length, step; /* first element, size, distance of two lines */
    i64 channel, position;       /* the first ones: channels as in the parameters, positions as in the mask */
} Block;

typedef struct {
    i64 is_rows, elements;
    i64 width, rows;                    /* planes: channels, samples; rows: channels in a line, lines of a block */
    i64 pixels, pieces, piece;          /* a plane's, cut in pieces */
    i64 per_block, blocks, units;       /* channels of a block, blocks side by side, and how often */
    i64 groups;                         /* of units, each with its own partial sums */
} Shape;

static inline i64 at_least(i64 least, i64 value) { return value < least ? least : value; }
static inline i64 at_most(i64 most, i64 value) { return value > most ? most : value; }
static inline i64 parts(i64 size, i64 part) { return (size + part - 1) / part; }

static inline Shape shape_of(const Call* call, int is_sum) {
    Shape s = {.is_rows = call->is_rows, .width = call->channels, .rows = call->samples, .pixels = call->pixels};
    s.elements = call->samples * call->channels * call->pixels;
    if (s.is_rows) {
        int is_narrow = is_sum ? call->channels < NARROW : 2 * call->channels <= MOST_COLUMNS;
        i64 several = is_sum ? LANES : MOST_COLUMNS / call->channels; /* rows that are taken as one, without a mask */
        if (is_narrow && !call->mask) s.width *= several;
        i64 columns = is_sum ? at_least(SUM_COLUMNS, at_most(WIDE_COLUMNS, s.width / 8)) : MOST_COLUMNS;
        s.per_block = at_most(columns, s.width);
        s.rows = BLOCK / at_least(SHORT, s.per_block);
        s.pieces = 1;
        s.units = s.elements / s.width / s.rows + 2; /* of whole rows, then what is left: fewer rows, a part of one */
    } else {
        s.pieces = at_least(1, parts(s.pixels, BLOCK));
        s.piece = at_least(1, at_most(BLOCK, s.pixels));
        s.per_block = at_most(MOST_LINES, at_most(s.width, at_least(1, BLOCK / s.piece)));
        s.units = s.rows * s.pieces;
    }
    s.blocks = parts(s.width, s.per_block);
    i64 tasks = at_most(MOST_TASKS, at_least(1, s.elements / TASK));
    s.groups = at_most(at_least(1, s.units), parts(tasks, s.blocks));
    return s;
}

static inline Block block_of(const Shape* s, i64 unit, i64 side) {
    Block b = {.channel = side * s->per_block};
    i64 channels = at_most(s->per_block, s->width - b.channel);
    if (s->is_rows) {
        i64 whole = s->elements / s->width, first = at_most(whole, unit * s->rows);
        b.lines = at_most(s->rows, whole - first);
        b.length = channels;
        if (unit == s->units - 1) { /* the last rows, if they are not as many as are taken at a time */
            first = whole;
            b.lines = 1;
            b.length = at_least(0, at_most(channels, s->elements - whole * s->width - b.channel));
        }
        b.position = first;
        b.step = s->width;
        b.at = first * s->width + b.channel;
    } else {
        i64 sample = unit / s->pieces, pixel = unit % s->pieces * s->piece;
        b.lines = channels;
        b.length = at_most(s->piece, s->pixels - pixel);
        b.position = sample * s->pixels + pixel;
        b.step = s->pixels;
        b.at = (sample * s->width + b.channel) * s->pixels + pixel;
    }
    if (b.length == 0) b.lines = 0;
    return b;
}

static inline int threads_for(const Call* call, i64 elements) {
    return (int)at_least(1, at_most(call->threads, elements / THREAD));
}
