"""The sections that every training job has, those of fine-tuning, and the checks that one section cannot express."""

from dataclasses import dataclass, field

from megatron_ads.architecture import ModelShape
from megatron_ads.config.data import DataConfig
from megatron_ads.config.model import LayoutConfig, LoraTarget, ModelConfig
from megatron_ads.config.training import (
    CheckpointConfig,
    LogConfig,
    LossConfig,
    OptimConfig,
    ReweightConfig,
    RuntimeConfig,
    TrainConfig,
)
from megatron_ads.errors import require
from megatron_ads.layout import ParallelLayout


@dataclass(kw_only=True, slots=True)
class RunConfig:
    """A training job; each kind of job adds sections of its own."""

    model: ModelConfig = field(default_factory=ModelConfig)
    layout: LayoutConfig = field(default_factory=LayoutConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    log: LogConfig = field(default_factory=LogConfig)


def validate_run(config: RunConfig, world: int, shape: ModelShape | None = None) -> None:
    """Refuse a job that cannot run, or that holds settings without effect, on ``world`` ranks.

    With ``shape``, what depends on the model is checked too: layers and experts per rank, MTP, sequence length.

    Raises:
        ConfigError: Naming the settings, their values and what to change.
    """
    sections = (config.model, config.layout, config.data, config.optim, config.train, config.checkpoint, config.runtime)
    for section in sections:
        section.check()
    require(
        config.optim.warmup_steps <= config.train.max_steps,
        f"optim.warmup_steps = {config.optim.warmup_steps} is more than train.max_steps = {config.train.max_steps}: "
        f"optim.learning_rate would never be reached. Set optim.warmup_steps={config.train.max_steps // 10}, or raise "
        "train.max_steps.",
    )
    require(
        config.train.evaluate_every is None or config.data.validation_rows > 0,
        f"train.evaluate_every is {config.train.evaluate_every}, but data.validation_rows is 0: there is nothing to "
        "evaluate on. Set data.validation_rows, or train.evaluate_every to null.",
    )
    require(
        config.model.train_only is None or config.optim.weight_decay == 0,
        f"optim.weight_decay is {config.optim.weight_decay:g}, which would change the rows that model.train_only = "
        f"{config.model.train_only} keeps. Set it to 0.",
    )
    layout = config.layout.runtime(world)
    require(
        (stages := config.model.recompute_stages) is None or stages < layout.pp,
        f"model.recompute_stages is {stages}, but layout.pp is {layout.pp}: no stage would keep everything. Remove it, "
        "or set a smaller number.",
    )
    _check_batch(config, layout)
    if shape is not None:
        _check_model(config, layout, shape)


def require_trainable(layout: ParallelLayout, shape: ModelShape | None) -> None:
    """Refuse what can be planned and converted, but not trained; the model only where its ``shape`` is known.

    Raises:
        ConfigError: If rows would have to be cut over context-parallel ranks, or Megatron-Core routes differently.
    """
    if shape is not None:
        shape.require_megatron_routing()
    require(
        layout.cp == 1,
        f"layout.cp is {layout.cp}: the training step does not cut rows over context-parallel ranks, each of which "
        "would train on whole rows. Set layout.cp to 1.",
    )


def _check_batch(config: RunConfig, layout: ParallelLayout) -> None:
    microbatches = config.train.microbatches(layout)
    require(
        layout.vpp == 1 or microbatches % layout.pp == 0,
        f"layout.vpp = {layout.vpp} runs microbatches in groups of layout.pp = {layout.pp}, but a step has "
        f"train.global_batch_size / (train.micro_batch_size * dp) = {config.train.global_batch_size} / "
        f"({config.train.micro_batch_size} * {layout.dp}) = {microbatches} microbatches. Choose a "
        f"train.global_batch_size that is a multiple of {layout.pp * layout.dp * config.train.micro_batch_size}.",
    )
    # Context parallelism cuts a row into 2 * cp pieces to balance the causal mask; sequence parallelism into tp.
    pieces = layout.tp * (2 * layout.cp if layout.cp > 1 else 1)
    tokens = config.data.seq_length * config.train.micro_batch_size
    require(
        tokens % pieces == 0,
        f"data.seq_length * train.micro_batch_size = {config.data.seq_length} * {config.train.micro_batch_size} = "
        f"{tokens} tokens cannot be cut into {pieces} pieces (layout.tp = {layout.tp}, layout.cp = {layout.cp}). "
        f"Choose a multiple of {pieces}.",
    )


def _check_model(config: RunConfig, layout: ParallelLayout, shape: ModelShape) -> None:
    config.layout.placement(shape, layout)
    layout.check_model(shape)
    require(
        config.data.seq_length <= shape.max_positions,
        f"data.seq_length = {config.data.seq_length} is longer than the model's {shape.max_positions} positions.",
    )
    require(
        shape.mtp_layers > 0 or config.model.mtp_loss_weight == 0,
        f"model.mtp_loss_weight is {config.model.mtp_loss_weight:g}, but the model has no MTP layer. Set it to 0.",
    )
    require(
        shape.has_expert_bias or config.model.expert_bias_update_rate is None,
        f"model.expert_bias_update_rate is {config.model.expert_bias_update_rate}, but the model's router has no "
        "selection bias. Set it to null.",
    )
    require(
        shape.num_experts > 0 or config.model.aux_loss_coefficient == 0,
        f"model.aux_loss_coefficient is {config.model.aux_loss_coefficient:g}, but the model has no experts to "
        "balance. Set it to 0.",
    )
    sizes = {"dense": shape.first_dense_layers, "shared_experts": shape.shared_ffn_size}
    sizes |= {"experts": shape.num_experts, "router": shape.num_experts}
    # All targets together mean those that the model has.
    targets = config.model.lora.targets if set(config.model.lora.targets) != set(LoraTarget) else []
    for setting, parts in (("model.frozen", config.model.frozen), ("model.lora.targets", targets)):
        absent = [part for part in parts if not sizes.get(part, 1)]
        require(not absent, f"{setting} lists {', '.join(absent)}, which the model does not have. Remove it.")


@dataclass(kw_only=True, slots=True)
class SftConfig(RunConfig):
    """A whole supervised fine-tuning job."""

    loss: LossConfig = field(default_factory=LossConfig)
    reweight: ReweightConfig = field(default_factory=ReweightConfig)


def validate(config: SftConfig, world: int, shape: ModelShape | None = None) -> None:
    """Refuse a recipe that cannot run, or that holds settings without effect; as ``validate_run``.

    Raises:
        ConfigError: Naming the settings, their values and what to change.
    """
    config.reweight.check()
    validate_run(config, world, shape)
    # Weights and shares must change before the last step.
    steps, evaluate_every, reweight = config.train.max_steps, config.train.evaluate_every, config.reweight
    require(
        evaluate_every is not None or not reweight.tasks,
        "reweight.tasks needs a validation metric of each task, but train.evaluate_every is null. Set it.",
    )
    require(
        evaluate_every is None or evaluate_every < steps or not reweight.tasks,
        f"reweight.tasks changes the shares at each evaluation, but train.evaluate_every = {evaluate_every} and "
        f"train.max_steps = {steps}: no step is left after the first. Lower train.evaluate_every.",
    )
    first = reweight.interval if reweight.exact else 2 * reweight.interval  # before it, nothing is measured twice
    require(
        not reweight.instances or first < steps,
        f"reweight.instances has its first weights after step {first} (reweight.interval = {reweight.interval}), but "
        f"train.max_steps is {steps}: it would have no effect. Lower reweight.interval.",
    )
