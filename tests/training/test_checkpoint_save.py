"""A save that goes on while training continues: the same bytes, the same losses, the same promises."""

import gc
import json
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import pytest

from megatron_ads.errors import CheckpointError, DivergedError
from parity_tests.harness.ranks import RanksFailed, run_ranks
from parity_tests.harness.training_jobs import Recipe, begin_save, resume_and_train, run_steps, save, start
from tests.models.checkpoints import V3, write_checkpoint

EP2 = {"ep": 2}
CHECKPOINT = "step-00000001"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model") / "v3", V3)


@pytest.fixture
def recipe(folder: Path, tmp_path: Path) -> Recipe:
    return Recipe(folder=folder, layout=EP2, checkpoints=tmp_path / "checkpoints", steps=2)


def _names(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir())


def _held_back(go_on: threading.Event, planners: list[weakref.ref]) -> Callable[[Any], Any]:
    """Return a ``RankWriter.write`` that waits, and remembers what holds the copies of the tensors."""
    from megatron_ads.training.checkpoint_writer import RankWriter

    write = RankWriter.write

    def when_allowed(writer: Any, *others: Any) -> Any:
        planners.append(weakref.ref(writer._planner))
        assert go_on.wait(60)
        return write(writer, *others)

    return when_allowed


def _train_while_saving(recipe: Recipe) -> tuple[list[float], list[str], bool, float]:
    """Save after step 1, write when steps 2 and 3 are done; rank 1 asks late whether all is done.

    Return their losses, what was in the folder meanwhile, whether the copies are gone at the end, and when that was.
    """
    import torch.distributed as dist

    from megatron_ads.training.checkpoint_writer import RankWriter

    model, shards, source = start(recipe)
    run_steps(model, shards, 0, 1)
    go_on = threading.Event()
    planners: list[weakref.ref] = []
    with patch.object(RankWriter, "write", _held_back(go_on, planners)):
        pending = begin_save(recipe, model, shards, source, in_background=True)
        losses = run_steps(model, shards, 1, 2).loss
        meanwhile = _names(recipe.checkpoints)
        go_on.set()
        time.sleep(3.0 * dist.get_rank())
        pending.wait()
    done = time.monotonic()
    gc.collect()
    return losses, meanwhile, [planner() for planner in planners] == [None], done


def _save_and_train(recipe: Recipe) -> list[float]:
    model, shards, source = start(recipe)
    run_steps(model, shards, 0, 1)
    save(recipe, model, shards, source)
    return run_steps(model, shards, 1, 2).loss


def _checksums(checkpoints: Path) -> dict[str, dict[str, int]]:
    files = json.loads((checkpoints / CHECKPOINT / "manifest.json").read_text())["files"]
    return {name: entry for name, entry in files.items() if name != ".metadata"}  # it has a number of its own


def test_what_is_written_meanwhile_is_the_state_at_the_save_and_changes_no_loss(recipe: Recipe, tmp_path: Path) -> None:
    at_once = replace(recipe, checkpoints=tmp_path / "at_once")
    expected = run_ranks(2, _save_and_train, at_once)
    saved = run_ranks(2, _train_while_saving, recipe)
    assert abs(saved[0][3] - saved[1][3]) < 2  # no rank ends the job while others still ask
    for rank, (losses, meanwhile, freed, _) in enumerate(saved):
        assert losses == expected[rank] and freed
        assert meanwhile == [f".{CHECKPOINT}.partial"]
    assert _names(recipe.checkpoints) == [CHECKPOINT]
    assert recipe.checkpoints is not None and at_once.checkpoints is not None
    assert _checksums(recipe.checkpoints) == _checksums(at_once.checkpoints)
    assert [losses.loss for losses in run_ranks(2, resume_and_train, recipe)] == expected


# Cut off


def _killed_while_writing(recipe: Recipe, point: str) -> None:
    model, shards, source = start(recipe)
    run_steps(model, shards, 0, 1)
    save(recipe, model, shards, source)
    run_steps(model, shards, 1, 1)
    with patch(f"megatron_ads.training.{point}", lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)):
        begin_save(recipe, model, shards, source, in_background=True)
        run_steps(model, shards, 2, 100)


@pytest.mark.parametrize("point", ["checkpoint_writer.ChecksummedFile", "checkpoint.publish"])
def test_a_kill_while_training_continues_loses_nothing_complete(point: str, recipe: Recipe) -> None:
    alone = replace(recipe, layout={})
    with pytest.raises(RanksFailed, match="died"):
        run_ranks(1, _killed_while_writing, alone, point)
    assert _names(alone.checkpoints or Path()) == [".step-00000002.partial", CHECKPOINT]
    (losses,) = run_ranks(1, resume_and_train, alone)
    assert len(losses.loss) == 2


def _failures_of_a_disk_that_is_full_for_rank_1(recipe: Recipe) -> tuple[str, list[str]]:
    """Save through a checkpointer; return what the next save says, and what the former has left."""
    import torch.distributed as dist

    from megatron_ads.training.checkpoint_writer import RankWriter

    model, shards, source = start(recipe)
    run_steps(model, shards, 0, 1)
    refused = Mock(side_effect=OSError(28, "No space left on device"))
    with patch.object(RankWriter, "write", refused if dist.get_rank() == 1 else RankWriter.write):
        checkpointer = _checkpointer(recipe, model, shards, source)
        checkpointer.save(1)
        run_steps(model, shards, 1, 1)
        with pytest.raises(CheckpointError) as caught:
            checkpointer.save(2)
    return str(caught.value), _names(recipe.checkpoints or Path())


def _checkpointer(recipe: Recipe, model: Any, shards: Any, source: Any) -> Any:
    from megatron_ads.training.checkpointer import Checkpointer

    settings = recipe.config().checkpoint
    settings.async_save = True
    data = Mock(state_dict=dict)
    return Checkpointer(settings=settings, model=model, data=data, layout=shards.layout, side_files=source.side_folder)


def test_a_rank_that_could_not_write_ends_the_job_at_the_next_save_on_every_rank(recipe: Recipe) -> None:
    for message, names in run_ranks(2, _failures_of_a_disk_that_is_full_for_rank_1, recipe):
        assert f"writing a checkpoint to {recipe.checkpoints} failed on rank 1: No space left on device" in message
        assert names == [f".{CHECKPOINT}.partial"]


# Waited for


def _ended(recipe: Recipe, error: type[Exception] | None) -> tuple[list[str], bool]:
    """Return what a job that ends while its checkpoint is written leaves, and whether a thread still writes then."""
    from megatron_ads.training.checkpoint_writer import RankWriter

    model, shards, source = start(recipe)
    run_steps(model, shards, 0, 1)
    go_on = threading.Event()
    with patch.object(RankWriter, "write", _held_back(go_on, [])):
        try:
            with _checkpointer(recipe, model, shards, source) as checkpointer:
                checkpointer.save(1)
                threading.Timer(0.2, go_on.set).start()
                if error is not None:
                    raise error("on purpose")
        except (DivergedError, KeyError):
            pass
        writes = "checkpoint" in [thread.name for thread in threading.enumerate()]
        return _names(recipe.checkpoints or Path()), writes


@pytest.mark.parametrize(
    ("error", "left"),
    [(None, CHECKPOINT), (DivergedError, CHECKPOINT), (KeyError, f".{CHECKPOINT}.partial")],
    ids=["end", "diverged on all ranks", "an error of one rank"],
)
def test_the_end_of_a_job_waits_unless_an_error_ended_one_rank(
    error: type[Exception] | None, left: str, recipe: Recipe
) -> None:
    assert run_ranks(1, _ended, replace(recipe, layout={}), error) == [([left], False)]


def _diverged_with_a_failed_save() -> None:
    from megatron_ads.training.checkpointer import Checkpointer

    checkpointer = Checkpointer(settings=Mock(), model=Mock(), data=Mock(), layout=Mock(), side_files=None)
    checkpointer._pending = Mock(**{"wait.side_effect": CheckpointError("the disk is full")})
    with pytest.raises(DivergedError), checkpointer:
        raise DivergedError("on purpose")


def test_a_job_that_has_diverged_ends_as_such_even_if_its_checkpoint_could_not_be_written() -> None:
    run_ranks(1, _diverged_with_a_failed_save)


# Damaged between the write and the manifest


def _saved_over_a_bad_cable(recipe: Recipe) -> str:
    """Save; what reaches the disk differs in one bit from what was written."""
    from megatron_ads.training import checkpoint

    model, shards, source = start(recipe)
    run_steps(model, shards, 0, 1)
    publish = checkpoint.publish

    def damaged(partial: Path, *others: Any) -> None:
        content = bytearray((partial / "__0_0.distcp").read_bytes())
        content[len(content) // 2] ^= 1
        (partial / "__0_0.distcp").write_bytes(content)
        publish(partial, *others)

    with patch.object(checkpoint, "publish", damaged):
        folder = save(recipe, model, shards, source)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load_checkpoint(folder, model.chunks, model.optimizer, shards.layout)
    return str(caught.value)


def test_the_checksum_is_of_what_was_written_and_not_of_what_is_read_back(recipe: Recipe) -> None:
    (message,) = run_ranks(1, _saved_over_a_bad_cable, replace(recipe, layout={}))
    assert "the content of __0_0.distcp changed since it was written" in message
