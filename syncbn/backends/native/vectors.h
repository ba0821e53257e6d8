/* Vectors of T, the computing dtype, in 32 bytes: compilers make one or several registers of each, on any processor.
   Every operation is rounded by itself, so that all of them give the same bits. Included once for float and once for
   double. */

enum { SIZED(WIDTH) = 32 / sizeof(T) };
typedef T SIZED(Vector) __attribute__((vector_size(32)));
typedef INTEGER SIZED(Integers) __attribute__((vector_size(32)));


INLINE VECTOR SIZED(all)(T value) { return value - (VECTOR){0}; }

INLINE VECTOR SIZED(take)(const T* from) {
    VECTOR value;
    memcpy(&value, from, sizeof value);
    return value;
}

INLINE void SIZED(put)(T* to, VECTOR value) { memcpy(to, &value, sizeof value); }

/* Comparisons give all ones where they hold. */
INLINE VECTOR SIZED(choose)(INTEGERS condition, VECTOR yes, VECTOR no) {
    return (VECTOR)((condition & (INTEGERS)yes) | (~condition & (INTEGERS)no));
}

INLINE VECTOR SIZED(two_to)(INTEGERS k) { return (VECTOR)((k + BIAS) << MANTISSA); }

/* e^z = 2^k·e^r with |r| <= ln2 / 2, e^r by its Taylor polynomial, whose remainder is beyond the last place. ROUNDER is
   so large that its sum with k has no fraction, and k in its last bits. 2^k in two factors, so that what is too large
   becomes infinite and what is too small 0. NaN stays. */
INLINE VECTOR SIZED(exponential)(VECTOR z) {
    VECTOR high = SIZED(all)(LARGEST_EXPONENT), low = -high;
    z = SIZED(choose)(z > high, high, SIZED(choose)(z < low, low, z));
    VECTOR shifted = z * (T)1.44269504088896341 + ROUNDER, k = shifted - ROUNDER;
    VECTOR r = (z - k * LN2_HIGH) - k * LN2_LOW, e = SIZED(all)(1);
    for (int n = DEGREE; n > 0; n--) e = e * (r * ((T)1 / n)) + 1;
    INTEGERS whole = (INTEGERS)shifted - (INTEGERS)SIZED(all)(ROUNDER), half = whole >> 1;
    return e * SIZED(two_to)(half) * SIZED(two_to)(whole - half);
}

/* NaN stays. At z = 0 relu is 0 and so is its derivative, leaky_relu has its slope there. */
INLINE VECTOR SIZED(activate)(VECTOR z, int activation, T leaky_slope) {
    VECTOR zero = {0};
    if (activation == RELU) return SIZED(choose)(z <= zero, zero, z);
    if (activation == LEAKY_RELU) return SIZED(choose)(z <= zero, z * leaky_slope, z);
    return activation == SILU ? z / (1 + SIZED(exponential)(-z)) : z;
}

INLINE VECTOR SIZED(activate_grad)(VECTOR dy, VECTOR z, int activation, T leaky_slope) {
    VECTOR zero = {0};
    if (activation == RELU) return SIZED(choose)(z > zero, dy, zero);
    if (activation == LEAKY_RELU) return SIZED(choose)(z > zero, dy, dy * leaky_slope);
    if (activation == NONE) return dy;
    VECTOR sigmoid = 1 / (1 + SIZED(exponential)(-z));
    return dy * sigmoid * (1 + z * (1 - sigmoid));
}
