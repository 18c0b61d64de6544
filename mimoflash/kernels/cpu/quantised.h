// Linear layers with weights in int8 and int4: whole-number dot products over groups of 32, scaled and added up.
#pragma once
#include "piece.h"

namespace mimoflash {

constexpr int AHEAD = 4096;  // bytes of weights that memory is asked for before their turn
constexpr int PARTS = PANEL / WIDTH;  // vectors that hold one number of each of a panel's outputs

// Four neighbouring inputs of WIDTH outputs, or four activations repeated.
#if defined(__AVX512F__)
typedef __m512i Bytes;
#elif defined(__AVX2__)
typedef __m256i Bytes;
#else
typedef int8_t Bytes __attribute__((vector_size(16)));
typedef uint8_t Unsigned __attribute__((vector_size(16)));
typedef int16_t Shorts __attribute__((vector_size(32)));
typedef int32_t Pairs __attribute__((vector_size(32)));  // two sums an output

inline Shorts widen(Bytes v) {
    return __builtin_convertvector(v, Shorts);
}

inline Pairs both_halves(Shorts v) {
    return ((Pairs)v << 16 >> 16) + ((Pairs)v >> 16);
}

inline Ints neighbours(Pairs v) {
    return Ints{v[0] + v[1], v[2] + v[3], v[4] + v[5], v[6] + v[7]};
}
#endif

inline Bytes load_bytes(const void* from) {
    Bytes v;
    memcpy(&v, from, sizeof v);
    return v;
}

inline Bytes splat4(const int8_t* from) {
    int32_t four;
    memcpy(&four, from, sizeof four);
    return (Bytes)(Ints{} + four);
}

#if defined(__AVX2__)
// Keeps the compiler from regrouping sums, which costs it more registers than there are.
template <class V>
inline void settle(V& a, V& b) {
    asm("" : "+x"(a), "+x"(b));
}
#endif

// The dot products of a group: acc[r][p] of row r and the outputs of part p.
template <int R>
inline void group_int8(const int8_t* w, const int8_t* const (&q)[R], const int32_t (&sum)[R], Ints (&acc)[R][PARTS]) {
#if defined(__AVX512F__)
    for (int r = 0; r < R; ++r) acc[r][0] = Ints{} - 128 * sum[r];  // the weights are taken as unsigned: plus 128
    for (int i = 0; i < GROUP; i += 4) {
        Bytes weights = _mm512_xor_si512(load_bytes(w + i * PANEL), _mm512_set1_epi8(-128));
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) acc[r][0] = (Ints)_mm512_dpbusd_epi32((Bytes)acc[r][0], weights, splat4(q[r] + i));
    }
#elif defined(__AVX2__)
    // Unsigned times signed, in pairs: |w| times x with w's sign stays below 2 * 127 * 127, which 16 bits hold.
    for (int r = 0; r < R; ++r) acc[r][0] = acc[r][1] = Ints{};
    (void)sum;
#pragma GCC unroll 8
    for (int i = 0; i < GROUP; i += 4) {
        __builtin_prefetch(w + i * PANEL + AHEAD, 0, 2);
        Bytes first = load_bytes(w + i * PANEL), second = load_bytes(w + i * PANEL + 32);
        Bytes first_size = _mm256_abs_epi8(first), second_size = _mm256_abs_epi8(second);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            Bytes x = splat4(q[r] + i);
            Bytes pairs = _mm256_maddubs_epi16(first_size, _mm256_sign_epi8(x, first));
            acc[r][0] += (Ints)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
            pairs = _mm256_maddubs_epi16(second_size, _mm256_sign_epi8(x, second));
            acc[r][1] += (Ints)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
            settle(acc[r][0], acc[r][1]);
        }
    }
#else
    (void)sum;
    for (int p = 0; p < PARTS; ++p) {
        Pairs pairs[R] = {};
        for (int i = 0; i < GROUP; i += 4) {
            Shorts weights = widen(load_bytes(w + i * PANEL + p * 16));
            for (int r = 0; r < R; ++r) pairs[r] += both_halves(weights * widen(splat4(q[r] + i)));
        }
        for (int r = 0; r < R; ++r) acc[r][p] = neighbours(pairs[r]);
    }
#endif
}

template <int R>
inline void group_int4(const uint8_t* w, const int8_t* const (&q)[R], Ints (&acc)[R][PARTS]) {
#if defined(__AVX512F__)
    const Bytes low = _mm512_set1_epi8(15);
    for (int r = 0; r < R; ++r) acc[r][0] = Ints{};
    for (int i = 0; i < GROUP; i += 8) {
        Bytes both = load_bytes(w + i * PANEL / 2);
        Bytes even = _mm512_and_si512(both, low), odd = _mm512_and_si512(_mm512_srli_epi16(both, 4), low);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            Bytes first = _mm512_dpbusd_epi32((Bytes)acc[r][0], even, splat4(q[r] + i));
            acc[r][0] = (Ints)_mm512_dpbusd_epi32(first, odd, splat4(q[r] + i + 4));
        }
    }
#elif defined(__AVX2__)
    const Bytes low = _mm256_set1_epi8(15);
    Bytes pairs[R][2];  // 16 products of at most 15 * 127 each: 16 bits hold their sum
    for (int r = 0; r < R; ++r) pairs[r][0] = pairs[r][1] = _mm256_setzero_si256();
#pragma GCC unroll 4
    for (int i = 0; i < GROUP; i += 8) {
        __builtin_prefetch(w + i * PANEL / 2 + AHEAD, 0, 2);
        Bytes first = load_bytes(w + i * PANEL / 2), second = load_bytes(w + i * PANEL / 2 + 32);
#pragma GCC unroll 2
        for (int odd = 0; odd < 2; ++odd) {
            Bytes a = _mm256_and_si256(odd ? _mm256_srli_epi16(first, 4) : first, low);
            Bytes b = _mm256_and_si256(odd ? _mm256_srli_epi16(second, 4) : second, low);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) {
                Bytes x = splat4(q[r] + i + 4 * odd);
                pairs[r][0] = _mm256_add_epi16(pairs[r][0], _mm256_maddubs_epi16(a, x));
                pairs[r][1] = _mm256_add_epi16(pairs[r][1], _mm256_maddubs_epi16(b, x));
                settle(pairs[r][0], pairs[r][1]);
            }
        }
    }
    for (int r = 0; r < R; ++r)
        for (int p = 0; p < PARTS; ++p) acc[r][p] = (Ints)_mm256_madd_epi16(pairs[r][p], _mm256_set1_epi16(1));
#else
    for (int p = 0; p < PARTS; ++p) {
        Shorts sums[R] = {};  // 8 products of at most 15 * 127 each
        for (int i = 0; i < GROUP; i += 8) {
            Bytes both = load_bytes(w + i * PANEL / 2 + p * 16);
            Shorts even = widen(both & 15), odd = widen((Bytes)((Unsigned)both >> 4));
            for (int r = 0; r < R; ++r) sums[r] += even * widen(splat4(q[r] + i)) + odd * widen(splat4(q[r] + i + 4));
        }
        for (int r = 0; r < R; ++r) acc[r][p] = neighbours(both_halves(sums[r]));
    }
#endif
}

// R rows times a panel of 16 outputs.
template <int R, bool FOUR>
void panel_rows(const Piece& piece, int row, int column) {
    const Matrix& w = *piece.job.w;
    const Activations& x = *piece.job.x;
    const int count = groups(w.k);
    const int64_t first = static_cast<int64_t>(column / PANEL) * count;  // the panel's first group
    constexpr int BYTES = FOUR ? GROUP * PANEL / 2 : GROUP * PANEL;
    const uint8_t* data = static_cast<const uint8_t*>(w.data) + first * BYTES;
    const bf16* scales = static_cast<const bf16*>(w.scales) + first * PANEL;
    const bf16* mins = FOUR ? static_cast<const bf16*>(w.mins) + first * PANEL : nullptr;
    const int8_t* q[R];
    const float* scale[R];
    const int32_t* sum[R];
    for (int r = 0; r < R; ++r) {
        int64_t from = static_cast<int64_t>(piece.in(row + r)) * count;
        q[r] = x.q + from * GROUP, scale[r] = x.scale + from, sum[r] = x.sum + from;
    }
    Floats total[R][PARTS] = {};
    for (int g = 0; g < count; ++g) {
        Ints acc[R][PARTS];
        if constexpr (FOUR) {
            group_int4<R>(data, q, acc);
        } else {
            int32_t sums_here[R];
            for (int r = 0; r < R; ++r) sums_here[r] = sum[r][g];
            group_int8<R>(reinterpret_cast<const int8_t*>(data), q, sums_here, acc);
        }
        for (int p = 0; p < PARTS; ++p) {
            Floats here = load(scales + p * WIDTH), least;
            if constexpr (FOUR) least = load(mins + p * WIDTH);
            for (int r = 0; r < R; ++r) {
                total[r][p] = fma(to_floats(acc[r][p]), here * splat(scale[r][g]), total[r][p]);
                if constexpr (FOUR) {
                    const float whole = scale[r][g] * static_cast<float>(sum[r][g]);
                    total[r][p] = fma(least, splat(whole), total[r][p]);
                }
            }
        }
        data += BYTES, scales += PANEL, mins += FOUR ? PANEL : 0;
        for (int r = 0; r < R; ++r) q[r] += GROUP;
    }
    int columns = std::min(PANEL, w.n - column);
    for (int r = 0; r < R; ++r)
        for (int j = 0; j < columns; ++j) piece.put(row + r, column + j, total[r][j / WIDTH][j % WIDTH]);
}

template <bool FOUR>
void quantised(const Piece& piece) {
    for (int j = piece.column; j < piece.column + piece.columns; j += PANEL) {
        for (int row = 0; row < piece.rows; row += 4) {
            switch (piece.rows - row) {
                case 1: panel_rows<1, FOUR>(piece, row, j); break;
                case 2: panel_rows<2, FOUR>(piece, row, j); break;
                case 3: panel_rows<3, FOUR>(piece, row, j); break;
                default: panel_rows<4, FOUR>(piece, row, j);
            }
        }
    }
}

#if defined(__AVX2__) && !defined(__AVX512F__)
inline __m128i halves(Ints v, __m128i (*join)(__m128i, __m128i)) {
    __m128i four = join(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
    four = join(four, _mm_shuffle_epi32(four, 0x4e));
    return join(four, _mm_shuffle_epi32(four, 0xb1));
}

inline int32_t largest_of(Ints v) {
    return _mm_cvtsi128_si32(halves(v, [](__m128i a, __m128i b) { return _mm_max_epi32(a, b); }));
}

inline int32_t sum_of(Ints v) {
    return _mm_cvtsi128_si32(halves(v, [](__m128i a, __m128i b) { return _mm_add_epi32(a, b); }));
}

// A group's whole numbers of -127 to 127, side by side.
inline void put_bytes(const Ints (&v)[4], int8_t* to) {
    const __m256i first = _mm256_packs_epi32((__m256i)v[0], (__m256i)v[1]);
    const __m256i second = _mm256_packs_epi32((__m256i)v[2], (__m256i)v[3]);
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(first, second), order);
    memcpy(to, &bytes, sizeof bytes);
}
#else
inline int32_t largest_of(Ints v) {
    int32_t most = v[0];
    for (int i = 1; i < WIDTH; ++i) most = std::max(most, v[i]);
    return most;
}

inline int32_t sum_of(Ints v) {
    int32_t total = 0;
    for (int i = 0; i < WIDTH; ++i) total += v[i];
    return total;
}

// A group's whole numbers of -127 to 127, side by side.
inline void put_bytes(const Ints (&v)[GROUP / WIDTH], int8_t* to) {
    typedef int8_t Small __attribute__((vector_size(WIDTH)));
    for (int i = 0; i < GROUP / WIDTH; ++i) {
        const Small small = __builtin_convertvector(v[i], Small);
        memcpy(to + i * WIDTH, &small, sizeof small);
    }
}
#endif

// 32 values to q and its sum; returns the scale. NaN and infinity give a scale that spoils the row, as they should.
inline float quantise_group(const float* x, int8_t* q, int32_t* sum) {
    constexpr int VECTORS = GROUP / WIDTH;
    Ints largest{};  // of the absolute values' bits: NaN is above infinity, infinity above all numbers
    for (int i = 0; i < VECTORS; ++i) {
        Ints size = (Ints)load(x + i * WIDTH) & 0x7fffffff;
        largest = size > largest ? size : largest;
    }
    const int32_t bits = largest_of(largest);
    float most;
    memcpy(&most, &bits, sizeof most);
    const bool finite = bits < 0x7f800000, spread = most > 1e-30f;  // below, 127 / most would overflow
    const Floats inverse = splat(finite && spread ? 127.0f / most : 0.0f);
    const Floats shift = splat(0x1.8p23f);  // adding it rounds to a whole number, which then stands in the low bits
    Ints total{}, whole[VECTORS];
    for (int i = 0; i < VECTORS; ++i) {
        Floats value = finite ? load(x + i * WIDTH) : Floats{};
        whole[i] = (Ints)(value * inverse + shift) - (Ints)shift;
        total += whole[i];
    }
    put_bytes(whole, q);
    *sum = sum_of(total);
    return finite && !spread ? 0.0f : most / 127.0f;
}

inline void quantise_row(const Activations& x, int row) {
    const float* values = x.x + row * x.stride;
    const int count = groups(x.k), whole = x.k / GROUP;
    const int64_t first = static_cast<int64_t>(row) * count;
    for (int g = 0; g < count; ++g) {
        float padded[GROUP] = {};
        const float* from = values + g * GROUP;
        if (g == whole) from = static_cast<float*>(memcpy(padded, from, sizeof(float) * (x.k - g * GROUP)));
        x.scale[first + g] = quantise_group(from, x.q + (first + g) * GROUP, x.sum + first + g);
    }
}

}  // namespace mimoflash
