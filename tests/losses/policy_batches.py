"""Answers of one update, and the microbatches that they are packed into for a loss."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_ads.config.rl import PolicyConfig
from megatron_ads.data.packed_batch import PackedBatch
from megatron_ads.losses.loss import TokenValues
from megatron_ads.losses.policy import ADVANTAGES, ENGINE, OLD, REFERENCE, answer_weight, normalize_of, policy_loss
from megatron_ads.rows import TokenizedRow

MAX_NEW_TOKENS = 10
PROMPT_LABELS = 2


@dataclass(frozen=True, slots=True)
class Answer:
    """Log-probabilities of the tokens of one answer by each policy, in FP32."""

    log_p: Tensor
    old: Tensor
    reference: Tensor
    engine: Tensor
    advantage: float | NDArray[np.float32]
    """Of all of its tokens, or of each."""
    counts: bool = True


def random_answers(lengths: Sequence[int], *, seed: int = 0) -> list[Answer]:
    """Return answers whose policies differ enough for every kind of clipping; the second does not count."""
    draw = torch.Generator().manual_seed(seed)
    answers = []
    for number, length in enumerate(lengths):
        log_p = -3 * torch.rand(length, generator=draw) - 0.1
        old, reference, engine = (log_p + 0.6 * torch.randn(length, generator=draw) for _ in range(3))
        advantage = torch.randn(1, generator=draw).item()
        answers.append(Answer(log_p.requires_grad_(), old, reference, engine, advantage, number != 1))
    return answers


def _row(answer: Answer, config: PolicyConfig) -> TokenizedRow:
    tokens, weights = np.zeros((2, 1 + PROMPT_LABELS + len(answer.log_p)))
    if answer.counts:
        weights[1 + PROMPT_LABELS :] = answer_weight(config.loss_agg_mode, len(answer.log_p), MAX_NEW_TOKENS)
    return TokenizedRow("r", "test", tokens.astype(np.int32), weights.astype(np.float32))


def _with_prompt(values: Tensor) -> Tensor:
    """Put labels before an answer whose values must not matter."""
    return torch.cat([torch.full((PROMPT_LABELS,), float("nan")), values])


def batches(
    answers: Sequence[Answer], config: PolicyConfig, *, rows: Sequence[Sequence[Sequence[int]]], seq_length: int
) -> list[TokenValues]:
    """Return each microbatch, as ``training.step`` hands it to a loss; ``rows`` says which answers each row has."""
    extra = {
        ADVANTAGES: [
            np.pad(np.full(len(each.log_p), each.advantage, np.float32), (PROMPT_LABELS, 0), mode="edge")
            for each in answers
        ],
        OLD: [_with_prompt(each.old).numpy() for each in answers],
        REFERENCE: [_with_prompt(each.reference).numpy() for each in answers],
        ENGINE: [_with_prompt(each.engine).numpy() for each in answers],
    }
    samples, normalize = [_row(each, config) for each in answers], normalize_of(config.loss_agg_mode)
    found = []
    for micro in rows:
        batch = PackedBatch.of(samples, micro, seq_length=seq_length, normalize=normalize, extra=extra)
        log_p_BS = torch.full(batch.tokens_BS.shape, -50.0)  # padding and prompts
        for row, numbers in enumerate(micro):
            start = 0
            for number in numbers:
                end = start + samples[number].predictions
                log_p_BS[row, start + PROMPT_LABELS : end] = answers[number].log_p
                start = end
        found.append(
            TokenValues(
                negative_log_p_T=-log_p_BS.view(1, -1),
                mask_T=batch.mask_BS.view(1, -1),
                sample_T=batch.sample_BS.view(-1),
                step_samples=batch.step_samples,
                normalizer=batch.normalizer,
                extra={name: values_BS.view(1, -1) for name, values_BS in batch.extra.items()},
            )
        )
    return found


@dataclass(frozen=True, slots=True)
class Update:
    """What a loss says of a whole update."""

    loss: float
    gradients: list[Tensor]
    """By the log-probabilities of each answer; divided like the loss."""
    totals: dict[str, float]
    per_sample: dict[str, list[float]]
    loss_tokens: int


def update(answers: Sequence[Answer], config: PolicyConfig, microbatches: Sequence[TokenValues]) -> Update:
    """Add up the microbatches as ``training.step`` does over all replicas."""
    loss = policy_loss(config)
    found = [loss.compute(values) for values in microbatches]
    count, total = sum(each.count for each in found), sum(each.sum for each in found)
    gradients = torch.autograd.grad(total / count, [each.log_p for each in answers], allow_unused=True)
    reports = {name: sum(each.report[name].double() for each in found) for name in (*loss.totals, *loss.per_sample)}
    return Update(
        loss=float(total.detach()) / count,
        gradients=[torch.zeros(0) if each is None else each for each in gradients],
        totals={name: float(reports[name]) for name in loss.totals},
        per_sample={name: reports[name].tolist() for name in loss.per_sample},
        loss_tokens=sum(int(values.mask_T.count_nonzero()) for values in microbatches),
    )
