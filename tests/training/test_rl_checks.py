"""What every job of reinforcement learning checks of itself: equal log-probabilities where they must be equal."""

from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock, patch

import numpy as np
import pytest
import torch

from megatron_ads.config.recipes import load_job
from megatron_ads.errors import ConversionError
from megatron_ads.rows import TokenizedRow
from megatron_ads.training import policy_update
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


@pytest.mark.parametrize(
    ("said", "weights", "fails"),
    [
        ((-2.04, -1.0), "4-b", False),
        ((-2.06, -1.0), "4-b", True),
        ((float("nan"), -1.0), "4-b", True),
        ((-2.0, -9.0), "4-b", False),  # by older weights
        ((-2.0, -9.0), "2-a", True),
        ((-9.0, -9.0), "6-c", False),
        ((-9.0, -9.0), None, False),  # of a dump
    ],
)
def test_answers_by_the_current_weights_of_which_the_engine_says_something_else_end_the_job(
    said: tuple[float, float], weights: str | None, fails: bool
) -> None:
    """Of an answer by the weights 4-b the trainer says -2, of one by 2-a -1, at each token."""
    config: Any = load_job("rl/quickstart", ["model.load=x"])
    session: Any = SimpleNamespace(step=6)
    update = PolicyUpdate(config=config, session=session, share=None, reference=None)  # type: ignore[arg-type]
    found: Any = SimpleNamespace(rollouts=[SimpleNamespace(weights="4-b"), SimpleNamespace(weights="2-a")])
    trainer, engine = ([np.full(3, value, np.float32) for value in of] for of in ((-2.0, -1.0), said))
    if fails:
        with pytest.raises(
            ConversionError, match=r"at step 7, engine and trainer differ by .*max_logprob_diff = 0\.05:"
        ):
            update._require_agreement(found, engine, trainer, weights)
    else:
        update._require_agreement(found, engine, trainer, weights)


class _GoesOnError(Exception):
    """What follows the check was reached."""


@pytest.mark.parametrize(
    ("limit", "error", "said"), [(0.05, ConversionError, "differ by 1 nats"), (2.0, _GoesOnError, "")]
)
def test_a_larger_limit_lets_a_step_go_on_whose_difference_is_to_be_expected(
    limit: float, error: type[Exception], said: str
) -> None:
    settings = ["model.load=x", f"rollout.max_logprob_diff={limit}", "policy.importance_sampling=tis"]
    config: Any = load_job("rl/quickstart", settings)
    session: Any = SimpleNamespace(step=0)
    update = PolicyUpdate(config=config, session=session, share=None, reference=None)  # type: ignore[arg-type]
    rollout = SimpleNamespace(weights="0-a", group=0, log_probabilities=(-1.5, -2.0, -2.5))
    found: Any = SimpleNamespace(rollouts=[rollout], rewards={})
    values = [np.full(3, -1.0, np.float32)]
    with (
        patch.object(policy_update, "policy_row"),
        patch.object(PolicyUpdate, "_loss_weight"),
        patch.object(PolicyUpdate, "_log_probabilities", return_value=(values, values)),
        patch.object(PolicyUpdate, "_of_reference", side_effect=_GoesOnError),
        pytest.raises(error, match=said),
    ):
        update.run(found, Mock(), weights="0-a")
