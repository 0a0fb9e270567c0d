"""Does a sample follow a distribution?"""

import math

import torch


def kolmogorov_smirnov(values, cdf):
    """sqrt(n) times the largest distance to a distribution; above 2.5 with probability 7e-6."""
    ordered = values.double().flatten().sort()[0]
    ranks = torch.arange(len(ordered) + 1, dtype=torch.float64) / len(ordered)
    expected = cdf(ordered)
    distance = torch.maximum(expected - ranks[:-1], ranks[1:] - expected).max()
    return math.sqrt(len(ordered)) * float(distance)
