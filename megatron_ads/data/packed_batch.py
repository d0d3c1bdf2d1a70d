"""One microbatch: whole samples packed end to end into rows of one length, and what their loss is divided by.

Packing is best-fit decreasing and deterministic; no sample is ever split.

Shape suffixes: B = rows of a microbatch, S = tokens of a row.
"""

from bisect import bisect_left, bisect_right, insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_ads.config.training import Normalize
from megatron_ads.rows import TokenizedRow

PADDING_TOKEN = 0

PLACE = "place"
"""Name in ``PackedBatch.extra`` of what ``places`` returns."""

PackedRow = Sequence[int]
"""The samples of one row, in order: each by its number in its step (or in a pass over all rows)."""


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """One microbatch. Every row holds whole samples, then padding."""

    tokens_BS: Tensor
    """int64; the input token at each position."""
    labels_BS: Tensor
    """int64; the token that follows it in its sample."""
    positions_BS: Tensor
    """int64; counted from 0 in each sample."""
    mask_BS: Tensor
    """float32; weight of the loss of each label, 0 where none is counted."""
    sample_BS: Tensor
    """int64; number in the step of the sample that each position belongs to; 0 at padding, where ``mask_BS`` is 0."""
    cu_seqlens: Tensor
    """int32; where each sample, or the padding that ends a row, begins in the flattened B * S tokens; then B * S."""
    step_samples: int
    """Samples of the whole step, of which ``sample_BS`` counts."""
    sample_count: int
    token_count: int
    """Tokens that are not padding."""
    target_count: int
    """Labels whose weight is not 0."""
    normalizer: int
    """What the sum of the weighted losses of a step is divided by, summed over its microbatches and replicas: the
    target tokens, or the samples that have any."""
    extra: dict[str, Tensor] = field(default_factory=dict)
    """(B, S) each: what an objective needs for each label besides, by name; 0 at padding."""

    @classmethod
    def of(
        cls,
        samples: Sequence[TokenizedRow],
        rows: Sequence[PackedRow],
        *,
        seq_length: int,
        normalize: Normalize = Normalize.token,
        extra: Mapping[str, Sequence[NDArray[Any]]] | None = None,
    ) -> "PackedBatch":
        """Lay samples end to end in each row, shift the labels, and count what the loss is normalised by.

        Args:
            samples: Those of the whole step.
            rows: Which of them each row of this microbatch holds.
            extra: For each name, an array for every sample of the step with one value for each of its N - 1 labels.
        """
        shape = (len(rows), seq_length)
        tokens_BS, labels_BS = np.full((2, *shape), PADDING_TOKEN, dtype=np.int64)
        positions_BS, sample_BS = np.zeros((2, *shape), dtype=np.int64)
        mask_BS = np.zeros(shape, dtype=np.float32)
        extra_BS = {name: np.zeros(shape, dtype=values[0].dtype) for name, values in (extra or {}).items()}
        counting = np.arange(seq_length)
        boundaries = [0]
        for b, numbers in enumerate(rows):
            start = 0
            for number in numbers:
                sample = samples[number]
                place = slice(start, start + sample.predictions)
                tokens_BS[b, place] = sample.tokens[:-1]
                labels_BS[b, place] = sample.tokens[1:]
                positions_BS[b, place] = counting[: sample.predictions]
                mask_BS[b, place] = sample.loss_weights[1:]
                if normalize is Normalize.sample:
                    mask_BS[b, place] /= max(sample.target_count, 1)
                sample_BS[b, place] = number
                for name, values_BS in extra_BS.items():
                    values_BS[b, place] = (extra or {})[name][number]
                start = place.stop
                boundaries.append(b * seq_length + start)
            if start < seq_length:
                positions_BS[b, start:] = counting[: seq_length - start]
                boundaries.append((b + 1) * seq_length)
        here = [samples[number] for numbers in rows for number in numbers]
        targets = [sample.target_count for sample in here]
        return cls(
            tokens_BS=torch.from_numpy(tokens_BS),
            labels_BS=torch.from_numpy(labels_BS),
            positions_BS=torch.from_numpy(positions_BS),
            mask_BS=torch.from_numpy(mask_BS),
            sample_BS=torch.from_numpy(sample_BS),
            cu_seqlens=torch.tensor(boundaries, dtype=torch.int32),
            step_samples=len(samples),
            sample_count=len(here),
            token_count=sum(sample.predictions for sample in here),
            target_count=sum(targets),
            normalizer=sum(targets) if normalize is Normalize.token else sum(count > 0 for count in targets),
            extra={name: torch.from_numpy(values_BS) for name, values_BS in extra_BS.items()},
        )

    @classmethod
    def unpadded(cls, *, tokens_BS: Tensor, labels_BS: Tensor, mask_BS: Tensor, cu_seqlens: Tensor) -> "PackedBatch":
        """Take rows that are given as tensors and have no padding; losses of single samples are not told apart.

        Every label whose weight is not 0 counts. ``cu_seqlens`` is as in the field.
        """
        targets = int(mask_BS.count_nonzero())
        starts_T = cu_seqlens[:-1].long().repeat_interleave(cu_seqlens.diff())
        return cls(
            tokens_BS=tokens_BS,
            labels_BS=labels_BS,
            positions_BS=(torch.arange(tokens_BS.numel()) - starts_T).view(tokens_BS.shape),
            mask_BS=mask_BS,
            sample_BS=torch.zeros_like(tokens_BS),
            cu_seqlens=cu_seqlens,
            step_samples=1,
            sample_count=len(cu_seqlens) - 1,
            token_count=tokens_BS.numel(),
            target_count=targets,
            normalizer=targets,
        )

    def pinned(self) -> "PackedBatch":
        """Return it in page-locked memory, from which a GPU copies while its kernels run."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        pinned: dict[str, Any] = {
            name: value.pin_memory() for name, value in values.items() if isinstance(value, Tensor)
        }
        return replace(self, **pinned, extra={name: values_BS.pin_memory() for name, values_BS in self.extra.items()})


def places(rows: Sequence[TokenizedRow]) -> list[NDArray[np.int64]]:
    """Return of each row the places of its labels among those of all rows, counted from 1: 0 is where padding goes."""
    ends = accumulate((row.predictions for row in rows), initial=1)
    return [np.arange(start, end) for start, end in pairwise(ends)]


def pack(lengths: Sequence[int], *, capacity: int, rows: int) -> list[list[int]] | None:
    """Place samples into ``rows`` rows of ``capacity``, the longest first, each where it leaves least room.

    Returns:
        The indices of the samples of each row, ascending (a row may be empty); None if they do not fit.
    """
    room = [(capacity, row) for row in range(rows)]  # kept ascending
    placed: list[list[int]] = [[] for _ in range(rows)]
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        found = bisect_left(room, (lengths[index], -1))
        if found == len(room):
            return None
        left, row = room.pop(found)
        insort(room, (left - lengths[index], row))
        placed[row].append(index)
    return [sorted(row) for row in placed]


def pack_prefix(lengths: Sequence[int], *, capacity: int, rows: int) -> list[list[int]]:
    """Pack as many samples from the front as fit into ``rows`` rows; no length may exceed ``capacity``.

    The prefix is found by bisection between one sample a row, which always fits, and the sum of the lengths.

    Returns:
        As :func:`pack`, for samples 0, 1, ... up to some number; the others are left for the next call.
    """
    low, high = min(rows, len(lengths)), bisect_right(list(accumulate(lengths)), capacity * rows)
    best = pack(lengths[:low], capacity=capacity, rows=rows)
    while low < high:
        middle = (low + high + 1) // 2
        tried = pack(lengths[:middle], capacity=capacity, rows=rows)
        if tried is None:
            high = middle - 1
        else:
            low, best = middle, tried
    assert best is not None, "one sample a row always fits"
    return best
