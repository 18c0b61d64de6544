// What Python hands over: a model, its cache, and a step. Mirrored field by field by mimoflash/engine/native.py.
#pragma once
#include <cstdint>

#include "linear.h"

namespace mimoflash {

struct AttentionShape {
    int32_t heads, kv_heads, head_dim, v_head_dim;
    int32_t window;          // positions attended, the query's own included; 0: all before
    int32_t rope_half;       // so many pairs of dimensions rotate
    const float* rope_base;  // (rope_half,) a position's angle is position / base
};

struct DenseFFN {
    Matrix gate, up, down;
};

struct MoE {
    Matrix router;           // float32
    const float* bias;       // (experts,) on the choice only
    const Matrix* gate_up;   // (experts,) of 2 * width outputs, the gate's first
    const Matrix* down;      // (experts,)
};

// A layer of the trunk, or the block of an MTP layer.
struct Layer {
    int32_t is_window, is_sparse;
    const float* input_norm;
    Matrix q, k, v, o;
    const float* sink;       // (heads,) or null
    const float* post_norm;
    DenseFFN dense;
    MoE moe;
    void* k_cache;           // global (pages, kv_heads, PAGE, head_dim), window (slots, kv_heads, ring, head_dim)
    void* v_cache;
};

struct MTPLayer {
    const float* enorm;
    const float* hnorm;
    const float* final_norm;
    Matrix eh_proj;
    Layer block;
};

struct Cache {
    int32_t kind;              // F32 or BF16
    int32_t drafts;            // MTP layers used; a ring has window + drafts places
    int32_t max_pages;
    int32_t kept;              // hidden states kept of a slot, position p at place p % kept; 0 without MTP layers
    const int32_t* page_table; // (slots, max_pages)
    float* hidden;             // (slots, kept, H) before the final norm
    int32_t* mtp_start;        // (slots,) MTP layer k's entries are right at positions mtp_start .. mtp_end - k - 1,
    int32_t* mtp_end;          // (slots,) as far as the trunk has run
};

struct Model {
    int32_t hidden, intermediate, vocab, layer_count, moe_layers;
    int32_t experts, per_token, expert_width, normalise;
    float epsilon, value_scale, routed_scaling;
    int32_t embedding_kind;      // F32 or BF16
    const void* embedding;       // (vocab, hidden)
    const Layer* layers;
    const MTPLayer* mtp;
    const float* final_norm;
    Matrix head;
    Matrix draft_head;           // the head's rows of the draft vocabulary
    const int32_t* draft_tokens; // (draft_head.n,) their ids; null: all
    AttentionShape shapes[2];    // global, window
    Cache cache;
};

// See engine/runner.py.
struct Step {
    int32_t sequences, tokens_count, logits_count, route_bytes;  // 1 or 2 bytes a route
    const int32_t* slots;
    const int32_t* starts;
    const int32_t* counts;
    const int32_t* tokens;
    const int32_t* logits_rows;
    const int32_t* lookahead;    // (sequences, drafts) or null
    float* logits;               // (logits_count, vocab)
    void* routes;                // (tokens, MoE layers, per_token)
};

struct DraftStep {
    int32_t sequences, count;
    const int32_t* slots;
    const int32_t* positions;
    const int32_t* recent;       // (sequences, 8)
    const float* temperature;
    const uint64_t* seed;
    int32_t* drafts;             // (sequences, count)
};

}  // namespace mimoflash
