// The MTP layers (mimoflash/model/mtp.py): their keys and values along the text, and the chain that drafts.
//
// Layer k at position i takes the trunk's hidden state there and the token at i + 1 + k, and names the one after.
#pragma once
#include "attention_layer.h"
#include "feed_forward.h"
#include "sampling.h"

namespace mimoflash {

constexpr int RECENT = 8;  // confirmed tokens that drafting is given

// Rows of one MTP layer, ready to be joined from hidden states and tokens.
struct MTPRows {
    Batch batch;
    const float** hidden;     // (R,) of the trunk
    const int32_t** tokens;   // (R,) may be filled in by the layer before
    float* joined;            // (R, 2 H)
    float* x;                 // (R, H)

    MTPRows(Workspace& memory, const Model& model, int rows, int sequences)
        : batch(take_batch(memory, model, rows, sequences)) {
        hidden = memory.take<const float*>(rows);
        tokens = memory.take<const int32_t*>(rows);
        joined = memory.take<float>(2 * static_cast<int64_t>(rows) * model.hidden);
        x = memory.take<float>(static_cast<int64_t>(rows) * model.hidden);
        batch.rows = batch.queries = 0;
    }

    void add(int slot, int position, const float* state, const int32_t* token) {
        const int row = batch.rows++;
        batch.slots[row] = slot, batch.positions[row] = position, batch.chunks[row] = nullptr;
        hidden[row] = state, tokens[row] = token;
    }
};

// x = eh_proj(concat(enorm(embedding), hnorm(hidden))). Ends with a barrier.
inline void join_inputs(Team& team, const Rows& rows, const MTPLayer& layer, MTPRows& r) {
    const int h = rows.model.hidden;
    const Activations joined = rows.input(r.joined, r.batch.rows, 2 * h);
    own_rows(team, r.batch.rows, [&](int row) {
        float* to = r.joined + 2 * static_cast<int64_t>(row) * h;
        rows.embed(*r.tokens[row], to + h);
        rows.norm(to + h, layer.enorm, to);
        rows.norm(r.hidden[row], layer.hnorm, to + h);
        rows.prepare(joined, row, 0, 2 * h);
        rows.angles(r.batch, row, 1);
    });
    team.barrier();
    const LinearJob job{&layer.eh_proj, &joined, nullptr, nullptr, r.batch.rows, r.x, h, false};
    linear(team, &job, 1);
    team.barrier();
}

inline const float* kept_hidden(const Model& model, int slot, int position) {
    const int64_t places = model.cache.kept;
    return model.cache.hidden + (slot * places + position % places) * model.hidden;
}

// One call of `draft` (engine/runner.py).
class Drafting {
public:
    Drafting(const Model& m, Workspace& memory, const DraftStep& d, int threads);
    void run(Team& team);
    void finish();  // after the pass: which entries are right now

private:
    const Model& model;
    const DraftStep& step;
    const int most_rows;
    Rows rows;
    AttentionLayer attention;
    FeedForward ffn;
    const int width;       // of `known`
    int32_t* known;        // (S, width) tokens from p - 6 on, the drafts last
    int32_t* query_rows;   // (count, S)
    MTPRows* layers;       // (all MTP layers,)
    float* x;              // (S, H)
    float* logits;         // (S, draft vocabulary)
    Picked* picked;        // (S, pieces)

    int plan_rows() const;
    int first_row(int s, int k) const;
    void plan_layer(MTPRows& r, int k);
    int pieces() const { return (model.draft_head.n + PICK_PIECE - 1) / PICK_PIECE; }
    void pick(Team& team, int k);
};

// The first position of sequence s that layer k must (again) build.
inline int Drafting::first_row(int s, int k) const {
    const int slot = step.slots[s];
    return std::max(model.cache.mtp_start[slot], std::min(model.cache.mtp_end[slot] - k, step.positions[s]));
}

// Entries that were left out for too long can be built no more: those before them count as absent. Returns how many
// rows a layer may have.
inline int Drafting::plan_rows() const {
    int most = 0;
    for (int s = 0; s < step.sequences; ++s) {
        const int oldest = std::max(0, step.positions[s] + 1 - RECENT);
        int32_t& from = model.cache.mtp_start[step.slots[s]];
        if (from < oldest && model.cache.mtp_end[step.slots[s]] - (model.cache.drafts - 1) < oldest) from = oldest;
        most += step.positions[s] + 1 - first_row(s, model.cache.drafts - 1);
    }
    return most;
}

inline Drafting::Drafting(const Model& m, Workspace& memory, const DraftStep& d, int threads)
    : model(m), step(d), most_rows(plan_rows()), rows(m, memory, most_rows, threads),
      attention(rows, memory, threads, most_rows, d.sequences), ffn(rows, memory, threads, d.sequences),
      width(RECENT + d.count) {
    known = memory.take<int32_t>(static_cast<int64_t>(step.sequences) * width);
    query_rows = memory.take<int32_t>(static_cast<int64_t>(step.sequences) * step.count);
    for (int s = 0; s < step.sequences; ++s)
        memcpy(known + s * width, step.recent + s * RECENT, RECENT * sizeof(int32_t));
    layers = memory.take<MTPRows>(model.cache.drafts);
    for (int k = 0; k < model.cache.drafts; ++k)
        plan_layer(*new (layers + k) MTPRows(memory, model, most_rows, step.sequences), k);
    x = memory.take<float>(static_cast<int64_t>(step.sequences) * model.hidden);
    logits = memory.take<float>(static_cast<int64_t>(step.sequences) * model.draft_head.n);
    picked = memory.take<Picked>(static_cast<int64_t>(step.sequences) * pieces());
}

// A layer that drafts gets all positions up to p; another those whose token is confirmed, so that it may draft later.
inline void Drafting::plan_layer(MTPRows& r, int k) {
    const bool drafts = k < step.count;
    for (int s = 0; s < step.sequences; ++s) {
        const int slot = step.slots[s], p = step.positions[s];
        for (int i = first_row(s, k); i <= (drafts ? p : p - k); ++i)
            r.add(slot, i, kept_hidden(model, slot, i), known + s * width + i + 1 + k - (p + 2 - RECENT));
        if (!drafts) continue;
        query_rows[k * step.sequences + s] = r.batch.rows - 1;
        r.batch.sequences[s] = {slot, p, 1, s, model.cache.mtp_start[slot], 0};
    }
    if (!drafts) return;
    r.batch.queries = step.sequences;
    r.batch.query_rows = query_rows + k * step.sequences;
}

inline void Drafting::run(Team& team) {
    const int64_t h = model.hidden;
    const Activations in = rows.norm_input(team, step.sequences);
    for (int k = 0; k < model.cache.drafts; ++k) {
        const MTPLayer& layer = model.mtp[k];
        MTPRows& r = layers[k];
        join_inputs(team, rows, layer, r);
        if (k >= step.count) {
            attention.project(team, layer.block, r.batch, r.x);
            continue;
        }
        own_rows(team, step.sequences, [&](int s) {
            memcpy(x + s * h, r.x + r.batch.query_rows[s] * h, h * sizeof(float));
        });
        attention.project(team, layer.block, r.batch, r.x);
        attention.attend(team, layer.block, r.batch, x);
        ffn.run(team, layer.block, step.sequences, x, {});
        rows.stage(team, in, [&](int row) { rows.norm_row(row, x + row * h, layer.final_norm, in); });
        const Matrix& w = model.draft_head;
        const LinearJob head{&w, &in, nullptr, nullptr, step.sequences, logits, w.n, false};
        linear(team, &head, 1);
        team.barrier();
        pick(team, k);
    }
}

// The likeliest token of the draft vocabulary, or at a temperature the one that its noise favours. Ends with a barrier.
inline void Drafting::pick(Team& team, int k) {
    const int size = model.draft_head.n, count = pieces();
    for (int64_t piece; (piece = team.next()) < static_cast<int64_t>(step.sequences) * count;) {
        const int64_t s = piece / count;
        const int from = static_cast<int>(piece % count) * PICK_PIECE, end = std::min(from + PICK_PIECE, size);
        const Noise noise(step.seed[s], step.positions[s] + 2 + k);
        picked[piece] = best_of(logits + s * size, from, end, model.draft_tokens, step.temperature[s], noise);
    }
    team.barrier();
    own_rows(team, step.sequences, [&](int s) {
        Picked best = picked[s * count];
        for (int i = 1; i < count; ++i)
            if (picked[s * count + i].value > best.value) best = picked[s * count + i];
        const int token = model.draft_tokens ? model.draft_tokens[best.index] : best.index;
        known[s * width + RECENT + k] = step.drafts[s * step.count + k] = token;
    });
    team.barrier();
}

inline void Drafting::finish() {
    for (int s = 0; s < step.sequences; ++s) model.cache.mtp_end[step.slots[s]] = step.positions[s] + 1;
}

}  // namespace mimoflash
