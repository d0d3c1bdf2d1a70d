"""Rung 6: the multi-token-prediction layer against a plain-torch reference; transformers has none.

A failure with rungs 3 to 5 green is in the MTP layer alone: the order of embedding and hidden state, which token is
embedded, which norm is where, or how its loss is shifted and weighted.
"""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cross_entropy

from conversion.names import parameters
from megatron_ads.architecture import read_model_shape
from parity_tests import jobs, reference
from parity_tests.checkpoints import BEYOND_CONTEXT
from parity_tests.jobs import rows
from parity_tests.machines import BF16, FP32, Machine
from parity_tests.passes import mean_kl
from parity_tests.plain_model import PlainModel
from parity_tests.tolerances import BF16_KL, GRADIENTS, LOGITS, MTP_OUTPUT, record

Checkpoint = Callable[[str], Path]
TOKENS_S = torch.randint(0, 160, (BEYOND_CONTEXT,), generator=torch.Generator().manual_seed(6))
MTP_WEIGHT = 0.3


def _plain(folder: Path, *, trained: bool = False) -> PlainModel:
    tensors = load_file(folder / "model.safetensors")
    for tensor in tensors.values():
        tensor.requires_grad_(trained)
    return PlainModel(json.loads((folder / "config.json").read_text()), tensors)


@pytest.fixture(scope="module")
def expected(checkpoint: Checkpoint) -> tuple[Tensor, Tensor]:
    """Return the logits of the plain model and of its MTP layer."""
    return _plain(checkpoint("v3"))(TOKENS_S)


def _difference(ours_BSV: Tensor, expected_SV: Tensor) -> float:
    return float((ours_BSV[0, :-1] - expected_SV[:-1]).abs().max())  # the last token has no next one


def test_the_plain_reference_is_right_where_transformers_can_tell(
    checkpoint: Checkpoint, expected: tuple[Tensor, Tensor]
) -> None:
    right = reference.forward(checkpoint("v3"), TOKENS_S[None]).logits
    assert _difference(right, expected[0]) < LOGITS.value


def _ours(folder: Path, machine: Machine, error: str | None = None) -> Tensor:
    job = machine.job(folder, mtp_loss_weight=MTP_WEIGHT)
    call = [jobs.mtp_logits, job, TOKENS_S[None]]
    (ours,) = machine.run(1, *call) if error is None else machine.run(1, jobs.with_error, error, *call)
    return ours


@pytest.mark.parametrize("machine", FP32, ids=str)
def test_the_mtp_layer_equals_the_published_description(
    checkpoint: Checkpoint, expected: tuple[Tensor, Tensor], machine: Machine
) -> None:
    difference = _difference(_ours(checkpoint("v3"), machine), expected[1])
    record(6, "largest difference of an MTP logit", difference, MTP_OUTPUT, machine)
    assert difference < MTP_OUTPUT.value


@pytest.mark.parametrize("machine", FP32, ids=str)
def test_an_error_in_the_mtp_layer_is_seen(
    checkpoint: Checkpoint, expected: tuple[Tensor, Tensor], machine: Machine
) -> None:
    assert _difference(_ours(checkpoint("v3"), machine, "mtp_halves_swapped"), expected[1]) > MTP_OUTPUT.value


def _divergence(ours_BSV: Tensor, expected_SV: Tensor) -> float:
    return mean_kl(expected_SV[None, :-1], ours_BSV[:, :-1])


@pytest.mark.parametrize("machine", BF16, ids=str)
def test_the_mtp_layer_in_bf16_predicts_what_it_does_in_fp32(
    checkpoint: Checkpoint, expected: tuple[Tensor, Tensor], machine: Machine
) -> None:
    divergence = _divergence(_ours(checkpoint("v3"), machine), expected[1])
    record(6, "mean KL of the MTP layer from FP32, nats", divergence, BF16_KL, machine)
    assert divergence < BF16_KL.value


@pytest.mark.parametrize("machine", BF16, ids=str)
def test_an_error_in_the_mtp_layer_is_seen_in_bf16(
    checkpoint: Checkpoint, expected: tuple[Tensor, Tensor], machine: Machine
) -> None:
    assert _divergence(_ours(checkpoint("v3"), machine, "mtp_halves_swapped"), expected[1]) > BF16_KL.value


def _gradients(folder: Path) -> dict[str, Tensor]:
    """Return the gradient of the mean loss, the MTP loss included, by canonical name.

    The MTP layer of position i predicts the label of position i + 1, where that counts and is of the same sample.
    """
    model = _plain(folder, trained=True)
    total, targets = torch.zeros(()), 0
    for row in rows(160):
        targets += int(row["mask"].count_nonzero())
        starts = row["boundaries"].tolist()
        for begin, end in pairwise(starts):
            tokens, labels, mask = (row[name][0, begin:end] for name in ("tokens", "labels", "mask"))
            logits, mtp_logits = model(tokens)
            total = total + (cross_entropy(logits, labels, reduction="none") * mask).sum()
            mtp_losses = cross_entropy(mtp_logits[:-1], labels[1:], reduction="none") * mask[1:]
            total = total + MTP_WEIGHT * mtp_losses.sum()
    (total / targets).backward()
    return {name: _joined(model, parameter) for name, parameter in parameters(read_model_shape(folder)).items()}


def _joined(model: PlainModel, parameter: Any) -> Tensor:
    tensors = [model.tensors[part.name] for part in parameter.parts]
    return torch.cat([torch.zeros_like(t) if t.grad is None else t.grad for t in tensors])


@pytest.mark.parametrize("machine", FP32, ids=str)
def test_every_gradient_with_the_mtp_loss_equals_the_reference(checkpoint: Checkpoint, machine: Machine) -> None:
    folder = checkpoint("small-v3")
    (ours,) = machine.run(1, jobs.gradients, machine.job(folder, mtp_loss_weight=MTP_WEIGHT))
    theirs = _gradients(folder)
    assert any(name.startswith("mtp.") for name in ours.grads)
    worst = max(
        (float((grad - theirs[name]).norm() / theirs[name].norm()), name)
        for name, grad in ours.grads.items()
        if theirs[name].any()
    )
    record(6, "largest relative difference of a gradient with the MTP loss", worst[0], GRADIENTS, machine)
    assert worst[0] < GRADIENTS.value, worst
    assert {name for name, grad in ours.grads.items() if grad.any()} == {
        name for name in ours.grads if theirs[name].any()
    }
