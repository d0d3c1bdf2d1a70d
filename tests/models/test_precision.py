"""BF16 models: compute in BF16, accumulate gradients in FP32, route in FP32."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_ads.config.model import Precision
from parity_tests.harness import model_jobs
from parity_tests.harness.model_jobs import Job, train_pass
from parity_tests.harness.ranks import run_ranks
from tests.models.checkpoints import V3, write_checkpoint

LOSS_TOLERANCE = 0.01
"""Relative: BF16 keeps 8 bits, an error of 0.4 % per value that averages out over tokens."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("precision") / "hf", V3)


def test_a_bf16_pass_is_near_the_fp32_pass_and_its_gradients_are_fp32(folder: Path) -> None:
    settings = {"mtp_loss_weight": 0.3}
    (full,) = run_ranks(1, train_pass, Job(folder=folder, settings=settings))
    (half,) = run_ranks(1, train_pass, Job(folder=folder, settings=settings | {"precision": Precision.bf16}))
    assert half.loss_sum == pytest.approx(full.loss_sum, rel=LOSS_TOLERANCE)
    assert half.loss_sum != full.loss_sum
    assert {grad.dtype for grad in half.grads.values()} == {torch.float32}
    name = "decoder.layers.0.self_attention.linear_proj.weight"
    assert torch.nn.functional.cosine_similarity(half.grads[name].flatten(), full.grads[name].flatten(), dim=0) > 0.99


def _routing_state(job: Job, how: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    from megatron.core.transformer.module import Float16Module

    from megatron_ads.models.build import wrap_precision

    (model,), _, _ = model_jobs.build(job)
    before = {name: value.clone() for name, value in model.named_buffers() if "router" in name}
    if how == "ours":
        wrap_precision([model])
    else:
        Float16Module(model.config, model)
    after = {name: value for name, value in model.named_buffers() if "router" in name}
    return before, after


def _changed(folder: Path, how: str) -> set[str]:
    job = Job(folder=folder, settings={"precision": Precision.bf16})
    ((before, after),) = run_ranks(1, _routing_state, job, how)
    assert len(before) == 2 * 3  # a bias and a count for each of two MoE layers and the MTP layer
    return {name for name, value in before.items() if value.dtype != after[name].dtype}


def test_routing_biases_and_counts_stay_fp32(folder: Path) -> None:
    assert _changed(folder, "ours") == set()


def test_upstream_still_rounds_them(folder: Path) -> None:
    assert len(_changed(folder, "upstream")) == 6
