"""Keep reasoning from which the answer follows: PPL(answer | prompt, reasoning) < R.

PPL = exp(-(1/T) sum_t log P(y_t | prompt, reasoning, y_<t)), over the T tokens of the answer, without the end token
R   = the median (or another quantile) of PPL over a sample of the candidates

Source: Taiji, equation 1 and section 2.2.1.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from megatron_ads.config.synthesis import PerplexityConfig
from megatron_ads.cooking.candidates import Candidate, Removed, passing
from megatron_ads.cooking.requests import drawn


class Scorer(Protocol):
    """A model that says how probable an answer is."""

    def perplexities(self, candidates: Sequence[Candidate]) -> list[float | None]:
        """Return PPL of each row's answer behind the candidate's reasoning; None if the model cannot read that much."""


def remove_unlikely(
    candidates: Sequence[Candidate], scorer: Scorer, config: PerplexityConfig, *, seed: int
) -> float | None:
    """Note the perplexity of every candidate that is left, and remove those not below R; return R.

    R is None where there is nothing to find it from.
    """
    left = passing(candidates)
    for candidate, perplexity in zip(left, scorer.perplexities(left), strict=True):
        candidate.perplexity = perplexity
        if candidate.perplexity is None:
            candidate.remove(Removed.too_long_to_measure)
    scored = passing(candidates)
    if not scored:
        return config.threshold
    limit = config.threshold if config.threshold is not None else find_threshold(scored, config, seed=seed)
    for candidate in scored:
        assert candidate.perplexity is not None, "noted above"
        if not candidate.perplexity < limit:
            candidate.remove(Removed.high_perplexity, measured=f"PPL {candidate.perplexity:.4g}, R {limit:.4g}")
    return limit


def find_threshold(scored: Sequence[Candidate], config: PerplexityConfig, *, seed: int) -> float:
    """Return the quantile over a sample that ``seed`` draws."""
    sample = sorted(scored, key=lambda candidate: drawn(seed, "sample", candidate.name))[: config.sample]
    return float(np.quantile([candidate.perplexity or 0.0 for candidate in sample], config.quantile))
