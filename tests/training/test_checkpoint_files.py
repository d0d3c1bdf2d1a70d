"""Checkpoint folders: complete or not there, whatever cuts a save off; damage is named and refused."""

import contextlib
import errno
import io
import json
import logging
import os
import pickle
import re
import signal
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import pytest

from megatron_ads.config.model import FrozenPart
from megatron_ads.errors import CheckpointError, MegatronAdsError
from parity_tests.harness.ranks import RanksFailed, run_ranks
from parity_tests.harness.training_jobs import Losses, Recipe, run_steps, save, start, train, train_and_save
from tests.models.checkpoints import V3, write_checkpoint
from tests.training.small_disk import small_disk

EP2 = {"ep": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model") / "v3", V3)


@pytest.fixture
def recipe(folder: Path, tmp_path: Path) -> Recipe:
    return Recipe(folder=folder, layout=EP2, checkpoints=tmp_path / "checkpoints", steps=1)


def _names(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir())


# What a save leaves


def _save_three_times(recipe: Recipe) -> list[list[str]]:
    model, shards, source = start(recipe)
    names = []
    for step in range(3):
        run_steps(model, shards, step, 1)
        save(recipe, model, shards, source)
        names.append(_names(recipe.checkpoints))
    return names


def test_the_last_two_checkpoints_are_kept(recipe: Recipe) -> None:
    names, _ = run_ranks(2, _save_three_times, recipe)  # keep_last is 2 in these jobs
    assert names == [
        ["step-00000001"],
        ["step-00000001", "step-00000002"],
        ["step-00000002", "step-00000003"],
    ]


def test_the_manifest_lists_every_other_file_and_the_side_files(recipe: Recipe) -> None:
    run_ranks(2, train_and_save, recipe)
    checkpoint = recipe.checkpoints / "step-00000001"
    files = {str(file.relative_to(checkpoint)) for file in checkpoint.rglob("*") if file.is_file()}
    assert files == {*json.loads((checkpoint / "manifest.json").read_text())["files"], "manifest.json"}
    assert {"common.pt", ".metadata", "metadata.json", "__0_0.distcp", "__1_0.distcp", "hf/config.json"} <= files


# Killed in the middle of a save

POINTS = {
    "checkpoint.prepare": (2, 0),
    "checkpoint._plan": (2, 1),
    "checkpoint_writer.to_host": (2, 1),  # a file is begun
    "checkpoint.publish": (2, 1),
    "checkpoint_save.sync_folder": (2, 1),  # the manifest is written; the folder has not got its name
    "checkpoint.remove": (3, 0),  # it has; the oldest checkpoint is still there
}
"""Functions of the save in the order in which they are entered: step to resume from, and partial folders left."""


def _killed_entering(recipe: Recipe, point: str) -> None:
    """Save twice in peace; be killed on the way into ``point`` of the third save."""
    model, shards, source = start(recipe)
    for step in range(2):
        run_steps(model, shards, step, 1)
        save(recipe, model, shards, source)
    run_steps(model, shards, 2, 1)
    with patch(f"megatron_ads.training.{point}", lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)):
        save(recipe, model, shards, source)


def _resume_from_the_latest(recipe: Recipe) -> tuple[int, list[str], list[float]]:
    """Resume as a job does; return the step resumed from, the warnings, and the losses up to step 5."""
    from megatron_ads.training import checkpoint
    from megatron_ads.training.checkpointer import _latest, logger

    warnings: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: warnings.append(record.getMessage())  # type: ignore[method-assign]
    model, shards, source = start(recipe)
    logger.addHandler(handler)
    try:
        latest = _latest(recipe.checkpoints, resume=True, last_step=5)
    finally:
        logger.removeHandler(handler)
    for _, complete in checkpoint.complete_checkpoints(recipe.checkpoints):
        checkpoint.verify_files(complete)
    assert latest is not None
    progress = checkpoint.load_checkpoint(latest, model.chunks, model.optimizer, shards.layout)
    losses = run_steps(model, shards, progress.step, 5 - progress.step).loss
    save(recipe, model, shards, source)
    return progress.step, warnings, losses


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> Losses:
    (losses,) = run_ranks(1, train, Recipe(folder=folder, steps=5))
    return losses


@pytest.mark.parametrize("point", POINTS)
def test_a_kill_in_a_save_loses_nothing_complete(point: str, recipe: Recipe, undisturbed: Losses) -> None:
    recipe = replace(recipe, layout={})
    expected_step, expected_partials = POINTS[point]
    with pytest.raises(RanksFailed, match="died"):
        run_ranks(1, _killed_entering, recipe, point)
    partial = [name for name in _names(recipe.checkpoints) if name.endswith(".partial")]
    ((step, warnings, losses),) = run_ranks(1, _resume_from_the_latest, recipe)
    assert (step, len(partial), len(warnings)) == (expected_step, expected_partials, expected_partials)
    assert all(name in warning for name, warning in zip(partial, warnings, strict=True))
    assert losses == undisturbed.loss[step:]
    assert not [name for name in _names(recipe.checkpoints) if name.endswith(".partial")]  # gone with the next save


# Damage

DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut off": (lambda folder: os.truncate(folder / "__0_0.distcp", 1000), "__0_0.distcp is 1000 bytes long instead"),
    "missing": (lambda folder: (folder / "__1_0.distcp").unlink(), "__1_0.distcp is missing"),
    "changed": (lambda folder: _flip_a_bit(folder / "__1_0.distcp"), "the content of __1_0.distcp changed"),
    "changed index": (lambda folder: _flip_a_bit(folder / ".metadata"), "the content of .metadata changed"),
    "changed common state": (lambda folder: _flip_a_bit(folder / "common.pt"), "the content of common.pt changed"),
    "manifest cut off": (lambda folder: os.truncate(folder / "manifest.json", 100), "manifest.json is not JSON"),
    "another format": (lambda folder: (folder / "manifest.json").write_text("[]"), "expected 'megatron-ads training"),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "has no manifest.json: the save was cut off"),
}


def _flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def _refusal(recipe: Recipe, folder: Path) -> str:
    from megatron_ads.training.checkpoint import load_checkpoint

    model, shards, _ = start(recipe)
    try:
        load_checkpoint(folder, model.chunks, model.optimizer, shards.layout)
    except MegatronAdsError as error:
        return str(error)
    return "loaded"


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_named_and_refused_on_every_rank(name: str, recipe: Recipe) -> None:
    run_ranks(2, train_and_save, recipe)
    checkpoint = recipe.checkpoints / "step-00000001"
    damage, said = DAMAGES[name]
    damage(checkpoint)
    for message in run_ranks(2, _refusal, recipe, checkpoint):
        assert said in message and str(checkpoint) in message


def test_an_undamaged_checkpoint_is_loaded(recipe: Recipe) -> None:
    run_ranks(2, train_and_save, recipe)
    assert run_ranks(2, _refusal, recipe, recipe.checkpoints / "step-00000001") == ["loaded"] * 2


OTHER_JOBS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "frozen": ({"frozen": [FrozenPart.embedding]}, {}, "optimizer.state.exp_avg.embedding.word_embeddings.weight"),
    "precision": ({}, {"precision": "bf16"}, "optimizer.state.param."),
    "mtp": ({}, {"mtp_loss_weight": 0.1}, "optimizer.state.exp_avg.mtp."),
}
"""The model section of the job that saves, that of the one that resumes, and what the latter misses."""


@pytest.mark.parametrize("name", OTHER_JOBS)
def test_a_checkpoint_without_what_the_job_trains_is_refused(name: str, recipe: Recipe) -> None:
    saving, going_on, missed = OTHER_JOBS[name]
    run_ranks(1, train_and_save, replace(recipe, layout={}, model=saving))
    checkpoint = recipe.checkpoints / "step-00000001"
    (message,) = run_ranks(1, _refusal, replace(recipe, layout={}, model=going_on), checkpoint)
    assert message.startswith(f"checkpoint {checkpoint} does not fit this job: it lacks {missed}")
    assert "model.precision, model.frozen and model.mtp_loss_weight that it was saved with" in message
    assert len(message) < 600


class _Payload:
    """Pickled, a call that leaves a file behind when it is unpickled freely."""

    def __init__(self, trace: Path) -> None:
        self._trace = trace

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self._trace),)


def _replace_file(checkpoint: Path, name: str, content: bytes) -> None:
    """Replace a file by one that the manifest vouches for."""
    (checkpoint / name).write_bytes(content)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": len(content), "crc32": zlib.crc32(content)}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def _saved(payload: _Payload) -> bytes:
    """Return what ``torch.save`` writes of it."""
    import torch

    file = io.BytesIO()
    torch.save({"training": payload}, file)
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "written"), [(".metadata", pickle.dumps), ("common.pt", _saved)], ids=[".metadata", "common.pt"]
)
def test_a_checkpoint_that_would_run_code_is_refused_before_it_does(
    name: str, written: Callable[[Any], bytes], recipe: Recipe, tmp_path: Path
) -> None:
    import torch

    run_ranks(2, train_and_save, recipe)
    checkpoint, trace = recipe.checkpoints / "step-00000001", tmp_path / "trace"
    content = written(_Payload(trace))
    _replace_file(checkpoint, name, content)
    messages = run_ranks(2, _refusal, recipe, checkpoint)
    assert all("cannot be read safely" in message for message in messages), messages
    assert not trace.exists()
    # The negative twin: unpickled freely, it runs.
    pickle.loads(content) if name == ".metadata" else torch.load(io.BytesIO(content), weights_only=False)
    assert trace.exists()


def test_a_weight_that_became_a_pickled_object_is_refused_before_it_runs(recipe: Recipe, tmp_path: Path) -> None:
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata

    run_ranks(2, train_and_save, recipe)
    checkpoint, trace = recipe.checkpoints / "step-00000001", tmp_path / "trace"
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())  # our own
    key = next(key for key in metadata.state_dict_metadata if key.endswith("output_layer.weight"))
    _replace_file(checkpoint, "payload.distcp", _saved(_Payload(trace)))
    (index,) = (index for index in metadata.storage_data if index.fqn == key)
    place = metadata.storage_data.pop(index)
    metadata.state_dict_metadata[key] = BytesStorageMetadata()
    metadata.storage_data[replace(index, offset=None, index=None)] = replace(
        place, relative_path="payload.distcp", offset=0, length=(checkpoint / "payload.distcp").stat().st_size
    )
    _replace_file(checkpoint, ".metadata", pickle.dumps(metadata))
    messages = run_ranks(2, _refusal, recipe, checkpoint)
    assert all(f"has {key} as a pickled object" in message for message in messages), messages
    assert not trace.exists()


def _complete_steps(directory: Path) -> list[int]:
    from megatron_ads.training.checkpoint import complete_checkpoints

    return [step for step, _ in complete_checkpoints(directory)]


def test_complete_checkpoints_are_found_among_others(tmp_path: Path) -> None:
    for name in ("step-00000010", "step-00000009", ".step-00000011.partial", "step-12", "notes"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").touch()
    (tmp_path / "step-00000013").mkdir()  # without a manifest
    assert run_ranks(1, _complete_steps, tmp_path) == [[9, 10]]
    assert run_ranks(1, _complete_steps, tmp_path / "absent") == [[]]


def _start_with(recipe: Recipe, resume: bool) -> str:
    from megatron_ads.training.checkpointer import Checkpointer

    model, shards, source = start(recipe)
    settings = recipe.config().checkpoint
    settings.resume = resume
    checkpointer = Checkpointer(
        settings=settings, model=model, data=Mock(), layout=shards.layout, side_files=source.side_folder
    )
    with pytest.raises(CheckpointError) as caught:
        checkpointer.load_latest(last_step=recipe.steps)
    return str(caught.value)


def test_a_fresh_start_refuses_a_folder_with_checkpoints_before_the_first_step(recipe: Recipe) -> None:
    run_ranks(2, train_and_save, recipe)
    for message in run_ranks(2, _start_with, recipe, False):
        assert f"checkpoint.resume is false, but checkpoint.dir holds {recipe.checkpoints / 'step-00000001'}" in message


def test_a_job_of_fewer_steps_than_the_checkpoint_has_is_refused_before_it_exports_that(recipe: Recipe) -> None:
    run_ranks(2, train_and_save, replace(recipe, steps=2))
    for message in run_ranks(2, _start_with, recipe, True):
        assert f"checkpoint.dir holds {recipe.checkpoints / 'step-00000002'}, but train.max_steps is 1: " in message


# A full disk


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 14 MB; one checkpoint of the tiny model takes 8."""
    with small_disk(tmp_path / "small", megabytes=14) as mount:
        yield mount


def _save_until_refused(recipe: Recipe) -> str:
    model, shards, source = start(recipe)
    try:
        for step in range(3):
            run_steps(model, shards, step, 1)
            save(recipe, model, shards, source)
    except CheckpointError as error:
        return str(error)
    return "saved"


def test_a_full_disk_ends_the_job_on_every_rank_and_leaves_earlier_checkpoints(recipe: Recipe, disk: Path) -> None:
    recipe = replace(recipe, checkpoints=disk / "checkpoints")
    for message in run_ranks(2, _save_until_refused, recipe):
        assert message.startswith(f"writing a checkpoint to {recipe.checkpoints} failed on rank ")
        assert re.search(
            r"; [\d.]+ (bytes|kB|MB) are free there now\. Checkpoints written before are untouched\. Make room", message
        )
    assert _names(recipe.checkpoints) == [".step-00000002.partial", "step-00000001"]
    assert run_ranks(2, _refusal, recipe, recipe.checkpoints / "step-00000001") == ["loaded"] * 2


def _save_onto_a_disk_that_is_full_for(recipe: Recipe, point: str) -> str:
    """As above; the system refuses what ``point`` of the save writes, on rank 0 alone."""
    import torch.distributed as dist

    def refused(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    model, shards, source = start(recipe)
    run_steps(model, shards, 0, 1)
    try:
        with patch(point, refused) if dist.get_rank() == 0 else contextlib.nullcontext():
            save(recipe, model, shards, source)
    except MegatronAdsError as error:
        return str(error)
    return "saved"


FULL_FOR = {
    "megatron_ads.training.checkpoint.prepare": "writing a checkpoint to {} failed: No space left on device; ",
    "megatron_ads.training.checkpoint_writer.to_host": "to {} failed on rank 0: No space left on device; ",
    "megatron_ads.training.checkpoint_save.flushed": "writing a checkpoint to {} failed: No space left on device; ",
    "megatron_ads.training.checkpoint.publish": "writing a checkpoint to {} failed: No space left on device; ",
    "conversion.carried._copy": "The disk is full at {}/.step-00000001.partial (No space left on device)",
}


@pytest.mark.parametrize("point", FULL_FOR)
def test_a_disk_that_is_full_for_rank_0_alone_ends_every_rank(point: str, recipe: Recipe) -> None:
    for message in run_ranks(2, _save_onto_a_disk_that_is_full_for, recipe, point):
        assert FULL_FOR[point].format(recipe.checkpoints) in message
