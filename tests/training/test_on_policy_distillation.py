"""Real jobs of on-policy distillation: a policy comes nearer to its teacher, and stays where it is its own teacher."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from parity_tests.harness.real_job import RealJob, write_small_model
from tests.training.test_rl import course

pytestmark = pytest.mark.slow

STEPS, PROMPTS = 6, 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a student, and a teacher that thinks the same but is five times as sure of it."""
    folder = tmp_path_factory.mktemp("on-policy")
    shutil.copytree(write_small_model(folder / "student"), folder / "teacher")
    for file in (folder / "teacher").glob("*.safetensors"):
        weights = load_file(file)
        if "model.norm.weight" in weights:
            weights["model.norm.weight"] *= 5
            save_file(weights, file, metadata={"format": "pt"})
    return folder


def job(folder: Path, name: str, *overrides: str, ranks: int = 2, steps: int = STEPS) -> RealJob:
    """Run a job to its end; one answer of at most 12 tokens to each prompt."""
    one = RealJob(
        recipe="rl/on_policy_distillation",
        model=folder / "student",
        root=folder / name,
        ranks=ranks,
        layout={"pp": 1, "ep": ranks},
        steps=steps,
        timeout_seconds=120,
        overrides=[
            f"train.global_batch_size={PROMPTS}",
            "train.micro_batch_size=16",
            "rollout.max_new_tokens=12",
            "rollout.batch_size=16",
            "optim.warmup_steps=0",
            "optim.learning_rate=1e-2",
            "checkpoint.save_every=null",
            *overrides,
        ],
    )
    one.run_to_end(forked=True)
    return one


@pytest.fixture(scope="module")
def whole(folder: Path) -> Iterator[RealJob]:
    """A job on two ranks that share the experts."""
    yield job(folder, "whole", f"teacher.model={folder / 'teacher'}")


def test_the_reverse_kl_falls_and_a_step_s_file_has_what_the_teacher_said(whole: RealJob) -> None:
    steps = [record for record in whole.metrics() if "teacher/reverse_kl" in record]
    divergences = [record["teacher/reverse_kl"] for record in steps]
    # Over the 384 tokens of a step the estimate is within 0.1 of its expectation.
    assert len(divergences) == STEPS and divergences[0] > 1.2 and np.mean(divergences[3:]) < 0.9 * divergences[0]
    for number, record in enumerate(steps, 1):
        assert record["timing_s/teacher"] > 0 and not any(name.startswith("critic/") for name in record)
        # With one update a step the ratio is 1: the loss is the mean of -A = log p_student - log p_teacher.
        assert record["actor/pg_loss"] == pytest.approx(record["teacher/reverse_kl"], abs=1e-5)
        header, *answers = map(json.loads, (whole.root / f"rollouts/step-{number:06d}.jsonl").read_text().splitlines())
        assert header["faults"] == {} and len(answers) == PROMPTS
        own, other = (
            np.concatenate([answer[name] for answer in answers])
            for name in ("log_probabilities", "teacher_log_probabilities")
        )
        assert record["teacher/reverse_kl"] == pytest.approx((own - other).mean())
    assert "<h2>Teacher</h2>" in (whole.root / "report.html").read_text()


def test_an_update_from_a_dump_is_that_of_the_job_to_the_bit(folder: Path, whole: RealJob) -> None:
    # The teacher is not asked again: it is not even there.
    again = job(
        folder,
        "again",
        "rollout.mode=train_only",
        f"rollout.dump={whole.root / 'rollouts'}",
        f"teacher.model={folder / 'nowhere'}",
    )
    assert again.weights() == whole.weights()
    there = [{name: record[name] for name in here} for here, record in zip(course(again), course(whole), strict=True)]
    assert there == course(again) and len(there) >= STEPS


def test_a_policy_that_is_its_own_teacher_has_nothing_to_learn(folder: Path) -> None:
    alone = job(folder, "alone", f"teacher.model={folder / 'student'}", "optim.weight_decay=0", ranks=1, steps=1)
    (record,) = (record for record in alone.metrics() if "loss" in record)
    assert abs(record["teacher/reverse_kl"]) < 1e-5 and abs(record["loss"]) < 1e-5 and record["grad_norm"] < 1e-5
    (file,) = (alone.root / "rollouts").glob("step-*.jsonl")
    for answer in map(json.loads, file.read_text().splitlines()[1:]):
        np.testing.assert_allclose(answer["teacher_log_probabilities"], answer["log_probabilities"], rtol=0, atol=1e-5)
