"""The same updates by policy and preference losses under every layout."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_ads.config.rl import ImportanceSampling, LossAggregation, PolicyConfig, PolicyLoss
from megatron_ads.config.training import Normalize
from megatron_ads.data.batches import ReplicaShare, batches_of_all
from megatron_ads.data.packed_batch import PackedBatch
from megatron_ads.losses.policy import (
    ADVANTAGES,
    ENGINE,
    OLD,
    REFERENCE,
    answer_weight,
    normalize_of,
    policy_loss,
    policy_metrics,
)
from megatron_ads.losses.preference import PREFERENCE, preference_coefficients, preference_values
from megatron_ads.rows import TokenizedRow
from parity_tests.harness.ranks import run_ranks
from parity_tests.harness.training_jobs import Recipe, start
from tests.models.checkpoints import V3, write_checkpoint

SEQ_LENGTH, PROMPT, MAX_NEW_TOKENS = 24, 3, 20
POLICY = PolicyConfig(
    loss=PolicyLoss.gspo,
    loss_agg_mode=LossAggregation.seq_mean_token_mean,
    clip_ratio_low=0.02,
    clip_ratio_high=0.02,
    kl_coef=0.1,
    importance_sampling=ImportanceSampling.tis,
)
SETS, CHOSEN = np.array([0, 0, 0, 1, 1, 2, 2, 2]), np.array([0, 1, 0, 1, 0, 0, 0, 1])


def rows(mode: LossAggregation = POLICY.loss_agg_mode) -> list[TokenizedRow]:
    """Return eight answers of many lengths behind prompts of three tokens, weighed for ``mode``."""
    draw, made = np.random.default_rng(5), []
    for number, length in enumerate((9, 5, 17, 4, 12, 20, 7, 6)):
        weights = np.full(length, answer_weight(mode, length - PROMPT, MAX_NEW_TOKENS), dtype=np.float32)
        weights[:PROMPT] = 0
        made.append(TokenizedRow(f"r{number}", "test", draw.integers(1, 128, length).astype(np.int32), weights))
    return made


@dataclass(frozen=True, slots=True)
class ModeUpdate:
    """Loss and gradient norm of a GRPO update with one way to take the mean."""

    normalizer_here: int
    """This replica's part of what the sum of the losses is divided by."""
    whole: tuple[float, float]
    """As a job has them."""
    of_replicas: tuple[float, float]
    """If each replica divided by its own normaliser, and the mean over replicas were taken."""


@dataclass(frozen=True, slots=True)
class Found:
    """What one rank saw of two policy updates on the same answers, and of two preference updates behind them."""

    losses: list[float]
    norms: list[float]
    metrics: list[dict[str, float]]
    set_losses: list[float]
    modes: dict[LossAggregation, ModeUpdate]


def _mode_updates(model: Any, share: ReplicaShare, extra: Any) -> dict[LossAggregation, ModeUpdate]:
    """Compute the update of every mode on the same weights, which stay as they are."""
    from megatron_ads.training.step import run_step

    def cut(mode: LossAggregation, dp_rank: int) -> list[PackedBatch]:
        mine, normalize = replace(share, dp_rank=dp_rank), normalize_of(mode)
        return batches_of_all(rows(mode), mine, seq_length=SEQ_LENGTH, packing=True, normalize=normalize, extra=extra)

    def run(mode: LossAggregation, batches: Sequence[PackedBatch]) -> tuple[float, float]:
        loss = policy_loss(PolicyConfig(loss_agg_mode=mode))
        report = run_step(batches, model.chunks, model.optimizer, learning_rate=0.0, loss=loss)
        assert report.update is not None
        return report.loss, report.update.grad_norm

    found = {}
    for mode in LossAggregation:
        replicas = [cut(mode, dp_rank) for dp_rank in range(share.dp_size)]
        normalizers, here = [sum(batch.normalizer for batch in each) for each in replicas], share.dp_rank
        # What is divided by the sum C of all C_r is weighed so that 1/C sum_r becomes 1/dp sum_r 1/C_r.
        factor = sum(normalizers) / (share.dp_size * normalizers[here])
        own = [replace(batch, mask_BS=batch.mask_BS * factor) for batch in replicas[here]]
        found[mode] = ModeUpdate(normalizers[here], run(mode, replicas[here]), run(mode, own))
    return found


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
    modes = _mode_updates(model, share, extra)  # the weights have moved since ``old``: ratios are not 1
    norms = [each.update.grad_norm for each in reports]
    return Found([each.loss for each in reports], norms, metrics, set_losses, modes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return write_checkpoint(tmp_path_factory.mktemp("model") / "v3", V3)


@pytest.fixture(scope="module")
def alone(folder: Path) -> Found:
    (found,) = run_ranks(1, _updates, Recipe(folder=folder))
    return found  # type: ignore[no-any-return]


LAYOUTS = {"dp2": (2, {}), "pp2-ep2, no experts on stage 0": (4, {"pp": 2, "ep": 2})}


@pytest.fixture(scope="module", params=LAYOUTS)
def ranks(request: pytest.FixtureRequest, folder: Path) -> list[Found]:
    """What each rank of a layout saw; one job runs all updates, as starting ranks takes longer than they do."""
    world, layout = LAYOUTS[request.param]
    return run_ranks(world, _updates, Recipe(folder=folder, layout=layout))


def test_updates_do_not_depend_on_the_layout(ranks: list[Found], alone: Found) -> None:
    # FP32 in another order: norms are up to 2e-6 apart after an update.
    for found in ranks:
        assert found.losses == pytest.approx(alone.losses, rel=1e-5)
        assert found.norms == pytest.approx(alone.norms, rel=1e-5)
        assert found.set_losses == pytest.approx(alone.set_losses, rel=1e-5)
        for metrics, expected in zip(found.metrics, alone.metrics, strict=True):
            assert metrics == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("mode", LossAggregation)
def test_every_mean_is_over_all_replicas_whatever_each_of_them_has(
    mode: LossAggregation, ranks: list[Found], alone: Found
) -> None:
    updates, wanted = [found.modes[mode] for found in ranks], alone.modes[mode].whole
    # Six of the eight answers are in the rows of one replica: 36 tokens and 20, without prompts.
    parts = {36, 20} if mode is LossAggregation.token_mean else {6, 2}
    assert {update.normalizer_here for update in updates} == parts
    for update in updates:
        assert update.whole == pytest.approx(wanted, rel=1e-5)
        # The negative twin, in its loss as in its gradients.
        for own, whole in zip(update.of_replicas, wanted, strict=True):
            assert own != pytest.approx(whole, rel=1e-3)


def test_the_ratio_is_one_before_the_first_update_and_clipped_after_it(alone: Found) -> None:
    first, second = alone.metrics
    assert first["actor/ratio"] == pytest.approx(1, abs=1e-6)
    assert first["actor/ppo_kl"] == pytest.approx(0, abs=1e-6)
    assert (first["actor/pg_clipfrac"], second["actor/pg_clipfrac"] > 0) == (0, True)


def test_a_preference_step_reports_the_loss_of_its_sets_and_lowers_it(alone: Found) -> None:
    assert alone.losses[2:] == pytest.approx(alone.set_losses, rel=1e-6)
    assert alone.set_losses[1] < alone.set_losses[0]
