"""What the ranks of the training tests run: a few optimizer steps of a tiny model on fixed rows, under any layout."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conversion.convert import lay_out
from conversion.sources import WeightSource, open_source
from megatron_ads.config.data import DataConfig, SourceConfig, SourceKind
from megatron_ads.config.model import LayerSpecChoice, LayoutConfig, ModelConfig, Precision
from megatron_ads.config.run import SftConfig
from megatron_ads.config.training import CheckpointConfig, LogConfig, OptimConfig, Schedule, TrainConfig
from megatron_ads.data.packed_batch import PackedBatch
from parity_tests.harness.model_jobs import rows

ROWS_PER_STEP = 4


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The settings a test varies; everything else is fixed."""

    folder: Path
    layout: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    optim: dict[str, Any] = field(default_factory=dict)
    checkpoints: Path | None = None
    steps: int = 3
    stub_experts: bool = True
    timeout_seconds: float = 100

    def config(self) -> SftConfig:
        """Return the whole recipe."""
        return SftConfig(
            model=self._model(),
            layout=LayoutConfig(**self.layout),
            data=DataConfig(sources=[SourceConfig(kind=SourceKind.builtin)], seq_length=32),
            optim=OptimConfig(
                **{"learning_rate": 1e-3, "schedule": Schedule.constant, "weight_decay": 0.1} | self.optim
            ),
            train=TrainConfig(max_steps=self.steps, global_batch_size=ROWS_PER_STEP),
            checkpoint=CheckpointConfig(dir=str(self.checkpoints or "unused")),
            log=LogConfig(dir="unused"),
        )

    def _model(self) -> ModelConfig:
        """Return the section with choices as enums, as Hydra makes them: elsewhere they are compared by ``is``."""
        settings = {"load": str(self.folder), "precision": "fp32", "layer_spec": "auto"} | self.model
        choices = {
            "precision": Precision(settings["precision"]),
            "layer_spec": LayerSpecChoice(settings["layer_spec"]),
        }
        return ModelConfig(**settings | choices)


@dataclass(frozen=True, slots=True)
class Losses:
    """Loss and gradient norm of each step, the same on every rank."""

    loss: list[float]
    grad_norm: list[float]


def start(recipe: Recipe) -> tuple[Any, Any, WeightSource]:
    """Start the groups and build this rank's trained model; return it with its layout and its source."""
    from megatron_ads.layout import world_size
    from megatron_ads.runtime import process_groups
    from megatron_ads.runtime.device import seed_everything
    from megatron_ads.training.build import build_model

    config, source = recipe.config(), open_source(recipe.folder)
    shards = lay_out(source.shape, config.layout, world_size())
    process_groups.start(
        shards.layout,
        timeout_seconds=recipe.timeout_seconds,
        embedding_ranks=shards.placement.embedding_ranks,
        create_gloo_process_groups=False,
    )
    seed_everything(1)
    model = build_model(config.model, config.optim, config.train, source, shards, stub_experts=recipe.stub_experts)
    return model, shards, source


def batches(vocabulary: int, step: int, layout: Any) -> list[PackedBatch]:
    """Return this rank's microbatches of a step: the global rows are the same under every layout."""
    from megatron.core import parallel_state

    mine = rows(vocabulary, seed=100 + step)[parallel_state.get_data_parallel_rank() :: layout.dp]
    return [
        PackedBatch.unpadded(
            tokens_BS=row["tokens"], labels_BS=row["labels"], mask_BS=row["mask"], cu_seqlens=row["boundaries"]
        )
        for row in mine
    ]


def run_steps(model: Any, shards: Any, first: int, count: int) -> Losses:
    """Run ``count`` steps from step ``first`` on."""
    from megatron_ads.training.step import run_step

    reports = [
        run_step(
            batches(shards.shape.vocab_size, step, shards.layout), model.chunks, model.optimizer, learning_rate=1e-3
        )
        for step in range(first, first + count)
    ]
    return Losses([report.loss for report in reports], [report.update.grad_norm for report in reports])


def train(recipe: Recipe) -> Losses:
    """Train from the recipe's weights."""
    model, shards, _ = start(recipe)
    return run_steps(model, shards, 0, recipe.steps)


def train_and_save(recipe: Recipe) -> Losses:
    """Train from the recipe's weights and save a checkpoint behind the last step."""
    model, shards, source = start(recipe)
    losses = run_steps(model, shards, 0, recipe.steps)
    save(recipe, model, shards, source)
    return losses


def resume_and_train(recipe: Recipe) -> Losses:
    """Continue for ``recipe.steps`` from the newest checkpoint."""
    model, shards, _ = start(recipe)
    return _continue(recipe, model, shards)


def train_and_export(recipe: Recipe, export: Path) -> Losses:
    """Train from the recipe's weights without interruption and export the result."""
    from megatron_ads.training.export import export_shards

    model, shards, source = start(recipe)
    losses = run_steps(model, shards, 0, recipe.steps)
    export_shards(export, model.models, model.spec, source, shards)
    return losses


def resume_and_export(recipe: Recipe, export: Path) -> Losses:
    """Continue for ``recipe.steps`` from the newest checkpoint and export the result."""
    from megatron_ads.training.export import export_shards

    model, shards, source = start(recipe)
    losses = _continue(recipe, model, shards)
    export_shards(export, model.models, model.spec, source, shards)
    return losses


def _continue(recipe: Recipe, model: Any, shards: Any) -> Losses:
    from megatron_ads.training.checkpoint import complete_checkpoints, load_checkpoint

    assert recipe.checkpoints is not None
    _, folder = complete_checkpoints(recipe.checkpoints)[-1]
    progress = load_checkpoint(folder, model.chunks, model.optimizer, shards.layout, adapters=model.adapters)
    return run_steps(model, shards, progress.step, recipe.steps)


def save(recipe: Recipe, model: Any, shards: Any, source: WeightSource) -> Path:
    """Save under the number of updates."""
    from megatron_ads.training.checkpoint import JobProgress, save_checkpoint

    updates = model.optimizer.updates
    progress = JobProgress(step=updates, updates=updates, data={"position": updates})
    return save_checkpoint(
        recipe.checkpoints,
        model.chunks,
        model.optimizer,
        progress,
        shards.layout,
        side_files=source.side_folder,
        keep_last=2,
        adapters=model.adapters,
    )
