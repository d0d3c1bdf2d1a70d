"""Jobs on a real Slurm with emulated nodes: preempted, robbed of a rank or a node, out of time, only placed, swept.

./tests/slurm/run.sh        installs Slurm where it may, and runs these tests
"""

import json
import os
import signal
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from parity_tests.harness.real_job import write_small_model
from tests.slurm.cluster import Cluster, rank_pid, running_cluster, why_not

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
    pytest.mark.timeout(900),
]
TWO_BY_TWO = ("--nodes=2", "--ntasks-per-node=2")
STEPS = 60


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running_cluster(tmp_path_factory.mktemp("pair"), nodes=2, cpus=2) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_model(tmp_path_factory.mktemp("slurm") / "model")


@dataclass(frozen=True)
class Run:
    """A run's folder, and what its job is given."""

    folder: Path
    model: Path
    steps: int = STEPS

    @property
    def log(self) -> Path:
        return self.folder / "job.log"

    @property
    def words(self) -> tuple[str, ...]:
        return (
            "sft/quickstart",
            f"model.load={self.model}",
            f"log.dir={self.folder}",
            "log.tensorboard=false",
            "checkpoint.save_every=10",
            f"train.max_steps={self.steps}",
            "train.evaluate_every=null",
            "data.validation_rows=0",
            "data.seq_length=128",
            "train.global_batch_size=4",
            "train.micro_batch_size=1",
            "optim.warmup_steps=2",
            "runtime.timeout_seconds=60",
            "runtime.threads=1",
            "layout.pp=2",
            "layout.ep=2",
            "layout.first_stage_layers=2",
        )

    def losses(self) -> dict[int, float]:
        file = self.folder / "metrics.jsonl"
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        records = [json.loads(line) for line in lines if line.endswith("\n")]
        return {record["step"]: record["loss"] for record in records if "loss" in record}

    def saved(self) -> list[int]:
        manifests = (self.folder / "checkpoints").glob("step-*/manifest.json")
        return sorted(int(manifest.parent.name.removeprefix("step-")) for manifest in manifests)

    def weights(self) -> dict[str, int]:
        return {file.name: zlib.crc32(file.read_bytes()) for file in (self.folder / "export").glob("*.safetensors")}

    def wait_for_step(self, cluster: Cluster, step: int) -> None:
        cluster.wait(f"step {step}", lambda: max(self.losses(), default=0) >= step, 120, self.log)


def test_a_preempted_job_that_then_loses_a_rank_and_a_node_ends_with_the_same_losses_and_weights(
    pair: Cluster, model: Path, tmp_path: Path
) -> None:
    undisturbed = Run(tmp_path / "undisturbed", model)
    undisturbed.folder.mkdir()
    job = pair.submit(undisturbed.log, *undisturbed.words, options=TWO_BY_TWO)
    assert pair.wait_for_end(job, undisturbed.log) == "COMPLETED", undisturbed.log.read_text()
    assert sorted(undisturbed.losses()) == list(range(1, STEPS + 1))

    run = Run(tmp_path / "disturbed", model)
    run.folder.mkdir()
    job = pair.submit(run.log, *run.words, options=TWO_BY_TWO)
    run.wait_for_step(pair, 3)
    pair.command("sbatch", "--partition=high", "--nodes=1", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    pair.wait_for_requeue(job, 1, run.log)
    stopped_at = max(run.losses())
    assert run.saved()[-1] == stopped_at < STEPS  # saved when it was told to stop, not at a multiple of save_every

    run.wait_for_step(pair, stopped_at + 2)
    victim = rank_pid(job, 3)
    assert victim is not None
    os.kill(victim, signal.SIGKILL)
    pair.wait_for_requeue(job, 2, run.log)
    said = run.log.read_text()
    assert "ended without a record (killed, out of memory, or its machine lost): rank 3" in said
    assert "rank 3 (stage 1) has gone" in said

    run.wait_for_step(pair, max(run.losses()) + 2)
    pair.lose_node("n2")
    pair.wait_for_requeue(job, 3, run.log)

    assert pair.wait_for_end(job, run.log) == "COMPLETED", run.log.read_text()
    assert run.losses() == undisturbed.losses()
    assert run.weights() == undisturbed.weights()
    assert len(run.weights()) == 4
    assert [attempt.name for attempt in sorted((run.folder / "slurm" / job).iterdir())] == [
        f"attempt-{number}" for number in range(4)
    ]


def test_a_job_near_its_time_limit_saves_and_goes_back_into_the_queue(
    pair: Cluster, model: Path, tmp_path: Path
) -> None:
    run = Run(tmp_path, model, steps=2000)
    # Limits are whole minutes, and Slurm may send the signal up to a minute early.
    options = (*TWO_BY_TWO, "--time=2", "--signal=B:USR1@50")
    job = pair.submit(run.log, *run.words, "checkpoint.save_every=2000", options=options)
    pair.wait("the requeue", lambda: pair.field(job, "Restarts") == "1" and pair.state(job) == "PENDING", 180, run.log)
    pair.command("scancel", job)
    assert run.saved() == [max(run.losses())]
    assert "stopped on request, with a checkpoint" in run.log.read_text()


def test_what_the_user_has_to_mend_is_listed_and_not_tried_again(pair: Cluster, tmp_path: Path) -> None:
    run = Run(tmp_path, tmp_path / "nowhere")
    options = ("--nodes=1", "--ntasks-per-node=2")
    job = pair.submit(run.log, *run.words, "data.sources=[{kind: jsonl, path: no-rows.jsonl}]", options=options)
    assert pair.wait_for_end(job, run.log) == "FAILED"
    assert (pair.field(job, "ExitCode"), pair.field(job, "Restarts")) == ("2:0", "0")
    said = run.log.read_text()
    assert "does not divide the 2 ranks" in said
    assert f"{tmp_path}/nowhere does not exist" in said
    assert "no-rows.jsonl (data.sources) does not exist" in said


def test_the_elements_of_a_job_array_take_the_lines_of_a_sweep(pair: Cluster, model: Path, tmp_path: Path) -> None:
    rates = [1e-3, 2e-3]
    sweep = tmp_path / "sweep.txt"
    sweep.write_text("# learning rates\n" + "".join(f"optim.learning_rate={rate}\n" for rate in rates))
    run = Run(tmp_path / "run", model, steps=3)
    log = tmp_path / "job-%a.log"
    layout = ("layout.pp=1", "layout.first_stage_layers=null")
    options = ("--nodes=1", "--ntasks-per-node=2", "--array=0-2%2")
    job = pair.submit(log, *run.words, *layout, options=options, export=f"MEGATRON_ADS_SWEEP={sweep}")
    states = [pair.wait_for_end(f"{job}_{index}", tmp_path / f"job-{index}.log") for index in range(3)]
    assert states == ["COMPLETED", "COMPLETED", "FAILED"]
    assert f"The sweep {sweep} has 2 lines, 0 to 1, but this is element 2." in (tmp_path / "job-2.log").read_text()
    for index, rate in enumerate(rates):
        folder = run.folder / f"sweep-{index}"
        assert json.loads((folder / "run.json").read_text())["recipe"]["optim"]["learning_rate"] == rate
        assert (folder / "checkpoints" / "step-00000003" / "manifest.json").is_file()


def test_248_tasks_on_31_nodes_report_their_places_in_the_deepseek_r1_job(tmp_path: Path) -> None:
    with running_cluster(tmp_path / "cluster", nodes=31, cpus=8) as cluster:
        log = tmp_path / "placement.log"
        options = ("--nodes=31", "--ntasks-per-node=8")
        check = "MEGATRON_ADS_CHECK_PLACEMENT=1"
        job = cluster.submit(log, "sft/deepseek_r1_671b_248gpu", options=options, export=check)
        assert cluster.wait_for_end(job, log, seconds=400) == "COMPLETED", log.read_text()
        said = log.read_text()
        assert "248 of 248 tasks reported from 31 nodes: 31 stages, 61 decoder layers + 1 MTP, 248 shard files" in said
        assert "8 ranks without routed experts" in said
        assert "every rank has its place, and nothing is missing or duplicated" in said
        reports = (cluster.folder / f"placement-{job}.jsonl").read_text().splitlines()
        assert sorted(json.loads(line)["rank"] for line in reports) == list(range(248))

        other = tmp_path / "other.log"
        job = cluster.submit(other, "sft/deepseek_r1_671b_256h100", options=options, export=check)
        assert cluster.wait_for_end(job, other) == "FAILED"
        assert "which does not divide the 248 ranks of this job" in other.read_text()
