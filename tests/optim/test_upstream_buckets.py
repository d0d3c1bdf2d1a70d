"""Optimizer state in a checkpoint when gradients are reduced in several buckets (Megatron-LM #5077).

The reference is the same training with one bucket: reduction is element by element, so the state must be equal.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from megatron_ads.layout import ParallelLayout
from parity_tests.harness.ranks import run_ranks
from parity_tests.harness.training_jobs import Losses, Recipe, resume_and_train, run_steps, save, start
from tests.models.checkpoints import V3, write_checkpoint
from tests.optim.stock import StockJob, StockTrainer, fused_adam_installed

LAYOUT = {"ep": 2}
"""Two ranks: the dense parameters have two replicas, the experts one."""
SMALL_BUCKET = 2000
"""Elements; both models have more than ten times as many on a rank."""
STEPS = 3


@dataclass(frozen=True)
class Saved:
    """The optimizer's state in a checkpoint, by key, and in how many buckets it lies."""

    buckets: int
    tensors: dict[str, Tensor]


Trained = tuple[Saved, Losses, Losses]


def _tensors(state: object) -> Iterator[tuple[str, Tensor]]:
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories

    for entry in nested_values(extract_sharded_tensors_and_factories(state)[0]):
        yield entry.key, entry.data.clone()


def _stock(job: StockJob) -> Saved:
    with fused_adam_installed():
        trainer = StockTrainer(job)
        for step in range(STEPS):
            trainer.step(step)
        buckets = sum(len(buffer.buckets) for member in trainer.members for buffer in member.buffers)
        return Saved(buckets, dict(_tensors(trainer.describe_state(loading=False)["optimizer"])))


def _ours(recipe: Recipe, bucket_size: int | None) -> Trained:
    """Train, save and continue; return the state at the save, and the losses before and after it."""
    from megatron.core.dist_checkpointing import load_plain_tensors

    from megatron_ads.optim.build import wrap_for_training

    def in_buckets(chunks: object, overlap: bool) -> object:
        return wrap_for_training(chunks, overlap=bucket_size is not None, bucket_size=bucket_size)

    with patch("megatron_ads.training.build.wrap_for_training", in_buckets):
        model, shards, source = start(recipe)
    before = run_steps(model, shards, 0, STEPS)
    buckets = sum(len(buffer.buckets) for member in model.optimizer.members for buffer in member.inner.buffers)
    stored = load_plain_tensors(str(save(recipe, model, shards, source)))
    tensors = {key: tensor for key, tensor in stored.items() if key.startswith("optimizer.state.")}
    return Saved(buckets, tensors), before, run_steps(model, shards, STEPS, STEPS)


def _changed(one_bucket: Saved, several: Saved, *, tolerance: float) -> list[str]:
    assert one_bucket.tensors.keys() == several.tensors.keys() and one_bucket.buckets < several.buckets
    return [
        key
        for key, tensor in one_bucket.tensors.items()
        if not torch.allclose(several.tensors[key], tensor, rtol=tolerance, atol=0)
    ]


def test_megatron_core_saves_other_state_with_several_buckets() -> None:
    job = StockJob(layout=ParallelLayout(world=2, **LAYOUT))
    one_bucket = run_ranks(2, _stock, job)
    several = run_ranks(2, _stock, replace(job, bucket_size=SMALL_BUCKET))
    for one, other in zip(one_bucket, several, strict=True):
        changed = _changed(one, other, tolerance=0.5)  # other values, not another rounding
        assert changed and len(changed) < len(one.tensors)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, list[Trained], list[Trained]]:
    """The same job with one bucket and with several; the latter's checkpoint is in the recipe."""
    root = tmp_path_factory.mktemp("buckets")
    # Not clipped: the norm is summed bucket by bucket, and its rounding would be in every weight.
    recipe = Recipe(folder=write_checkpoint(root / "v3", V3), layout=LAYOUT, optim={"clip_grad": 0.0}, steps=STEPS)
    several = replace(recipe, checkpoints=root / "several")
    one_bucket = run_ranks(2, _ours, replace(recipe, checkpoints=root / "one"), None)
    return several, one_bucket, run_ranks(2, _ours, several, SMALL_BUCKET)


def test_ours_saves_the_same_state_whatever_the_buckets(trained: tuple[Recipe, list[Trained], list[Trained]]) -> None:
    _, one_bucket, several = trained
    for (one, losses, _), (other, same_losses, _) in zip(one_bucket, several, strict=True):
        assert _changed(one, other, tolerance=0) == []
        assert losses.loss == same_losses.loss


def test_ours_saved_from_several_buckets_resumes_bit_equal_in_one(
    trained: tuple[Recipe, list[Trained], list[Trained]],
) -> None:
    several, one_bucket, _ = trained
    for resumed, (_, _, after) in zip(run_ranks(2, resume_and_train, several), one_bucket, strict=True):
        assert resumed.loss == after.loss
