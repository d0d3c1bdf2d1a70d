"""Adaptive weights in a real job: the same under data parallelism and packing as in a plain computation."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_ads.data.adaptive_weights import InstanceWeights
from megatron_ads.data.batches import BatchStream, ReplicaShare
from megatron_ads.data.mixing import WeightedRows
from megatron_ads.rows import TokenizedRow
from parity_tests.harness.ranks import run_ranks
from parity_tests.harness.training_jobs import Recipe, start
from tests.models.checkpoints import V3, write_checkpoint

STEPS, SAMPLES = 5, 12
BETA, LOWEST, HIGHEST = 2.0, 0.5, 2.0
SMALL_BETA = 2e-3
"""For the passes: a model with random weights has perplexities near 1000, and most samples change by hundreds."""


@dataclass(frozen=True)
class Measured:
    """What one rank saw of each step."""

    losses: list[float]
    samples: list[list[int]]
    sample_losses: list[list[float]]
    weights: list[list[float]]
    """Of the samples of the step, as they were used in it."""
    passes: list[list[float]]
    """Losses of all samples in each pass over them."""


def samples(vocabulary: int) -> list[TokenizedRow]:
    draw = np.random.default_rng(0)
    made = []
    for number in range(SAMPLES):
        length = 6 + number % 5
        weights = np.ones(length, dtype=np.float32)
        weights[: 2 + number % 3] = 0
        tokens = draw.integers(1, vocabulary, length).astype(np.int32)
        made.append(TokenizedRow(f"r{number}", "test", tokens, weights))
    return made


def train_reweighted(recipe: Recipe, packing: bool, rows_per_step: int, exact: bool = False) -> Measured:
    """Train with instance weights renewed every other step; if ``exact``, from a pass over all samples."""
    from megatron_ads.layout import rank
    from megatron_ads.training.step import run_pass, run_step

    model, shards, _ = start(recipe)
    layout = shards.layout
    share = ReplicaShare(rows_per_step, 1, layout.coordinates(rank()).dp, layout.dp)
    stream = BatchStream(
        [WeightedRows(samples(shards.shape.vocab_size))],
        share,
        seq_length=32,
        packing=packing,
        seed=0,
        weights=InstanceWeights(
            ["test"] * SAMPLES, interval=2, beta=SMALL_BETA if exact else BETA, lowest=LOWEST, highest=HIGHEST
        ),
    )
    measured = Measured([], [], [], [], [])

    def renew() -> None:
        pass_losses = run_pass(stream.all_rows(), model.chunks) if exact else None
        stream.renew_weights(pass_losses)
        measured.passes.extend([pass_losses] if pass_losses else [])

    if exact:
        renew()
    for _ in range(STEPS):
        batches = stream.next_step()
        drawn = [draw.number for draw in stream._step]
        assert stream._weights is not None
        measured.weights.append(stream._weights.of(drawn).tolist())
        report = run_step(batches, model.chunks, model.optimizer, learning_rate=3e-3)
        stream.observe(report.sample_losses)
        if stream.weights_are_due:
            renew()
        measured.losses.append(report.loss)
        measured.samples.append(drawn)
        measured.sample_losses.append(report.sample_losses)
    return measured


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return write_checkpoint(tmp_path_factory.mktemp("reweighting") / "hf", V3)


@pytest.fixture(scope="module")
def replicas(folder: Path) -> list[Measured]:
    """Two replicas, rows packed."""
    return run_ranks(2, train_reweighted, Recipe(folder=folder), True, 4)


def test_all_ranks_have_the_same_losses_and_weights(replicas: list[Measured]) -> None:
    assert replicas[0] == replicas[1]


def test_the_weights_are_those_of_the_equations_computed_plainly(replicas: list[Measured]) -> None:
    measured, rows = replicas[0], samples(1000)
    before: dict[int, float] = {}
    weight = dict.fromkeys(range(SAMPLES), 1.0)
    interval: dict[int, tuple[float, int]] = {}
    for step in range(STEPS):
        assert measured.weights[step] == pytest.approx([weight[number] for number in measured.samples[step]])
        for number, loss in zip(measured.samples[step], measured.sample_losses[step], strict=True):
            targets = sum(1 for value in rows[number].loss_weights if value)
            total, count = interval.get(number, (0.0, 0))
            interval[number] = (total + loss, count + targets)
        if step % 2 == 1:
            for number, (total, count) in interval.items():
                now = math.exp(total / count)
                if number in before:
                    weight[number] = min(max(math.exp(-BETA * (before[number] - now)), LOWEST), HIGHEST)
                before[number] = now
            interval = {}
    assert any(value != 1 for value in weight.values())


def test_the_objective_is_the_weighted_mean(replicas: list[Measured]) -> None:
    measured, rows = replicas[0], samples(1000)
    for step in range(STEPS):
        targets = sum(rows[number].target_count for number in measured.samples[step])
        weighted = np.dot(measured.weights[step], measured.sample_losses[step])
        assert measured.losses[step] == pytest.approx(weighted / targets, rel=1e-6)


def test_losses_of_samples_do_not_depend_on_packing_and_replicas(folder: Path, replicas: list[Measured]) -> None:
    """The first step of one process without packing has the same weights: each sample's loss must agree."""
    (alone,) = run_ranks(1, train_reweighted, Recipe(folder=folder), False, SAMPLES)
    of_sample = dict(zip(alone.samples[0], alone.sample_losses[0], strict=True))
    assert len(of_sample) == SAMPLES
    expected = [of_sample[number] for number in replicas[0].samples[0]]
    assert replicas[0].sample_losses[0] == pytest.approx(expected, rel=1e-5)


def test_exact_weights_are_those_of_passes_over_all_samples_whatever_the_layout(folder: Path) -> None:
    split = run_ranks(2, train_reweighted, Recipe(folder=folder), True, 4, True)
    assert split[0] == split[1]
    measured, rows = split[0], samples(1000)
    assert [len(losses) for losses in measured.passes] == [SAMPLES] * 3  # before the first step, and after 2 and 4
    weight = [1.0] * SAMPLES
    for step in range(STEPS):
        assert measured.weights[step] == pytest.approx([weight[number] for number in measured.samples[step]])
        if step % 2 == 1:
            before, now = (
                [math.exp(loss / row.target_count) for loss, row in zip(losses, rows, strict=True)]
                for losses in measured.passes[step // 2 : step // 2 + 2]
            )
            progress = [b - n for b, n in zip(before, now, strict=True)]
            weight = [min(max(math.exp(-SMALL_BETA * delta), LOWEST), HIGHEST) for delta in progress]
    assert len({*weight}) > SAMPLES / 2
    (alone,) = run_ranks(1, train_reweighted, Recipe(folder=folder), False, SAMPLES, True)
    assert measured.passes[0] == pytest.approx(alone.passes[0], rel=1e-5)  # under the same weights of the model
