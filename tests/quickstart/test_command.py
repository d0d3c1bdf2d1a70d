"""The quickstart from start to end, with few steps and few rows: real processes, conversions and comparisons."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_ads.observability.metrics import METRICS_FILE, read_metrics
from parity_tests.harness.real_job import FEW_ROWS

STEPS = 6
SETTINGS = (
    FEW_ROWS, "data.validation_rows=8", "checkpoint.save_every=2", "optim.warmup_steps=2", "train.evaluate_every=3",
)  # fmt: skip

pytestmark = [pytest.mark.first, pytest.mark.timeout(900)]


def _start(folder: Path, *words: str) -> "subprocess.Popen[str]":
    environment = {name: value for name, value in os.environ.items() if name != "MEGATRON_ADS_DATA"}
    command = [sys.executable, "-m", "megatron_ads.cli", "quickstart", "--out", str(folder), "--steps", str(STEPS)]
    return subprocess.Popen(
        [*command, *words, *SETTINGS],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def _finish(process: "subprocess.Popen[str]") -> tuple[int, str, str]:
    out, err = process.communicate(timeout=600)
    return process.returncode, out, err


def _wait_for_a_step(folder: Path, process: "subprocess.Popen[str]") -> None:
    give_up = time.monotonic() + 400
    while not ((folder / "run" / METRICS_FILE).exists() and read_metrics(folder / "run")):
        assert process.poll() is None, _finish(process)
        assert time.monotonic() < give_up, "no training step within 400 s"
        time.sleep(0.1)


def test_it_goes_on_where_it_was_interrupted_and_then_is_complete(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    interrupted = _start(folder)
    _wait_for_a_step(folder, interrupted)
    interrupted.send_signal(signal.SIGTERM)
    status, out, err = _finish(interrupted)
    assert status == 130, (out, err)
    assert err.splitlines()[-1] == "megatron-ads: interrupted"
    assert not (folder / "report.json").exists()

    status, out, err = _finish(_start(folder))
    assert status == 0, (out, err)
    assert "make a small random DeepSeek-V3-family checkpoint in FP8: complete" in out
    assert f"fine-tune it for {STEPS} steps (continuing where it was interrupted)" in out
    _check_report(folder)

    status, again, _ = _finish(_start(folder))
    assert status == 0
    assert "was complete already" in again
    assert "$ megatron-ads" not in again


@pytest.mark.slow
def test_a_dense_model_goes_the_same_way_at_pp_2_tp_2(tmp_path: Path) -> None:
    status, out, err = _finish(_start(tmp_path / "out", "--preset", "dense"))
    assert status == 0, (out, err)
    layout = json.loads((tmp_path / "out" / "run" / "run.json").read_text())["recipe"]["layout"]
    assert (layout["pp"], layout["tp"]) == (2, 2)
    _check_report(tmp_path / "out")


def _check_report(folder: Path) -> None:
    report = json.loads((folder / "report.json").read_text())
    assert report["training"]["steps"] == STEPS
    assert [row["step"] for row in read_metrics(folder / "run") if "loss" in row] == list(range(1, STEPS + 1))
    assert report["parity"]["max_abs_difference"] < 1e-5
    assert report["fp8_export"]["equal"] is True
    assert report["evaluation"]["after"]["rows"] == 8
    assert report["data"]["source"] == "simulated_pairs"
    for file in report["files"]:
        assert Path(file).exists(), file
    assert "<svg" in (folder / "report.html").read_text()
