"""Rung 11: ``megatron-ads parity`` on a checkpoint in a folder: FP8 as published, layer by layer, with its reports.

A failure with rungs 1 to 6 green is in the streaming itself; the command is then no judge of a large checkpoint.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from parity_tests import commands
from parity_tests.checkpoint_errors import GATE_AND_UP_SWAPPED
from parity_tests.figures import record
from parity_tests.tolerances import STREAMED_DIVERGENCE, STREAMED_LAYER, STREAMED_LAYER_BF16
from tests.conversion.checkpoints import fp8_checkpoint
from tests.distributed import run_ranks

Checkpoint = Callable[[str], Path]


def _parity(out: Path, *arguments: str, error: str | None = None) -> tuple[int, dict]:
    return run_ranks(1, commands.parity, arguments, out, error, process_group=False)[0]


def _verdicts(report: dict) -> dict[int, bool | None]:
    return {one["rung"]: one["passed"] for one in report["rungs"]}


@pytest.mark.parametrize("family", ["v3", "v2-lite", "moonlight"])
def test_a_right_checkpoint_passes(checkpoint: Checkpoint, tmp_path: Path, family: str) -> None:
    status, report = _parity(tmp_path, "--hf", str(checkpoint(family)), "--layout", "tp=2,ep=4,pp=2")
    worst = max(layer["difference"] for layer in report["layers"])
    record(11, f"{family}: worst layer given the same input", worst, STREAMED_LAYER)
    record(11, f"{family}: mean KL, nats", report["logits"]["divergence"], STREAMED_DIVERGENCE)
    assert (status, report["passed"]) == (0, True)
    assert [rung for rung, passed in _verdicts(report).items() if passed] == [1, 2, 3, 4] + [6] * (family == "v3")
    assert worst < STREAMED_LAYER.value
    page = (tmp_path / "parity.html").read_text()
    assert page.count("<svg") == 3
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")


def test_an_fp8_checkpoint_and_its_shards_pass_in_bf16(tmp_path: Path) -> None:
    published = fp8_checkpoint(tmp_path / "published")
    status, report = _parity(tmp_path / "out", "--hf", str(published), "--precision", "bf16", "--tokens", "64")
    worst = max(layer["difference"] for layer in report["layers"])
    record(11, "FP8 checkpoint in BF16: worst layer given the same input", worst, STREAMED_LAYER_BF16)
    assert status == 0, report["rungs"]


def test_values_in_the_wrong_place_fail_rungs_2_and_3_and_name_the_layer(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    wrong = GATE_AND_UP_SWAPPED.write(checkpoint("small-v3"), tmp_path / "wrong")
    status, report = _parity(tmp_path / "out", "--hf", str(checkpoint("small-v3")), "--megatron", str(wrong))
    assert status == 1
    assert {rung for rung, passed in _verdicts(report).items() if passed is False} >= {2, 3}
    assert "layer 0 departs first" in next(one["detail"] for one in report["rungs"] if one["rung"] == 3)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_wrong_arithmetic_fails_rung_3_with_rung_2_green(
    checkpoint: Checkpoint, tmp_path: Path, precision: str
) -> None:
    error = "softmax_scale_rounded_to_bf16" if precision == "fp32" else "softmax_scale_halved"
    arguments = ("--hf", str(checkpoint("small-v3")), "--precision", precision)
    status, report = _parity(tmp_path, *arguments, error=error)
    verdicts = _verdicts(report)
    assert (status, verdicts[2], verdicts[3]) == (1, True, False)
    assert max(layer["difference"] for layer in report["layers"]) > report["limits"]["layer"]


def test_a_bias_in_the_weights_fails_the_router(checkpoint: Checkpoint, tmp_path: Path) -> None:
    status, report = _parity(tmp_path, "--hf", str(checkpoint("small-v3")), error="bias_rounded_to_bf16")
    assert status == 1
    assert _verdicts(report)[4] is False


def test_one_layer_of_one_side_is_in_memory_at_a_time(checkpoint: Checkpoint, tmp_path: Path) -> None:
    arguments = ["--hf", str(checkpoint("small-v3")), "--tokens", "8"]
    assert run_ranks(1, commands.most_layers_alive, arguments, tmp_path, process_group=False) == [1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_gpu_computes_the_same(checkpoint: Checkpoint, tmp_path: Path, precision: str) -> None:
    """In a process of its own: the ladder's ranks do not see the GPU."""
    words = ["parity", "--hf", str(checkpoint("v3")), "--precision", precision, "--out", str(tmp_path)]
    subprocess.run([sys.executable, "-m", "megatron_ads.cli", *words], check=True, timeout=280)
    report = json.loads((tmp_path / "parity.json").read_text())
    worst = max(layer["difference"] for layer in report["layers"])
    record(11, f"GPU, {precision}: worst layer given the same input", worst)
    assert report["passed"]
