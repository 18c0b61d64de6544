// Softmax attention of a tile of rows (queries x the heads that share a KV head) over cached keys and values.
//
// A row's result does not depend on the tile it is in. Keys go by absolute blocks of 64 positions, in ascending order,
// with a running maximum; global layers close the sums every 1,024 positions (a span) and add spans up in order. So a
// span can be another thread's work. A masked key has the weight 0 exactly.
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>

#include "api.h"
#include "exponential.h"
#include "workspace.h"

namespace mimoflash {

constexpr int PAGE = 64;    // positions a page holds, and a block of keys
constexpr int SPAN = 1024;  // positions summed up on their own
constexpr int TILE = 32;    // rows of a tile, unless more heads share a KV head
constexpr int SCORES = PAGE + 16;  // a row of scores; the last few are written past

constexpr float NONE = -std::numeric_limits<float>::infinity();

inline int padded(int width) { return (width + WIDTH - 1) / WIDTH * WIDTH; }

// Where the keys and values of one sequence and KV head lie.
template <class T>
struct Keys {
    const T* k;            // global: of the first page; window: of the slot's ring
    const T* v;
    int head_dim, v_head_dim;
    int ring;              // places; 0: pages
    const int32_t* pages;  // of the slot
    int64_t page_stride;   // rows of k and v from page to page
    const T* new_k;        // window layers, chunks longer than the ring can take: positions from new_from on
    const T* new_v;
    int new_from;

    struct Run {
        const T* k;
        const T* v;
        int count;
    };

    // The positions from `position` on, below `end`, that lie side by side.
    Run at(int position, int end) const {
        if (ring == 0) {
            const int place = position % PAGE;
            return run(k, v, pages[position / PAGE] * page_stride + place, std::min(end - position, PAGE - place));
        }
        if (position >= new_from) return run(new_k, new_v, position - new_from, end - position);
        const int place = position % ring;
        return run(k, v, place, std::min(std::min(end, new_from) - position, ring - place));
    }

    Run run(const T* k_from, const T* v_from, int64_t place, int count) const {
        return {k_from + place * head_dim, v_from + place * v_head_dim, count};
    }
};

// Sums over some of a row's keys: acc / l is the mean of their values weighted by exp(score), m the largest score.
struct Sums {
    float* acc;  // (rows, padded(v_head_dim))
    float* m;    // (rows,)
    float* l;    // (rows,)

    Sums from(int64_t row, int v_width) const { return {acc + row * v_width, m + row, l + row}; }
};

inline Sums take_sums(Workspace& memory, int64_t rows, int v_head_dim) {
    return {memory.take<float>(rows * padded(v_head_dim)), memory.take<float>(rows), memory.take<float>(rows)};
}

// One thread's rows. Row r is query r / group, at position `start` + r / group, and head r % group of the KV head.
struct Tile {
    int rows, group, start;
    int first;   // no earlier position is seen
    int window;  // 0: none
    int width, v_width;  // padded head_dim and v_head_dim
    float* q;            // (rows, width), scaled, zeros behind
    float* scores;       // (rows, SCORES)
    Sums sums;

    int position(int row) const { return start + row / group; }
    int lowest(int row) const { return std::max(first, window ? position(row) - window + 1 : 0); }
};

// q (queries, heads, head_dim) from the tile's first row on, `stride` floats from query to query.
inline void load_queries(Tile& tile, const float* q, int64_t stride, int head_dim) {
    const float scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(head_dim)));
    for (int r = 0; r < tile.rows; ++r) {
        const float* from = q + r / tile.group * stride + r % tile.group * head_dim;
        float* to = tile.q + static_cast<int64_t>(r) * tile.width;
        for (int i = 0; i < head_dim; ++i) to[i] = from[i] * scale;
        for (int i = head_dim; i < tile.width; ++i) to[i] = 0;
    }
}

// Keeps the compiler from loading a value again at each use: loads are what limits these loops.
inline Floats in_register(Floats v) {
#if defined(__x86_64__)
    asm("" : "+v"(v));
#endif
    return v;
}

// -- scores -----------------------------------------------------------------------------------------------------------

// R rows from `row` on times K keys: as many sums as registers hold.
template <int R, int K, class T>
inline void score_tile(const Tile& tile, int row, const T* const* k, int head_dim, int place) {
    Floats acc[R][K] = {};
    const float* q = tile.q + static_cast<int64_t>(row) * tile.width;
    auto step = [&](int i, auto load_k) {
        Floats keys[K];
#pragma GCC unroll 4
        for (int j = 0; j < K; ++j) keys[j] = load_k(k[j] + i);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            const Floats query = in_register(load(q + r * tile.width + i));
#pragma GCC unroll 4
            for (int j = 0; j < K; ++j) acc[r][j] = fma(query, keys[j], acc[r][j]);
        }
    };
    int i = 0;
    for (; i + WIDTH <= head_dim; i += WIDTH) step(i, [](const T* p) { return load(p); });
    if (i < head_dim) step(i, [=](const T* p) { return load(p, head_dim - i); });
    float* to = tile.scores + row * SCORES + place;
    if constexpr (K == 4) {
        for (int r = 0; r < R; ++r) {
            const Four four = sums(acc[r][0], acc[r][1], acc[r][2], acc[r][3]);
            memcpy(to + r * SCORES, four.v, sizeof four.v);
        }
    } else {
        static_assert(R % 2 == 0 && K == 2);
        for (int r = 0; r < R; r += 2) {
            const Four four = sums(acc[r][0], acc[r][1], acc[r + 1][0], acc[r + 1][1]);
            memcpy(to + r * SCORES, four.v, 2 * sizeof(float));
            memcpy(to + (r + 1) * SCORES, four.v + 2, 2 * sizeof(float));
        }
    }
}

template <class T>
inline void score_four(const Tile& tile, int row, const T* const* k, int head_dim, int place) {
    if constexpr (WIDTH == 16) {
        score_tile<4, 4>(tile, row, k, head_dim, place);
    } else {
        score_tile<4, 2>(tile, row, k, head_dim, place);
        score_tile<4, 2>(tile, row, k + 2, head_dim, place + 2);
    }
}

// Asks for memory that is needed soon: pages lie apart, so the processor does not guess them.
template <class T>
inline void fetch(const T* from, int count) {
    for (int i = 0; i < count; i += 64 / sizeof(T)) __builtin_prefetch(from + i);
}

// Scores of positions from .. end - 1 of a block; `ahead`: the next block's keys, or null.
template <class T>
void score(const Tile& tile, const Keys<T>& keys, int from, int end, const T* ahead) {
    for (int position = from; position < end;) {
        const auto run = keys.at(position, end);
        for (int j = 0; j < run.count; j += 4) {
            fetch(run.v + static_cast<int64_t>(j) * keys.v_head_dim, 4 * keys.v_head_dim);
            if (ahead) fetch(ahead + static_cast<int64_t>(position - from + j) * keys.head_dim, 4 * keys.head_dim);
            const T* k[4];
            for (int d = 0; d < 4; ++d) k[d] = run.k + int64_t{std::min(j + d, run.count - 1)} * keys.head_dim;
            const int place = (position + j) % PAGE;
            int row = 0;
            for (; row + 4 <= tile.rows; row += 4) score_four(tile, row, k, keys.head_dim, place);
            switch (tile.rows - row) {
                case 1: score_tile<1, 4>(tile, row, k, keys.head_dim, place); break;
                case 2: score_tile<2, 4>(tile, row, k, keys.head_dim, place); break;
                case 3: score_tile<3, 4>(tile, row, k, keys.head_dim, place); break;
            }
        }
        position += run.count;
    }
}

// -- softmax ----------------------------------------------------------------------------------------------------------

// Scores of the block of positions from `block` on become weights relative to the row's running maximum.
inline void weigh(const Tile& tile, int row, int block) {
    float* s = tile.scores + row * SCORES;
    const int from = std::clamp(tile.lowest(row) - block, 0, PAGE);
    const int end = std::clamp(tile.position(row) + 1 - block, 0, PAGE);
    if (from >= end) {
        memset(s, 0, PAGE * sizeof(float));
        return;
    }
    std::fill(s, s + from, NONE);
    std::fill(s + end, s + PAGE, NONE);
    Floats most = load(s);
    for (int i = WIDTH; i < PAGE; i += WIDTH) most = maximum(most, load(s + i));
    float& m = tile.sums.m[row];
    const float new_m = std::max(m, maximum(most));
    if (new_m != m) {
        const float factor = exponential(m - new_m);
        float* acc = tile.sums.acc + static_cast<int64_t>(row) * tile.v_width;
        for (int i = 0; i < tile.v_width; i += WIDTH) store(acc + i, load(acc + i) * splat(factor));
        tile.sums.l[row] *= factor;
        m = new_m;
    }
    Floats total = {};
    for (int i = 0; i < PAGE; i += WIDTH) {
        const Floats weight = exponential(load(s + i) - splat(m));
        store(s + i, weight);
        total += weight;
    }
    tile.sums.l[row] += sum(total);
}

// -- values -----------------------------------------------------------------------------------------------------------

// acc of R rows, N vectors of it, += weights x values; `count`: floats of the last vector if it is not whole.
template <int R, int N, bool PARTIAL, class T>
inline void value_tile(const Tile& tile, int row, int column, const T* v, int stride, int keys, int place, int count) {
    float* acc = tile.sums.acc + static_cast<int64_t>(row) * tile.v_width + column;
    const float* weights = tile.scores + row * SCORES + place;
    Floats out[R][N];
    for (int r = 0; r < R; ++r)
        for (int n = 0; n < N; ++n) out[r][n] = load(acc + r * tile.v_width + n * WIDTH);
    for (int j = 0; j < keys; ++j, v += stride) {
        Floats values[N];
        for (int n = 0; n < N; ++n) values[n] = PARTIAL ? load(v + column, count) : load(v + column + n * WIDTH);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            const Floats weight = splat(weights[r * SCORES + j]);
            for (int n = 0; n < N; ++n) out[r][n] = fma(weight, values[n], out[r][n]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int n = 0; n < N; ++n) store(acc + r * tile.v_width + n * WIDTH, out[r][n]);
}

template <int R, class T>
inline void value_rows(const Tile& tile, int row, const T* v, int v_head_dim, int keys, int place) {
    int column = 0;
    for (; column + 2 * WIDTH <= v_head_dim; column += 2 * WIDTH)
        value_tile<R, 2, false>(tile, row, column, v, v_head_dim, keys, place, 0);
    for (; column + WIDTH <= v_head_dim; column += WIDTH)
        value_tile<R, 1, false>(tile, row, column, v, v_head_dim, keys, place, 0);
    if (column < v_head_dim)
        value_tile<R, 1, true>(tile, row, column, v, v_head_dim, keys, place, v_head_dim - column);
}

template <class T>
void add_values(const Tile& tile, const Keys<T>& keys, int from, int end) {
    for (int position = from; position < end;) {
        const auto run = keys.at(position, end);
        const int place = position % PAGE;
        int row = 0;
        for (; row + 4 <= tile.rows; row += 4) value_rows<4>(tile, row, run.v, keys.v_head_dim, run.count, place);
        switch (tile.rows - row) {
            case 1: value_rows<1>(tile, row, run.v, keys.v_head_dim, run.count, place); break;
            case 2: value_rows<2>(tile, row, run.v, keys.v_head_dim, run.count, place); break;
            case 3: value_rows<3>(tile, row, run.v, keys.v_head_dim, run.count, place); break;
        }
        position += run.count;
    }
}

// -- together ---------------------------------------------------------------------------------------------------------

inline void clear(Sums& sums, int rows, int v_width) {
    std::fill(sums.acc, sums.acc + static_cast<int64_t>(rows) * v_width, 0.0f);
    std::fill(sums.m, sums.m + rows, NONE);
    std::fill(sums.l, sums.l + rows, 0.0f);
}

// The tile's sums over positions from `from` to below `end`.
template <class T>
void sum_over(Tile& tile, const Keys<T>& keys, int from, int end) {
    clear(tile.sums, tile.rows, tile.v_width);
    from = std::max(from, tile.lowest(0));
    end = std::min(end, tile.position(tile.rows - 1) + 1);
    for (int block = from / PAGE * PAGE; block < end; block += PAGE) {
        const int begin = std::max(from, block), stop = std::min(end, block + PAGE);
        score(tile, keys, begin, stop, stop < end ? keys.at(stop, end).k : nullptr);
        for (int row = 0; row < tile.rows; ++row) weigh(tile, row, block);
        add_values(tile, keys, begin, stop);
    }
}

// The sums over a row's next span join those over the spans before it.
inline void join(Sums& to, const Sums& from, int row, int v_width) {
    if (from.m[row] == NONE) return;
    const float m = std::max(to.m[row], from.m[row]);
    const float keep = exponential(to.m[row] - m), take = exponential(from.m[row] - m);
    float* a = to.acc + static_cast<int64_t>(row) * v_width;
    const float* b = from.acc + static_cast<int64_t>(row) * v_width;
    for (int i = 0; i < v_width; i += WIDTH) store(a + i, load(a + i) * splat(keep) + load(b + i) * splat(take));
    to.l[row] = to.l[row] * keep + from.l[row] * take;
    to.m[row] = m;
}

// A row's mean value; a sink is one more score, of a key whose value is 0.
inline void finish(const Sums& sums, int row, int v_width, const float* sink, float* out, int v_head_dim) {
    const float m = sink ? std::max(sums.m[row], *sink) : sums.m[row];
    const float factor = exponential(sums.m[row] - m);
    const float l = sums.l[row] * factor + (sink ? exponential(*sink - m) : 0.0f);
    const float* acc = sums.acc + static_cast<int64_t>(row) * v_width;
    for (int i = 0; i < v_head_dim; ++i) out[i] = acc[i] * factor / l;
}

}  // namespace mimoflash
