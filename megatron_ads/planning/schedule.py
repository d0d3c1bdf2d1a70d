"""The pipeline schedules that Megatron-Core runs, played through: who computes what when, and who waits.

1F1B (arXiv:2104.04473, section 2.2) with one chunk a stage, interleaved 1F1B (section 2.2.2) with several. The order of
work on each stage is that of ``megatron.core.pipeline_parallel.schedules``, version 0.16.1.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product


@dataclass(frozen=True, slots=True)
class Work:
    """One pass of one microbatch through one chunk."""

    backward: bool
    virtual: int
    microbatch: int


@dataclass(frozen=True, slots=True)
class WorkSpan:
    """When a stage does a piece of work, in seconds from the start of the step."""

    stage: int
    work: Work
    start: float
    end: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Timeline:
    """One step of the pipeline."""

    stages: int
    spans: tuple[WorkSpan, ...]

    @property
    def seconds(self) -> float:
        """From the first forward to the last backward pass."""
        return max(span.end for span in self.spans)

    @property
    def bubble(self) -> float:
        """The share of all stages' time in which they wait: for one another, and for slower ones."""
        busy = sum(span.end - span.start for span in self.spans)
        return 1.0 - busy / (self.stages * self.seconds)


def ideal_bubble(pp: int, vpp: int, microbatches: int) -> float:
    """Return the bubble of equal stages whose messages take no time, (p - 1) / (v m + p - 1).

    Source: arXiv:2104.04473, section 2.2, as a share of the whole step and not of the work alone.
    """
    return (pp - 1) / (vpp * microbatches + pp - 1)


def stage_order(pp: int, vpp: int, stage: int, microbatches: int) -> list[Work]:
    # Groups of pp microbatches go through all chunks of a stage in turn: (virtual chunk, microbatch).
    groups = [range(first, min(first + pp, microbatches)) for first in range(0, microbatches, pp)]
    forward = [visit for group in groups for visit in product(range(vpp), group)]
    backward = [(vpp - 1 - virtual, microbatch) for virtual, microbatch in forward]
    warmup = pp - stage - 1 if vpp == 1 else 2 * (pp - stage - 1) + (vpp - 1) * pp
    warmup = min(warmup, len(forward))
    order = [Work(False, *visit) for visit in forward[:warmup]]
    for ahead, behind in zip(forward[warmup:], backward, strict=False):
        order += [Work(False, *ahead), Work(True, *behind)]
    return order + [Work(True, *visit) for visit in backward[len(forward) - warmup :]]


def peak_held(order: Iterable[Work], bytes_by_virtual: Sequence[int]) -> int:
    """Return the maximum of bytes that a stage holds between the forward and backward passes of its microbatches."""
    held = peak = 0
    for work in order:
        held += -bytes_by_virtual[work.virtual] if work.backward else bytes_by_virtual[work.virtual]
        peak = max(peak, held)
    return peak


def play(
    pp: int,
    vpp: int,
    microbatches: int,
    *,
    forward_seconds: Sequence[float],
    backward_seconds: Sequence[float],
    message_seconds: float = 0.0,
) -> Timeline:
    """Run one step of the pipeline on paper.

    Args:
        forward_seconds: Of one microbatch through each chunk, in the order a microbatch visits them; backward likewise.
        message_seconds: From the end of a pass to where the next stage can begin.
    """
    orders = [stage_order(pp, vpp, stage, microbatches) for stage in range(pp)]
    done: dict[tuple[bool, int, int], float] = {}
    free, position, spans = [0.0] * pp, [0] * pp, list[WorkSpan]()
    total = sum(map(len, orders))
    while len(spans) < total:
        before = len(spans)
        for stage in range(pp):
            while position[stage] < len(orders[stage]):
                work = orders[stage][position[stage]]
                chunk = work.virtual * pp + stage
                ready = _ready(work, chunk, pp * vpp, done, message_seconds)
                if ready is None:
                    break
                start = max(free[stage], ready)
                free[stage] = start + (backward_seconds if work.backward else forward_seconds)[chunk]
                done[work.backward, chunk, work.microbatch] = free[stage]
                spans.append(WorkSpan(stage, work, start, free[stage]))
                position[stage] += 1
        assert len(spans) > before, "the order of work deadlocks"
    return Timeline(stages=pp, spans=tuple(spans))


def _ready(
    work: Work, chunk: int, chunks: int, done: dict[tuple[bool, int, int], float], message_seconds: float
) -> float | None:
    """Return when the input of a piece of work is there; None while that is not known."""
    if work.backward and chunk == chunks - 1:
        return done.get((False, chunk, work.microbatch))
    if not work.backward and chunk == 0:
        return 0.0
    source = chunk + 1 if work.backward else chunk - 1
    sent = done.get((work.backward, source, work.microbatch))
    return None if sent is None else sent + message_seconds
