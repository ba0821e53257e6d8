/* What Python calls: the verbs, with all the instructions that this processor has, and what is of channels' size. */
#include <math.h>
#include <pthread.h>
#include <stdlib.h>

#include "call.h"
#include "numbers.h"

extern const Verbs verbs_base;
#ifdef WITH_LEVELS
#include <cpuid.h>
extern const Verbs verbs_v3;

/* Whether processor and system have what V3 in compiling.py names. Asked here, since what compilers bring for the
   question gives 0 with some of them. */
static int has_v3(void) {
    unsigned a, b, c, d, low, high;
    const unsigned first = bit_AVX | bit_OSXSAVE | bit_FMA | bit_F16C;
    if (!__get_cpuid(1, &a, &b, &c, &d) || (c & first) != first) return 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(b & bit_AVX2)) return 0;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0)); /* which registers the system keeps for a thread */
    return (low & 6) == 6;
}
#endif

static const Verbs* verbs = &verbs_base;
static int is_forked = 0;

/* The threads of a team do not outlive a fork, and whoever counts on them waits for ever. */
static void forked(void) { is_forked = 1; }

__attribute__((constructor)) static void begin(void) { pthread_atfork(0, 0, forked); }

/* The highest level that this processor has, at most that one: 0 for any processor, 3 for x86-64-v3. */
int syncbn_use_level(int most) {
    verbs = &verbs_base;
#ifdef WITH_LEVELS
    if (most >= 3 && has_v3()) verbs = &verbs_v3;
#endif
    (void)most;
    return verbs == &verbs_base ? 0 : 3;
}

#define AS_NAME(name) #name " "
const char* syncbn_fields(void) { return FIELDS(AS_NAME, AS_NAME, AS_NAME); }

const char* syncbn_source(void) { return SOURCE; }

int syncbn_has_threads(void) {
#ifdef _OPENMP
    return 1;
#else
    return 0;
#endif
}

/* What a rank that takes part in the comparison adds to its tag: see fingerprint.py. */
static void stamp(f64* end, f64 tag) {
    end[0] = tag ? 4294967296.0 + tag : 0;
    end[1] = tag * tag;
}

static Call alone(const Call* call) {
    Call mine = *call;
    if (is_forked) mine.threads = 1;
    return mine;
}

int syncbn_batch_sums(const Call* given) {
    Call call = alone(given);
    f64* sums = call.sums;
    const uint8_t* mask = call.mask;
    i64 count = call.samples * call.pixels, counted = mask ? 0 : count;
    for (i64 i = 0; mask && i < count; i++) counted += mask[i] != 0;
    sums[2 * call.channels] = (f64)counted;
    stamp(sums + 2 * call.channels + 1, call.tag);
    return verbs->batch_sums(&call);
}

typedef struct {
    f64 mean, var;
} Moments;

/* Of channel c, from [Σx, Σx², count]: the variance is biased and at least 0, a NaN stays; both are 0 of nothing. */
static Moments moments(const Call* call, i64 c, f64 count) {
    const f64* sums = call->sums;
    f64 n = count < 1 ? 1 : count, mean = sums[c] / n, var = sums[call->channels + c] / n - mean * mean;
    return (Moments){mean, var < 0 ? 0 : var};
}

/* As torch.lerp. */
static f64 lerp(f64 start, f64 end, f64 weight) {
    return fabs(weight) < 0.5 ? fma(weight, end - start, start) : fma(weight - 1, end - start, end);
}

/* The running statistics of one channel: see move_running in reference.py. A NaN is not at most `most`. */
static void move(const Call* call, i64 c, Moments of, f64 count, f64 factor) {
    f64 new_mean = lerp(get(call->running_mean, call->running_mean_dtype, c), of.mean, factor);
    f64 unbiased = of.var * (count / (count - 1 < 1 ? 1 : count - 1));
    f64 new_var = lerp(get(call->running_var, call->running_var_dtype, c), unbiased, factor);
    if (call->most && !(fabs(new_mean) <= call->most && fabs(new_var) <= call->most)) return;
    if (count > 0) set(call->running_mean, call->running_mean_dtype, c, new_mean);
    if (count > 1) set(call->running_var, call->running_var_dtype, c, new_var);
}

/* mean and invstd, y, then the running statistics. A momentum that is NaN stands for 1 / counter. */
int syncbn_normalize(const Call* given) {
    Call call = alone(given);
    f64 count = ((const f64*)call.sums)[2 * call.channels], factor = call.momentum;
    i64 dtype = call.dtype == FLOAT64 ? FLOAT64 : FLOAT32;
    for (i64 c = 0; c < call.channels; c++) {
        Moments of = moments(&call, c, count);
        set(call.mean, dtype, c, of.mean);
        set(call.invstd, dtype, c, 1 / sqrt(of.var + call.eps));
    }
    if (verbs->normalize(&call)) return 1;
    if (call.counter) {
        i64 calls = ++*(i64*)call.counter;
        if (factor != factor) factor = 1.0 / (f64)calls;
    }
    for (i64 c = 0; call.running_mean && c < call.channels; c++)
        move(&call, c, moments(&call, c, count), count, factor);
    return 0;
}

int syncbn_grad_sums(const Call* given) {
    Call call = alone(given);
    int failed = verbs->grad_sums(&call);
    f64* dsums = call.dsums;
    for (i64 c = 0; c < call.channels; c++) {
        f64* product = dsums + call.channels + c;
        *product *= get(call.invstd, call.dtype == FLOAT64 ? FLOAT64 : FLOAT32, c);
        if (call.dweight) set(call.dweight, call.weight_dtype, c, *product);
        if (call.dbias) set(call.dbias, call.bias_dtype, c, dsums[c]);
    }
    stamp(dsums + 2 * call.channels, call.tag);
    return failed;
}

int syncbn_grad_input(const Call* given) {
    Call call = alone(given);
    return verbs->grad_input(&call);
}
