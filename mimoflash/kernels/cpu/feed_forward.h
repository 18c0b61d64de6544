// The feed-forward parts of a layer, as mimoflash/model/moe.py has them: dense SwiGLU, and the mixture of experts.
#pragma once
#include "rows.h"

namespace mimoflash {

// Where the experts chosen for the first row go, those of the next `stride` numbers further.
struct Routes {
    void* first;
    int64_t stride;
    int bytes;  // of a number, 1 or 2

    Routes next(int count) const { return {static_cast<char*>(first) + count * bytes, stride, bytes}; }

    void put(int row, int n, int expert) const {
        if (bytes == 1) static_cast<uint8_t*>(first)[row * stride + n] = static_cast<uint8_t>(expert);
        else static_cast<int16_t*>(first)[row * stride + n] = static_cast<int16_t>(expert);
    }
};

class FeedForward {
public:
    FeedForward(const Rows& r, Workspace& memory, int threads, int queries);

    // x (Q, H), whole, += FFN(norm(x)). Ends with a barrier.
    void run(Team& team, const Layer& layer, int queries, float* x, const Routes& routes);

private:
    static constexpr int ALONE = 1 << 15;  // multiplications of a router that one thread does for all

    const Rows& rows;
    const Model& model;
    float *gate_up, *activated;  // (rows, 2 I), (rows, I); where they are few each thread has a copy of `activated`

    // experts; P pairs of a query and an expert, in the order of experts
    float* scores;         // (Q, E)
    float* weights;        // (Q, K)
    int32_t* chosen;       // (Q, K)
    int32_t* place;        // (Q, K) the pair's
    int32_t* source;       // (P,) the pair's query
    int32_t* ends;         // (E,)
    int32_t* counting;     // (P,) 0, 1, 2, ...
    float* expert_out;     // (P, H)
    LinearJob *up_jobs, *down_jobs;  // (E,) one for each expert that is chosen
    int job_count = 0;
    Activations expert_in{}, expert_inner{};

    void dense(Team& team, const Layer& layer, int queries, float* x);
    void route(Team& team, const Layer& layer, int queries, const float* x, const Routes& to);
    void route_alone(Team& team, const Layer& layer, int queries, const float* x, const Routes& to);
    void sparse(Team& team, int queries, float* x);
    Activations normed(Team& team, const Layer& layer, int queries, const float* x) const;
    void activate(const Activations& out, int64_t piece);
    void choose(const MoE& moe, int row, const Routes& to);
    void group(const MoE& moe, const Activations& in);
};

inline FeedForward::FeedForward(const Rows& r, Workspace& memory, int threads, int queries)
    : rows(r), model(r.model) {
    const int64_t pairs = static_cast<int64_t>(queries) * model.per_token;
    const int64_t inner = std::max(static_cast<int64_t>(queries) * model.intermediate, pairs * model.expert_width);
    gate_up = memory.take<float>(2 * inner), activated = memory.take<float>(std::max(inner, threads * Rows::FEW));
    scores = memory.take<float>(static_cast<int64_t>(queries) * model.experts);
    weights = memory.take<float>(pairs), chosen = memory.take<int32_t>(pairs), place = memory.take<int32_t>(pairs);
    source = memory.take<int32_t>(pairs), counting = memory.take<int32_t>(pairs);
    ends = memory.take<int32_t>(model.experts);
    expert_out = memory.take<float>(pairs * model.hidden);
    up_jobs = memory.take<LinearJob>(model.experts), down_jobs = memory.take<LinearJob>(model.experts);
    for (int64_t i = 0; i < pairs; ++i) counting[i] = static_cast<int32_t>(i);
}

inline void FeedForward::run(Team& team, const Layer& layer, int queries, float* x, const Routes& routes) {
    if (!layer.is_sparse) return dense(team, layer, queries, x);
    const bool alone = static_cast<int64_t>(queries) * model.experts * model.hidden <= ALONE;
    alone ? route_alone(team, layer, queries, x, routes) : route(team, layer, queries, x, routes);
    sparse(team, queries, x);
}

inline Activations FeedForward::normed(Team& team, const Layer& layer, int queries, const float* x) const {
    const Activations in = rows.norm_input(team, queries);
    rows.stage(team, in, [&](int row) { rows.norm_row(row, x + int64_t{row} * in.k, layer.post_norm, in); });
    return in;
}

constexpr int ACTIVATION = 512;  // columns of a piece

inline int64_t activation_pieces(const Activations& out) {
    return int64_t{out.rows} * ((out.k + ACTIVATION - 1) / ACTIVATION);
}

inline void FeedForward::dense(Team& team, const Layer& layer, int queries, float* x) {
    const DenseFFN& ffn = layer.dense;
    const int width = model.intermediate;
    const Activations in = normed(team, layer, queries, x);
    const LinearJob up[] = {
        {&ffn.gate, &in, nullptr, nullptr, queries, gate_up, 2 * width, false},
        {&ffn.up, &in, nullptr, nullptr, queries, gate_up + width, 2 * width, false},
    };
    linear(team, up, 2);
    team.barrier();
    const int64_t at = rows.own_place(team, queries, width);
    const Activations inner = rows.input(activated + at, queries, width, at);
    if (rows.few(queries, width)) {
        for (int64_t piece = 0; piece < activation_pieces(inner); ++piece) activate(inner, piece);
    } else {
        for (int64_t piece; (piece = team.next()) < activation_pieces(inner);) activate(inner, piece);
        team.barrier();
    }
    const LinearJob down{&ffn.down, &inner, nullptr, nullptr, queries, x, model.hidden, true};
    linear(team, &down, 1);
    team.barrier();
}

// silu(gate) * up, a piece of a row
inline void FeedForward::activate(const Activations& out, int64_t piece) {
    const int64_t width = out.k, pieces = activation_pieces(out) / out.rows;
    const int64_t row = piece / pieces, from = piece % pieces * ACTIVATION, end = std::min(from + ACTIVATION, width);
    const float *gate = gate_up + row * 2 * width, *up = gate + width;
    float* y = const_cast<float*>(out.x) + row * width;  // `activated`
    int64_t i = from;
    for (; i + WIDTH <= end; i += WIDTH) store(y + i, silu(load(gate + i)) * load(up + i));
    const int rest = static_cast<int>(end - i);
    if (rest) store(y + i, silu(load(gate + i, rest)) * load(up + i, rest), rest);
    rows.prepare(out, static_cast<int>(row), static_cast<int>(from), static_cast<int>(end - from));
}

// -- experts ----------------------------------------------------------------------------------------------------------

inline void FeedForward::route(
    Team& team, const Layer& layer, int queries, const float* x, const Routes& to) {
    const Activations in = normed(team, layer, queries, x);
    const LinearJob router{&layer.moe.router, &in, nullptr, nullptr, in.rows, scores, model.experts, false};
    linear(team, &router, 1);
    team.barrier();
    own_rows(team, in.rows, [&](int row) { choose(layer.moe, row, to); });
    team.barrier();
    if (team.id == 0) group(layer.moe, in);
    team.barrier();
}

// The same by the first thread, where it is done sooner than all threads would have met.
inline void FeedForward::route_alone(
    Team& team, const Layer& layer, int queries, const float* x, const Routes& to) {
    if (team.id == 0) {
        Shared alone;
        Team one{alone, 0};
        route(one, layer, queries, x, to);
    }
    team.barrier();
}

inline void FeedForward::sparse(Team& team, int queries, float* x) {
    const int64_t h = model.hidden;
    linear(team, up_jobs, job_count);
    team.barrier();
    for (int64_t piece; (piece = team.next()) < activation_pieces(expert_inner);) activate(expert_inner, piece);
    team.barrier();
    linear(team, down_jobs, job_count);
    team.barrier();
    own_rows(team, queries, [&](int row) {  // sums in the order of choice
        float* y = x + row * h;
        const float* weight = weights + row * model.per_token;
        const int32_t* at = place + row * model.per_token;
        for (int64_t i = 0; i < h; ++i) {
            float total = 0;
            for (int e = 0; e < model.per_token; ++e) total += weight[e] * expert_out[at[e] * h + i];
            y[i] += total;
        }
    });
    team.barrier();
}

// Sigmoid scores; the highest `per_token` of score + correction bias (the lower index where they are equal); weights
// from the scores without the bias.
inline void FeedForward::choose(const MoE& moe, int row, const Routes& to) {
    const int experts = model.experts, per_token = model.per_token;
    float* score = scores + static_cast<int64_t>(row) * experts;
    for (int i = 0; i < experts; i += WIDTH) {
        const int count = std::min(WIDTH, experts - i);
        const Floats x = count == WIDTH ? load(score + i) : load(score + i, count);
        store(score + i, splat(1.0f) / (splat(1.0f) + exponential(-x)), count);
    }
    float total = 0;
    int32_t* taken = chosen + row * per_token;
    for (int n = 0; n < per_token; ++n) {
        int best = -1;
        for (int e = 0; e < experts; ++e) {
            if (std::find(taken, taken + n, e) != taken + n) continue;
            if (best < 0 || score[e] + moe.bias[e] > score[best] + moe.bias[best]) best = e;
        }
        taken[n] = best;
        total += score[best];
        to.put(row, n, best);
    }
    for (int n = 0; n < per_token; ++n) {
        const float weight = model.normalise ? score[taken[n]] / (total + 1e-20f) : score[taken[n]];
        weights[row * per_token + n] = weight * model.routed_scaling;
    }
}

// Sorts the pairs by expert and writes down the multiplications of each.
inline void FeedForward::group(const MoE& moe, const Activations& in) {
    const int pairs = in.rows * model.per_token, width = model.expert_width;
    expert_in = in;
    expert_inner = rows.input(activated, pairs, width);
    std::fill(ends, ends + model.experts, 0);
    for (int i = 0; i < pairs; ++i) ++ends[chosen[i]];
    job_count = 0;
    for (int e = 0, begin = 0; e < model.experts; ++e) {
        const int count = ends[e];
        ends[e] = begin;  // moves on to the end as pairs are placed
        if (count == 0) continue;
        const int32_t* these = counting + begin;
        float* up = gate_up + static_cast<int64_t>(begin) * 2 * width;
        up_jobs[job_count] = {moe.gate_up + e, &expert_in, source + begin, nullptr, count, up, 2 * width, false};
        down_jobs[job_count++] = {moe.down + e, &expert_inner, these, these, count, expert_out, model.hidden, false};
        begin += count;
    }
    for (int i = 0; i < pairs; ++i) {
        place[i] = ends[chosen[i]]++;
        source[place[i]] = i / model.per_token;
    }
}

}  // namespace mimoflash
