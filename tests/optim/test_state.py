"""The optimizer's state in a checkpoint: cut into pieces that cover it, and never in memory as a whole."""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest

from megatron_ads.optim import state
from megatron_ads.planning.checkpoint import PIECE_ELEMENTS
from parity_tests.harness.ranks import run_ranks
from parity_tests.harness.training_jobs import Recipe, run_steps, save, start
from tests.models.checkpoints import V3, write_checkpoint
from tests.training.live_bytes import LiveBytes

SHAPES = [(), (7,), (5, 3), (2, 3, 4), (3, 1, 1, 5)]
SMALL_PIECE = 4


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_blocks_cover_every_element_once_in_order_and_are_small(shape: tuple[int, ...]) -> None:
    numbers = np.arange(int(np.prod(shape))).reshape(shape)
    bounds = [(a, b) for a in range(numbers.size) for b in range(a + 1, numbers.size + 1)]
    with patch.object(state, "PIECE", SMALL_PIECE):
        for begin, end in bounds:
            cut = [
                numbers[tuple(slice(a, a + length) for a, length in zip(first, size, strict=True))].ravel()
                for first, size in state.blocks(shape, begin, end)
            ]
            assert np.concatenate(cut).tolist() == list(range(begin, end))
            assert max(map(len, cut)) <= SMALL_PIECE


def test_a_plan_counts_with_the_same_piece() -> None:
    assert state.PIECE == PIECE_ELEMENTS


def test_few_blocks_are_made_where_a_share_ends_within_rows() -> None:
    cut = list(state.blocks((1000, 100), 150, 99_950))
    assert cut == [((1, 50), (1, 50)), ((2, 0), (997, 100)), ((999, 0), (1, 50))]
    assert all(a <= b for a, b in pairwise(first for first, _ in cut))


@dataclass(frozen=True)
class Peaks:
    """Bytes of tensors, at most at once, beyond the model and its optimizer."""

    save: int
    load: int
    largest_weight: int
    optimizer: int
    """Bytes of this rank's optimizer state, for comparison."""


def _peaks(recipe: Recipe) -> Peaks:
    from megatron_ads.training.checkpoint import load_checkpoint

    model, shards, source = start(recipe)
    run_steps(model, shards, 0, 1)
    inner = [member.inner for member in model.optimizer.members]
    buffers = [tensor for each in inner for buffer in each.buffers for tensor in (buffer.param_data, buffer.grad_data)]
    moments = [value for each in inner for values in each.optimizer.state.values() for value in values.values()]
    shards_held = [shard for each in inner for group in each.optimizer.param_groups for shard in group["params"]]
    parameters = [parameter for chunk in model.models for parameter in chunk.state_dict().values()]
    known = [tensor for tensor in (*buffers, *moments, *shards_held, *parameters) if tensor is not None]
    with patch.object(state, "PIECE", 1 << 14):
        with LiveBytes(known) as saving:
            folder = save(recipe, model, shards, source)
        with LiveBytes(known) as loading:
            load_checkpoint(folder, model.chunks, model.optimizer, shards.layout)
    largest = max(parameter.nbytes for parameter in parameters if parameter is not None)
    return Peaks(saving.peak, loading.peak, largest, sum(value.nbytes for value in (*moments, *shards_held)))


@pytest.mark.parametrize("world", [1, 2])
def test_a_save_and_a_load_hold_no_more_than_a_few_tensors_at_a_time(world: int, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "v3", V3)
    recipe = Recipe(folder=folder, layout={"ep": world}, model={"precision": "bf16"}, checkpoints=tmp_path / "saved")
    for peaks in run_ranks(world, _peaks, recipe):
        assert 0 < peaks.save <= 4 * peaks.largest_weight  # and the plans that the ranks exchange
        assert 0 < peaks.load <= 4 * peaks.largest_weight  # gate and up are read apart and joined in the model
        assert peaks.optimizer > 15 * peaks.largest_weight
