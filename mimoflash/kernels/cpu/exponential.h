// exp and log of vectors, the same in every lane, so that a value does not depend on its place in a row.
#pragma once
#include "vector.h"

namespace mimoflash {

inline Floats maximum(Floats a, Floats b) { return a > b ? a : b; }

inline float maximum(Floats v) {
    float most = v[0];
    for (int i = 1; i < WIDTH; ++i) most = v[i] > most ? v[i] : most;
    return most;
}

// Relative error below 1.2e-7. 0 below -87.3 (-inf too), exp(88) above 88, NaN of NaN.
inline Floats exponential(Floats x) {
    const Ints vanishes = x < splat(-87.3f);
    Floats clamped = x > splat(88.0f) ? splat(88.0f) : x;
    clamped = vanishes ? splat(-87.3f) : clamped;
    // x = n ln 2 + r, |r| <= ln 2 / 2; adding 1.5 * 2^23 rounds to a whole number, which then stands in the low bits
    const Floats magic = splat(12582912.0f);
    const Floats shifted = fma(clamped, splat(1.44269504f), magic);
    const Floats n = shifted - magic;
    Floats r = fma(n, splat(-0.693359375f), clamped);
    r = fma(n, splat(2.12194440e-4f), r);
    Floats y = splat(1.9875691500e-4f);
    y = fma(y, r, splat(1.3981999507e-3f));
    y = fma(y, r, splat(8.3334519073e-3f));
    y = fma(y, r, splat(4.1665795894e-2f));
    y = fma(y, r, splat(1.6666665459e-1f));
    y = fma(y, r, splat(5.0000001201e-1f));
    y = fma(y, r * r, r + splat(1.0f));
    const Ints power = ((Ints)shifted - (Ints)magic + 127) << 23;
    return vanishes ? splat(0.0f) : y * (Floats)power;
}

inline float exponential(float x) { return exponential(splat(x))[0]; }

// Natural logarithm of normal positive numbers, relative error below 1e-6 away from 1, absolute below 1e-7 near it.
inline Floats logarithm(Floats x) {
    const Ints bits = (Ints)x;
    Ints exponent = (bits >> 23) - 126;
    Floats m = (Floats)((bits & 0x007fffff) | 0x3f000000);  // in [0.5, 1)
    const Ints small = m < splat(0.70710678f);
    exponent += small;  // a mask is -1
    m = (small ? m + m : m) - splat(1.0f);
    Floats y = splat(7.0376836292e-2f);
    for (float c : {-1.1514610310e-1f, 1.1676998740e-1f, -1.2420140846e-1f, 1.4249322787e-1f, -1.6668057665e-1f,
                    2.0000714765e-1f, -2.4999993993e-1f, 3.3333331174e-1f})
        y = fma(y, m, splat(c));
    const Floats square = m * m, n = to_floats(exponent);
    y = y * m * square;
    y = fma(n, splat(-2.12194440e-4f), y);
    y = fma(square, splat(-0.5f), y);
    return fma(n, splat(0.693359375f), m + y);
}

// x * sigmoid(x)
inline Floats silu(Floats x) { return x / (splat(1.0f) + exponential(-x)); }

}  // namespace mimoflash
