"""The plan of a whole job: every stage's weights, memory and traffic, and how long a step takes. Runs calibrate it."""

import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import median

from omegaconf import OmegaConf

from megatron_ads.config.recipe_errors import current_settings
from megatron_ads.config.run import SftConfig
from megatron_ads.errors import ConfigError
from megatron_ads.layout import Chunk
from megatron_ads.models.flops import flops_per_token
from megatron_ads.planning import costs
from megatron_ads.planning.checkpoint import CheckpointCosts, checkpoint_costs
from megatron_ads.planning.hardware import Card
from megatron_ads.planning.job import PlannedJob, job_of, planned_shape
from megatron_ads.planning.memory import RankMemory, stage_memory
from megatron_ads.planning.preference import PreferenceCosts, preference_costs
from megatron_ads.planning.rollout import RolloutCosts, rollout_costs
from megatron_ads.planning.schedule import Timeline, play

_MESSAGE_LATENCY_SECONDS = 20e-6
"""Of one point-to-point message or collective, whatever its size."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StagePlan:
    """What each rank of one pipeline stage holds and does."""

    stage: int
    chunks: tuple[Chunk, ...]
    weights: tuple[costs.Weights, ...]
    memory: RankMemory
    traffic: tuple[costs.GroupTraffic, ...]
    flops_per_step: int
    """Of one rank, forward and backward, what is computed again included."""

    @property
    def parameters(self) -> int:
        return costs.total(self.weights)

    @property
    def expert_parameters(self) -> int:
        return costs.total(self.weights, expert=True)

    @property
    def contents(self) -> str:
        """Such as ``E 0-1``, or ``30, 60 m1 L``: embedding, decoder layers, MTP layers, loss."""
        words = ["E"] if any(chunk.has_embedding for chunk in self.chunks) else []
        layers = [chunk.layers for chunk in self.chunks if chunk.layers]
        words.append(", ".join(f"{each[0]}-{each[-1]}" if len(each) > 1 else str(each[0]) for each in layers))
        for chunk in self.chunks:
            words += [f"m{len(chunk.mtp_layers)}"] if chunk.mtp_layers else []
            words += ["L"] if chunk.has_loss else []
        return " ".join(word for word in words if word)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A job on some cards. What takes long to work out is worked out when it is asked for."""

    job: PlannedJob
    card: Card
    stages: tuple[StagePlan, ...]

    @property
    def fullest(self) -> StagePlan:
        return max(self.stages, key=lambda stage: stage.memory.peak)

    @property
    def spare_bytes(self) -> int:
        """Memory left on the fullest rank; negative: by how much the job does not fit."""
        return self.card.memory_bytes - self.fullest.memory.peak

    @property
    def fits(self) -> bool:
        return self.spare_bytes >= 0

    @property
    def expert_less_stages(self) -> tuple[int, ...]:
        return self.job.placement.expert_less_stages(self.job.shape) if self.job.shape.num_experts else ()

    @property
    def imbalance(self) -> float:
        """Work of the busiest stage over the mean; what is above 1, every other stage waits for."""
        flops = [stage.flops_per_step for stage in self.stages]
        return max(flops) * len(flops) / sum(flops)

    @cached_property
    def timeline(self) -> Timeline:
        """The pipeline's step, without the update at its end."""
        job = self.job
        passes = [self._chunk_seconds(chunk) for chunk in job.placement.chunks]
        link = next((group for group in self.stages[0].traffic if group.group == "pp"), None)
        message = 0.0
        if link is not None:
            rate = self.card.network_bytes_per_second if link.off_node else self.card.node_bytes_per_second
            message = costs.message_bytes(job) / rate + _MESSAGE_LATENCY_SECONDS
        return play(
            job.layout.pp,
            job.layout.vpp,
            job.microbatches,
            forward_seconds=[forward for forward, _ in passes],
            backward_seconds=[backward for _, backward in passes],
            message_seconds=message,
        )

    def _chunk_seconds(self, chunk: Chunk) -> tuple[float, float]:
        """Return (forward, backward) seconds of one microbatch: arithmetic, and tokens on their way to experts."""
        job, card = self.job, self.card
        tokens = job.tokens_per_microbatch / (job.layout.tp * job.layout.cp)
        rate = card.flops_per_second * card.efficiency
        flops = costs.chunk_flops(job, chunk)
        forward, backward = tokens * flops.forward / rate, tokens * (flops.backward + flops.recomputed) / rate
        exchanged = 0.0
        for group in self.stages[chunk.stage].traffic:
            sent = {"ep": costs.dispatch_bytes, "tp": costs.tensor_bytes}.get(group.group)
            if sent is not None and group.bytes_per_step:
                exchanged += sent(job, chunk) / group.bytes_per_step * group.seconds(card)
        share = forward / (forward + backward) if forward else 0.0
        return forward + share * exchanged, backward + (1 - share) * exchanged

    @property
    def update_seconds(self) -> float:
        """Reducing gradients, updating and gathering weights, on the slowest stage."""
        return max(
            sum(group.seconds(self.card) for group in stage.traffic if group.group in ("dp", "edp"))
            + 2 * (stage.memory.optimizer + stage.memory.gradients) / self.card.memory_bytes_per_second
            for stage in self.stages
        )

    @property
    def accumulation_seconds(self) -> float:
        """Adding every microbatch's weight gradients to the FP32 ones of the step, on the stage with the most of them.

        A gradient is written and read, what it is added to read and written. Not added to the step: the efficiency that
        is assumed stands for all that a stage does.
        """
        trained = max(stage.memory.gradients // 4 for stage in self.stages)
        moved = trained * (2 * self.job.element_bytes + 8)
        return self.job.microbatches * moved / self.card.memory_bytes_per_second

    @property
    def step_seconds(self) -> float:
        return self.timeline.seconds + self.update_seconds

    @property
    def tokens_per_second(self) -> float:
        """Of the whole job, padding included."""
        return self.job.tokens_per_step / self.step_seconds

    @property
    def model_flops_per_second(self) -> float:
        """Model arithmetic of all cards, nothing counted twice."""
        job = self.job
        each = flops_per_token(job.shape, job.seq_length, with_mtp=job.trains_mtp, lora=job.lora)
        return each * self.tokens_per_second

    @property
    def model_flops_utilization(self) -> float:
        """Model arithmetic over the peak of all cards."""
        return self.model_flops_per_second / (self.card.flops_per_second * self.job.layout.world)

    @cached_property
    def rollouts(self) -> RolloutCosts | None:
        """A whole step of reinforcement learning; None for other jobs."""
        return rollout_costs(
            self.job, self.card, pipeline_seconds=self.timeline.seconds, update_seconds=self.update_seconds
        )

    @cached_property
    def preference(self) -> PreferenceCosts | None:
        """A whole step of preference training; None for other jobs."""
        return preference_costs(self.job, pipeline_seconds=self.timeline.seconds, update_seconds=self.update_seconds)

    @cached_property
    def checkpoint(self) -> CheckpointCosts:
        """One training checkpoint."""
        return checkpoint_costs(self.job, self.card, [stage.weights for stage in self.stages])


def make_plan(job: PlannedJob, card: Card) -> Plan:
    """Work out what a job takes on ``job.layout.world`` of these cards."""
    tokens = job.tokens_per_microbatch * job.microbatches // (job.layout.tp * job.layout.cp)
    stages = []
    for stage in range(job.layout.pp):
        chunks = job.placement.stage_chunks(stage)
        flops = [costs.chunk_flops(job, chunk) for chunk in chunks]
        per_token = sum(each.forward + each.backward + each.recomputed for each in flops)
        stages.append(
            StagePlan(
                stage=stage,
                chunks=chunks,
                weights=costs.stage_weights(job, stage),
                memory=stage_memory(
                    job,
                    stage,
                    gpu=card.name != "cpu",
                    reserved_bytes=card.reserved_bytes(costs.communicators(job, stage)),
                ),
                traffic=costs.stage_traffic(job, stage, card),
                flops_per_step=tokens * per_token,
            )
        )
    return Plan(job=job, card=card, stages=tuple(stages))


def calibrated(card: Card, run: Path, model: str | None = None) -> Card:
    """Return the card with the efficiency at which the planned model FLOP/s are those that ``run`` measured.

    Communication and bubble are planned as they are, so the result holds for other layouts as far as those are right.

    Raises:
        ConfigError: If ``run.json`` or ``metrics.jsonl`` cannot be read or holds no measurement, or the run was faster
            than any efficiency up to 1 allows: the card is another one.
    """
    try:
        described = json.loads((run / "run.json").read_text(encoding="utf-8"))
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    except (OSError, json.JSONDecodeError) as error:
        raise ConfigError(f"--calibrate {run} cannot be read ({error}); give the log folder of a run.") from None
    ranks = int(described["ranks"])
    # The first step warms up. Older runs recorded the FLOP/s of the whole job.
    speeds = [row["tflops_per_gpu"] * 1e12 * ranks for row in rows if "tflops_per_gpu" in row][1:]
    speeds = speeds or [row["model_flops_per_second"] for row in rows if "model_flops_per_second" in row][1:]
    if not speeds:
        raise ConfigError(f"--calibrate {run / 'metrics.jsonl'} has fewer than two steps with tflops_per_gpu.")
    if {"rollout", "preference"} & described["recipe"].keys():
        raise ConfigError(
            f"--calibrate {run} is no fine-tuning run: its steps do more than an update. Give the log folder of one."
        )
    measured = float(median(speeds))
    config = OmegaConf.to_object(
        OmegaConf.merge(OmegaConf.structured(SftConfig), current_settings(described["recipe"]))
    )
    assert isinstance(config, SftConfig)  # to_object instantiates the schema
    job = job_of(config, planned_shape(model, config), ranks)

    def planned(efficiency: float) -> float:
        return make_plan(job, replace(card, efficiency=efficiency)).model_flops_per_second

    if (fastest := planned(1.0)) < measured:
        raise ConfigError(
            f"--calibrate: the run did {measured:.3g} model FLOP/s, more than {job.layout.world} cards of kind "
            f"{card.name} can ({fastest:.3g}). Name the card it ran on with --gpu."
        )
    low, high = 1e-6, 1.0
    while high / low > 1.001:  # planned speed rises with efficiency
        middle = (low * high) ** 0.5
        low, high = (middle, high) if planned(middle) < measured else (low, middle)
    return replace(card, efficiency=high)
