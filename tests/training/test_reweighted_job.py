"""A real job with instance weights and task shares: it continues exactly where it was, and its report shows both."""

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from parity_tests.harness.real_job import RealJob, write_small_model

pytestmark = pytest.mark.slow

STEPS, SAVED = 30, 10
LEARNABLE, RANDOM = "says_yes", "random_labels"
MEASURED_TIME = ("seconds", "per_second", "slowest_rank", "max_memory_allocated", "tflops_per_gpu")
"""In names of metrics that tell of the machine, not of the training."""


def chat(name: str, task: str, question: str, answer: str) -> str:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return json.dumps({"id": name, "task": task, "messages": messages}) + "\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reweighted")
    write_small_model(folder / "model")
    draw = random.Random(0)
    lines = [chat(f"y{number}", LEARNABLE, f"Say yes {number}", "yes yes yes") for number in range(40)]
    for number in range(40):
        words = " ".join(draw.choice(("shoes", "lamp", "sofa", "phone", "red", "blue")) for _ in range(3))
        lines.append(chat(f"r{number}", RANDOM, f"Query {number}", words))
    (folder / "rows.jsonl").write_text("".join(lines))
    return folder


def run(folder: Path, root: Path) -> RealJob:
    """Run the job to its end from whatever checkpoint is in ``root``; two replicas, rows packed."""
    job = RealJob(
        model=folder / "model",
        root=root,
        ranks=2,
        layout={"pp": 1, "ep": 2},
        steps=STEPS,
        save_every=SAVED,
        timeout_seconds=120,
        overrides=[
            f"data.sources=[{{kind: jsonl, path: {folder / 'rows.jsonl'}}}]",
            "data.validation_rows=20",
            "data.seq_length=64",
            "train.evaluate_every=5",
            "checkpoint.save_total_limit=9",
            "optim.learning_rate=1e-2",
            "reweight.instances=true",
            "reweight.interval=4",  # so that the checkpoint is in the middle of an interval
            "reweight.tasks=true",
        ],
    )
    job.run_to_end(forked=True)
    return job


@pytest.fixture(scope="module")
def whole(folder: Path) -> Iterator[RealJob]:
    """The job without an interruption."""
    yield run(folder, folder / "whole")


def trained(job: RealJob) -> list[dict[str, float]]:
    """Return what the job logged behind the checkpoint: losses, weights and shares."""
    return [
        {name: value for name, value in record.items() if not any(part in name for part in MEASURED_TIME)}
        for record in job.metrics()
        if record["step"] > SAVED
    ]


def test_a_job_resumed_within_an_interval_has_the_same_losses_weights_and_shares_to_the_bit(
    folder: Path, whole: RealJob
) -> None:
    name = f"step-{SAVED:08d}"
    shutil.copytree(whole.checkpoints / name, folder / "resumed" / "checkpoints" / name)
    resumed = run(folder, folder / "resumed")
    assert min(resumed.losses()) == SAVED + 1
    assert trained(resumed) == trained(whole)
    names = {name for record in trained(whole) for name in record}
    assert {f"instance_weight_p50/{RANDOM}", f"task_share/{RANDOM}", f"validation_loss/{RANDOM}", "loss"} <= names
    assert resumed.weights() == whole.weights() != {}


def test_the_task_that_is_learned_gives_share_to_the_one_that_is_not_and_the_report_shows_it(whole: RealJob) -> None:
    shares = [record for record in whole.metrics() if f"task_share/{RANDOM}" in record]
    assert [record["step"] for record in shares] == list(range(5, STEPS + 1, 5))
    assert shares[-1][f"task_share/{RANDOM}"] > 0.6 > 0.4 > shares[-1][f"task_share/{LEARNABLE}"]
    page = (whole.root / "report.html").read_text()
    assert f"{RANDOM}: {shares[-1][f'task_share/{RANDOM}']:.4g} at {STEPS}" in page
    weights = [record for record in whole.metrics() if f"instance_weight_p50/{LEARNABLE}" in record]
    assert [record["step"] for record in weights] == list(range(4, STEPS + 1, 4))
    assert {record[f"instance_weight_p50/{LEARNABLE}"] for record in weights} != {1.0}
