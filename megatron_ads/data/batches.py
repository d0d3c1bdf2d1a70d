"""The batches of one replica: which samples form a step, how they share its rows, and the state of the sequence.

Which samples form a step, and how they are packed, depends on the data, the seed and the step alone. Replicas and
microbatches only divide the rows among themselves.

Shape suffixes: B = rows of a microbatch, S = tokens of a row.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_ads.config.training import Normalize
from megatron_ads.data.adaptive_weights import InstanceWeights, task_shares
from megatron_ads.data.mixing import Draw, Mixture, WeightedRows
from megatron_ads.data.packed_batch import PackedBatch, PackedRow, pack_prefix
from megatron_ads.errors import ConfigError, DataError
from megatron_ads.metrics.text import perplexities
from megatron_ads.rows import FittingRows, TokenizedRow
from megatron_ads.runtime.device import device, use_own_device

_ROWS_OF_A_PORTION = 1024


@dataclass(frozen=True, slots=True)
class ReplicaShare:
    """Which rows of a step one replica runs, and in which microbatches."""

    global_batch_size: int
    """Rows of a step, over all replicas."""
    micro_batch_size: int
    """Rows that a replica runs at once."""
    dp_rank: int
    dp_size: int

    def __post_init__(self) -> None:
        if self.global_batch_size % (self.micro_batch_size * self.dp_size):
            raise ConfigError(
                f"train.global_batch_size = {self.global_batch_size} rows do not divide into train.micro_batch_size * "
                f"dp = {self.micro_batch_size} * {self.dp_size} = {self.micro_batch_size * self.dp_size}. "
                "Choose a multiple."
            )

    def microbatches(self, rows: Sequence[PackedRow]) -> list[Sequence[PackedRow]]:
        """Return this replica's rows of a step, one entry per microbatch."""
        size, stride = self.micro_batch_size, self.micro_batch_size * self.dp_size
        first = self.dp_rank * size
        return [rows[start : start + size] for start in range(first, len(rows), stride)]


@dataclass(frozen=True, slots=True)
class DrawnStep:
    """One step of a replica before instance weights, and where in the data it ends."""

    draws: list[Draw]
    batches: list[PackedBatch]
    drawn: list[int]
    """Samples of each source, up to its end."""


class BatchStream:
    """The endless sequence of steps of one replica. Its state is a few integers, the same on every replica.

    A thread draws the next step while the latest one is trained on. The state is that after the latest step all the
    same, and what changes future draws discards the step that was drawn ahead: the sequence is as without the thread.
    """

    def __init__(
        self,
        sources: Sequence[WeightedRows],
        share: ReplicaShare,
        *,
        seq_length: int,
        packing: bool,
        seed: int,
        normalize: Normalize = Normalize.token,
        weights: InstanceWeights | None = None,
    ) -> None:
        """Start at the first step.

        Args:
            seq_length: S, in tokens; no sample may predict more.
            packing: Put as many samples into a row as fit; else one.
            weights: Multiply the loss of each sample; numbered as ``Mixture`` does. None is 1 for all.

        Raises:
            DataError: If a source has no rows, or one that is too long.
        """
        for source in sources:
            if not isinstance(source.rows, FittingRows):
                refuse_long_rows(source.rows, seq_length)
        self._mixture = Mixture(sources, seed=seed)
        self._share, self._seq_length, self._packing = share, seq_length, packing
        self._seed, self._normalize, self._weights = seed, normalize, weights
        self._step: list[Draw] = []
        self._drawn = list(self._mixture.drawn)
        self._thread = ThreadPoolExecutor(1, "batches", initializer=use_own_device)
        self._ahead: Future[DrawnStep] | None = None

    def next_step(self) -> list[PackedBatch]:
        """Return this replica's microbatches of the next step, and have the one after it drawn meanwhile."""
        step = self._draw_step() if self._ahead is None else self._ahead.result()
        self._step, self._drawn = step.draws, step.drawn
        self._ahead = self._thread.submit(self._draw_step)
        if self._weights is None:
            return step.batches
        weights = torch.from_numpy(self._weights.of([draw.number for draw in self._step])).float()
        return [replace(batch, mask_BS=batch.mask_BS * weights[batch.sample_BS]) for batch in step.batches]

    def _rewind(self) -> None:
        """Discard the step that was drawn ahead; the thread is idle afterwards."""
        if self._ahead is not None:
            wait([self._ahead])
            self._ahead = None
            self._mixture.drawn = list(self._drawn)

    def _draw_step(self) -> DrawnStep:
        """Draw and pack the samples of a step; those that do not fit any more go back."""
        count = self._share.global_batch_size
        drawn = [self._mixture.draw() for _ in range(count)]
        packed: list[PackedRow] = [[number] for number in range(count)]
        if self._packing:
            room = count * self._seq_length - sum(draw.row.predictions for draw in drawn)
            while room >= 0:
                drawn.append(self._mixture.draw())
                room -= drawn[-1].row.predictions
            packed = [*pack_prefix([draw.row.predictions for draw in drawn], capacity=self._seq_length, rows=count)]
        used = sum(map(len, packed))
        self._mixture.put_back([draw.source for draw in drawn[used:]])
        samples = [draw.row for draw in drawn[:used]]
        batches = [
            PackedBatch.of(samples, micro, seq_length=self._seq_length, normalize=self._normalize)
            for micro in self._share.microbatches(packed)
        ]
        if device().type == "cuda":
            batches = [batch.pinned() for batch in batches]
        return DrawnStep(drawn[:used], batches, list(self._mixture.drawn))

    def observe(self, sample_losses: Sequence[float]) -> dict[str, float]:
        """Take in the summed loss of each sample of the latest step; return the mean per target token of each task."""
        rows = [draw.row for draw in self._step]
        if self._weights is not None:
            targets = [row.target_count for row in rows]
            self._weights.observe([draw.number for draw in self._step], sample_losses, targets)
        return losses_by_task(rows, sample_losses)

    @property
    def weights_are_due(self) -> bool:
        """Whether the instance weights, if there are any, are to be renewed before the next step."""
        return self._weights is not None and self._weights.due

    def all_rows(self) -> Iterator[list[PackedBatch]]:
        """Yield this replica's microbatches of one pass over all rows, by number, in portions that fit in memory."""
        rows = self._mixture.rows
        while portion := list(islice(rows, _ROWS_OF_A_PORTION)):
            yield batches_of_all(portion, self._share, seq_length=self._seq_length, packing=self._packing)

    def renew_weights(self, pass_losses: Sequence[float] | None = None) -> dict[str, float]:
        """Renew the instance weights; return what they are now, by metric name.

        Args:
            pass_losses: The summed loss of every row, of a pass over ``all_rows``; None: what the steps measured.
        """
        assert self._weights is not None
        if pass_losses is not None:
            self._weights.measure_all(pass_losses, [row.target_count for row in self._mixture.rows])
        self._weights.renew()
        return self._weights.quantiles()

    def require_held_out(self, rows: Sequence[TokenizedRow]) -> None:
        """Refuse to start if a task whose share adapts will have no metric.

        Raises:
            DataError: Naming the tasks of which no row is held out.
        """
        held_out = {row.task for row in rows}
        if missing := [task for task in self._mixture.adaptive_tasks if task not in held_out]:
            raise DataError(
                f"reweight.tasks needs held-out rows of every task; there are none of {', '.join(missing)}. Raise "
                "data.validation_rows, or set keep_share: true for their source."
            )

    def adapt(self, metrics: Mapping[str, float], *, alpha: float) -> dict[str, float]:
        """Renew the shares of the adaptive tasks from their validation metrics; return them."""
        self._rewind()
        of_tasks = {task: metrics[task] for task in self._mixture.adaptive_tasks}
        return self._mixture.adapt(task_shares(of_tasks, alpha=alpha))

    def state_dict(self) -> dict[str, Any]:
        """Return the current state, and of which sequence it is; independent of the layout."""
        weights = {} if self._weights is None else {"weights": self._weights.state_dict()}
        content = {"rows": list(self._mixture.sizes), "contents": list(self._mixture.contents)}
        drawn = {"drawn": list(self._drawn)}
        return {**self._mixture.state_dict(), **drawn, **content, "seed": self._seed, **weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state`` was taken.

        Raises:
            DataError: If it belongs to other rows or another seed, or only one of the two has instance weights.
        """
        require_same_sequence(self._mixture, self._seed, state)
        if ("weights" in state) != (self._weights is not None):
            raise DataError(
                f"The checkpoint was made with{'' if 'weights' in state else 'out'} instance weights, this job is the "
                "other way round. Set reweight.instances as it was, or start anew with another checkpoint.dir."
            )
        self._rewind()
        self._mixture.load_state_dict(state)
        self._drawn = list(self._mixture.drawn)
        if self._weights is not None:
            self._weights.load_state_dict(state["weights"])


def require_same_sequence(mixture: Mixture, seed: int, state: Mapping[str, Any]) -> None:
    """Refuse to continue where ``state`` was taken, if it is of other rows or another seed.

    Raises:
        DataError: Saying which differ.
    """
    identity: dict[str, Any] = {"rows": list(mixture.sizes), "seed": seed}
    if "contents" in state:
        identity["contents"] = list(mixture.contents)
    elif "digests" in state and state["rows"] == identity["rows"]:  # older checkpoints have other digests, or none
        identity["digests"] = list(mixture.older_digests)
    for name, here in identity.items():
        if state[name] != here:
            raise DataError(
                f"The checkpoint was made with data of {_difference(name, state[name], here)}: the order of samples "
                "cannot continue. Use the same files, tokenizer and data settings, in the same order of sources, or "
                "start anew with another checkpoint.dir."
            )


def _difference(name: str, before: Any, here: Any) -> str:
    if name not in ("contents", "digests"):
        return f"{name} {before}, this job has {here}"
    if sorted(before) == sorted(here):
        return "the same sources in another order"
    changed = [str(index) for index, pair in enumerate(zip(before, here, strict=True)) if pair[0] != pair[1]]
    return f"other content in source{'s' if len(changed) > 1 else ''} {', '.join(changed)}, counted from 0"


def batches_of_all(
    rows: Sequence[TokenizedRow],
    share: ReplicaShare,
    *,
    seq_length: int,
    packing: bool,
    normalize: Normalize = Normalize.token,
    extra: Mapping[str, Sequence[NDArray[Any]]] | None = None,
) -> list[PackedBatch]:
    """Return this replica's microbatches of one pass over ``rows``, in order; every replica has as many.

    The last step is filled with rows of padding. ``share.global_batch_size`` rows are packed at a time. ``extra`` is
    as in ``PackedBatch.of``, for each of ``rows``.

    Raises:
        DataError: If a row is too long.
    """
    refuse_long_rows(rows, seq_length)
    batches: list[PackedBatch] = []
    start, count = 0, share.global_batch_size
    while start < len(rows):
        packed = _pack_from(rows, start, count, seq_length if packing else None)
        start += sum(map(len, packed))
        batches += [
            PackedBatch.of(rows, micro, seq_length=seq_length, normalize=normalize, extra=extra)
            for micro in share.microbatches(packed)
        ]
    return batches


def _pack_from(rows: Sequence[TokenizedRow], start: int, count: int, capacity: int | None) -> list[PackedRow]:
    """Return ``count`` packed rows, some of them perhaps empty; ``capacity`` None is one sample a row."""
    if capacity is None:
        return [[number] if number < len(rows) else [] for number in range(start, start + count)]
    lengths: list[int] = []
    room = count * capacity
    while room >= 0 and start + len(lengths) < len(rows):
        lengths.append(rows[start + len(lengths)].predictions)
        room -= lengths[-1]
    packed = pack_prefix(lengths, capacity=capacity, rows=count)
    return [[start + index for index in indices] for indices in packed]


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Held-out rows, and this replica's share of them in microbatches."""

    rows: Sequence[TokenizedRow]
    batches: Sequence[PackedBatch]

    def task_losses(self, sample_losses: Sequence[float]) -> dict[str, float]:
        """Return the mean loss per target token of each task, given each row's summed loss."""
        return losses_by_task(self.rows, sample_losses)

    def task_metrics(self, sample_losses: Sequence[float]) -> dict[str, float]:
        """Return M_t of each task, in [0, 1]: the mean over its rows of 1 / ppl."""
        inverse: dict[str, list[float]] = defaultdict(list)
        counts = np.array([row.target_count for row in self.rows], dtype=np.float64)
        for row, ppl in zip(self.rows, perplexities(np.asarray(sample_losses), counts), strict=True):
            inverse[row.task].append(1.0 / float(ppl))
        return {task: sum(values) / len(values) for task, values in sorted(inverse.items())}


def losses_by_task(rows: Sequence[TokenizedRow], sample_losses: Sequence[float]) -> dict[str, float]:
    """Return the mean loss per target token of each task, given each row's summed loss; unweighted."""
    sums: dict[str, list[float]] = {}
    for row, loss in zip(rows, sample_losses, strict=True):
        total = sums.setdefault(row.task, [0.0, 0.0])
        total[0] += loss
        total[1] += row.target_count
    return {task: loss / max(count, 1.0) for task, (loss, count) in sorted(sums.items())}


def refuse_long_rows(rows: Sequence[TokenizedRow], seq_length: int) -> None:
    """Raise a ``DataError`` on the first row that predicts more tokens than fit."""
    if row := next((row for row in rows if row.predictions > seq_length), None):
        raise DataError(
            f"Row {row.id!r} needs {row.predictions} positions, data.seq_length is {seq_length}. "
            "Raise data.seq_length, or leave the row out."
        )
