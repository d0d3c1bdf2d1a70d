"""Dense models, with tied heads and with heads of their own, train, save, resume and export under layouts."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conversion.convert import to_hf
from conversion.sources import open_source
from conversion.verify import verify
from megatron_ads.config.model import FrozenPart, LoraConfig, Recompute
from parity_tests.checkpoints import DENSE, write_checkpoint
from parity_tests.harness.ranks import run_ranks
from parity_tests.harness.training_jobs import Losses, Recipe, resume_and_train, run_steps, save, start, train

STEPS = 2
LAYOUT = {"pp": 2, "tp": 2}


@pytest.fixture(scope="module", params=["qwen2-tied", "llama"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model") / request.param, DENSE[request.param])


def _train_save_export_train(recipe: Recipe, export: Path) -> Losses:
    from megatron_ads.training.export import export_shards

    model, shards, source = start(recipe)
    run_steps(model, shards, 0, STEPS)
    save(recipe, model, shards, source)
    export_shards(export, model.models, model.spec, source, shards)
    return run_steps(model, shards, STEPS, STEPS)


@pytest.fixture(scope="module")
def saved(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Losses, Path]:
    """A checkpoint after two steps, the losses of the two steps behind it, and an export of it."""
    root = tmp_path_factory.mktemp("job")
    recipe = Recipe(folder=folder, layout=LAYOUT, checkpoints=root / "checkpoints", steps=STEPS)
    return recipe, run_ranks(4, _train_save_export_train, recipe, root / "export")[0], root / "export"


def test_resuming_on_the_same_layout_is_bit_equal(saved: tuple[Recipe, Losses, Path]) -> None:
    recipe, straight, _ = saved
    for losses in run_ranks(4, resume_and_train, recipe):
        assert losses == straight


@pytest.mark.parametrize("layout", [{}, {"pp": 2, "vpp": 2}], ids=str)
def test_resuming_on_another_layout_continues_the_curve(
    layout: dict[str, int], saved: tuple[Recipe, Losses, Path]
) -> None:
    recipe, straight, _ = saved
    resumed = run_ranks(layout.get("pp", 1), resume_and_train, replace(recipe, layout=layout))[0]
    assert resumed.loss == pytest.approx(straight.loss, rel=1e-5)
    assert resumed.grad_norm == pytest.approx(straight.grad_norm, rel=1e-4)


def test_checkpoint_export_and_hugging_face_folder_hold_the_same_model(
    saved: tuple[Recipe, Losses, Path], tmp_path: Path
) -> None:
    recipe, _, export = saved
    (checkpoint,) = (recipe.checkpoints or Path()).glob("step-*")
    to_hf(export, tmp_path / "hf")
    for other in (checkpoint, tmp_path / "hf"):
        assert verify(export, other).differences == ()
    exported, tied = open_source(tmp_path / "hf"), recipe.folder.name == "qwen2-tied"
    assert ("lm_head.weight" in exported.container.tensors) == (not tied)  # type: ignore[union-attr]
    copies = open_source(export).replicas("embedding.word_embeddings.weight")
    assert len(copies) == 1 + tied  # on the first stage, and where it is the head on the last one, too
    assert verify(export, recipe.folder).differences  # it was trained


VARIANTS: dict[str, dict[str, Any]] = {
    "adapters": {"lora": LoraConfig(rank=4, alpha=8)},
    "frozen embedding": {"frozen": [FrozenPart.embedding, FrozenPart.attention]},
    "selective, bf16": {"recompute": Recompute.selective, "precision": "bf16"},
    "full": {"recompute": Recompute.full},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_losses_do_not_depend_on_the_layout(folder: Path, name: str) -> None:
    recipe = Recipe(folder=folder, model=VARIANTS[name], steps=3)
    (alone,) = run_ranks(1, train, recipe)
    tolerance = 2e-3 if "precision" in recipe.model else 1e-5
    for losses in run_ranks(4, train, replace(recipe, layout=LAYOUT)):
        assert losses.loss == pytest.approx(alone.loss, rel=tolerance)
        assert losses.grad_norm == pytest.approx(alone.grad_norm, rel=10 * tolerance)
