// The network over one step: mimoflash/model/transformer.py, line by line, with all of a step's rows side by side.
#pragma once
#include "mtp.h"

namespace mimoflash {

// T rows, one for each token; N of them give logits. H is the hidden size.
class Forward {
public:
    Forward(const Model& m, Workspace& memory, const Step& s, int threads);
    void run(Team& team);
    void finish();  // after the pass: which MTP entries are right now

private:
    const Model& model;
    const Step& step;
    Rows rows;
    AttentionLayer attention;
    FeedForward ffn;
    Batch batch;
    float* x;                // (T, H) the residual stream
    MTPRows* fills = nullptr;  // (drafts,) rows that the MTP layers get
    int32_t* known_until;    // (S,) the last position whose token is known

    void keep_hidden(int row);
    void fill_mtp(Team& team);
    void logits(Team& team);
    void plan_fill(Workspace& memory);
    void plan_fill(MTPRows& r, int k, int s);
    bool is_filled(int s) const { return step.lookahead[s * model.cache.drafts] > -2; }
};

// A chunk that fills MTP layers may build entries before it again.
inline int most_rows(const Model& model, const Step& step) {
    const int again = step.lookahead ? step.sequences * model.cache.drafts : 0;
    return std::max(step.tokens_count + again, step.logits_count);
}

inline Forward::Forward(const Model& m, Workspace& memory, const Step& s, int threads)
    : model(m), step(s),
      rows(m, memory, most_rows(m, s), threads), attention(rows, memory, threads, most_rows(m, s), s.tokens_count),
      ffn(rows, memory, threads, s.tokens_count), batch(take_batch(memory, m, s.tokens_count, s.sequences)) {
    x = memory.take<float>(static_cast<int64_t>(step.tokens_count) * model.hidden);
    int row = 0;
    for (int i = 0; i < step.sequences; ++i) {
        batch.sequences[i] = {step.slots[i], step.starts[i], step.counts[i], row, 0, 0};
        const bool is_long = step.counts[i] > 1 + model.cache.drafts;
        for (int t = 0; t < step.counts[i]; ++t, ++row) {
            batch.positions[row] = step.starts[i] + t;
            batch.slots[row] = step.slots[i];
            batch.chunks[row] = is_long ? batch.sequences + i : nullptr;
        }
    }
    attention.plan(batch, memory);
    if (model.cache.drafts && step.lookahead) plan_fill(memory);
}

inline void Forward::run(Team& team) {
    own_rows(team, step.tokens_count, [&](int row) {
        rows.embed(step.tokens[row], x + static_cast<int64_t>(row) * model.hidden);
        for (int shape = 0; shape < 2; ++shape) rows.angles(batch, row, shape);
    });
    team.barrier();
    Routes routes{step.routes, static_cast<int64_t>(model.moe_layers) * model.per_token, step.route_bytes};
    for (int i = 0; i < model.layer_count; ++i) {
        const Layer& layer = model.layers[i];
        attention.project(team, layer, batch, x);
        attention.attend(team, layer, batch, x);
        ffn.run(team, layer, step.tokens_count, x, routes);
        if (layer.is_sparse) routes = routes.next(model.per_token);
    }
    if (fills) fill_mtp(team);
    if (model.cache.kept) own_rows(team, step.tokens_count, [&](int row) { keep_hidden(row); });
    logits(team);
}

// logits_rows -> (N, vocabulary)
inline void Forward::logits(Team& team) {
    const Activations in = rows.norm_input(team, step.logits_count);
    rows.stage(team, in, [&](int i) {
        rows.norm_row(i, x + int64_t{step.logits_rows[i]} * in.k, model.final_norm, in);
    });
    const LinearJob head{&model.head, &in, nullptr, nullptr, step.logits_count, step.logits, model.vocab, false};
    linear(team, &head, 1);
}

// -- what drafting needs ----------------------------------------------------------------------------------------------

// The last hidden states of a slot.
inline void Forward::keep_hidden(int row) {
    const int places = model.cache.kept, next = row + places;
    const bool overwritten = next < step.tokens_count && batch.slots[next] == batch.slots[row];
    if (overwritten) return;
    float* to = const_cast<float*>(kept_hidden(model, batch.slots[row], batch.positions[row]));
    memcpy(to, x + static_cast<int64_t>(row) * model.hidden, model.hidden * sizeof(float));
}

// Layer k gets the positions whose token 1 + k places on is known, the last ones that its ring holds; before the chunk,
// up to k positions again whose entries were built on drafts.
inline void Forward::plan_fill(Workspace& memory) {
    const int drafts = model.cache.drafts, ring = model.shapes[1].window + drafts;
    int count = 0;
    for (int s = 0; s < step.sequences; ++s) count += std::min(step.counts[s] + drafts, ring);
    fills = memory.take<MTPRows>(drafts);
    known_until = memory.take<int32_t>(step.sequences);
    for (int k = 0; k < drafts; ++k) {
        new (fills + k) MTPRows(memory, model, count, 1);
        for (int s = 0; s < step.sequences; ++s)
            if (is_filled(s)) plan_fill(fills[k], k, s);
    }
}

inline void Forward::plan_fill(MTPRows& r, int k, int s) {
    const int drafts = model.cache.drafts, ring = model.shapes[1].window + drafts, slot = step.slots[s];
    const int start = step.starts[s], end = start + step.counts[s], row = batch.sequences[s].row;
    int32_t &from = model.cache.mtp_start[slot], &filled = model.cache.mtp_end[slot];
    if (k == 0 && (from > start || filled < start)) from = filled = start;  // begun anew, or a gap before this chunk
    const int32_t* lookahead = step.lookahead + s * drafts;
    int ahead = 0;
    while (ahead < drafts && lookahead[ahead] >= 0) ++ahead;
    known_until[s] = end - 1 + ahead;
    const int first = std::max(from, std::min(filled - k, start)), last = std::min(end, known_until[s] - k);
    for (int i = std::max(first, end - ring); i < last; ++i) {
        const int token = i + 1 + k;
        const float* hidden = i < start ? kept_hidden(model, slot, i) : x + int64_t{row + i - start} * model.hidden;
        r.add(slot, i, hidden, token < end ? step.tokens + row + token - start : lookahead + token - end);
    }
}

inline void Forward::fill_mtp(Team& team) {
    for (int k = 0; k < model.cache.drafts; ++k) {
        join_inputs(team, rows, model.mtp[k], fills[k]);
        attention.project(team, model.mtp[k].block, fills[k].batch, fills[k].x);
    }
}

inline void Forward::finish() {
    for (int s = 0; model.cache.drafts && s < step.sequences; ++s) {
        const int slot = step.slots[s], start = step.starts[s];
        int32_t &from = model.cache.mtp_start[slot], &filled = model.cache.mtp_end[slot];
        if (fills && is_filled(s)) {
            filled = known_until[s];
        } else {
            from = std::min(from, start);  // a text that begins anew
            filled = std::min(filled, start);
        }
    }
}

}  // namespace mimoflash
