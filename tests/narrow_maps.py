"""Narrow maps and weights as triton_src/_narrow.py and narrow_weight.py describe them, in torch alone."""

import torch

SCALE = 2.0**13  # of a map, which is float16


def narrow(t):
    """The values that a narrow map holds of these."""
    return (t * SCALE).half().float() / SCALE


def narrow_weight(weight):
    """(rows times a power of two, rounded to float16; what takes sums back)."""
    largest = torch.where(weight.isfinite(), weight.abs(), 0.0).amax(1)
    exponent = torch.where(largest == 0, 113, 15 - torch.frexp(largest).exponent).clamp(-113, 113)
    one = torch.ones(len(weight))
    return torch.ldexp(weight, exponent[:, None]).half(), torch.ldexp(one, -exponent) / SCALE
