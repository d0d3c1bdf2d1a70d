"""``preference``: what preference training has besides the sections of every job. Importing it needs no torch."""

from dataclasses import dataclass, field
from enum import StrEnum

from megatron_ads.architecture import ModelShape
from megatron_ads.config.run import RunConfig, validate_run
from megatron_ads.errors import require, require_above, require_at_least


class PreferenceLoss(StrEnum):
    """What is minimised."""

    dpo = "dpo"
    """The chosen answer against one rejected one (arXiv:2305.18290)."""
    sdpo = "sdpo"
    """The chosen answer against several rejected ones at once (S-DPO, arXiv:2406.09215)."""


@dataclass(kw_only=True, slots=True)  # not frozen, here and below: Hydra merges into it
class PreferenceLossConfig:
    """The update; formulas in ``megatron_ads/losses/preference.py``. The reference are the weights of ``model.load``.

    A step has ``train.global_batch_size`` prompts, each with its chosen and its rejected answers: one set.
    """

    loss: PreferenceLoss = PreferenceLoss.sdpo
    """What is minimised."""
    beta: float = 0.1
    """How strongly the policy is held to the reference; lower lets it go further."""
    negatives: int = 3
    """Rejected answers of each prompt, drawn by its id from those of its row; a row that has fewer uses all."""
    sft_weight: float = 0.0
    """Weight of the mean negative log-probability of the chosen answers' tokens, which is added to the loss (TRL's
    ``rpo_alpha``, arXiv:2404.19733); 0 is off."""
    reference_steps: int = 50
    """Steps whose reference log-probabilities are computed together; each prompt's are computed once in a job. For as
    long the reference's weights are swapped in, of which each rank keeps a copy on the host; with LoRA the adapters are
    switched off instead."""

    def check(self) -> None:
        """Refuse values that are impossible whatever the other sections say."""
        require_above("preference", self, 0, "beta")
        require_at_least("preference", self, 0, "sft_weight")
        require_at_least("preference", self, 1, "negatives", "reference_steps")
        require(
            self.loss is PreferenceLoss.sdpo or self.negatives == 1,
            f"preference.negatives is {self.negatives}, but preference.loss {self.loss} has a single rejected answer. "
            "Set preference.negatives=1, or preference.loss=sdpo.",
        )


@dataclass(kw_only=True, slots=True)
class PreferenceConfig(RunConfig):
    """A whole job of preference training."""

    preference: PreferenceLossConfig = field(default_factory=PreferenceLossConfig)


def validate(config: PreferenceConfig, world: int, shape: ModelShape | None = None) -> None:
    """Refuse a recipe that cannot run, or that holds settings without effect; as ``validate_run``.

    Raises:
        ConfigError: Naming the settings, their values and what to change.
    """
    config.preference.check()
    validate_run(config, world, shape)
    require(
        config.model.mtp_loss_weight == 0,
        f"model.mtp_loss_weight is {config.model.mtp_loss_weight:g}: the MTP layer would be trained on rejected "
        "answers as well. Set it to 0; its weights are carried along.",
    )
