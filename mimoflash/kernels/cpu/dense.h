// Linear layers with weights in float32 and bfloat16, read where PyTorch keeps them.
#pragma once
#include "piece.h"

namespace mimoflash {

constexpr int BLOCK = 12;  // outputs that all rows of a piece go through before the next ones

// Weights that memory is asked for while others are computed with, so that they are in the cache when their turn comes:
// `outputs` rows of the weight, line after line.
template <class T>
struct Ahead {
    const T* from;
    int outputs;
};

// R rows times N outputs: products summed up in WIDTH lanes.
template <int R, int N, class T>
inline void dot_tile(const float* const (&x)[R], const T* w, int64_t k, Ahead<T> ahead, Floats (&acc)[R][N]) {
    auto step = [&](auto load_x, auto load_w) {
        Floats xs[R];
        for (int r = 0; r < R; ++r) xs[r] = load_x(x[r]);
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) {
            Floats weights = load_w(w + n * k);
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) acc[r][n] = fma(xs[r], weights, acc[r][n]);
        }
    };
    auto whole = [&](int64_t i) {
        step([i](const float* p) { return load(p + i); }, [i](const T* p) { return load(p + i); });
    };
    constexpr int LINE = 64 / sizeof(T);
    int64_t i = 0;
    for (; i + LINE <= k; i += LINE) {
        for (int n = 0; n < ahead.outputs; ++n) __builtin_prefetch(ahead.from + i * ahead.outputs + n * LINE, 0, 2);
#pragma GCC unroll 8
        for (int j = 0; j < LINE; j += WIDTH) whole(i + j);
    }
    for (; i + WIDTH <= k; i += WIDTH) whole(i);
    if (const int rest = static_cast<int>(k - i); rest > 0)
        step([=](const float* p) { return load(p + i, rest); }, [=](const T* p) { return load(p + i, rest); });
}

template <int R, int N>
inline void put_sums(const Floats (&acc)[R][N], float* const (&y)[R], int column, bool add) {
    auto at = [&](int i) { return acc[std::min(i, R * N - 1) % R][std::min(i, R * N - 1) / R]; };
    for (int i = 0; i < R * N; i += 4) {
        Four four = sums(at(i), at(i + 1), at(i + 2), at(i + 3));
        for (int d = 0; d < 4 && i + d < R * N; ++d) {
            float* to = y[(i + d) % R] + column + (i + d) / R;
            *to = add ? *to + four.v[d] : four.v[d];
        }
    }
}

// R rows from `row` on times the outputs from..upto. Each tile asks memory for `each` outputs beyond, from `ahead` on.
template <int R, int N, class T>
void dense_columns(const Piece& piece, int row, int from, int upto, int each, int& ahead) {
    const int64_t k = piece.job.w->k;
    const T* data = static_cast<const T*>(piece.job.w->data);
    const int end = std::min(piece.job.w->n, upto + BLOCK);
    const bool add = piece.job.add;
    const float* x[R];
    float* y[R];
    for (int r = 0; r < R; ++r) x[r] = piece.x(row + r), y[r] = piece.y(row + r);
    int j = from;
    for (; j + N <= upto; j += N) {
        Floats acc[R][N] = {};
        int outputs = std::max(0, std::min(each, end - ahead));
        dot_tile<R, N>(x, data + j * k, k, Ahead<T>{data + ahead * k, outputs}, acc);
        ahead += outputs;
        put_sums<R, N>(acc, y, j, add);
    }
    for (; j < upto; ++j) {
        Floats acc[R][1] = {};
        dot_tile<R, 1>(x, data + j * k, k, Ahead<T>{data, 0}, acc);
        put_sums<R, 1>(acc, y, j, add);
    }
}

template <class T>
void dense(const Piece& piece) {
    int end = piece.column + piece.columns;
    const int tiles = (piece.rows + 3) / 4;
    for (int j = piece.column; j < end; j += BLOCK) {
        int upto = std::min(j + BLOCK, end), ahead = upto;
        const int each = tiles == 1 ? 4 : (3 + tiles - 1) / tiles;
        for (int row = 0; row < piece.rows; row += 4) {
            switch (piece.rows - row) {
                case 1: dense_columns<1, 4, T>(piece, row, j, upto, each, ahead); break;
                case 2: dense_columns<2, 4, T>(piece, row, j, upto, each, ahead); break;
                case 3: dense_columns<3, 4, T>(piece, row, j, upto, each, ahead); break;
                default: dense_columns<4, 3, T>(piece, row, j, upto, each, ahead);
            }
        }
    }
}

}  // namespace mimoflash
