/* Calls of the CPU library with random shapes, dtypes and extras, for the sanitizers that this is compiled with: every
   array is as long as it must be, at an address that is no better aligned than it must be. Usage: fuzz SEED CALLS */
#include <stdio.h>
#include <stdlib.h>

#include "call.h"
#include "numbers.h"

int syncbn_batch_sums(const Call*), syncbn_normalize(const Call*), syncbn_grad_sums(const Call*),
    syncbn_grad_input(const Call*), syncbn_use_level(int);

static const i64 SIZE[] = {4, 8, 2, 2};
static void* blocks[32];
static int used;

static i64 below(i64 limit) { return rand() % limit; }

/* `count` numbers of this dtype, random bits among them if wild. */
static void* numbers(i64 dtype, i64 count, int wild) {
    char* room = malloc(count * SIZE[dtype] + SIZE[dtype]);
    blocks[used++] = room;
    char* at = room + SIZE[dtype];
    for (i64 i = 0; i < count; i++) {
        set(at, dtype, i, (f64)below(2000) / 500 - 2);
        if (wild && below(50) == 0)
            for (i64 k = 0; k < SIZE[dtype]; k++) at[i * SIZE[dtype] + k] = (char)below(256);
    }
    return at;
}

static i64 size(void) {
    static const i64 often[] = {0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 64, 65};
    return below(4) ? often[below(14)] : below(300);
}

static void one_call(void) {
    Call c = {.is_rows = below(2), .samples = size(), .channels = 1 + size(), .pixels = size(), .dtype = below(4)};
    if (below(20) == 0) c.channels = 500 + below(1200), c.samples = below(12);
    if (below(20) == 0 && !c.is_rows) c.pixels = 2000 + below(5000), c.channels = 1 + below(4), c.samples = below(4);
    if (c.is_rows) c.pixels = 1, c.samples *= 1 + below(6);
    c.threads = 1 + below(4);
    c.activation = below(4), c.leaky_slope = 0.01, c.eps = 1e-5, c.tag = below(3);
    i64 elements = c.samples * c.channels * c.pixels, wide = c.dtype == FLOAT64 ? FLOAT64 : FLOAT32, C = c.channels;
    int wild = below(3) == 0;
    c.x = numbers(c.dtype, elements, wild), c.dy = numbers(c.dtype, elements, wild);
    c.y = numbers(c.dtype, elements, 0), c.mean = numbers(wide, C, 0), c.invstd = numbers(wide, C, 0);
    c.sums = numbers(FLOAT64, 2 * C + 3, 0), c.dsums = numbers(FLOAT64, 2 * C + 2, 0);
    if (below(2)) c.residual = numbers(c.dtype, elements, wild);
    if (below(2)) {
        unsigned char* mask = malloc(c.samples * c.pixels + 1);
        blocks[used++] = mask;
        for (i64 i = 0; i < c.samples * c.pixels; i++) mask[i + 1] = below(2);
        c.mask = mask + 1;
    }
    c.weight_dtype = below(4), c.bias_dtype = below(4);
    if (below(2)) c.weight = numbers(c.weight_dtype, C, 0), c.dweight = numbers(c.weight_dtype, C, 0);
    if (below(2)) c.bias = numbers(c.bias_dtype, C, 0), c.dbias = numbers(c.bias_dtype, C, 0);
    if (below(2)) {
        c.running_mean_dtype = below(4), c.running_var_dtype = below(4), c.momentum = 0.1, c.most = below(2) * 1e4;
        c.running_mean = numbers(c.running_mean_dtype, C, 0), c.running_var = numbers(c.running_var_dtype, C, 0);
        c.counter = calloc(1, 8);
        blocks[used++] = c.counter;
    }
    Call sums = c, back = c;
    sums.dx = sums.dresidual = 0;
    int failed = syncbn_batch_sums(&sums) | syncbn_normalize(&sums) | syncbn_grad_sums(&sums);
    c.counted = back.counted = (f64*)c.sums + 2 * C;
    if (below(4)) back.dx = numbers(c.dtype, elements, 0);
    if (below(2)) back.dresidual = numbers(c.dtype, elements, 0);
    if (failed | syncbn_grad_input(&back)) exit(3);
    while (used) free(blocks[--used]);
}

int main(int count, char** given) {
    if (count != 3) return 2;
    srand(atoi(given[1]));
    for (int i = atoi(given[2]); i > 0; i--) {
        syncbn_use_level(i % 2 ? 9 : 0);
        one_call();
    }
    printf("%s calls\n", given[2]);
    return 0;
}
