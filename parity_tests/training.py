"""Rung 9 on both sides: the same batches, schedule and AdamW, in our training step and in transformers and torch."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from megatron_ads.config.model import Precision
from megatron_ads.config.training import Schedule
from megatron_ads.data.packed_batch import PackedBatch
from megatron_ads.runtime.device import device
from parity_tests import reference
from parity_tests.harness.model_jobs import rows
from parity_tests.harness.training_jobs import Recipe, start
from parity_tests.machines import CPU_FP32, Machine

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Training:
    """One training, described for either side."""

    folder: Path
    steps: list[list[Row]]
    """The packed rows of each step: tokens, labels, positions, mask, boundaries, as ``model_jobs.rows``."""
    peak: float = 1e-3
    warmup_steps: int = 5
    weight_decay: float = 0.1
    clip_grad: float = 1.0
    questions_NS: Tensor | None = None
    """Scored by the trained model: the logits of the token behind the last place."""
    betas: tuple[float, float] = field(default=(0.9, 0.95))
    epsilon: float = 1e-8


@dataclass(frozen=True, slots=True)
class Trained:
    """The loss of each step in nats per target token, and the answers."""

    losses: list[float]
    answers_NV: Tensor | None


def language_steps(count: int, vocabulary: int) -> list[list[Row]]:
    """Return four packed rows for each step."""
    return [rows(vocabulary, seed=900 + step) for step in range(count)]


def pairs_row(tokens_NS: Tensor, labels_N: Tensor) -> Row:
    """Pack pairs of one length into a row whose only targets are the tokens behind each pair."""
    count, length = tokens_NS.shape
    labels_NS = tokens_NS.roll(-1, dims=1)
    labels_NS[:, -1] = labels_N
    mask_NS = torch.zeros(count, length)
    mask_NS[:, -1] = 1
    return {
        "tokens": tokens_NS.reshape(1, -1),
        "labels": labels_NS.reshape(1, -1),
        "positions": torch.arange(length).repeat(count)[None],
        "mask": mask_NS.reshape(1, -1),
        "boundaries": torch.arange(0, (count + 1) * length, length, dtype=torch.int32),
    }


def _packed(row: Row) -> PackedBatch:
    return PackedBatch.unpadded(
        tokens_BS=row["tokens"], labels_BS=row["labels"], mask_BS=row["mask"], cu_seqlens=row["boundaries"]
    )


def train_ours(training: Training, precision: Precision = Precision.fp32) -> Trained:
    """Train on one rank with the project's own step, optimizer and schedule."""
    from megatron_ads.training.step import run_step

    optim = {
        "learning_rate": training.peak,
        "schedule": Schedule.cosine,
        "warmup_steps": training.warmup_steps,
        "weight_decay": training.weight_decay,
        "beta1": training.betas[0],
        "beta2": training.betas[1],
        "epsilon": training.epsilon,
        "clip_grad": training.clip_grad,
    }
    settings = {"precision": precision, "layer_spec": "grouped"}
    model, _, _ = start(Recipe(folder=training.folder, model=settings, optim=optim, steps=len(training.steps)))
    losses = [
        run_step(
            [_packed(row) for row in step], model.chunks, model.optimizer, learning_rate=model.schedule.at(number)
        ).loss
        for number, step in enumerate(training.steps)
    ]
    if training.questions_NS is None:
        return Trained(losses, None)
    questions_NS = training.questions_NS
    positions_NS = torch.arange(questions_NS.size(1)).expand(questions_NS.shape)
    with torch.no_grad():
        answers_NSV = model.models[0].eval()(questions_NS.to(device()), positions_NS.to(device()), None)
        return Trained(losses, answers_NSV[:, -1].float().cpu())


def train_theirs(training: Training, machine: Machine = CPU_FP32) -> Trained:
    """Train with transformers and ``torch.optim.AdamW``, every sample a row of its own, padded behind its end."""
    model = reference.load(training.folder, machine)
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": training.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        betas=training.betas,
        eps=training.epsilon,
    )
    losses = []
    for number, step in enumerate(training.steps):
        for group in optimizer.param_groups:
            group["lr"] = _cosine(training, number)
        optimizer.zero_grad()
        loss = _loss(model, [reference.on_device(row, machine) for row in step])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), training.clip_grad)
        optimizer.step()
        losses.append(float(loss.detach()))
    if training.questions_NS is None:
        return Trained(losses, None)
    with torch.no_grad():
        return Trained(losses, model(training.questions_NS.to(machine.device)).logits[:, -1].cpu())


def _cosine(training: Training, step: int) -> float:
    """Linear warm-up, then half a cosine that reaches 0 at the last step."""
    if step < training.warmup_steps:
        return training.peak * (step + 1) / (training.warmup_steps + 1)
    progress = (step - training.warmup_steps) / (len(training.steps) - 1 - training.warmup_steps)
    return training.peak * (1 + math.cos(math.pi * progress)) / 2


def _loss(model: Any, step: Sequence[Row]) -> Tensor:
    tokens, labels, masks = zip(*(sample for row in step for sample in _samples(row)), strict=True)
    tokens_BS, labels_BS = (torch.nn.utils.rnn.pad_sequence(list(x), batch_first=True) for x in (tokens, labels))
    mask_BS = torch.nn.utils.rnn.pad_sequence(list(masks), batch_first=True)
    losses_BS = cross_entropy(model(tokens_BS).logits.transpose(1, 2), labels_BS, reduction="none")
    return (losses_BS * mask_BS).sum() / mask_BS.sum()


def _samples(row: Row) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    starts = row["boundaries"].tolist()
    for begin, end in pairwise(starts):
        yield row["tokens"][0, begin:end], row["labels"][0, begin:end], row["mask"][0, begin:end]
