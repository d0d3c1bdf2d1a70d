"""Rung 4: every router chooses the same experts for every token and weighs them alike.

A failure here with logits that agree (rung 3) means a near tie; one with logits that differ means scores, groups, bias
or scaling: compare ``n_group``, ``topk_group``, ``norm_topk_prob``, ``routed_scaling_factor`` and the router biases.
"""

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from parity_tests import jobs, reference
from parity_tests.checkpoints import BEYOND_CONTEXT, MIXTURES, V3, altered_copy
from parity_tests.deliberate_errors import GROUP_LIMITS_OFF, SCALING_ROUNDED
from parity_tests.machines import BF16, CPU_FP32, FP32, Machine
from parity_tests.passes import Routing, noise_ratio
from parity_tests.tolerances import BF16_ROUTER, ROUTER_WEIGHTS, record

Checkpoint = Callable[[str], Path]
Theirs = Callable[[str, Machine], list[Routing]]
TOKENS_BS = torch.randint(0, 160, (2, BEYOND_CONTEXT), generator=torch.Generator().manual_seed(4))


def _ours(folder: Path, error: str | None = None, machine: Machine = CPU_FP32) -> list[Routing]:
    job = machine.job(folder)
    if error is None:
        return machine.run(1, jobs.forward, job, TOKENS_BS)[0].routing
    return machine.run(1, jobs.with_error, error, jobs.forward, job, TOKENS_BS)[0].routing


def _differing_tokens(ours: list[Routing], theirs: list[Routing]) -> int:
    """Count the tokens, over all MoE layers, that are sent to another set of experts."""
    pairs = zip(ours, theirs, strict=True)
    return sum(int((a.experts_TK != b.experts_TK).any(dim=1).sum()) for a, b in pairs)


def _weight_difference(ours: list[Routing], theirs: list[Routing]) -> float:
    return max(float((a.weights_TE - b.weights_TE).abs().max()) for a, b in zip(ours, theirs, strict=True))


@pytest.fixture(scope="module")
def theirs(checkpoint: Checkpoint) -> Theirs:
    """Return transformers' routing of a family's checkpoint on a machine, each computed once."""
    return cache(lambda family, machine: reference.forward(checkpoint(family), TOKENS_BS, machine).routing)


@pytest.mark.parametrize("machine", FP32, ids=str)
@pytest.mark.parametrize("family", MIXTURES)
def test_every_token_goes_to_the_same_experts_with_the_same_weights(
    checkpoint: Checkpoint, theirs: Theirs, family: str, machine: Machine
) -> None:
    ours, right = _ours(checkpoint(family), machine=machine), theirs(family, machine)
    assert len(ours) == 3  # layer 0 is dense
    differing, difference = _differing_tokens(ours, right), _weight_difference(ours, right)
    record(4, f"{family}: tokens sent to other experts, of {3 * TOKENS_BS.numel()}", differing, machine=machine)
    record(4, f"{family}: largest difference of a weight", difference, ROUTER_WEIGHTS, machine)
    assert differing == 0
    assert difference < ROUTER_WEIGHTS.value


def _noise(ours: list[Routing], right: list[Routing], exact: list[Routing]) -> tuple[float, float]:
    """Return two noises of ``ours`` over that of ``right``, both in BF16 against FP32.

    Of the weights, over the tokens that keep their experts in all three passes; and of the selection, in tokens that
    are sent to other experts.
    """
    kept: tuple[list[Tensor], ...] = ([], [], [])
    for sides in zip(ours, right, exact, strict=True):
        same_T = torch.stack([one.experts_TK == sides[2].experts_TK for one in sides[:2]]).all(dim=2).all(dim=0)
        for weights, one in zip(kept, sides, strict=True):
            weights.append(one.weights_TE[same_T])
    moved, moved_there = (_differing_tokens(side, exact) for side in (ours, right))
    return noise_ratio(*(torch.cat(weights) for weights in kept)), moved / moved_there


@pytest.mark.parametrize("machine", BF16, ids=str)
@pytest.mark.parametrize("family", MIXTURES)
def test_bf16_disturbs_the_router_no_more_than_in_transformers(
    checkpoint: Checkpoint, theirs: Theirs, family: str, machine: Machine
) -> None:
    ours, right, exact = _ours(checkpoint(family), machine=machine), theirs(family, machine), theirs(family, CPU_FP32)
    weights, selection = _noise(ours, right, exact)
    record(4, f"{family}: noise of the weights over that of transformers", weights, BF16_ROUTER, machine)
    record(4, f"{family}: tokens sent to other experts over those of transformers", selection, BF16_ROUTER, machine)
    assert weights < BF16_ROUTER.value
    assert selection < BF16_ROUTER.value
    assert _differing_tokens(ours, exact) < TOKENS_BS.numel()  # of three layers: most keep their experts


@pytest.mark.parametrize("machine", BF16, ids=str)
def test_a_bias_in_the_weights_is_seen_in_bf16(checkpoint: Checkpoint, theirs: Theirs, machine: Machine) -> None:
    ours = _ours(checkpoint("v3"), "bias_in_the_weights", machine)
    assert _noise(ours, theirs("v3", machine), theirs("v3", CPU_FP32))[0] > BF16_ROUTER.value


@pytest.mark.parametrize("machine", BF16, ids=str)
def test_group_limits_off_are_seen_in_bf16(
    checkpoint: Checkpoint, theirs: Theirs, tmp_path: Path, machine: Machine
) -> None:
    ours = _ours(GROUP_LIMITS_OFF.write(checkpoint("v3"), tmp_path / "wrong"), machine=machine)
    assert _noise(ours, theirs("v3", machine), theirs("v3", CPU_FP32))[1] > BF16_ROUTER.value


@pytest.mark.parametrize("error", ["bias_in_the_weights", "group limits off", "scaling rounded"])
def test_a_router_error_is_seen(checkpoint: Checkpoint, theirs: Theirs, tmp_path: Path, error: str) -> None:
    family = "moonlight" if error == "scaling rounded" else "v3"
    right = checkpoint(family)
    if error == "bias_in_the_weights":
        ours = _ours(right, error)
    else:
        ours = _ours((SCALING_ROUNDED if family == "moonlight" else GROUP_LIMITS_OFF).write(right, tmp_path / "wrong"))
    assert _weight_difference(ours, theirs(family, CPU_FP32)) > ROUTER_WEIGHTS.value


def test_the_bias_moves_the_selection_and_not_the_weights(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """In layer 1, whose input no router has touched, tokens that keep their experts keep the weights."""
    weak, none = (
        altered_copy(checkpoint("v3"), tmp_path / str(factor), weights=partial(_scale_bias, factor))
        for factor in (0.02, 0.0)
    )
    (biased, *_), (unbiased, *_) = _ours(weak), _ours(none)
    same_T = (biased.experts_TK == unbiased.experts_TK).all(dim=1)
    assert 10 < int(same_T.sum()) < same_T.numel() - 10
    # not to the bit: the bias orders the eight scores that are summed to normalise them
    assert float((biased.weights_TE - unbiased.weights_TE)[same_T].abs().max()) < ROUTER_WEIGHTS.value


def _scale_bias(factor: float, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t * factor if name.endswith("correction_bias") else t for name, t in tensors.items()}


def test_a_bias_rounded_to_bf16_is_seen_in_the_selection(checkpoint: Checkpoint, theirs: Theirs) -> None:
    assert _differing_tokens(_ours(checkpoint("v3"), "bias_rounded_to_bf16"), theirs("v3", CPU_FP32)) > 0


def test_ties_are_resolved_alike_or_among_equals(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Experts 3i, 3i + 1, 3i + 2 score the same: 8 of them cut through a triple, and any two of its three are right."""
    tied = altered_copy(checkpoint("v3"), tmp_path / "tied", weights=_score_in_triples)
    ours, theirs = _ours(tied)[0], reference.forward(tied, TOKENS_BS).routing[0]
    differing = (ours.experts_TK != theirs.experts_TK).any(dim=1)
    record(4, f"v3 with ties: tokens of {differing.numel()} whose tie is resolved otherwise", int(differing.sum()))
    triples = [one.experts_TK // 3 for one in (ours, theirs)]
    assert torch.equal(*(x.sort(dim=1).values for x in triples))


def _score_in_triples(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give three neighbouring experts the same router row and bias; each group of 32 keeps its last two apart."""
    experts = torch.arange(V3["n_routed_experts"])
    representative = experts // 3 * 3
    changed: dict[str, Any] = {}
    for name, tensor in tensors.items():
        routes = name.endswith(("mlp.gate.weight", "correction_bias"))
        changed[name] = tensor[representative] if routes else tensor
    return changed
