"""Rung 3: the logits of each model family in FP32 and BF16, and the first layer that departs where they differ.

A failure means that the arithmetic is another one: attention, positions, norms, routing or experts. The message names
the first layer whose output differs although its input does not; compare that layer's config first.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conversion.layer_specs import LayerSpec
from parity_tests import jobs, reference
from parity_tests.checkpoints import BEYOND_CONTEXT, DENSE, FAMILIES, MIXTURES, altered_copy
from parity_tests.deliberate_errors import (
    BIASES_LEFT_OUT,
    EPSILON_CHANGED,
    GATE_AND_UP_SWAPPED,
    GROUP_LIMITS_OFF,
    INTERLEAVING_FLIPPED,
    LLAMA3_LEFT_OUT,
    MSCALE_LEFT_OUT,
    SCALING_ROUNDED,
    STACKED_BY_PROJECTION,
    YARN_LEFT_OUT,
    CheckpointError,
)
from parity_tests.harness.growing import WORDS, grow, write_tokenizer
from parity_tests.machines import BF16, CPU_FP32, FP32, Machine
from parity_tests.passes import Pass, first_departure, mean_kl, noise_ratio
from parity_tests.tolerances import BF16_KL, BF16_NOISE, LAYER, LOGITS, record

Checkpoint = Callable[[str], Path]
Theirs = Callable[[str, Machine], Pass]
VOCABULARY = 160
TOKENS_BS = torch.randint(0, VOCABULARY, (2, BEYOND_CONTEXT), generator=torch.Generator().manual_seed(4))
"""As in rung 4. No token's last chosen expert scores within 2e-6 of the first left out: FP32 rounding, 1e-7, cannot
move a token to another expert, whatever device computes it."""
SMALL_ERRORS: dict[str, tuple[str, CheckpointError]] = {
    "mscale left out": ("v3", MSCALE_LEFT_OUT),
    "YaRN left out": ("v3", YARN_LEFT_OUT),
    "group limits off": ("v3", GROUP_LIMITS_OFF),
    "one epsilon changed": ("v3", EPSILON_CHANGED),
    "gate and up swapped": ("v2-lite", GATE_AND_UP_SWAPPED),
    "rope interleaving flipped": ("v3", INTERLEAVING_FLIPPED),
    "routing scale rounded to BF16": ("moonlight", SCALING_ROUNDED),
    "queries, keys and values one after the other": ("qwen2", STACKED_BY_PROJECTION),
    "biases left out": ("llama-tied", BIASES_LEFT_OUT),
    "Llama 3.1's scaling left out": ("llama", LLAMA3_LEFT_OUT),
}


def _ours(folder: Path, machine: Machine = CPU_FP32, **settings: Any) -> Pass:
    (result,) = machine.run(1, jobs.forward, machine.job(folder, **settings), TOKENS_BS)
    return result


def _largest(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


@pytest.fixture(scope="module")
def theirs(checkpoint: Checkpoint) -> Theirs:
    """Return transformers' pass over a family's checkpoint on a machine, each computed once."""
    return cache(lambda family, machine: reference.forward(checkpoint(family), TOKENS_BS, machine))


FAMILIES_AND_SPECS = [
    *((family, spec) for family in MIXTURES for spec in (LayerSpec.LOCAL, LayerSpec.GROUPED)),
    *((family, LayerSpec.GROUPED) for family in DENSE),  # without experts the two are the same modules
]


@pytest.mark.parametrize("machine", FP32, ids=str)
@pytest.mark.parametrize(("family", "spec"), FAMILIES_AND_SPECS)
def test_logits_equal_those_of_transformers(
    checkpoint: Checkpoint, theirs: Theirs, family: str, spec: LayerSpec, machine: Machine
) -> None:
    ours, right = _ours(checkpoint(family), machine, spec=spec), theirs(family, machine)
    difference = _largest(ours.logits, right.logits)
    record(3, f"{family}, {spec}: largest logit difference", difference, LOGITS, machine)
    assert difference < LOGITS.value, first_departure(ours.layers, right.layers)
    assert first_departure(ours.layers, right.layers) is None


@pytest.mark.parametrize("family", ["v3", "qwen2-tied"])
def test_logits_of_a_grown_vocabulary_equal_those_of_transformers(
    checkpoint: Checkpoint, tmp_path: Path, family: str
) -> None:
    small = write_tokenizer(altered_copy(checkpoint(family), tmp_path / "small"))
    grow(small, tmp_path / "grown", tokens=50)
    end = WORDS + 50
    tokens_BS = TOKENS_BS + end - VOCABULARY  # up to the last new one
    (ours,) = CPU_FP32.run(1, jobs.forward, CPU_FP32.job(tmp_path / "grown"), tokens_BS)
    right = reference.forward(tmp_path / "grown", tokens_BS, CPU_FP32)
    assert tokens_BS.max() == end - 1 and ours.logits.shape[-1] == 176, "a multiple of 8 that holds 170"
    difference = _largest(ours.logits, right.logits)
    record(3, f"{family}, a grown vocabulary: largest logit difference", difference, LOGITS, CPU_FP32)
    assert difference < LOGITS.value, first_departure(ours.layers, right.layers)


@pytest.mark.parametrize("name", SMALL_ERRORS)
def test_a_small_error_is_seen_in_the_logits(checkpoint: Checkpoint, theirs: Theirs, tmp_path: Path, name: str) -> None:
    family, error = SMALL_ERRORS[name]
    ours = _ours(error.write(checkpoint(family), tmp_path / "wrong"))
    assert _largest(ours.logits, theirs(family, CPU_FP32).logits) > LOGITS.value


@pytest.mark.parametrize("machine", FP32, ids=str)
def test_a_softmax_scale_rounded_to_bf16_is_seen_in_the_logits(
    checkpoint: Checkpoint, theirs: Theirs, machine: Machine
) -> None:
    job = machine.job(checkpoint("v3"))
    (ours,) = machine.run(1, jobs.with_error, "softmax_scale_rounded_to_bf16", jobs.forward, job, TOKENS_BS)
    assert _largest(ours.logits, theirs("v3", machine).logits) > LOGITS.value


def change_epsilon_of_layer_2(model: Any) -> None:
    """Give one norm of one layer another epsilon."""
    model.decoder.layers[2].pre_mlp_layernorm.eps = 1e-4


@pytest.mark.parametrize("machine", FP32, ids=str)
def test_the_bisect_names_the_layer_that_departs(checkpoint: Checkpoint, theirs: Theirs, machine: Machine) -> None:
    job, right = machine.job(checkpoint("v3")), theirs("v3", machine)
    (ours,) = machine.run(1, jobs.forward, job, TOKENS_BS, change_epsilon_of_layer_2)
    departure = first_departure(ours.layers, right.layers)
    assert departure is not None
    assert (departure.layer, departure.difference > LAYER.value) == (2, True)
    assert _largest(ours.logits, right.logits) > LOGITS.value


@pytest.mark.parametrize("machine", BF16, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_adds_no_more_noise_than_transformers_does(
    checkpoint: Checkpoint, theirs: Theirs, family: str, machine: Machine
) -> None:
    exact, right = theirs(family, CPU_FP32).logits, theirs(family, machine).logits
    ours = _ours(checkpoint(family), machine).logits
    noise, divergence = noise_ratio(ours, right, exact), mean_kl(exact, ours)
    record(3, f"{family}: logit noise over that of transformers", noise, BF16_NOISE, machine)
    record(3, f"{family}: mean KL from FP32, nats", divergence, BF16_KL, machine)
    assert noise < BF16_NOISE.value
    assert divergence < BF16_KL.value


@pytest.mark.parametrize("machine", BF16, ids=str)
@pytest.mark.parametrize("name", ["mscale left out", "group limits off", "rope interleaving flipped"])
def test_a_small_error_is_seen_in_bf16(
    checkpoint: Checkpoint, theirs: Theirs, tmp_path: Path, name: str, machine: Machine
) -> None:
    wrong = SMALL_ERRORS[name][1].write(checkpoint("v3"), tmp_path / "wrong")
    exact, ours = theirs("v3", CPU_FP32).logits, _ours(wrong, machine).logits
    assert noise_ratio(ours, theirs("v3", machine).logits, exact) > BF16_NOISE.value
    assert mean_kl(exact, ours) > BF16_KL.value
