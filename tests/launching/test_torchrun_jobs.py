"""Two machines under launch/torchrun.sh, here two process trees on loopback: a rank is lost, the job is stopped."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_ads.runtime.health.rank_record import ExitStatus
from parity_tests.harness.ranks import free_port
from parity_tests.harness.real_job import FEW_ROWS, descendants, write_small_model

ROOT = Path(__file__).parents[2]
STEPS = 2000
"""More than are done before the signal comes."""


@dataclass(frozen=True)
class TwoNodes:
    """The launch scripts of both nodes, and the folder that they share."""

    folder: Path
    scripts: list[subprocess.Popen[bytes]]

    def losses(self) -> dict[int, float]:
        file = self.folder / "metrics.jsonl"
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        records = [json.loads(line) for line in lines if line.endswith("\n")]
        return {record["step"]: record["loss"] for record in records if "loss" in record}

    def logs(self) -> str:
        return "".join(file.read_text(errors="replace") for file in sorted(self.folder.glob("node-*.log")))

    def wait_for_step(self, step: int) -> None:
        deadline = time.monotonic() + 120
        while max(self.losses(), default=0) < step:
            assert time.monotonic() < deadline, self.logs()
            assert all(script.poll() is None for script in self.scripts), self.logs()
            time.sleep(0.5)

    def rank_of(self, node: int) -> int:
        """Return the process of the rank that runs on a node."""
        for pid in descendants(self.scripts[node].pid):
            with contextlib.suppress(OSError):
                if b"\0RANK=" in Path(f"/proc/{pid}/environ").read_bytes():
                    return pid
        raise AssertionError(f"node {node} has no rank\n{self.logs()}")


@pytest.fixture
def job(tmp_path: Path) -> Iterator[TwoNodes]:
    model = write_small_model(tmp_path / "model")
    words = [
        "sft/quickstart",
        f"model.load={model}",
        f"log.dir={tmp_path}",
        "log.tensorboard=false",
        FEW_ROWS,
        "checkpoint.save_every=5",
        f"train.max_steps={STEPS}",
        "train.evaluate_every=null",
        "data.validation_rows=0",
        "data.seq_length=128",
        "train.global_batch_size=4",
        "train.micro_batch_size=1",
        "runtime.threads=1",
        "layout.pp=1",
        "layout.ep=2",
        "layout.first_stage_layers=null",
    ]
    meeting = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    scripts = []
    for node in (0, 1):
        environment = os.environ | meeting | {
            "NODE_RANK": str(node), "MEGATRON_ADS_MAX_RESTARTS": "1", "MEGATRON_ADS_VENV": sys.prefix,
            "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo",
        }  # fmt: skip
        with (tmp_path / f"node-{node}.log").open("wb") as log:
            command = [str(ROOT / "launch" / "torchrun.sh"), *words]
            scripts.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
    yield TwoNodes(tmp_path, scripts)
    for script in scripts:
        for pid in [*descendants(script.pid), script.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        script.wait()


@pytest.mark.slow
def test_a_job_on_two_machines_goes_on_after_a_killed_rank_and_saves_when_it_is_stopped(job: TwoNodes) -> None:
    job.wait_for_step(7)
    os.kill(job.rank_of(1), signal.SIGKILL)
    before = max(job.losses())
    job.wait_for_step(before + 3)
    assert "resumed from" in job.logs()
    assert "has gone (killed, or its machine lost)" in job.logs()

    job.scripts[1].send_signal(signal.SIGTERM)  # one machine is told; both stop after the same step
    assert [script.wait(120) for script in job.scripts] == [ExitStatus.STOPPED] * 2, job.logs()
    last = max(job.losses())
    assert json.loads((job.folder / "outcome.json").read_text()) == {"outcome": "stopped", "step": last}
    assert (job.folder / "checkpoints" / f"step-{last:08d}" / "manifest.json").is_file()
    assert sorted(job.losses()) == list(range(1, last + 1))
