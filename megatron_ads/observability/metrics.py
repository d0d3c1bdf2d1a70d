"""Numbers of every step, appended to ``metrics.jsonl``, to TensorBoard files by default, and to trackers if asked.

One line per ``write``: ``{"step": 12, "loss": 1.25, ...}``. A value that is not finite is written as ``null``, so
that every line is standard JSON. A resumed run drops the lines after the step it resumes from, so that each step
is there once, as it was last computed.
"""

import json
import math
import os
import re
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from conversion.atomic_file import write_small
from megatron_ads.errors import ConfigError
from megatron_ads.observability.trackers import TrackedRuns

METRICS_FILE = "metrics.jsonl"


METRICS = {
    "loss": ("nats/token", "what is minimised: mean over the target tokens of the global batch, weights applied"),
    "loss/{task}": ("nats/token", "mean over the target tokens of one task, without weights"),
    "instance_weight_p10/{task}": ("1", "weight that a tenth of the task's training samples stay below"),
    "instance_weight_p50/{task}": ("1", "median weight of the task's training samples (reweight.instances)"),
    "instance_weight_p90/{task}": ("1", "weight that nine tenths of the task's training samples stay below"),
    "task_share/{task}": ("1", "share of the task in the samples drawn from here on (reweight.tasks)"),
    "task_metric/{task}": ("0 to 1", "mean of 1 / perplexity over the task's held-out rows"),
    "validation_loss": ("nats/token", "loss over the held-out rows"),
    "validation_loss/{task}": ("nats/token", "mean over the target tokens of one task's held-out rows"),
    "grad_norm": ("1", "L2 norm of the whole gradient before clipping"),
    "learning_rate": ("1", "rate the update of this step used"),
    "skipped_update": ("0 or 1", "1 when the weights were left alone because a gradient was not finite"),
    "loss_tokens": ("tokens", "tokens of this step that counted in the loss"),
    "tokens": ("tokens", "tokens of this step, prompts included, padding left out"),
    "samples": ("samples", "samples of this step, before packing"),
    "tokens_per_second": ("tokens/s", "tokens through the whole job per second, forward, backward and update"),
    "tflops_per_gpu": ("TFLOP/s", "arithmetic the model needs (no recomputation), per GPU or CPU process"),
    "mfu": ("1", "the same over the GPU's dense BF16 peak; absent where that is not known"),
    "step_seconds": ("s", "wall time of the step"),
    "checkpoint_seconds": ("s", "wall time the step spent on saving"),
    "expert_load_max_over_mean": ("1", "busiest expert's tokens over the mean, over all MoE layers; 1 is even"),
    "slowest_rank": ("rank", "whose own work, without waiting for others, lags most behind its pipeline stage"),
    "slowest_rank_seconds": ("s", "own work of that rank in this step"),
    "slowest_rank_over_median": ("1", "the same over the median of the other ranks of its stage"),
    "rewards/chosen": ("1", "beta times the log-ratio of policy to reference of the chosen answers, mean over prompts"),
    "rewards/rejected": ("1", "the same of the rejected answers"),
    "rewards/margins": ("1", "reward of the chosen answer less that of the best rejected one"),
    "rewards/accuracies": ("0 to 1", "share of prompts whose chosen answer has the highest reward"),
    "logps/chosen": ("nats", "mean log-probability of the chosen answers, all tokens together"),
    "logps/rejected": ("nats", "the same of the rejected answers"),
    "nll_loss": ("nats/token", "mean over the chosen answers, each the mean over its tokens (preference.sft_weight)"),
    "validation_rewards/{name}": ("1", "rewards/* of the held-out prompts"),
    "validation_logps/{name}": ("nats", "logps/* of the held-out prompts"),
    "validation_nll_loss": ("nats/token", "nll_loss of the held-out prompts"),
    "reference_seconds": ("s", "computing log-probabilities under the reference, for steps to come"),
    "critic/rewards/mean": (
        "1",
        "mean over the answers of the step of their rewards, shaped (rollout.overlong), weighted and summed",
    ),
    "critic/rewards/max": ("1", "the largest of them"),
    "critic/rewards/min": ("1", "the smallest of them"),
    "critic/rewards/{reward}/mean": ("1", "mean of one reward, over the answers that it judges"),
    "reward_weight/{reward}": ("1", "what the reward's advantages are multiplied by"),
    "reward_inner_product/{reward}": (
        "1",
        "of its gradient with the sum of all rewards' gradients (rewards.combine: popo)",
    ),
    "validation/reward": ("1", "mean weighted sum of the rewards of greedy answers to the held-out prompts"),
    "validation/reward/{reward}/mean": ("1", "mean of one reward of those answers"),
    "response_length/mean": ("tokens", "length of the answers, end token included"),
    "response_length/max": ("tokens", "length of the longest answer"),
    "response_length/clip_ratio": ("1", "share of answers that were cut off at rollout.max_new_tokens"),
    "prompt_length/mean": ("tokens", "length of the prompts"),
    "rollout/groups_without_variance": (
        "groups",
        "whose answers are all worth the same, or all masked (rollout.overlong), so that they teach nothing",
    ),
    "rollout/draws": ("1", "how often prompts were drawn for the step (rollout.dynamic_sampling)"),
    "rollout/answers": ("answers", "generated for the step, those of replaced groups included"),
    "rollout/faults/{reward}": (
        "answers",
        "without this reward because something went wrong, by REWARD/FAULT; of a teacher, teacher/FAULT",
    ),
    "teacher/reverse_kl": (
        "nats/token",
        "estimate of KL(policy || teacher), mean over the answers' tokens; falls as the policy learns",
    ),
    "rollout/logprob_abs_diff": (
        "nats/token",
        "mean absolute difference between engine and trainer over the answers",
    ),
    "rollout/probe_logprob_abs_diff": ("nats/token", "the same over fixed rows after the update, of the worst rank"),
    "rollout/staleness/mean": (
        "steps",
        "that the weights of the answers are behind those they train (rollout.max_staleness)",
    ),
    "rollout/staleness/max": ("steps", "of the answers whose weights are the furthest behind"),
    "rollout/server_losses": ("1", "how often an inference server was lost, since the job started"),
    "actor/pg_loss": ("1", "policy loss, without the KL term"),
    "actor/pg_clipfrac": ("1", "share of answer tokens whose ratio is clipped"),
    "actor/pg_clipfrac_lower": ("1", "share of answer tokens that policy.dual_clip bounds"),
    "actor/ppo_kl": ("nats/token", "estimate of the KL divergence from the policy that answered"),
    "actor/ratio": ("1", "mean ratio of the policy to the one that answered"),
    "actor/max_ratio": ("1", "largest ratio"),
    "actor/kl_loss": ("nats/token", "estimate of the KL divergence from the reference"),
    "actor/importance_weight": ("1", "mean correction for the engine's numbers (policy.importance_sampling)"),
    "actor/entropy": ("nats/token", "mean entropy of the policy over the answers' tokens"),
    "timing_s/rollout": ("s", "generating the answers, the slowest rank's"),
    "timing_s/reward": ("s", "computing the rewards"),
    "timing_s/teacher": ("s", "asking the teacher how probable the answers are to it"),
    "timing_s/wait": ("s", "waiting for answers that are generated during updates (rollout.max_staleness)"),
    "timing_s/update": ("s", "log-probabilities, backward passes and updates"),
    "timing_s/sync": ("s", "giving the engines the new weights, and comparing them"),
    "max_memory_allocated": ("bytes", "peak of the fullest rank: CUDA allocator, or resident memory on a CPU"),
}
"""Every name that ``MetricsWriter.write`` accepts (``{task}`` is an ads task or data source), its unit and meaning."""

_NAMES = re.compile("|".join(re.sub(r"\\{\w+\\}", ".+", re.escape(name)) for name in METRICS))


class MetricsWriter:
    """Appends the metrics of a run under ``directory``. Make one, on the rank that reports."""

    def __init__(
        self, directory: Path, tensorboard: bool = True, resume_step: int = 0, *, tracked: TrackedRuns | None = None
    ) -> None:
        """Open the files; steps after ``resume_step`` (0: all of them) of an earlier run are dropped.

        Raises:
            ConfigError: If the folder cannot be written, or holds a damaged ``metrics.jsonl``.
        """
        try:
            directory.mkdir(parents=True, exist_ok=True)
            if (file := directory / METRICS_FILE).exists():
                kept = [json.dumps(values) + "\n" for values in read_metrics(file) if values["step"] <= resume_step]
                write_small(file, "".join(kept))  # replaced at once, so that a kill loses nothing
            self._lines = file.open("a", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"log.dir {directory} cannot be written ({error.strerror}); choose another.") from None
        self._tracked = tracked
        self._tensorboard: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # seconds of imports that a run without it is spared

            _keep_quiet_what_tensorboard_raises_again()
            self._tensorboard = SummaryWriter(str(directory / "tensorboard"), purge_step=resume_step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append the values of one step; every name must be in ``METRICS``."""
        for name in values:
            if not _NAMES.fullmatch(name):
                raise ValueError(f"metric {name!r} is not documented: add it to METRICS in {__name__}.")
        numbers = {name: float(value) for name, value in values.items()}
        finite = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        self._lines.write(json.dumps({"step": step, **finite}) + "\n")
        self._lines.flush()
        if self._tracked is not None:
            self._tracked.log(step, numbers)
        if self._tensorboard is not None:
            for name, value in numbers.items():
                self._tensorboard.add_scalar(name, value, step)

    def close(self) -> None:
        """Write out what is buffered. Calling it twice is harmless."""
        if not self._lines.closed:
            self._lines.flush()
            os.fsync(self._lines.fileno())
            self._lines.close()
        for other in filter(None, (self._tracked, self._tensorboard)):
            other.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _keep_quiet_what_tensorboard_raises_again() -> None:
    """Print no traceback of its thread when a disk is full: the next call raises the error."""
    before = threading.excepthook

    def hook(args: threading.ExceptHookArgs) -> None:
        if not (isinstance(args.exc_value, OSError) and type(args.thread).__module__.startswith("tensorboard.")):
            before(args)

    threading.excepthook = hook


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a ``metrics.jsonl`` (the file, or the folder it is in), in the order written.

    A last line without its line end was cut off by a kill and is left out.

    Raises:
        ConfigError: If the file is missing, or a complete line is not a JSON object with a ``step``.
    """
    file = path / METRICS_FILE if path.is_dir() else path
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{file} does not exist: no run has written metrics there.") from None
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(text[: text.rfind("\n") + 1].splitlines(), start=1):
        try:
            rows.append(json.loads(line))
            int(rows[-1]["step"])
        except (ValueError, KeyError, TypeError):
            said = f"{file} line {number} is not a metrics line ({line[:60]!r}); move the file away."
            raise ConfigError(said) from None
    return rows
