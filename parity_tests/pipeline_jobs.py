"""What each rank of rung 10 runs: train, save, resume and export, on the tests' fixed rows."""

from dataclasses import replace
from pathlib import Path

from parity_tests.harness.training_jobs import Losses, Recipe, run_steps, save, start


def train_straight(recipe: Recipe, steps: int, export: Path) -> Losses:
    """Train without interruption and export."""
    from megatron_ads.training.export import export_shards

    model, shards, source = start(replace(recipe, steps=steps))
    losses = run_steps(model, shards, 0, steps)
    export_shards(export, model.models, model.spec, source, shards)
    return losses


def train_and_save(recipe: Recipe, steps: int) -> Losses:
    """Train from the start and save behind the last step."""
    model, shards, source = start(replace(recipe, steps=steps))
    losses = run_steps(model, shards, 0, steps)
    save(recipe, model, shards, source)
    return losses


def resume_and_export(recipe: Recipe, steps: int, export: Path) -> Losses:
    """Go on from the newest checkpoint for ``steps`` steps and export."""
    from megatron_ads.training.checkpoint import complete_checkpoints, load_checkpoint
    from megatron_ads.training.export import export_shards

    assert recipe.checkpoints is not None
    model, shards, source = start(replace(recipe, steps=steps))
    _, folder = complete_checkpoints(recipe.checkpoints)[-1]
    progress = load_checkpoint(folder, model.chunks, model.optimizer, shards.layout)
    losses = run_steps(model, shards, progress.step, steps)
    export_shards(export, model.models, model.spec, source, shards)
    return losses
