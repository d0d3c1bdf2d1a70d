"""Rung 3: the logits of each model family in FP32 and BF16, and the first layer that departs where they differ.

A failure means that the arithmetic is another one: attention, positions, norms, routing or experts. The message names
the first layer whose output differs although its input does not; compare that layer's config first.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from conversion.layer_specs import LayerSpec
from megatron_ads.config import Precision
from parity_tests import jobs, reference
from parity_tests.bisect import first_departure
from parity_tests.checkpoint_errors import (
    EPSILON_CHANGED,
    GATE_AND_UP_SWAPPED,
    GROUP_LIMITS_OFF,
    INTERLEAVING_FLIPPED,
    MSCALE_LEFT_OUT,
    SCALING_ROUNDED,
    YARN_LEFT_OUT,
    CheckpointError,
)
from parity_tests.checkpoints import BEYOND_CONTEXT, FAMILIES
from parity_tests.figures import record
from parity_tests.jobs import Job
from parity_tests.reference import Pass
from parity_tests.tolerances import BF16_KL, BF16_NOISE, LAYER, LOGITS
from tests.distributed import run_ranks

Checkpoint = Callable[[str], Path]
VOCABULARY = 160
TOKENS_BS = torch.randint(0, VOCABULARY, (2, BEYOND_CONTEXT), generator=torch.Generator().manual_seed(3))
SMALL_ERRORS: dict[str, tuple[str, CheckpointError]] = {
    "mscale left out": ("v3", MSCALE_LEFT_OUT),
    "YaRN left out": ("v3", YARN_LEFT_OUT),
    "group limits off": ("v3", GROUP_LIMITS_OFF),
    "one epsilon changed": ("v3", EPSILON_CHANGED),
    "gate and up swapped": ("v2-lite", GATE_AND_UP_SWAPPED),
    "rope interleaving flipped": ("v3", INTERLEAVING_FLIPPED),
    "routing scale rounded to BF16": ("moonlight", SCALING_ROUNDED),
}


def _ours(folder: Path, **settings: Any) -> Pass:
    settings = {"spec": LayerSpec.GROUPED} | settings
    (result,) = run_ranks(1, jobs.forward, Job(folder=folder, settings=settings), TOKENS_BS)
    return result


def _largest(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


@pytest.fixture(scope="module")
def theirs(checkpoint: Checkpoint) -> Callable[[str], Pass]:
    """Return transformers' FP32 pass over a family's checkpoint, computed once."""
    passes: dict[str, Pass] = {}

    def get(family: str) -> Pass:
        if family not in passes:
            passes[family] = reference.forward(checkpoint(family), TOKENS_BS)
        return passes[family]

    return get


@pytest.mark.parametrize("spec", [LayerSpec.LOCAL, LayerSpec.GROUPED])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_those_of_transformers(
    checkpoint: Checkpoint, theirs: Callable[[str], Pass], family: str, spec: LayerSpec
) -> None:
    ours, right = _ours(checkpoint(family), spec=spec), theirs(family)
    difference = _largest(ours.logits, right.logits)
    record(3, f"{family}, {spec}: largest logit difference", difference, LOGITS)
    assert difference < LOGITS.value, first_departure(ours.layers, right.layers)
    assert first_departure(ours.layers, right.layers) is None


@pytest.mark.parametrize("name", SMALL_ERRORS)
def test_a_small_error_is_seen_in_the_logits(
    checkpoint: Checkpoint, theirs: Callable[[str], Pass], tmp_path: Path, name: str
) -> None:
    family, error = SMALL_ERRORS[name]
    ours = _ours(error.write(checkpoint(family), tmp_path / "wrong"))
    assert _largest(ours.logits, theirs(family).logits) > LOGITS.value


def test_a_softmax_scale_rounded_to_bf16_is_seen_in_the_logits(
    checkpoint: Checkpoint, theirs: Callable[[str], Pass]
) -> None:
    job = Job(folder=checkpoint("v3"), settings={"spec": LayerSpec.GROUPED})
    (ours,) = run_ranks(1, jobs.with_error, "softmax_scale_rounded_to_bf16", jobs.forward, job, TOKENS_BS)
    assert _largest(ours.logits, theirs("v3").logits) > LOGITS.value


def change_epsilon_of_layer_2(model: Any) -> None:
    """Give one norm of one layer another epsilon."""
    model.decoder.layers[2].pre_mlp_layernorm.eps = 1e-4


def test_the_bisect_names_the_layer_that_departs(checkpoint: Checkpoint, theirs: Callable[[str], Pass]) -> None:
    job = Job(folder=checkpoint("v3"))
    (ours,) = run_ranks(1, jobs.forward, job, TOKENS_BS, change_epsilon_of_layer_2)
    departure = first_departure(ours.layers, theirs("v3").layers)
    assert departure is not None
    assert (departure.layer, departure.difference > LAYER.value) == (2, True)
    assert _largest(ours.logits, theirs("v3").logits) > LOGITS.value


def _mean_kl(right: Tensor, other: Tensor) -> float:
    """Mean over positions of KL(right || other), in nats."""
    p, q = (log_softmax(logits, dim=-1).flatten(0, 1) for logits in (right, other))
    return float(kl_div(q, p, reduction="batchmean", log_target=True))


def _rms(x: Tensor) -> float:
    return float(x.pow(2).mean().sqrt())


@pytest.fixture(scope="module")
def their_bf16_noise(checkpoint: Checkpoint, theirs: Callable[[str], Pass]) -> float:
    """Return the root-mean-square error of transformers' own BF16 logits."""
    return _rms(reference.forward(checkpoint("v3"), TOKENS_BS, torch.bfloat16).logits - theirs("v3").logits)


def test_bf16_adds_no_more_noise_than_transformers_does(
    checkpoint: Checkpoint, theirs: Callable[[str], Pass], their_bf16_noise: float
) -> None:
    ours, right = _ours(checkpoint("v3"), precision=Precision.bf16).logits, theirs("v3").logits
    noise, divergence = _rms(ours - right) / their_bf16_noise, _mean_kl(right, ours)
    record(3, "v3, BF16: logit noise over that of transformers in BF16", noise, BF16_NOISE)
    record(3, "v3, BF16: mean KL from FP32, nats", divergence, BF16_KL)
    assert noise < BF16_NOISE.value
    assert divergence < BF16_KL.value


@pytest.mark.parametrize("name", ["mscale left out", "group limits off", "rope interleaving flipped"])
def test_a_small_error_is_seen_in_bf16(
    checkpoint: Checkpoint, theirs: Callable[[str], Pass], their_bf16_noise: float, tmp_path: Path, name: str
) -> None:
    wrong = SMALL_ERRORS[name][1].write(checkpoint("v3"), tmp_path / "wrong")
    ours, right = _ours(wrong, precision=Precision.bf16).logits, theirs("v3").logits
    assert _rms(ours - right) / their_bf16_noise > BF16_NOISE.value
    assert _mean_kl(right, ours) > BF16_KL.value
