"""Perplexity: how many equally likely tokens a model hesitates between, on average.

PPL = exp(-(1/T) sum_t log P(y_t | prompt, y_<t)), over T target tokens
"""

import math

import numpy as np
from numpy.typing import NDArray

MAX_EXPONENT = 700.0
"""Largest mean loss, in nats, that is exponentiated: above about 709 a double overflows."""

Vector = NDArray[np.float64]


def perplexity(loss_sum: float, targets: int) -> float:
    """Return PPL of a loss summed over ``targets`` tokens, in nats; at most ``exp(MAX_EXPONENT)``."""
    return math.exp(min(loss_sum / targets, MAX_EXPONENT))


def perplexities(loss_sums: Vector, targets: Vector) -> Vector:
    """Return PPL from summed losses and counts of target tokens; always finite, the largest for a loss of NaN."""
    exponents = np.fmin(loss_sums / np.maximum(targets, 1), MAX_EXPONENT)  # fmin takes the other value for NaN
    result: Vector = np.exp(exponents)
    return result
