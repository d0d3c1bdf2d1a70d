import math

import numpy as np
import pytest

from megatron_ads.metrics.perplexity import MAX_EXPONENT, perplexities, perplexity


def test_perplexity_is_per_target_token_and_always_finite():
    # 2 tokens of loss ln 4 each -> 4; a loss of 10^6 on one token is capped, not infinite.
    values = perplexities(np.array([2 * math.log(4), 1e6, math.nan]), np.array([2.0, 1.0, 1.0]))
    assert values[0] == pytest.approx(4.0)
    assert np.isfinite(values).all() and values[1] == values[2]


def test_one_perplexity_is_that_of_many_and_never_overflows() -> None:
    assert perplexity(2 * math.log(4), 2) == pytest.approx(4)
    assert perplexity(1e6, 2) == math.exp(MAX_EXPONENT)
