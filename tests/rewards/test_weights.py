"""The weights of several rewards, with numbers worked out by hand."""

import math

import numpy as np
import pytest

from megatron_ads.config.rl import Combine, RewardConfig, RewardsConfig
from megatron_ads.errors import CheckpointError
from megatron_ads.rewards.weights import RewardWeights

NAN = math.nan


def weights(combine: Combine, *starts: float, step: float = 0.1, temperature: float = 1.0) -> RewardWeights:
    use = [RewardConfig(name=f"r{place}", weight=start) for place, start in enumerate(starts)]
    return RewardWeights(RewardsConfig(use=use, combine=combine, popo_step_size=step, popo_temperature=temperature))


def test_fixed_weights_are_those_of_the_recipe() -> None:
    fixed = weights(Combine.fixed, 2.0, 1.0)
    fixed.observe({"r0": np.array([0.0, 1.0]), "r1": np.array([0.0, 5.0])}, [0, 0])
    fixed.update({"r0": 3.0, "r1": -3.0})
    assert fixed.current == {"r0": 2.0, "r1": 1.0}


@pytest.mark.parametrize("combine", [Combine.popo, Combine.popo_light])
def test_the_others_start_normalised(combine: Combine) -> None:
    assert weights(combine, 1.0, 1.0).current == {"r0": 0.5, "r1": 0.5}
    assert weights(combine, 3.0, 1.0).current == {"r0": 0.75, "r1": 0.25}


def test_popo_multiplies_by_the_exponential_of_the_inner_products() -> None:
    popo = weights(Combine.popo, 1.0, 1.0, step=0.5, temperature=2.0)
    popo.observe({"r0": np.array([0.0, 9.0]), "r1": np.array([0.0, 1.0])}, [0, 0])
    assert popo.current == {"r0": 0.5, "r1": 0.5}
    # Gradients (2, 0) and (1, 1): their sum is (3, 1), so I = (6, 4); eta I / mu = (1.5, 1.0).
    popo.update({"r0": 6.0, "r1": 4.0})
    first = math.exp(1.5) / (math.exp(1.5) + math.exp(1.0))
    assert first == pytest.approx(0.62246, abs=1e-5)
    assert popo.current == pytest.approx({"r0": first, "r1": 1 - first})
    # Once more, (0, 2): w~ is (e^1.5, e^1.0) * (e^0, e^0.5) = (e^1.5, e^1.5).
    popo.update({"r0": 0.0, "r1": 2.0})
    assert popo.current == pytest.approx({"r0": 0.5, "r1": 0.5})


def test_popo_is_not_upset_by_large_or_undefined_inner_products() -> None:
    popo = weights(Combine.popo, 1.0, 1.0)
    popo.update({"r0": 1e6, "r1": 1e6 - 10})  # e^1e5 overflows; only the difference counts
    assert popo.current == pytest.approx({"r0": 1 / (1 + math.exp(-1)), "r1": 1 / (1 + math.e)})
    before = popo.current
    popo.update({"r0": NAN, "r1": 1.0})
    assert popo.current == before
    popo.update({"r0": 0.0, "r1": 1e6})  # e^-1e5 is 0
    popo.update({"r0": 1e6, "r1": 0.0})
    assert popo.current == {"r0": 0.0, "r1": 1.0}


def test_popo_light_is_the_coefficient_of_variation_within_groups() -> None:
    light = weights(Combine.popo_light, 1.0, 1.0)
    # r0: groups (0, 2) and (1, 3): sigma 1 and 1, mu 1 and 2: 1 / 1.5.  Over all values sigma would be 1.118.
    # r1: groups (4, 4) and (2, 6): sigma 0 and 2, mu 4 and 4: 1 / 4.
    light.observe({"r0": np.array([0.0, 2.0, 1.0, 3.0]), "r1": np.array([4.0, 4.0, 2.0, 6.0])}, [0, 0, 1, 1])
    # Without epsilon, which is a millionth of the means.
    assert light.current == pytest.approx({"r0": (2 / 3) / (2 / 3 + 1 / 4), "r1": (1 / 4) / (2 / 3 + 1 / 4)}, rel=1e-5)
    light.update({"r0": 100.0, "r1": 0.0})
    assert light.current["r0"] == pytest.approx(8 / 11, rel=1e-5)


def test_popo_light_leaves_out_what_has_no_value_and_a_saturated_reward() -> None:
    light = weights(Combine.popo_light, 1.0, 1.0)
    light.observe({"r0": np.array([0.1, 0.1, 0.1, NAN]), "r1": np.array([1.0, 3.0, NAN, 9.0])}, [0, 0, 0, 1])
    assert light.current == {"r0": 0.0, "r1": 1.0}
    light.observe({"r0": np.array([0.1, 0.1, 0.1]), "r1": np.array([NAN, NAN, 5.0])}, [0, 0, 0])
    assert light.current == {"r0": 0.0, "r1": 1.0}, "nothing varies, so nothing is learned of the weights"


def test_they_are_in_the_checkpoint_and_of_the_same_rewards() -> None:
    popo = weights(Combine.popo, 1.0, 1.0)
    popo.update({"r0": 5.0, "r1": 0.0})
    again = weights(Combine.popo, 1.0, 1.0)
    again.load_state_dict(popo.state_dict())
    assert again.current == popo.current
    with pytest.raises(CheckpointError, match=r"weights of the rewards r0, r1; rewards\.use names r0, r1, r2"):
        weights(Combine.popo, 1.0, 1.0, 1.0).load_state_dict(popo.state_dict())
    fixed = weights(Combine.fixed, 1.0, 3.0)
    fixed.load_state_dict(popo.state_dict())
    assert fixed.current == {"r0": 1.0, "r1": 3.0}
