"""The same updates by policy and preference losses under every layout."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_ads.config.rl import ImportanceSampling, LossAggregation, PolicyConfig, PolicyLoss
from megatron_ads.config.training import Normalize
from megatron_ads.data.batches import ReplicaShare, batches_of_all
from megatron_ads.losses.policy import ADVANTAGES, ENGINE, OLD, REFERENCE, normalize_of, policy_loss, policy_metrics
from megatron_ads.losses.preference import PREFERENCE, preference_coefficients, preference_values
from megatron_ads.rows import TokenizedRow
from parity_tests.harness.ranks import run_ranks
from parity_tests.harness.training_jobs import Recipe, start
from tests.models.checkpoints import V3, write_checkpoint

SEQ_LENGTH, PROMPT = 24, 3
POLICY = PolicyConfig(
    loss=PolicyLoss.gspo,
    loss_agg_mode=LossAggregation.seq_mean_token_mean,
    clip_ratio_low=0.02,
    clip_ratio_high=0.02,
    kl_coef=0.1,
    importance_sampling=ImportanceSampling.tis,
)
SETS, CHOSEN = np.array([0, 0, 0, 1, 1, 2, 2, 2]), np.array([0, 1, 0, 1, 0, 0, 0, 1])


def rows() -> list[TokenizedRow]:
    """Return eight answers of many lengths behind prompts of three tokens."""
    draw, made = np.random.default_rng(5), []
    for number, length in enumerate((9, 5, 17, 4, 12, 20, 7, 6)):
        weights = np.ones(length, dtype=np.float32)
        weights[:PROMPT] = 0
        made.append(TokenizedRow(f"r{number}", "test", draw.integers(1, 128, length).astype(np.int32), weights))
    return made


@dataclass(frozen=True, slots=True)
class Found:
    """What one rank saw of two policy updates on the same answers, and of two preference updates behind them."""

    losses: list[float]
    norms: list[float]
    metrics: list[dict[str, float]]
    set_losses: list[float]


def _updates(recipe: Recipe) -> Found:
    from megatron_ads.layout import rank
    from megatron_ads.training.step import run_log_probabilities, run_step

    model, shards, _ = start(recipe)
    share = ReplicaShare(4, 1, shards.layout.coordinates(rank()).dp, shards.layout.dp)
    samples, metrics, reports, set_losses = rows(), [], [], []

    def log_p() -> list[Any]:
        found = run_log_probabilities(samples, share, model.chunks, seq_length=SEQ_LENGTH)
        return [each.numpy() for each in found]

    def run(loss: Any, normalize: Normalize, extra: Any) -> Any:
        cut = batches_of_all(samples, share, seq_length=SEQ_LENGTH, packing=True, normalize=normalize, extra=extra)
        reports.append(run_step(cut, model.chunks, model.optimizer, learning_rate=1e-3, loss=loss))
        return reports[-1]

    old, draw = log_p(), np.random.default_rng(6)
    extra = {OLD: old, ADVANTAGES: [np.full(len(each), draw.normal(), np.float32) for each in old]}
    for name, spread in ((REFERENCE, 0.3), (ENGINE, 0.5)):
        extra[name] = [each + draw.normal(0, spread, len(each)).astype(np.float32) for each in old]
    for _ in range(2):
        report = run(policy_loss(POLICY), normalize_of(POLICY.loss_agg_mode), extra)
        metrics.append(policy_metrics(POLICY, report.totals, report.per_sample, report.loss_tokens))
    reference = np.array([each[PROMPT - 1 :].sum() for each in old], dtype=np.float64)
    for _ in range(2):
        summed = np.array([each[PROMPT - 1 :].sum() for each in log_p()], dtype=np.float64)
        loss_S, coefficient_N = preference_coefficients(summed, reference, SETS, CHOSEN, 0.5)
        run(PREFERENCE, Normalize.sample, preference_values(samples, loss_S, coefficient_N, SETS, CHOSEN))
        set_losses.append(float(loss_S.mean()))
    return Found([each.loss for each in reports], [each.update.grad_norm for each in reports], metrics, set_losses)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return write_checkpoint(tmp_path_factory.mktemp("model") / "v3", V3)


@pytest.fixture(scope="module")
def alone(folder: Path) -> Found:
    (found,) = run_ranks(1, _updates, Recipe(folder=folder))
    return found  # type: ignore[no-any-return]


LAYOUTS = {"dp2": (2, {}), "pp2-ep2, no experts on stage 0": (4, {"pp": 2, "ep": 2})}


@pytest.mark.parametrize("name", LAYOUTS)
def test_updates_do_not_depend_on_the_layout(name: str, folder: Path, alone: Found) -> None:
    world, layout = LAYOUTS[name]
    # FP32 in another order: norms are up to 2e-6 apart after an update.
    for found in run_ranks(world, _updates, Recipe(folder=folder, layout=layout)):
        assert found.losses == pytest.approx(alone.losses, rel=1e-5)
        assert found.norms == pytest.approx(alone.norms, rel=1e-5)
        assert found.set_losses == pytest.approx(alone.set_losses, rel=1e-5)
        for metrics, expected in zip(found.metrics, alone.metrics, strict=True):
            assert metrics == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_the_ratio_is_one_before_the_first_update_and_clipped_after_it(alone: Found) -> None:
    first, second = alone.metrics
    assert first["actor/ratio"] == pytest.approx(1, abs=1e-6)
    assert first["actor/ppo_kl"] == pytest.approx(0, abs=1e-6)
    assert (first["actor/pg_clipfrac"], second["actor/pg_clipfrac"] > 0) == (0, True)


def test_a_preference_step_reports_the_loss_of_its_sets_and_lowers_it(alone: Found) -> None:
    assert alone.losses[2:] == pytest.approx(alone.set_losses, rel=1e-6)
    assert alone.set_losses[1] < alone.set_losses[0]
