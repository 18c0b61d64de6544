"""Measurements beside a peer: the same shape, in turn, in one run; ratios of pairs, since machines drift."""
