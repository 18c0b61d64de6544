"""What sampling must be, written from its definition, and whether samples have a distribution."""

import math

import numpy as np
import torch

U32, U64 = 2**32, 2**64


def noise_by_whole_numbers(seed, position, token):
    """splitmix64's finaliser, then murmur3's twice, in Python's unbounded integers."""
    z = (seed + 0x9E3779B97F4A7C15 * (position + 1)) % U64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % U64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % U64
    z ^= z >> 31

    def mix(x):
        x = (x ^ x >> 16) * 0x85EBCA6B % U32
        x = (x ^ x >> 13) * 0xC2B2AE35 % U32
        return x ^ x >> 16

    h = mix(mix((token * 0x9E3779B9 + z % U32) % U32) ^ z // U32)
    return -math.log1p(-(h + 0.5) / U32)


def final_distribution(logits, temperature, top_p, top_k, min_p):
    """What tokens are sampled from, in float64 by loops, and a margin by which no cut was undecided."""
    logits, temperature, top_p, min_p = (np.float32(x).astype(np.float64) for x in (logits, temperature, top_p, min_p))
    p = np.exp((logits - logits.max()) / temperature)
    p /= p.sum()
    order = sorted(range(len(p)), key=lambda i: (-logits[i], i))
    if top_k:
        order = order[:top_k]
    total, mass, kept, margin = sum(p[i] for i in order), 0.0, [], 1.0
    for i in order:
        if top_p < 1:
            margin = min(margin, abs(mass / total - top_p))
            if mass / total >= top_p:
                break
        kept.append(i)
        mass += p[i]
    largest = max(p[i] for i in kept)
    margin = min([margin, *(abs(p[i] / largest - min_p) for i in kept if min_p)])
    kept = [i for i in kept if p[i] / largest >= min_p]
    q = np.zeros_like(p)
    q[kept] = p[kept] / p[kept].sum()
    return q, margin


def assert_matches(counts, p):
    """Chi-square at 4 sigma, cells of under 5 expected put together."""
    counts, expected = counts.double(), p * counts.sum()
    assert not counts[p == 0].any()
    rare = expected < 5
    seen, wanted = (torch.cat([x[~rare], x[rare].sum()[None]]) for x in (counts, expected))
    seen, wanted = seen[wanted > 0], wanted[wanted > 0]
    freedom = len(seen) - 1
    assert ((seen - wanted) ** 2 / wanted).sum() < freedom + 4 * math.sqrt(2 * freedom) + 4
