"""A supervised fine-tuning job."""

from dataclasses import dataclass, field

from megatron_ads.architecture import ModelShape
from megatron_ads.config.checks import require
from megatron_ads.config.run import RunConfig, validate_run
from megatron_ads.config.training import LossConfig, ReweightConfig


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
    _check_reweighting(config)


def _check_reweighting(config: SftConfig) -> None:
    """Refuse weights and shares that would never change before the last step."""
    steps, evaluate_every, reweight = config.train.max_steps, config.train.evaluate_every, config.reweight
    if reweight.tasks:
        require(
            evaluate_every is not None,
            "reweight.tasks needs a validation metric of each task, but train.evaluate_every is null. Set it.",
        )
        require(
            evaluate_every is None or evaluate_every < steps,
            f"reweight.tasks changes the shares at each evaluation, but train.evaluate_every = {evaluate_every} and "
            f"train.max_steps = {steps}: no step is left after the first. Lower train.evaluate_every.",
        )
    first = reweight.interval if reweight.exact else 2 * reweight.interval  # before it, nothing is measured twice
    require(
        not reweight.instances or first < steps,
        f"reweight.instances has its first weights after step {first} (reweight.interval = {reweight.interval}), but "
        f"train.max_steps is {steps}: it would have no effect. Lower reweight.interval.",
    )
