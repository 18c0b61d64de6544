// An attention layer over a batch of rows: projections, RoPE, the cache, attention, output projection.
#pragma once
#include <climits>

#include "attention.h"
#include "rows.h"

namespace mimoflash {

class AttentionLayer {
public:
    AttentionLayer(const Rows& r, Workspace& memory, int threads, int rows, int queries);

    // Before a pass: where the sums of sequences over several spans lie.
    void plan(Batch& batch, Workspace& memory);

    // `input` (R, H), whole -> queries, and keys and values in the cache. Ends with a barrier.
    void project(Team& team, const Layer& layer, const Batch& batch, const float* input);

    // x (Q, H) += o_proj(attention). Ends with a barrier.
    void attend(Team& team, const Layer& layer, const Batch& batch, float* x);

private:
    const Rows& rows;
    const Model& model;
    float *q, *mixed;         // (Q, heads, head_dim), (Q, heads, v_head_dim)
    float *k, *v;             // (R, kv_heads, head_dim), (R, kv_heads, v_head_dim)
    void *chunk_k, *chunk_v;  // of sequences that are too long for a ring: (kv_heads, count, width) each
    Tile* tiles;              // one a thread
    Sums* totals;
    Sums partials{};          // (sequence, KV head, span, row)
    bool any_split = false;

    const AttentionShape& shape(const Layer& layer) const { return model.shapes[layer.is_window]; }
    int ring(const AttentionShape& s) const { return s.window ? s.window + model.cache.drafts : 0; }
    bool is_long(const Sequence& sequence) const { return sequence.count > 1 + model.cache.drafts; }

    template <class T> void write(const Layer& layer, const Batch& batch, int row) const;
    template <class T> void write_ring(Team& team, const Layer& layer, const Batch& batch) const;
    template <class T> Keys<T> keys(const Layer& layer, const Sequence& sequence, int head) const;
    template <class T> void mix(Team& team, const Layer& layer, const Batch& batch);
    template <class T> void mix_unit(Team& team, const Layer& layer, const Sequence& sequence, int head, int part);
    void join_spans(Team& team, const Layer& layer, const Batch& batch);
    void put(const Layer& layer, const Sums& sums, const Sequence& sequence, int head, int query, int count);
};

inline int group_size(const AttentionShape& s) { return s.heads / s.kv_heads; }
inline int tile_queries(const AttentionShape& s) { return std::max(1, TILE / group_size(s)); }
inline int spans(const AttentionShape& s, int length) { return s.window ? 1 : (length - 1) / SPAN + 1; }

// Few queries over a long text: its spans are units of work of their own.
inline bool is_split(const AttentionShape& s, const Sequence& sequence) {
    return sequence.count <= tile_queries(s) && spans(s, sequence.start + sequence.count) > 1;
}

inline AttentionLayer::AttentionLayer(const Rows& r, Workspace& memory, int threads, int row_count, int queries)
    : rows(r), model(r.model) {
    int64_t q_width = 0, k_width = 0, v_width = 0, mixed_width = 0;
    int tile_rows = TILE, width = 0, v_head = 0;
    for (const AttentionShape& s : model.shapes) {
        q_width = std::max<int64_t>(q_width, s.heads * s.head_dim);
        k_width = std::max<int64_t>(k_width, s.kv_heads * s.head_dim);
        v_width = std::max<int64_t>(v_width, s.kv_heads * s.v_head_dim);
        mixed_width = std::max<int64_t>(mixed_width, s.heads * s.v_head_dim);
        tile_rows = std::max(tile_rows, group_size(s));
        width = std::max(width, padded(s.head_dim)), v_head = std::max(v_head, s.v_head_dim);
    }
    q = memory.take<float>(queries * q_width), mixed = memory.take<float>(queries * mixed_width);
    k = memory.take<float>(row_count * k_width), chunk_k = memory.take<float>(row_count * k_width);
    v = memory.take<float>(row_count * v_width), chunk_v = memory.take<float>(row_count * v_width);
    tiles = memory.take<Tile>(threads), totals = memory.take<Sums>(threads);
    for (int i = 0; i < threads; ++i) {
        tiles[i].q = memory.take<float>(tile_rows * width);
        tiles[i].scores = memory.take<float>(tile_rows * SCORES);
        tiles[i].sums = take_sums(memory, tile_rows, v_head);
        totals[i] = take_sums(memory, tile_rows, v_head);
    }
}

inline void AttentionLayer::plan(Batch& batch, Workspace& memory) {
    const AttentionShape& s = model.shapes[0];
    int64_t count = 0;
    for (int i = 0; i < batch.sequence_count; ++i) {
        Sequence& sequence = batch.sequences[i];
        sequence.partial = count;
        if (!is_split(s, sequence)) continue;
        count += int64_t{sequence.count} * s.heads * spans(s, sequence.start + sequence.count);
    }
    any_split = count > 0;
    if (any_split) partials = take_sums(memory, count, s.v_head_dim);
}

inline void put_value(float* to, float value) { *to = value; }

inline void put_value(bf16* to, float value) {  // to the nearest, ties to even
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    *to = static_cast<bf16>(value != value ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline void AttentionLayer::project(Team& team, const Layer& layer, const Batch& batch, const float* input) {
    const AttentionShape& s = shape(layer);
    const Activations x = rows.norm_input(team, batch.rows);
    rows.stage(team, x, [&](int row) { rows.norm_row(row, input + int64_t{row} * x.k, layer.input_norm, x); });
    const LinearJob jobs[] = {
        {&layer.k, &x, nullptr, nullptr, batch.rows, k, s.kv_heads * s.head_dim, false},
        {&layer.v, &x, nullptr, nullptr, batch.rows, v, s.kv_heads * s.v_head_dim, false},
        {&layer.q, &x, batch.query_rows, nullptr, batch.queries, q, s.heads * s.head_dim, false},
    };
    linear(team, jobs, batch.queries ? 3 : 2);
    team.barrier();
    own_rows(team, batch.queries, [&](int query) {
        const int row = batch.query_rows ? batch.query_rows[query] : query;
        rows.rotate(batch, row, layer.is_window, q + static_cast<int64_t>(query) * s.heads * s.head_dim, s.heads);
    });
    own_rows(team, batch.rows, [&](int row) {
        rows.rotate(batch, row, layer.is_window, k + static_cast<int64_t>(row) * s.kv_heads * s.head_dim, s.kv_heads);
        model.cache.kind == F32 ? write<float>(layer, batch, row) : write<bf16>(layer, batch, row);
    });
    team.barrier();
}

template <class T>
void AttentionLayer::write(const Layer& layer, const Batch& batch, int row) const {
    const AttentionShape& s = shape(layer);
    const int slot = batch.slots[row], position = batch.positions[row];
    const Sequence* chunk = s.window ? batch.chunks[row] : nullptr;
    T* to_k = static_cast<T*>(chunk ? chunk_k : layer.k_cache);
    T* to_v = static_cast<T*>(chunk ? chunk_v : layer.v_cache);
    int64_t unit, places, place;  // the page, ring or chunk; positions that it holds, and this one's place
    if (chunk) {
        unit = 0, places = chunk->count, place = position - chunk->start;
        to_k += static_cast<int64_t>(chunk->row) * s.kv_heads * s.head_dim;
        to_v += static_cast<int64_t>(chunk->row) * s.kv_heads * s.v_head_dim;
    } else if (s.window) {
        unit = slot, places = ring(s), place = position % places;
    } else {
        unit = model.cache.page_table[static_cast<int64_t>(slot) * model.cache.max_pages + position / PAGE];
        places = PAGE, place = position % PAGE;
    }
    const float* from_k = k + static_cast<int64_t>(row) * s.kv_heads * s.head_dim;
    const float* from_v = v + static_cast<int64_t>(row) * s.kv_heads * s.v_head_dim;
    for (int head = 0; head < s.kv_heads; ++head) {
        const int64_t at = (unit * s.kv_heads + head) * places + place;
        for (int i = 0; i < s.head_dim; ++i) put_value(to_k + at * s.head_dim + i, *from_k++);
        for (int i = 0; i < s.v_head_dim; ++i) put_value(to_v + at * s.v_head_dim + i, *from_v++ * model.value_scale);
    }
}

// The last positions of long sequences go from beside the cache into the ring.
template <class T>
void AttentionLayer::write_ring(Team& team, const Layer& layer, const Batch& batch) const {
    const AttentionShape& s = shape(layer);
    const int places = ring(s);
    own_rows(team, static_cast<int64_t>(batch.sequence_count) * s.kv_heads, [&](int i) {
        const Sequence& sequence = batch.sequences[i / s.kv_heads];
        if (!is_long(sequence)) return;
        const int64_t head = i % s.kv_heads;
        const int64_t from = static_cast<int64_t>(sequence.row) * s.kv_heads + head * sequence.count;
        const int64_t to = (static_cast<int64_t>(sequence.slot) * s.kv_heads + head) * places;
        auto copy = [&](void* chunk, void* cache, int place, int width) {
            const T* source = static_cast<const T*>(chunk) + (from + place) * width;
            T* target = static_cast<T*>(cache) + (to + (sequence.start + place) % places) * width;
            memcpy(target, source, width * sizeof(T));
        };
        for (int place = std::max(0, sequence.count - places); place < sequence.count; ++place) {
            copy(chunk_k, layer.k_cache, place, s.head_dim);
            copy(chunk_v, layer.v_cache, place, s.v_head_dim);
        }
    });
}

inline void AttentionLayer::attend(Team& team, const Layer& layer, const Batch& batch, float* x) {
    const AttentionShape& s = shape(layer);
    const bool wide = model.cache.kind == F32;
    wide ? mix<float>(team, layer, batch) : mix<bf16>(team, layer, batch);
    team.barrier();
    if (!s.window && any_split) {
        join_spans(team, layer, batch);
        team.barrier();
    }
    const int width = s.heads * s.v_head_dim;
    const Activations in = rows.input(mixed, batch.queries, width, rows.own_place(team, batch.queries, width));
    if (in.q) rows.stage(team, in, [&](int row) { rows.prepare(in, row, 0, width); });
    if (s.window) wide ? write_ring<float>(team, layer, batch) : write_ring<bf16>(team, layer, batch);
    const LinearJob job{&layer.o, &in, nullptr, nullptr, batch.queries, x, model.hidden, true};
    linear(team, &job, 1);
    team.barrier();
}

// Units of work are tiles of queries of a KV head, or the spans of a sequence that is split.
template <class T>
void AttentionLayer::mix(Team& team, const Layer& layer, const Batch& batch) {
    const AttentionShape& s = shape(layer);
    int64_t before = 0, parts = 0;  // units of the sequences before; of this one, by KV head
    int i = -1;
    for (;;) {
        const int64_t unit = team.next();
        while (unit >= before + parts * s.kv_heads) {
            before += parts * s.kv_heads;
            if (++i == batch.sequence_count) return;
            const Sequence& sequence = batch.sequences[i];
            parts = is_split(s, sequence) ? spans(s, sequence.start + sequence.count)
                                          : (sequence.count + tile_queries(s) - 1) / tile_queries(s);
        }
        const int64_t head = (unit - before) / parts, part = parts - 1 - (unit - before) % parts;  // long ones first
        mix_unit<T>(team, layer, batch.sequences[i], static_cast<int>(head), static_cast<int>(part));
    }
}

template <class T>
void AttentionLayer::mix_unit(Team& team, const Layer& layer, const Sequence& sequence, int head, int part) {
    const AttentionShape& s = shape(layer);
    const bool split = is_split(s, sequence);
    const int query = split ? 0 : part * tile_queries(s), count = std::min(tile_queries(s), sequence.count - query);
    Tile tile = tiles[team.id];
    tile.group = group_size(s), tile.rows = count * tile.group;
    tile.start = sequence.start + query, tile.first = sequence.first, tile.window = s.window;
    tile.width = padded(s.head_dim), tile.v_width = padded(s.v_head_dim);
    const int64_t stride = s.heads * s.head_dim;
    load_queries(tile, q + (sequence.row + query) * stride + head * tile.group * s.head_dim, stride, s.head_dim);
    const Keys<T> keys = this->keys<T>(layer, sequence, head);
    const int span_count = spans(s, tile.start + count);
    if (split) {
        const int64_t first = sequence.partial + (int64_t{head} * span_count + part) * tile.rows;
        tile.sums = partials.from(first, tile.v_width);
        return sum_over(tile, keys, part * SPAN, (part + 1) * SPAN);
    }
    if (span_count == 1) {
        sum_over(tile, keys, 0, INT_MAX);
        return put(layer, tile.sums, sequence, head, query, tile.rows);
    }
    Sums& total = totals[team.id];
    clear(total, tile.rows, tile.v_width);
    for (int span = 0; span < span_count; ++span) {
        sum_over(tile, keys, span * SPAN, (span + 1) * SPAN);
        for (int row = 0; row < tile.rows; ++row) join(total, tile.sums, row, tile.v_width);
    }
    put(layer, total, sequence, head, query, tile.rows);
}

template <class T>
Keys<T> AttentionLayer::keys(const Layer& layer, const Sequence& sequence, int head) const {
    const AttentionShape& s = shape(layer);
    const int64_t places = s.window ? ring(s) : PAGE;
    const int64_t first = ((s.window ? static_cast<int64_t>(sequence.slot) * s.kv_heads : 0) + head) * places;
    Keys<T> keys{};
    keys.head_dim = s.head_dim, keys.v_head_dim = s.v_head_dim;
    keys.k = static_cast<const T*>(layer.k_cache) + first * s.head_dim;
    keys.v = static_cast<const T*>(layer.v_cache) + first * s.v_head_dim;
    keys.ring = ring(s);
    keys.pages = model.cache.page_table + static_cast<int64_t>(sequence.slot) * model.cache.max_pages;
    keys.page_stride = static_cast<int64_t>(s.kv_heads) * PAGE;
    keys.new_from = INT_MAX;
    if (s.window && is_long(sequence)) {
        const int64_t from = int64_t{sequence.row} * s.kv_heads + int64_t{head} * sequence.count;
        keys.new_k = static_cast<const T*>(chunk_k) + from * s.head_dim;
        keys.new_v = static_cast<const T*>(chunk_v) + from * s.v_head_dim;
        keys.new_from = sequence.start;
    }
    return keys;
}

inline void AttentionLayer::join_spans(Team& team, const Layer& layer, const Batch& batch) {
    const AttentionShape& s = shape(layer);
    const int v_width = padded(s.v_head_dim);
    own_rows(team, static_cast<int64_t>(batch.sequence_count) * s.kv_heads, [&](int i) {
        const Sequence& sequence = batch.sequences[i / s.kv_heads];
        if (!is_split(s, sequence)) return;
        const int count = sequence.count * group_size(s), head = i % s.kv_heads;
        const int span_count = spans(s, sequence.start + sequence.count);
        Sums& total = totals[team.id];
        clear(total, count, v_width);
        for (int span = 0; span < span_count; ++span) {
            const int64_t first = sequence.partial + (static_cast<int64_t>(head) * span_count + span) * count;
            for (int row = 0; row < count; ++row) join(total, partials.from(first, v_width), row, v_width);
        }
        put(layer, total, sequence, head, 0, count);
    });
}

// Rows of sums -> mixed (Q, heads, v_head_dim), from the sequence's query `query` on.
inline void AttentionLayer::put(
    const Layer& layer, const Sums& sums, const Sequence& sequence, int head, int query, int count) {
    const AttentionShape& s = shape(layer);
    const int group = group_size(s), v_width = padded(s.v_head_dim);
    for (int row = 0; row < count; ++row) {
        const int h = head * group + row % group;
        const int64_t at = int64_t{sequence.row + query + row / group} * s.heads + h;
        finish(sums, row, v_width, layer.sink ? layer.sink + h : nullptr, mixed + at * s.v_head_dim, s.v_head_dim);
    }
}

}  // namespace mimoflash
