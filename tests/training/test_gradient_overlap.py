"""Reducing gradients during the backward pass, which only a GPU does, changes no digit of losses and norms.

Megatron's buckets assert that every parameter of theirs got a gradient: a parameter without use would end the job on a
GPU, and would not be seen on a CPU.
"""

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from parity_tests.harness.ranks import run_ranks
from parity_tests.harness.training_jobs import Losses, Recipe, train
from tests.models.checkpoints import V3, write_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("overlap") / "hf", V3)


def _train(recipe: Recipe, overlap: bool) -> tuple[Losses, int]:
    """Train with or without overlap, in many buckets; return how many reductions the backward pass has begun too."""
    from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup

    from megatron_ads.training import build

    begun = 0
    start = _ParamAndGradBucketGroup.start_grad_sync

    def counted(group: _ParamAndGradBucketGroup, **options: Any) -> None:
        nonlocal begun
        begun += group.ddp_config.overlap_grad_reduce
        start(group, **options)

    _ParamAndGradBucketGroup.start_grad_sync = counted
    build.wrap_for_training = partial(build.wrap_for_training, bucket_size=50_000)  # type: ignore[attr-defined]
    wrap_chunks = build.wrap_chunks
    build.wrap_chunks = lambda models, **_: wrap_chunks(models, overlap=overlap)  # type: ignore[assignment]
    return train(recipe), begun


@pytest.mark.parametrize("mtp_loss_weight", [0.1, 0.0], ids=["mtp", "mtp unused"])
def test_losses_and_norms_do_not_depend_on_overlap(folder: Path, mtp_loss_weight: float) -> None:
    model = {"mtp_loss_weight": mtp_loss_weight, "recompute": "full"}
    recipe = Recipe(folder=folder, layout={"pp": 2}, model=model, steps=3)
    plain, overlapped = (run_ranks(2, _train, recipe, overlap) for overlap in (False, True))
    for (losses, begun), (expected, _) in zip(overlapped, plain, strict=True):
        assert losses == expected
        assert begun > 3 * 2  # several buckets a step
