"""A real job whose rewards are weighed by POPO: the weights move with the gradients, and continue to the bit."""

import math
import shutil
from pathlib import Path

import pytest

from parity_tests.harness.real_job import write_small_model
from tests.training.test_rl import SAVED, STEPS, course, job

pytestmark = pytest.mark.slow

REWARDS = """
def letters(completions, **columns):
    return [sum(map(ord, text)) % 7 / 7 for text in completions]

def contrary(completions, **columns):
    return [-value for value in letters(completions)]

def length(completions, **columns):
    return [len(text) % 5 / 5 for text in completions]
"""


def test_weights_of_rewards_follow_their_gradients_and_a_resumed_job_continues_with_them_to_the_bit(
    tmp_path: Path,
) -> None:
    write_small_model(tmp_path / "model")
    (tmp_path / "rewards.py").write_text(REWARDS)
    names = [f"{tmp_path / 'rewards.py'}:{function}" for function in ("letters", "contrary", "length")]
    settings = (
        f"rewards.use=[{', '.join(f'{{name: {name!r}}}' for name in names)}]",
        "rewards.combine=popo",
        "policy.kl_coef=0",
        "rollout.max_new_tokens=8",
    )
    whole = job(tmp_path, "whole", *settings, ranks=1, layout={"pp": 1, "ep": 1})
    before = dict.fromkeys(names, 1 / 3)
    for record in course(whole):
        product = {name: record[f"rewards/inner_product/{name}"] for name in names}
        # Of L and -L, the gradients are opposite, and so are the inner products with any sum.
        assert product[names[0]] == pytest.approx(-product[names[1]], rel=1e-3) != 0
        weights = {name: record[f"reward_weight/{name}"] for name in names}
        assert sum(weights.values()) == pytest.approx(1)
        for name in names[1:]:  # w_k / w_0 is multiplied by exp(eta (I_k - I_0) / mu): the logarithms' difference
            grown = weights[name] / weights[names[0]] / (before[name] / before[names[0]])
            assert grown == pytest.approx(math.exp(0.1 * (product[name] - product[names[0]])), rel=1e-6)
        before = weights

    name = f"step-{SAVED:08d}"
    shutil.copytree(whole.checkpoints / name, tmp_path / "resumed" / "checkpoints" / name)
    resumed = job(tmp_path, "resumed", *settings, ranks=1, layout={"pp": 1, "ep": 1})
    assert course(resumed) == course(whole, after=SAVED) and len(course(resumed)) == STEPS - SAVED
    assert resumed.weights() == whole.weights()
