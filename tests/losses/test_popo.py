"""Inner products of rewards' gradients come out of norms as they come out of the gradients."""

import numpy as np
import pytest

from megatron_ads.losses.popo import inner_products


@pytest.mark.parametrize(("count", "passes"), [(2, 3), (3, 7)])
def test_inner_products_are_those_of_the_gradients_in_as_few_passes(count: int, passes: int) -> None:
    gradients = {f"r{k}": vector for k, vector in enumerate(np.random.default_rng(0).normal(size=(count, 50)))}
    asked: list[frozenset[str]] = []

    def norm_of(rewards: frozenset[str]) -> float:
        asked.append(rewards)
        return float(np.linalg.norm(sum(gradients[name] for name in rewards)))

    found = inner_products(list(gradients), norm_of)
    whole = sum(gradients.values())
    assert found == pytest.approx({name: float(vector @ whole) for name, vector in gradients.items()})
    assert len(asked) == passes
