// From logits to tokens, as mimoflash/engine/sampling.py says it: the same tokens, without sorting the vocabulary.
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>

#include "exponential.h"
#include "team.h"
#include "workspace.h"

namespace mimoflash {

constexpr float INFINITE = std::numeric_limits<float>::infinity();

typedef uint32_t Words __attribute__((vector_size(4 * WIDTH)));

inline Ints lanes() {
    Ints v;
    for (int i = 0; i < WIDTH; ++i) v[i] = i;
    return v;
}

inline bool any(Ints mask) {
#if defined(__AVX512F__)
    return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(__AVX2__)
    return !_mm256_testz_si256((__m256i)mask, (__m256i)mask);
#else
    int32_t bits = 0;
    for (int i = 0; i < WIDTH; ++i) bits |= mask[i];
    return bits != 0;
#endif
}

// Calls f(first, vector, its floats) over `size` floats; the last vector is filled up with `filling`.
template <class F>
inline void each_vector(const float* x, int size, float filling, F f) {
    int i = 0;
    for (; i + WIDTH <= size; i += WIDTH) f(i, load(x + i), WIDTH);
    if (i == size) return;
    Floats last = splat(filling);
    for (int j = 0; i + j < size; ++j) last[j] = x[i + j];
    f(i, last, size - i);
}

// -- noise ------------------------------------------------------------------------------------------------------------

// Exponential variates of rate 1 for the tokens of one (seed, position).
struct Noise {
    uint32_t key1, key2;

    Noise(uint64_t seed, int64_t position) {
        uint64_t z = seed + 0x9E3779B97F4A7C15u * (static_cast<uint64_t>(position) + 1);
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
        z = (z ^ z >> 27) * 0x94D049BB133111EBu;
        z ^= z >> 31;
        key1 = static_cast<uint32_t>(z), key2 = static_cast<uint32_t>(z >> 32);
    }

    template <class U>
    static U mix(U x) {
        x = (x ^ x >> 16) * 0x85EBCA6Bu;
        x = (x ^ x >> 13) * 0xC2B2AE35u;
        return x ^ x >> 16;
    }

    // The variate to the last bit of a double.
    double exact(uint32_t token) const {
        const uint32_t h = mix(mix(token * 0x9E3779B9u + key1) ^ key2);
        return -std::log1p(-(h + 0.5) / 4294967296.0);
    }

    // Relative error below 2e-7.
    Floats rough(Ints tokens) const {
        const Words h = mix(mix((Words)tokens * 0x9E3779B9u + key1) ^ key2);
        const Floats v = fraction(h), complement = fraction(~h);  // v and 1 - v, each to a float's relative precision
        // near 0, -log(1 - v) is mended by what 1 - v has lost in rounding
        const Floats u = splat(1.0f) - v, mended = (v + (u - splat(1.0f))) / u - logarithm(u);
        return v < splat(0.5f) ? mended : -logarithm(complement);
    }

private:
    static Floats fraction(Words h) {  // (h + 0.5) / 2^32
        const Floats high = to_floats((Ints)(h >> 16)), low = to_floats((Ints)(h & 0xffff)) + splat(0.5f);
        return fma(high, splat(65536.0f), low) * splat(1.0f / 4294967296.0f);
    }
};

// -- picking a draft --------------------------------------------------------------------------------------------------

struct Picked {
    float value;
    int index;
};

constexpr int PICK_PIECE = 4096;  // logits a piece of work

// Of logits[from .. end - 1] the largest; at a temperature, of logit / temperature + Gumbel noise of the ids that the
// logits stand for (null: their places).
inline Picked best_of(
    const float* logits, int from, int end, const int32_t* ids, float temperature, const Noise& noise) {
    Floats best = splat(-INFINITE);
    Ints place = Ints{} + from;
    each_vector(logits + from, end - from, -INFINITE, [&](int i, Floats value, int count) {
        const Ints here = lanes() + (from + i);
        if (temperature > 0) {
            Ints tokens = here;
            if (ids) {
                tokens = Ints{};
                memcpy(&tokens, ids + from + i, count * sizeof(int32_t));
            }
            value = value / splat(temperature) - logarithm(noise.rough(tokens));
        }
        const Ints better = value > best;
        best = better ? value : best;
        place = better ? here : place;
    });
    Picked picked{best[0], place[0]};
    for (int i = 1; i < WIDTH; ++i) {
        const bool better = best[i] > picked.value || (best[i] == picked.value && place[i] < picked.index);
        if (better) picked = {best[i], place[i]};
    }
    return picked;
}

// -- sampling ---------------------------------------------------------------------------------------------------------

struct SampleJob {
    const float* logits;  // (rows, vocab) after bias, penalties and mask
    const float* raw;     // as the model gave them
    int64_t stride;
    int32_t rows, vocab;
    const float* temperature;
    const float* top_p;
    const int32_t* top_k;
    const float* min_p;
    const uint64_t* seed;
    const int64_t* position;
    int32_t* tokens;
    float* logprobs;
    float* sampling_logprobs;
};

class RowSampler {
public:
    RowSampler(Workspace& memory, int size)
        : vocab(size), weights(memory.take<float>(size)), race(memory.take<float>(size)),
          candidates(memory.take<Candidate>(size)), block_most(memory.take<float>(size / BLOCK + 1)) {}

    void run(const SampleJob& job, int row);

private:
    struct Candidate {
        float logit, weight;
        int32_t id;
        bool operator<(const Candidate& other) const {  // the likelier first
            return logit > other.logit || (logit == other.logit && id < other.id);
        }
    };
    static constexpr int BLOCK = 64;

    int vocab;
    float* weights;          // exp((logit - largest) / temperature)
    float* race;             // noise / weight
    Candidate* candidates;
    float* block_most;
    int candidate_count = 0;

    double weigh(const float* logits, float largest, float temperature, float* out) const;
    Candidate last_kept(const float* logits, float largest, float temperature, double total, int top_k, float top_p);
    Candidate last_of_nucleus(const float* logits, float largest, float temperature, double total, float top_p);
    Candidate reaches(double missing);
    void collect(const float* logits, float least, float most);
    float kth_block(const float* logits, int k) const;
    double run_race(const float* logits, const Candidate& last, float min_p, const Noise& noise, float* first) const;
    int32_t winner(const float* logits, float largest, float temperature, float first, const Noise& noise) const;
};

inline void RowSampler::run(const SampleJob& job, int row) {
    const float *logits = job.logits + row * job.stride, *raw = job.raw + row * job.stride;
    const float temperature = job.temperature[row];
    const Noise noise(job.seed[row], job.position[row]);
    const Picked top = best_of(logits, 0, vocab, nullptr, 0, noise);
    const float raw_most = raw == logits ? top.value : best_of(raw, 0, vocab, nullptr, 0, noise).value;
    int32_t token = top.index;
    double raw_total = -1;
    job.sampling_logprobs[row] = 0;
    if (temperature > 0) {
        const double total = weigh(logits, top.value, temperature, weights);
        const Candidate last = last_kept(logits, top.value, temperature, total, job.top_k[row], job.top_p[row]);
        float first = INFINITE;
        const double kept = run_race(logits, last, job.min_p[row], noise, &first);
        token = winner(logits, top.value, temperature, first, noise);
        if (token < 0) token = top.index;  // only where logits are not finite
        const double log_weight = (static_cast<double>(logits[token]) - top.value) / temperature;
        job.sampling_logprobs[row] = static_cast<float>(log_weight - std::log(kept));
        if (raw == logits && temperature == 1) raw_total = total;
    }
    if (raw_total < 0) raw_total = weigh(raw, raw_most, 1, nullptr);
    job.tokens[row] = token;
    job.logprobs[row] = static_cast<float>(static_cast<double>(raw[token]) - raw_most - std::log(raw_total));
}

// The weights, if asked for, and their sum.
inline double RowSampler::weigh(const float* logits, float largest, float temperature, float* out) const {
    constexpr int PIECE = 1024;  // floats summed up in float
    double total = 0;
    for (int from = 0; from < vocab; from += PIECE) {
        Floats piece = {};
        each_vector(logits + from, std::min(PIECE, vocab - from), -INFINITE, [&](int i, Floats x, int count) {
            const Floats weight = exponential((x - splat(largest)) / splat(temperature));
            piece += weight;
            if (!out) return;
            count == WIDTH ? store(out + from + i, weight) : store(out + from + i, weight, count);
        });
        total += sum(piece);
    }
    return total;
}

// The least likely token that top_k and then top_p keep; those before it in the order of likelihood are kept too.
inline RowSampler::Candidate RowSampler::last_kept(
    const float* logits, float largest, float temperature, double total, int top_k, float top_p) {
    const bool is_k = top_k > 0 && top_k < vocab;
    if (!is_k && !(top_p < 1)) return {-INFINITE, 0, vocab};
    if (!is_k) return last_of_nucleus(logits, largest, temperature, total, top_p);
    collect(logits, kth_block(logits, top_k), INFINITE);
    if (candidate_count < top_k) return {-INFINITE, 0, vocab};  // logits that are not numbers
    std::nth_element(candidates, candidates + top_k - 1, candidates + candidate_count);
    if (!(top_p < 1)) return candidates[top_k - 1];
    candidate_count = top_k;
    total = 0;
    for (int i = 0; i < top_k; ++i) total += candidates[i].weight;
    return reaches(top_p * total);
}

// Adds up mass in slices of equal width in logits until it is reached; only the slice where it is need be sorted.
inline RowSampler::Candidate RowSampler::last_of_nucleus(
    const float* logits, float largest, float temperature, double total, float top_p) {
    constexpr int SLICES = 1024;
    // all tokens below this together hold less than 1 - top_p
    const float least = static_cast<float>(0.999 * (1 - static_cast<double>(top_p)) * total / vocab);
    const float width = std::max(temperature * -std::log(least) / SLICES, std::numeric_limits<float>::min());
    auto slice_of = [&](float logit) {  // in the order in which NaN gives 0
        return static_cast<int>(std::min<float>(SLICES - 1, std::max(0.0f, (largest - logit) / width)));
    };
    double masses[SLICES] = {};
    each_vector(weights, vocab, 0, [&](int i, Floats weight, int count) {
        if (!any(weight >= splat(least))) return;
        for (int j = 0; j < count; ++j)
            if (weight[j] >= least) masses[slice_of(logits[i + j])] += weight[j];
    });
    double missing = top_p * total;
    int slice = 0;
    while (slice < SLICES - 1 && masses[slice] < missing) missing -= masses[slice++];
    const float above = largest - (slice - 1) * width, below = largest - (slice + 2) * width;  // a little more than it
    collect(logits, slice == SLICES - 1 ? -INFINITE : below, above);
    auto elsewhere = [&](const Candidate& c) { return c.weight < least || slice_of(c.logit) != slice; };
    Candidate* end = std::remove_if(candidates, candidates + candidate_count, elsewhere);
    candidate_count = static_cast<int>(end - candidates);
    return candidate_count ? reaches(missing) : Candidate{-INFINITE, 0, vocab};
}

// The candidate at which the mass of those up to it reaches `missing`; the last one if none does.
inline RowSampler::Candidate RowSampler::reaches(double missing) {
    int from = 0, end = candidate_count;  // candidates before `from` are kept, those from `end` on are not
    while (end - from > 1) {
        const int middle = (from + end) / 2;
        std::nth_element(candidates + from, candidates + middle, candidates + end);
        double mass = 0;
        for (int i = from; i < middle; ++i) mass += candidates[i].weight;
        if (mass >= missing) {
            end = middle;
        } else {
            missing -= mass, from = middle;
        }
    }
    return candidates[from];
}

// The tokens whose logits are from `least` to `most`.
inline void RowSampler::collect(const float* logits, float least, float most) {
    candidate_count = 0;
    each_vector(logits, vocab, -INFINITE, [&](int i, Floats logit, int count) {
        if (!any((logit >= splat(least)) & (logit <= splat(most)))) return;
        for (int j = 0; j < count; ++j)
            if (logit[j] >= least && logit[j] <= most)
                candidates[candidate_count++] = {logit[j], weights[i + j], i + j};
    });
}

// A number that at least k logits reach: of the largest of each block of 64, the k-th.
inline float RowSampler::kth_block(const float* logits, int k) const {
    const int blocks = vocab / BLOCK;
    if (k > blocks) return -INFINITE;
    for (int b = 0; b < blocks; ++b) {
        Floats most = load(logits + b * BLOCK);
        for (int i = WIDTH; i < BLOCK; i += WIDTH) most = maximum(most, load(logits + b * BLOCK + i));
        block_most[b] = maximum(most);
    }
    std::nth_element(block_most, block_most + k - 1, block_most + blocks, std::greater<float>());
    return block_most[k - 1];
}

// Fills in `race` for the tokens kept (infinity for others), `first` with the smallest; returns the weight of all kept.
inline double RowSampler::run_race(
    const float* logits, const Candidate& last, float min_p, const Noise& noise, float* first) const {
    // The likeliest token has the weight 1, and its noise is below 23; all noise is above 1e-10.
    constexpr float HOPELESS = 4e-12f;
    constexpr int PIECE = 1024;
    double kept = 0;
    Floats smallest = splat(INFINITE);
    for (int from = 0; from < vocab; from += PIECE) {
        Floats piece = {};
        each_vector(weights + from, std::min(PIECE, vocab - from), 0, [&](int i, Floats weight, int count) {
            const Ints ids = lanes() + (from + i);
            const Floats logit = count == WIDTH ? load(logits + from + i) : load(logits + from + i, count);
            Ints keeps = (logit > splat(last.logit)) | ((logit == splat(last.logit)) & (ids <= last.id));
            keeps &= weight >= splat(min_p);
            const Floats mine = keeps ? weight : splat(0.0f);
            piece += mine;
            Floats clock = splat(INFINITE);
            if (any(mine > splat(HOPELESS))) {
                clock = mine > splat(HOPELESS) ? noise.rough(ids) / mine : clock;
                smallest = clock < smallest ? clock : smallest;
            }
            count == WIDTH ? store(race + from + i, clock) : store(race + from + i, clock, count);
        });
        kept += sum(piece);
    }
    *first = -maximum(-smallest);
    return kept;
}

// Of the tokens that are first within rounding the one that exact arithmetic names; the lowest id where they are equal.
inline int32_t RowSampler::winner(
    const float* logits, float largest, float temperature, float first, const Noise& noise) const {
    const float limit = first * 1.0001f;
    int32_t token = -1;
    double best = 0;
    each_vector(race, vocab, INFINITE, [&](int i, Floats clock, int count) {
        if (!any(clock <= splat(limit))) return;
        for (int j = 0; j < count; ++j) {
            if (!(clock[j] <= limit) || clock[j] == INFINITE) continue;
            const double weight = std::exp((static_cast<double>(logits[i + j]) - largest) / temperature);
            const double exact = noise.exact(static_cast<uint32_t>(i + j)) / weight;
            if (token < 0 || exact < best) token = i + j, best = exact;
        }
    });
    return token;
}

// Rows dealt over the team.
inline void sample(Team& team, const SampleJob& job, RowSampler* samplers) {
    for (int64_t row; (row = team.next()) < job.rows;) samplers[team.id].run(job, static_cast<int>(row));
}

}  // namespace mimoflash
