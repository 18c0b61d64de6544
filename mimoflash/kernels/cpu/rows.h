// Rows: what a pass runs, how threads share its rows, and the stages that take one row at a time.
//
// R rows get keys and values; Q of them (all, in the trunk) go on as queries. Row stages give row r always to the same
// thread, so that row stages which follow each other need no barrier between them; `linear` and attention do. What
// makes a multiplication's input ready (`Rows::stage`) every thread does for itself where the values are few: that is
// done sooner than all would have met.
#pragma once
#include <algorithm>
#include <cmath>

#include "api.h"
#include "exponential.h"
#include "workspace.h"

namespace mimoflash {

// A run of queries of one sequence.
struct Sequence {
    int slot, start, count;
    int row;          // of the first query
    int first;        // no earlier position is seen
    int64_t partial;  // where the sums of its spans lie, if they are worked out apart
};

struct Batch {
    int rows, queries, sequence_count;
    int32_t* positions;          // (R,)
    int32_t* slots;              // (R,)
    const Sequence** chunks;     // (R,) the sequence, where it is too long for a ring; else null
    const int32_t* query_rows;   // (Q,) the rows that are queries; null: all
    Sequence* sequences;
    float* cos[2];               // (R, rope_half) for global and window layers
    float* sin[2];
};

inline Batch take_batch(Workspace& memory, const Model& model, int rows, int sequences) {
    Batch batch{rows, rows, sequences, memory.take<int32_t>(rows), memory.take<int32_t>(rows),
                memory.take<const Sequence*>(rows), nullptr, memory.take<Sequence>(sequences), {}, {}};
    for (int s = 0; s < 2; ++s) {
        batch.cos[s] = memory.take<float>(static_cast<int64_t>(rows) * model.shapes[s].rope_half);
        batch.sin[s] = memory.take<float>(static_cast<int64_t>(rows) * model.shapes[s].rope_half);
    }
    return batch;
}

// Calls f(row) for this thread's rows.
template <class F>
inline void own_rows(const Team& team, int64_t rows, F f) {
    const int threads = team.shared.threads.load(std::memory_order_relaxed);
    for (int64_t row = team.id; row < rows; row += threads) f(static_cast<int>(row));
}

// Groups of 32 inputs of the widest multiplication, for a row.
inline int64_t widest_input(const Model& model) {
    int64_t widest = std::max(groups(2 * model.hidden), groups(model.intermediate));
    for (const AttentionShape& s : model.shapes) widest = std::max<int64_t>(widest, groups(s.heads * s.v_head_dim));
    return std::max(widest, static_cast<int64_t>(model.per_token) * groups(model.expert_width));
}

struct Rows {
    static constexpr int64_t FEW = 4096;  // values that every thread works out for itself

    const Model& model;
    float* normed;          // (rows, H) input of the projections; a copy of FEW for each thread
    Activations quantised;  // the quantised form of one stage's input, likewise

    Rows(const Model& m, Workspace& memory, int64_t rows, int threads) : model(m), quantised{} {
        normed = memory.take<float>(std::max(rows * model.hidden, threads * FEW));
        if (model.head.kind < INT8) return;
        const int64_t widest = std::max(rows * widest_input(model), threads * FEW / GROUP);
        quantised.q = memory.take<int8_t>(widest * GROUP);
        quantised.scale = memory.take<float>(widest);
        quantised.sum = memory.take<int32_t>(widest);
    }

    static bool few(int rows, int k) { return int64_t{rows} * groups(k) * GROUP <= FEW; }

    // Where this thread's copy begins, if they are few.
    static int64_t own_place(const Team& team, int rows, int k) { return few(rows, k) ? team.id * FEW : 0; }

    // x (rows, k) as `linear` takes it, the quantised form from `at` on.
    Activations input(const float* x, int rows, int k, int64_t at = 0) const {
        if (quantised.q == nullptr) return {x, k, rows, k, nullptr, nullptr, nullptr};
        return {x, k, rows, k, quantised.q + at, quantised.scale + at / GROUP, quantised.sum + at / GROUP};
    }

    // Room for normed rows, for `norm_row` to fill.
    Activations norm_input(const Team& team, int rows) const {
        const int64_t at = own_place(team, rows, model.hidden);
        return input(normed + at, rows, model.hidden, at);
    }

    // Calls f(row) for the rows of x, each thread for its own, and then all meet; of few rows each thread for all.
    template <class F>
    void stage(Team& team, const Activations& x, F f) const {
        if (few(x.rows, x.k)) {
            for (int row = 0; row < x.rows; ++row) f(row);
            return;
        }
        own_rows(team, x.rows, f);
        team.barrier();
    }

    // Makes `count` columns of a row from `from`, a multiple of GROUP, on ready for multiplications.
    void prepare(const Activations& x, int row, int from, int count) const {
        if (x.q == nullptr) return;
        const int64_t group = static_cast<int64_t>(row) * groups(x.k) + from / GROUP;
        Activations part{x.x + row * x.stride + from, x.stride, 1, count,
                         x.q + group * GROUP, x.scale + group, x.sum + group};
        Shared alone;
        Team team{alone, 0};
        quantise(team, part);
    }

    // x / sqrt(mean(x^2) + eps) * weight
    void norm(const float* x, const float* weight, float* y) const {
        const int h = model.hidden;
        Floats squares[4] = {};
        int i = 0;
        for (; i + 4 * WIDTH <= h; i += 4 * WIDTH) {
            for (int j = 0; j < 4; ++j) {
                const Floats values = load(x + i + j * WIDTH);
                squares[j] = fma(values, values, squares[j]);
            }
        }
        float total = sum((squares[0] + squares[1]) + (squares[2] + squares[3]));
        for (; i < h; ++i) total += x[i] * x[i];
        const float scale = 1.0f / std::sqrt(total / static_cast<float>(h) + model.epsilon);
        int j = 0;
        for (; j + WIDTH <= h; j += WIDTH) store(y + j, load(x + j) * splat(scale) * load(weight + j));
        for (; j < h; ++j) y[j] = x[j] * scale * weight[j];
    }

    // The vector x (H), normed and ready for multiplications, becomes a row of `in`, see `norm_input`.
    void norm_row(int row, const float* x, const float* weight, const Activations& in) const {
        norm(x, weight, const_cast<float*>(in.x) + row * in.stride);
        prepare(in, row, 0, in.k);
    }

    void embed(int32_t token, float* x) const {
        const int64_t from = static_cast<int64_t>(token) * model.hidden;
        if (model.embedding_kind == F32) {
            memcpy(x, static_cast<const float*>(model.embedding) + from, model.hidden * sizeof(float));
        } else {
            const bf16* row = static_cast<const bf16*>(model.embedding) + from;
            for (int i = 0; i < model.hidden; ++i) x[i] = to_float(row[i]);
        }
    }

    // cos and sin of position / theta^(2i / rope_dim)
    void angles(const Batch& batch, int row, int which) const {
        const AttentionShape& s = model.shapes[which];
        const int64_t from = static_cast<int64_t>(row) * s.rope_half;
        for (int i = 0; i < s.rope_half; ++i) {
            const float angle = static_cast<float>(batch.positions[row]) / s.rope_base[i];
            batch.cos[which][from + i] = std::cos(angle), batch.sin[which][from + i] = std::sin(angle);
        }
    }

    // Rotate-half on the first 2 * rope_half dimensions of each head of x (heads, head_dim); the rest passes.
    void rotate(const Batch& batch, int row, int which, float* x, int heads) const {
        const int half = model.shapes[which].rope_half, width = model.shapes[which].head_dim;
        const float* cos = batch.cos[which] + static_cast<int64_t>(row) * half;
        const float* sin = batch.sin[which] + static_cast<int64_t>(row) * half;
        for (int head = 0; head < heads; ++head, x += width) {
            int i = 0;
            for (; i + WIDTH <= half; i += WIDTH) {
                const Floats first = load(x + i), second = load(x + i + half), c = load(cos + i), s = load(sin + i);
                store(x + i, first * c - second * s);
                store(x + i + half, second * c + first * s);
            }
            for (; i < half; ++i) {
                const float first = x[i], second = x[i + half];
                x[i] = first * cos[i] - second * sin[i];
                x[i + half] = second * cos[i] + first * sin[i];
            }
        }
    }
};

}  // namespace mimoflash
