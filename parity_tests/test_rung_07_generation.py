"""Rung 7: 64 greedy tokens are the same as transformers', with and without its KV cache.

A failure with rung 3 green is a near tie: the message gives the margin between the two best tokens there. One with a
large margin and the cache only is a position or mask of cached decoding.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from parity_tests import jobs, reference
from parity_tests.checkpoint_errors import GATE_AND_UP_SWAPPED, INTERLEAVING_FLIPPED, MSCALE_LEFT_OUT, CheckpointError
from parity_tests.figures import record
from parity_tests.jobs import Job
from tests.distributed import run_ranks

COUNT = 64
PROMPT = torch.randint(0, 160, (1, 96), generator=torch.Generator().manual_seed(7))
"""With 64 more tokens it passes the original context of 128."""
ERRORS = {"mscale": MSCALE_LEFT_OUT, "interleaving": INTERLEAVING_FLIPPED, "gate and up": GATE_AND_UP_SWAPPED}


@pytest.fixture(scope="module")
def theirs(checkpoint: Callable[[str], Path]) -> list[int]:
    return reference.greedy_tokens(checkpoint("small-v3"), PROMPT, COUNT, cache=False)


def _ours(folder: Path) -> list[int]:
    return run_ranks(1, jobs.greedy_tokens, Job(folder=folder), PROMPT, COUNT)[0]


def _margin(folder: Path, tokens: list[int], place: int) -> float:
    sequence = torch.cat([PROMPT, torch.tensor([tokens[:place]], dtype=torch.long)], dim=1)
    best = reference.forward(folder, sequence).logits[0, -1].topk(2).values
    return float(best[0] - best[1])


def test_greedy_tokens_are_the_same(checkpoint: Callable[[str], Path], theirs: list[int]) -> None:
    ours = _ours(checkpoint("small-v3"))
    assert len(ours) == COUNT
    differing = [place for place in range(COUNT) if ours[place] != theirs[place]]
    record(7, f"greedy tokens of {COUNT} that differ", len(differing))
    assert not differing, (
        f"token {differing[0]} is {ours[differing[0]]} instead of {theirs[differing[0]]}; the two best logits "
        f"there are {_margin(checkpoint('small-v3'), theirs, differing[0]):.1e} apart"
    )
    assert len(set(ours)) > 5  # a model that repeats one token would show nothing


def test_a_kv_cache_on_the_hugging_face_side_changes_nothing(
    checkpoint: Callable[[str], Path], theirs: list[int]
) -> None:
    assert reference.greedy_tokens(checkpoint("small-v3"), PROMPT, COUNT, cache=True) == theirs


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
def test_a_small_error_is_seen_in_the_tokens(
    checkpoint: Callable[[str], Path], theirs: list[int], tmp_path: Path, error: CheckpointError
) -> None:
    assert _ours(error.write(checkpoint("small-v3"), tmp_path / "wrong")) != theirs
