"""What is planned: a recipe, the model it is for and the ranks it runs on, without any weights."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from conversion.names import parameters
from conversion.published_models import published_file, published_models, published_name
from conversion.rank_files import ShardsLayout
from megatron_ads.architecture import ModelShape, read_model_shape
from megatron_ads.config import recipes
from megatron_ads.config.data import SourceConfig, SourceKind
from megatron_ads.config.generation import ModelKind
from megatron_ads.config.model import FrozenPart, LoraTarget, ModelConfig, Precision
from megatron_ads.config.preference import PreferenceConfig
from megatron_ads.config.rl import Combine, RlConfig, RolloutMode
from megatron_ads.config.run import RunConfig
from megatron_ads.config.teacher import TeacherConfig
from megatron_ads.errors import ConfigError
from megatron_ads.layout import ParallelLayout, PipelinePlacement
from megatron_ads.models.parts import Lora, frozen_parts

_PLANNED = ("layout", "data", "train", "optim", "rollout", "rewards", "policy", "teacher", "preference")
"""Sections that a plan reads; of the model, everything but its weights."""
ROUTING_IMBALANCE = 1.5
"""Tokens that the busiest rank of an expert-parallel group may get, over the mean: memory is set aside for them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedTeacher:
    """The teacher of on-policy distillation."""

    served: bool
    """By a server, which takes nothing of the cards."""
    nbytes: int = 0
    """Of the weights that rank 0 loads, in the format they are stored in; 0: there is no checkpoint yet."""
    shape: ModelShape | None = None
    """Of that checkpoint; None: only transformers knows its kind."""

    @classmethod
    def of(cls, config: TeacherConfig) -> Self:
        """Return what a plan needs of the teacher.

        Raises:
            ConversionError: If its folder is no checkpoint.
        """
        folder = Path(config.model or "")
        if config.kind is not ModelKind.local or not folder.exists():
            return cls(served=config.kind is not ModelKind.local)
        if not (folder / "config.json").is_file():
            from conversion.sources import open_source  # imports torch, as in planned_shape

            source = open_source(folder)
            each = parameters(source.shape).items()
            nbytes = sum(math.prod(parameter.shape) * source.dtype(name).itemsize for name, parameter in each)
            return cls(served=False, nbytes=nbytes, shape=source.shape)
        try:
            shape = read_model_shape(folder)
        except ConfigError:
            shape = None
        return cls(served=False, nbytes=sum(file.stat().st_size for file in folder.glob("*.safetensors")), shape=shape)


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedRollouts:
    """The answers of a step, and what is done with them."""

    mode: RolloutMode
    answers: int
    max_new_tokens: int
    batch_size: int
    """Answers that one engine generates at once."""
    updates: int
    """Updates of a step; ``PlannedJob.microbatches`` are those of one."""
    has_reference: bool
    draws: int = 1
    """How often prompts may be drawn for one step, each time at most as many as the step has."""
    gradient_passes: int = 0
    """POPO's, one for each reward."""
    overlap: bool = False
    """Servers generate while the trainer updates."""
    teacher: PlannedTeacher | None = None

    @classmethod
    def of(cls, config: RlConfig) -> Self:
        rollout, rewards = config.rollout, config.rewards
        trains = rollout.mode is not RolloutMode.rollout_only
        teaches = config.teacher.is_there and rollout.mode is not RolloutMode.train_only  # a dump has what it said
        return cls(
            mode=rollout.mode,
            answers=config.train.global_batch_size * rollout.samples,
            max_new_tokens=rollout.max_new_tokens,
            batch_size=rollout.batch_size,
            updates=config.policy.minibatches if trains else 0,
            has_reference=trains and config.policy.kl_coef > 0,
            draws=rollout.max_draws if rollout.dynamic_sampling else 1,
            gradient_passes=len(rewards.use) if rewards.combine is Combine.popo else 0,
            overlap=rollout.max_staleness > 0,
            teacher=PlannedTeacher.of(config.teacher) if teaches else None,
        )

    @property
    def generates(self) -> bool:
        return self.mode is not RolloutMode.train_only

    @property
    def colocated(self) -> bool:
        """Whether the training processes generate."""
        return self.mode in (RolloutMode.colocated, RolloutMode.rollout_only)

    @property
    def trains(self) -> bool:
        return self.updates > 0


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedJob:
    """Every number a plan depends on, apart from the hardware."""

    shape: ModelShape
    layout: ParallelLayout
    placement: PipelinePlacement
    model: ModelConfig
    """How the model is run, and what of it is trained."""
    seq_length: int
    """Tokens of one row."""
    micro_batch_size: int
    """Rows of one microbatch."""
    microbatches: int
    """Microbatches that one replica runs in a step."""
    lora: Lora | None = None
    """Adapters that are trained instead of the weights."""
    deterministic: bool = False
    routing_imbalance: float = ROUTING_IMBALANCE
    """Tokens of the busiest rank of an expert-parallel group over the mean."""
    rollouts: PlannedRollouts | None = None
    """What its steps do besides updating; None: nothing, it is no reinforcement learning."""
    has_preferences: bool = False
    """Its steps compare answers, by log-probabilities of the policy and of a reference."""
    moment_bytes: int = 4
    """Of one of the two moments of a trained element."""

    @property
    def shards(self) -> ShardsLayout:
        return ShardsLayout(shape=self.shape, layout=self.layout, placement=self.placement)

    @property
    def tokens_per_microbatch(self) -> int:
        """Tokens of one microbatch, before tensor or context parallelism divides them."""
        return self.seq_length * self.micro_batch_size

    @property
    def tokens_per_rank(self) -> int:
        """Tokens of one microbatch whose activations one rank keeps."""
        return self.tokens_per_microbatch // (self.layout.tp * self.layout.cp)

    @property
    def expert_tokens(self) -> float:
        """Tokens that the busiest rank's experts run, over those of balanced routing."""
        return min(self.routing_imbalance, float(self.layout.ep))

    @property
    def element_bytes(self) -> int:
        """Bytes of one weight or activation."""
        return 2 if self.model.precision is Precision.bf16 else 4

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one step over the whole job, padding included."""
        return self.tokens_per_microbatch * self.microbatches * self.layout.dp

    @property
    def trains_mtp(self) -> bool:
        return self.shape.mtp_layers > 0 and self.model.mtp_loss_weight > 0

    @property
    def trains_experts(self) -> bool:
        if self.lora is not None:
            return any(self.lora.adapts(weight) for weight in parameters(self.shape).values() if weight.expert == 0)
        in_layers = self.trains(FrozenPart.experts) and self.shape.num_layers > self.shape.first_dense_layers
        return in_layers or (self.shape.mtp_layers > 0 and self.trains(FrozenPart.mtp))

    def trains(self, part: FrozenPart | LoraTarget | None) -> bool:
        """Whether parameters of ``part`` have gradients and optimizer state; a ``LoraTarget`` is its adapters."""
        if self.lora is not None:
            return isinstance(part, LoraTarget)
        return part not in frozen_parts(self.model, self.shape)


def planned_shape(model: str | None, config: RunConfig) -> ModelShape:
    """Return the shape of the model to plan for.

    Args:
        model: A ``config.json`` or the folder that holds it, or a published model by its short name or that of its
            repository. None: the checkpoint that ``model.load`` names, where it exists, else the published model that
            ``model.published`` names.

    Raises:
        ConfigError: If there is no such model.
    """
    load = Path(config.model.load)
    if model is None and load.exists():
        if (load / "config.json").is_file():
            return read_model_shape(load)
        from conversion.sources import open_source  # imports torch, which a plan needs for converted checkpoints only

        return open_source(load).shape
    name = model or config.model.published
    if name is None:
        raise ConfigError(
            "The recipe does not say which model it is for, and there is no checkpoint yet. Give --model NAME "
            f"({', '.join(published_models())}) or --model FOLDER, or set model.load to a checkpoint that exists."
        )
    if Path(name).exists() and name not in published_models():
        return read_model_shape(Path(name))
    if (published := published_name(name)) is None:
        raise ConfigError(
            f"There is no model {name!r}: neither a published one ({', '.join(published_models())}) nor a folder or "
            "config.json."
        )
    return read_model_shape(published_file(published))


def load_job(
    recipe: str, overrides: Sequence[str] = (), *, model: str | None = None, ranks: int | None = None
) -> PlannedJob:
    """Compose a recipe and lay it out over ``ranks`` (None: the fewest that its layout fits)."""
    config = recipes.load_job(recipe, overrides, sections=_PLANNED)
    if not config.data.sources:  # a recipe may leave them to the command line, and a plan does not depend on them
        config.data.sources = [SourceConfig(kind=SourceKind.jsonl, path="not given")]
    return job_of(config, planned_shape(model, config), ranks)


def job_of(config: RunConfig, shape: ModelShape, ranks: int | None = None) -> PlannedJob:
    """Lay a composed recipe out over ``ranks`` (None: the fewest that its layout fits).

    Raises:
        ConfigError: If model, layout and ranks do not fit together.
    """
    sizes = config.layout
    if ranks is None:
        ranks = sizes.fewest_ranks()
    elif ranks < 1:
        raise ConfigError(f"--gpus is {ranks}; it must be at least 1.")
    layout = sizes.runtime(ranks)
    placement = sizes.placement(shape, layout)
    layout.check_model(shape)
    for number, chunk in enumerate(placement.chunks):  # ranks without a parameter would have no optimizer
        if not (chunk.layers or chunk.mtp_layers or chunk.has_embedding or chunk.has_loss):
            raise ConfigError(
                f"layout.pipeline {placement.string!r} leaves chunk {number} (stage {chunk.stage}) without any layer. "
                "Move a layer there, or use fewer stages."
            )
    recipes.validate_job(config, ranks, shape)
    return PlannedJob(
        shape=shape,
        layout=layout,
        placement=placement,
        model=config.model,
        seq_length=config.data.seq_length,
        micro_batch_size=config.train.micro_batch_size,
        microbatches=_microbatches(config, layout),
        rollouts=PlannedRollouts.of(config) if isinstance(config, RlConfig) else None,
        has_preferences=isinstance(config, PreferenceConfig),
        lora=Lora.of(config.model),
        deterministic=config.train.deterministic,
        moment_bytes=2 if config.optim.moments is Precision.bf16 else 4,
    )


def _microbatches(config: RunConfig, layout: ParallelLayout) -> int:
    """Return the microbatches of an update; of a policy or preferences, those of answers that are not packed."""
    prompts = config.train.microbatches(layout)
    if isinstance(config, PreferenceConfig):
        return prompts * (1 + config.preference.negatives)
    if not isinstance(config, RlConfig):
        return prompts
    return -(-prompts * config.rollout.samples // config.policy.minibatches)
