"""Saved under one layout, resumed under the same and under others; saved in whole tensors, as it once was."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from parity_tests.harness.ranks import run_ranks
from parity_tests.harness.training_jobs import Recipe, resume_and_train, train, train_and_save
from tests.models.checkpoints import V3, write_checkpoint

SAVED_STEPS, MORE_STEPS = 3, 3
SAVED_LAYOUT = {"pp": 2, "ep": 2}
"""Stage 0 has no routed experts and holds rank 0, which writes the common state."""
OTHERS = {
    "pp4-ep1": (4, {"pp": 4}),
    "pp1-ep4": (4, {"ep": 4}),
    "pp1-ep1": (1, {}),
    "tp2": (2, {"tp": 2, "ep": 2}),
    "pp2-vpp2": (2, {"pp": 2, "vpp": 2}),
}


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def saved(request, tmp_path_factory):
    """A checkpoint after three steps, and the losses of six steps without interruption."""
    root = tmp_path_factory.mktemp(request.param)
    recipe = Recipe(
        folder=write_checkpoint(root / "v3", V3),
        layout=SAVED_LAYOUT,
        checkpoints=root / "checkpoints",
        steps=SAVED_STEPS,
        model={"precision": request.param},
    )
    run_ranks(4, train_and_save, recipe)
    straight = Recipe(folder=recipe.folder, layout=SAVED_LAYOUT, steps=SAVED_STEPS + MORE_STEPS, model=recipe.model)
    return recipe, run_ranks(4, train, straight)[0]


def test_resuming_on_the_same_layout_is_bit_equal(saved):
    recipe, straight = saved
    resumed = run_ranks(4, resume_and_train, recipe)
    for losses in resumed:
        assert losses.loss == straight.loss[SAVED_STEPS:]
        assert losses.grad_norm == straight.grad_norm[SAVED_STEPS:]


@pytest.mark.parametrize("name", OTHERS)
def test_resuming_on_another_layout_continues_the_curve(name, saved):
    recipe, straight = saved
    world, layout = OTHERS[name]
    other = Recipe(
        folder=recipe.folder,
        layout=layout,
        checkpoints=recipe.checkpoints,
        steps=MORE_STEPS,
        model=recipe.model,
    )
    tolerance = 1e-5 if recipe.model["precision"] == "fp32" else 2e-3
    assert run_ranks(world, resume_and_train, other)[0].loss == pytest.approx(
        straight.loss[SAVED_STEPS:], rel=tolerance
    )


def _write_with_whole_tensors(folder: Path, older: Path) -> int:
    """Write the checkpoint as one whose optimizer state was not cut into pieces; return how many tensors were."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedTensor

    from megatron_ads.training.checkpoint_save import flushed
    from megatron_ads.training.checkpoint_writer import PlannedSave

    loaded = dist_checkpointing.load_plain_tensors(str(folder))
    common = {"training": loaded.pop("training")}
    del loaded["content_metadata"]
    whole = {key: ShardedTensor.from_rank_offsets(key, tensor) for key, tensor in loaded.items()}
    older.mkdir(parents=True)
    strategy = PlannedSave(staged=False)
    dist_checkpointing.save(whole | common, str(older), sharded_strategy=strategy)
    strategy.writer.write_index([strategy.writer.write()])
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"] = {file.name: flushed(file) for file in older.iterdir()}
    (older / "manifest.json").write_text(json.dumps(manifest))
    stored = {key: len(entry.chunks) for key, entry in _index(folder).items() if hasattr(entry, "chunks")}
    assert all(len(entry.chunks) == 1 for entry in _index(older).values())
    return sum(count > 1 for key, count in stored.items() if key.startswith("optimizer.") and "experts" not in key)


def _index(folder):
    from conversion.torch_dist_pickle import read_metadata

    return read_metadata(folder / ".metadata").state_dict_metadata


def test_a_checkpoint_of_whole_tensors_resumes_bit_equal(tmp_path: Path) -> None:
    recipe = Recipe(
        folder=write_checkpoint(tmp_path / "v3", V3),
        layout={"ep": 2},
        checkpoints=tmp_path / "checkpoints",
        steps=SAVED_STEPS,
        model={"precision": "bf16"},
    )
    run_ranks(2, train_and_save, recipe)
    older = replace(recipe, checkpoints=tmp_path / "older")
    folders = [each.checkpoints / f"step-{SAVED_STEPS:08d}" for each in (recipe, older)]
    (cut,) = run_ranks(1, _write_with_whole_tensors, *folders)
    assert cut >= 1  # a replica's share of the dense parameters ends within one of them
    expected = [losses.loss for losses in run_ranks(2, resume_and_train, recipe)]
    shutil.rmtree(recipe.checkpoints)
    assert [losses.loss for losses in run_ranks(2, resume_and_train, older)] == expected
