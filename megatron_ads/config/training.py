"""``optim``, ``train``, ``loss``, ``reweight``, ``checkpoint``, ``runtime`` and ``log``: the course of a job."""

import math
from dataclasses import dataclass, field
from enum import StrEnum

from omegaconf import MISSING

from megatron_ads.config.model import Precision
from megatron_ads.errors import require, require_above, require_at_least, require_each
from megatron_ads.layout import ParallelLayout


class Schedule(StrEnum):
    """Course of the learning rate after the warm-up."""

    cosine = "cosine"
    linear = "linear"
    constant = "constant"


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    """AdamW (arXiv:1711.05101) and the course of its learning rate."""

    learning_rate: float = MISSING
    """Highest learning rate, reached after the warm-up."""
    min_learning_rate: float = 0.0
    """Learning rate at the last step."""
    schedule: Schedule = Schedule.cosine
    """From the highest to the lowest learning rate."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly from 0."""
    weight_decay: float = 0.0
    """Decoupled weight decay; norms and biases are left out."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    epsilon: float = 1e-8
    """Added to the square root of the second moment."""
    clip_grad: float = 1.0
    """Largest global gradient norm; 0 is off."""
    moments: Precision = Precision.fp32
    """Number format in which both moments are kept; updates are computed in FP32. ``bf16`` takes 4 bytes a parameter
    less, for clusters that are short of memory (DeepSeek-V3 was trained so, arXiv:2412.19437, section 3.3.3)."""

    def check(self) -> None:
        """Refuse values that are impossible whatever the other sections say."""
        amounts = ("learning_rate", "min_learning_rate", "warmup_steps", "weight_decay", "clip_grad")
        require_at_least("optim", self, 0, *amounts)
        require_above("optim", self, 0, "learning_rate", "epsilon")
        require_each("optim", self, ("beta1", "beta2"), lambda beta: 0 <= beta < 1, "at least 0 and below 1")
        require(
            self.schedule is not Schedule.constant or self.min_learning_rate == 0,
            f"optim.min_learning_rate is {self.min_learning_rate:g}, which has no effect with optim.schedule constant. "
            "Remove it, or choose cosine or linear.",
        )
        require(
            self.min_learning_rate <= self.learning_rate,
            f"optim.min_learning_rate {self.min_learning_rate:g} is above optim.learning_rate {self.learning_rate:g}.",
        )


class Normalize(StrEnum):
    """What one unit of loss is averaged over."""

    token = "token"
    sample = "sample"


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    """How long and in which portions."""

    max_steps: int = MISSING
    """Optimizer steps of the whole run, over all resumptions."""
    global_batch_size: int = 8
    """Rows of ``data.seq_length`` tokens per step, over all ranks; in reinforcement learning and preference training,
    prompts."""
    micro_batch_size: int = 1
    """Rows one rank runs forward and backward at a time."""
    seed: int = 0
    """Seeds every random number generator that is not the data's."""
    deterministic: bool = False
    """Ask for bit-equal repetition, slower on a GPU."""
    log_every: int = 1
    """Steps between lines of metrics."""
    max_skipped_updates: int = 10
    """A job that skips so many consecutive updates, or half of ``max_steps`` if that is fewer, has diverged: it ends
    with exit status 77 and exports nothing. An update is skipped whose gradients FP32 cannot hold."""
    evaluate_every: int | None = None
    """Steps between evaluations on the held-out rows; None is never."""

    def check(self) -> None:
        """Refuse values that are impossible whatever the other sections say."""
        counts = ("max_steps", "global_batch_size", "micro_batch_size", "log_every", "evaluate_every")
        require_at_least("train", self, 1, *counts, "max_skipped_updates")
        require_at_least("train", self, 0, "seed")

    def microbatches(self, layout: ParallelLayout) -> int:
        """Return how many microbatches each data-parallel rank runs in one step.

        Raises:
            ConfigError: If the rows of a step cannot be divided evenly.
        """
        rows = self.micro_batch_size * layout.dp
        require(
            self.global_batch_size % rows == 0,
            f"train.global_batch_size = {self.global_batch_size} is not a multiple of train.micro_batch_size * dp = "
            f"{self.micro_batch_size} * {layout.dp} = {rows}. Choose a multiple of {rows}.",
        )
        return self.global_batch_size // rows


@dataclass(kw_only=True, slots=True)
class LossConfig:
    """How the loss is averaged."""

    normalize: Normalize = Normalize.token
    """``token``: every target token of a step weighs the same; ``sample``: every sample does."""


@dataclass(kw_only=True, slots=True)
class ReweightConfig:
    """Weights that follow what the model has learned; formulas in ``megatron_ads/data/adaptive_weights.py``."""

    instances: bool = False
    """Multiply each sample's loss by a weight that falls as its perplexity does."""
    interval: int = 50
    """Steps between renewals of the instance weights."""
    exact: bool = False
    """Measure perplexities by a forward pass over all training rows at each renewal, and one before the first step: all
    under the same weights, for about a third of the time that training on every row once takes. False takes them from
    the training steps in between, at no cost."""
    beta: float = 1.0
    """How strongly a change of perplexity changes an instance weight. The change is a plain difference: where
    perplexities are in the hundreds, as early in training from random weights, 1.0 drives every weight to ``lowest`` or
    ``highest``. About 1 over the usual change between renewals keeps them apart."""
    lowest: float = 0.2
    """Smallest instance weight."""
    highest: float = 5.0
    """Largest instance weight."""
    tasks: bool = False
    """Draw more samples of the tasks whose validation metric is low, renewed at each evaluation."""
    alpha: float = 1.0
    """How strongly a low validation metric raises a task's share; 1 is in proportion to what is missing to 1."""

    def check(self) -> None:
        """Refuse values that are impossible whatever the other sections say."""
        require_at_least("reweight", self, 1, "interval", "alpha")
        require(
            self.instances or not self.exact,
            "reweight.exact is true, which has no effect while reweight.instances is false. Set both, or neither.",
        )
        require_above("reweight", self, 0, "beta", "lowest")
        require(
            self.lowest <= 1 <= self.highest < math.inf,
            f"reweight.lowest = {self.lowest:g} and reweight.highest = {self.highest:g} must have 1 between them: it "
            "is the weight of a sample whose perplexity has not changed.",
        )


@dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    """Saving and resuming."""

    dir: str = MISSING
    """Folder that holds one folder per checkpoint."""
    save_every: int | None = None
    """Steps between checkpoints; None saves after the last step only."""
    save_total_limit: int = 2
    """Complete checkpoints kept; older ones are deleted."""
    resume: bool = True
    """Go on from the latest complete checkpoint in ``dir`` where there is one."""
    async_save: bool = False
    """Write checkpoints while training continues, from a copy in the host's memory: up to 14 bytes for each parameter
    of a rank in BF16, 12 in FP32. The next save, and the end of the job, wait until a checkpoint is complete."""

    def check(self) -> None:
        """Refuse values that are impossible whatever the other sections say."""
        require_at_least("checkpoint", self, 1, "save_every", "save_total_limit")
        require(
            self.save_every is not None or not self.async_save,
            "checkpoint.async_save is true, which has no effect while checkpoint.save_every is not set: after the last "
            "step there is nothing to continue. Set checkpoint.save_every, or leave async_save out.",
        )


@dataclass(kw_only=True, slots=True)
class RuntimeConfig:
    """Processes of the job."""

    timeout_seconds: int = 600
    """A communication, or a step in which nothing moves, that takes longer ends the job, with a report on the cause."""
    threads: int = 0
    """CPU threads per process; 0 divides the cores among the processes of a machine."""
    straggler_factor: float = 1.5
    """A rank is named as slow when its own work takes this many times the median of its pipeline stage."""
    straggler_steps: int = 5
    """For how many consecutive logged steps it must."""
    load_timeout_seconds: int = 3600
    """How long ranks wait for the slowest of them to read the weights, or a checkpoint to resume from; in reinforcement
    learning also to generate its answers, compute the rewards or give an engine new weights."""
    gc_interval: int | None = 10
    """Steps between collections of Python's garbage, by all ranks at the same step: each that collects at a moment of
    its own keeps the others waiting. None leaves it to Python."""

    def check(self) -> None:
        """Refuse values that are impossible whatever the other sections say."""
        amounts = ("timeout_seconds", "straggler_factor", "straggler_steps", "load_timeout_seconds", "gc_interval")
        require_at_least("runtime", self, 1, *amounts)
        require_at_least("runtime", self, 0, "threads")


class Tracker(StrEnum):
    """An experiment tracker, from the extra ``track``."""

    wandb = "wandb"
    mlflow = "mlflow"
    trackio = "trackio"


@dataclass(kw_only=True, slots=True)
class LogConfig:
    """What a run leaves behind to look at."""

    dir: str = MISSING
    """Folder for metrics.jsonl, the resolved recipe and TensorBoard files."""
    tensorboard: bool = True
    """Write TensorBoard files besides metrics.jsonl."""
    trackers: list[Tracker] = field(default_factory=list)
    """Send every metric also to wandb, mlflow or trackio, as their own environment variables say."""
