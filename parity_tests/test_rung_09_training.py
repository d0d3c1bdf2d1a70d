"""Rung 9: the same training in transformers and torch gives the same loss curve, and the same task metric.

A failure with rungs 5 and 8 green is in the optimizer: decay, clipping, moments, or the schedule. The step at which
the curves part is in the message: step 1 points at the first update, a later one at the schedule or at clipping.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from statistics import mean

import pytest
import torch
from sklearn.metrics import roc_auc_score

from parity_tests import jobs, phrase_match
from parity_tests.checkpoints import SMALL_V3, write_checkpoint
from parity_tests.machines import BF16, CPU_FP32, FP32, Machine
from parity_tests.phrase_match import NO, YES, Pairs, draw_pairs
from parity_tests.tolerances import AUC, BF16_TRAINING_LOSS, TRAINING_LOSS, record
from parity_tests.training import Row, Trained, Training, language_steps, pairs_row, train_ours, train_theirs

STEPS = 50
PAIRS_PER_STEP = 48
QUESTIONS = draw_pairs(2000, seed=2)


def _ours(training: Training, machine: Machine = CPU_FP32) -> Trained:
    return machine.run(1, train_ours, training, machine.precision, timeout=280)[0]


def _curve_difference(ours: Trained, theirs: Trained) -> tuple[float, int]:
    """Return the largest relative difference of a step's loss, and the step."""
    assert len(ours.losses) == len(theirs.losses)
    pairs = enumerate(zip(ours.losses, theirs.losses, strict=True))
    return max((abs(a / b - 1), step) for step, (a, b) in pairs)


@pytest.fixture(scope="module")
def language(checkpoint: Callable[[str], Path]) -> Training:
    return Training(folder=checkpoint("small-v3"), steps=language_steps(STEPS, 160))


@pytest.fixture(scope="module")
def their_language(language: Training) -> Callable[[Machine], Trained]:
    """Return transformers' and torch's training on a machine, each run once."""
    return cache(lambda machine: train_theirs(language, machine))


@pytest.mark.parametrize("machine", FP32, ids=str)
def test_the_loss_curves_are_the_same(
    language: Training, their_language: Callable[[Machine], Trained], machine: Machine
) -> None:
    ours, theirs = _ours(language, machine), their_language(machine)
    difference, step = _curve_difference(ours, theirs)
    record(9, f"{STEPS} steps: largest relative difference of the loss", difference, TRAINING_LOSS, machine)
    assert difference < TRAINING_LOSS.value, f"step {step}: {ours.losses[step]} against {theirs.losses[step]}"
    assert abs(ours.losses[-1] / ours.losses[0] - 1) > 100 * TRAINING_LOSS.value  # the weights did move


def test_an_error_of_the_optimizer_is_seen(language: Training) -> None:
    short = replace(language, steps=language.steps[:10])
    wrong = _with_error("decay_in_the_gradient", short, CPU_FP32)
    assert _curve_difference(wrong, train_theirs(short))[0] > TRAINING_LOSS.value


def _with_error(error: str, training: Training, machine: Machine) -> Trained:
    return machine.run(1, jobs.with_error, error, train_ours, training, machine.precision)[0]


def _mean_difference(ours: Trained, theirs: Trained) -> float:
    """Return the mean relative difference of a step's loss: that of single steps scatters in BF16."""
    return mean(abs(a / b - 1) for a, b in zip(ours.losses, theirs.losses, strict=True))


@pytest.mark.parametrize("machine", BF16, ids=str)
def test_the_loss_curve_in_bf16_is_that_in_fp32(
    language: Training, their_language: Callable[[Machine], Trained], machine: Machine
) -> None:
    """Weights are FP32 in our optimizer; torch's AdamW on BF16 weights would lose most updates."""
    difference = _mean_difference(_ours(language, machine), their_language(CPU_FP32))
    record(9, f"{STEPS} steps: mean relative difference of the loss from FP32", difference, BF16_TRAINING_LOSS, machine)
    assert difference < BF16_TRAINING_LOSS.value


@pytest.mark.parametrize("machine", BF16, ids=str)
def test_an_error_of_training_is_seen_in_bf16(language: Training, machine: Machine) -> None:
    short = replace(language, steps=language.steps[:10])
    wrong = _with_error("samples_see_each_other", short, machine)
    assert _mean_difference(wrong, train_theirs(short)) > BF16_TRAINING_LOSS.value


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Training:
    config = SMALL_V3 | {"vocab_size": phrase_match.VOCABULARY, "num_hidden_layers": 3, "n_routed_experts": 16}
    folder = write_checkpoint(tmp_path_factory.mktemp("task") / "model", config)
    return Training(
        folder=folder,
        steps=_steps(draw_pairs(STEPS * PAIRS_PER_STEP, seed=1)),
        peak=3e-3,
        weight_decay=0.01,
        questions_NS=QUESTIONS.tokens_NS,
    )


def _steps(pairs: Pairs) -> list[list[Row]]:
    batches = [pairs.batch(step, PAIRS_PER_STEP) for step in range(STEPS)]
    return [[pairs_row(batch.tokens_NS, batch.labels_N)] for batch in batches]


def _area(trained: Trained) -> float:
    assert trained.answers_NV is not None
    scores = trained.answers_NV[:, YES] - trained.answers_NV[:, NO]
    return float(roc_auc_score(QUESTIONS.labels_N == YES, scores))


@pytest.fixture(scope="module")
def their_task(task: Training) -> Callable[[Machine], Trained]:
    """Return the task trained with transformers and torch on a machine, each run once."""
    return cache(lambda machine: train_theirs(task, machine))


@pytest.mark.parametrize("machine", FP32, ids=str)
def test_the_phrase_match_area_is_that_of_a_model_trained_in_transformers(
    task: Training, their_task: Callable[[Machine], Trained], machine: Machine
) -> None:
    ours, theirs = _ours(task, machine), their_task(machine)
    difference, curve = abs(_area(ours) - _area(theirs)), _curve_difference(ours, theirs)[0]
    record(9, "phrase match: AUC ours, of 100", f"{100 * _area(ours):.2f}", machine=machine)
    record(9, "phrase match: AUC with transformers and torch, of 100", f"{100 * _area(theirs):.2f}", machine=machine)
    record(9, "phrase match: difference of the AUC, of 1", difference, AUC, machine)
    record(9, "phrase match: largest relative difference of the loss", f"{curve:.1e}", machine=machine)
    assert difference < AUC.value
    assert _area(theirs) > 0.95


def test_a_model_trained_on_shuffled_labels_misses_the_area(
    task: Training, their_task: Callable[[Machine], Trained]
) -> None:
    pairs = draw_pairs(STEPS * PAIRS_PER_STEP, seed=1).shuffled_labels(torch.Generator().manual_seed(5))
    ours = _ours(replace(task, steps=_steps(pairs)[:10]))
    assert abs(_area(ours) - _area(their_task(CPU_FP32))) > AUC.value


@pytest.mark.parametrize("machine", FP32, ids=str)
def test_the_loss_curves_of_a_dense_model_with_a_tied_head_are_the_same(
    checkpoint: Callable[[str], Path], machine: Machine
) -> None:
    training = Training(folder=checkpoint("qwen2-tied"), steps=language_steps(25, 160))
    ours, theirs = _ours(training, machine), train_theirs(training, machine)
    difference, step = _curve_difference(ours, theirs)
    record(9, "dense, tied: largest relative difference of the loss in 25 steps", difference, TRAINING_LOSS, machine)
    assert difference < TRAINING_LOSS.value, f"step {step}: {ours.losses[step]} against {theirs.losses[step]}"
    assert abs(ours.losses[-1] / ours.losses[0] - 1) > 10 * TRAINING_LOSS.value  # the weights did move
