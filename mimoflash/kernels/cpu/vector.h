// Vectors of floats as wide as the instruction set that this file is compiled for: 16, 8 or 4.
// No operation here depends on optimisation: multiply-and-add is fused where the instruction set can, and only there.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace mimoflash {

#if defined(__AVX512F__)
constexpr int WIDTH = 16;
#elif defined(__AVX2__)
constexpr int WIDTH = 8;
#else
constexpr int WIDTH = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * WIDTH)));
typedef int32_t Ints __attribute__((vector_size(4 * WIDTH)));
typedef uint16_t Halves __attribute__((vector_size(2 * WIDTH)));
typedef uint16_t bf16;  // the upper half of a float

inline Floats splat(float value) {
    return value - Floats{};
}

inline Floats load(const float* from) {
    Floats v;
    memcpy(&v, from, sizeof v);
    return v;
}

inline Floats load(const bf16* from) {
    Halves halves;
    memcpy(&halves, from, sizeof halves);
#if defined(__AVX512F__)
    return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)halves), 16);
#elif defined(__AVX2__)
    return (Floats)_mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)halves), 16);
#else
    return (Floats)(__builtin_convertvector(halves, Ints) << 16);
#endif
}

// The first `count` < WIDTH values, then zeros; reads no further.
template <class T>
inline Floats load(const T* from, int count) {
    T values[WIDTH] = {};
    for (int i = 0; i < count; ++i) values[i] = from[i];
    return load(values);
}

inline void store(float* to, Floats v) {
    memcpy(to, &v, sizeof v);
}

inline void store(float* to, Floats v, int count) {
    for (int i = 0; i < count; ++i) to[i] = v[i];
}

inline Floats to_floats(Ints v) {
    return __builtin_convertvector(v, Floats);
}

inline float to_float(bf16 value) {
    uint32_t bits = static_cast<uint32_t>(value) << 16;
    float result;
    memcpy(&result, &bits, sizeof result);
    return result;
}

// a * b + c
inline Floats fma(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
    return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
    return _mm256_fmadd_ps(a, b, c);
#elif defined(__ARM_NEON)
    return (Floats)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

// The four sums of the lanes of four vectors. Always in the same order: neighbours first.
struct Four {
    float v[4];
};

inline Four sums(Floats a, Floats b, Floats c, Floats d) {
    Four out;
#if defined(__AVX2__)
#if defined(__AVX512F__)
    auto half = [](Floats v) {
        return _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    };
    __m256 s = _mm256_hadd_ps(_mm256_hadd_ps(half(a), half(b)), _mm256_hadd_ps(half(c), half(d)));
#else
    __m256 s = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
#endif
    _mm_storeu_ps(out.v, _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1)));
#else
    const Floats* all[4] = {&a, &b, &c, &d};
    for (int i = 0; i < 4; ++i) out.v[i] = ((*all[i])[0] + (*all[i])[1]) + ((*all[i])[2] + (*all[i])[3]);
#endif
    return out;
}

inline float sum(Floats v) {
    return sums(v, v, v, v).v[0];
}

}  // namespace mimoflash
