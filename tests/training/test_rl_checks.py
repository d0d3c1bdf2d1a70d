"""What every job of reinforcement learning checks of itself: equal log-probabilities where they must be equal."""

from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

from megatron_ads.config.recipes import load_job
from megatron_ads.errors import ConversionError
from megatron_ads.rows import TokenizedRow
from megatron_ads.training.policy_update import PolicyUpdate
from megatron_ads.training.rollout import probe as weight_probe
from parity_tests.harness.ranks import run_ranks


def _marked(gap: float, said: float) -> tuple[str, float] | str:
    """Mark weights of which the trainer says ``said`` of a target, and the engine ``gap`` more."""
    row = TokenizedRow("a", "task", np.array([5, 6, 7], dtype=np.int32), np.array([0, 0, 1], dtype=np.float32))
    probe = weight_probe.WeightProbe(rows=[row], share=None, seq_length=8, max_logprob_diff=0.05)  # type: ignore[arg-type]
    model: Any = SimpleNamespace(chunks=[], optimizer=SimpleNamespace(updates=3))

    def asked(given: Any) -> float:
        assert (given.prompts, given.answers, given.log_probabilities) == ([[5, 6]], [[7]], [[said]])
        return gap

    with patch.object(weight_probe, "run_log_probabilities", return_value=[torch.tensor([-9.0, said])]):
        try:
            return probe.mark(model, asked)
        except ConversionError as error:
            return str(error)


def test_an_engine_that_differs_from_the_trainer_on_the_probe_ends_the_job() -> None:
    name, gap = run_ranks(1, _marked, 0.04, -2.0)[0]
    other, _ = run_ranks(1, _marked, 0.04, -2.25)[0]
    assert gap == 0.04 and name.startswith("3-") and other.startswith("3-") and name != other
    for wrong in (0.06, float("nan")):
        message = run_ranks(1, _marked, wrong, -2.0)[0]
        assert "differ by " in message and "above rollout.max_logprob_diff = 0.05" in message


@pytest.mark.parametrize(
    ("metrics", "fails"),
    [
        ({"actor/ratio": 1.00002, "actor/ppo_kl": 0.00002, "actor/max_ratio": 1.0001}, False),
        ({"actor/ratio": 1.01, "actor/ppo_kl": 0.0, "actor/max_ratio": 1.2}, True),
        ({"actor/ratio": 1.0, "actor/ppo_kl": 0.001, "actor/max_ratio": 1.2}, True),
        ({"actor/ratio": float("nan"), "actor/ppo_kl": 0.0, "actor/max_ratio": 1.0}, True),
        ({"actor/ratio": 0.0, "actor/ppo_kl": 0.0, "actor/max_ratio": 0.0}, False),  # every answer is masked
    ],
)
def test_a_first_update_must_begin_with_the_policy_that_answered(metrics: dict[str, float], fails: bool) -> None:
    config: Any = load_job("rl/quickstart", ["model.load=x"])
    session: Any = SimpleNamespace(step=6)
    update = PolicyUpdate(config=config, session=session, share=None, reference=None)  # type: ignore[arg-type]
    if fails:
        with pytest.raises(ConversionError, match="first update of step 7 began with a mean ratio of"):
            update._require_ratio_of_one(metrics)
    else:
        update._require_ratio_of_one(metrics)
