"""Rung 11: ``megatron-ads parity`` on a checkpoint in a folder: FP8 as published, layer by layer, with its reports.

A failure with rungs 1 to 6 green is in the streaming itself; the command is then no judge of a large checkpoint.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_ads.config.model import Precision
from parity_tests import jobs
from parity_tests.deliberate_errors import GATE_AND_UP_SWAPPED, STACKED_BY_PROJECTION
from parity_tests.harness.hf_checkpoints import fp8_checkpoint
from parity_tests.machines import BF16, CPU_FP32, FP32, Machine
from parity_tests.tolerances import STREAMED_DIVERGENCE, STREAMED_LAYER, STREAMED_LAYER_BF16, record

Checkpoint = Callable[[str], Path]


def _parity(
    out: Path, *arguments: str, error: str | None = None, machine: Machine = CPU_FP32
) -> tuple[int, dict[str, Any]]:
    words = (*arguments, "--precision", str(machine.precision))
    return machine.run(1, jobs.parity, words, out, error, process_group=False)[0]


def _verdicts(report: dict) -> dict[int, bool | None]:
    return {one["rung"]: one["passed"] for one in report["rungs"]}


@pytest.mark.parametrize("machine", FP32, ids=str)
@pytest.mark.parametrize("family", ["v3", "v2-lite", "moonlight"])
def test_a_right_checkpoint_passes(checkpoint: Checkpoint, tmp_path: Path, family: str, machine: Machine) -> None:
    words = ("--hf", str(checkpoint(family)), "--layout", "tp=2,ep=4,pp=2")
    status, report = _parity(tmp_path, *words, machine=machine)
    worst = max(layer["difference"] for layer in report["layers"])
    record(11, f"{family}: worst layer given the same input", worst, STREAMED_LAYER, machine)
    record(11, f"{family}: mean KL, nats", report["logits"]["divergence"], STREAMED_DIVERGENCE, machine)
    assert (status, report["passed"]) == (0, True)
    assert [rung for rung, passed in _verdicts(report).items() if passed] == [1, 2, 3, 4] + [6] * (family == "v3")
    assert worst < STREAMED_LAYER.value
    page = (tmp_path / "parity.html").read_text()
    assert page.count("<svg") == 3
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")


@pytest.mark.parametrize("machine", BF16, ids=str)
def test_an_fp8_checkpoint_and_its_shards_pass_in_bf16(tmp_path: Path, machine: Machine) -> None:
    published = fp8_checkpoint(tmp_path / "published")
    status, report = _parity(tmp_path / "out", "--hf", str(published), "--tokens", "64", machine=machine)
    worst = max(layer["difference"] for layer in report["layers"])
    record(11, "FP8 checkpoint: worst layer given the same input", worst, STREAMED_LAYER_BF16, machine)
    assert status == 0, report["rungs"]


@pytest.mark.parametrize("family", ["qwen2-tied", "llama"])
def test_a_dense_checkpoint_passes(checkpoint: Checkpoint, tmp_path: Path, family: str) -> None:
    status, report = _parity(tmp_path, "--hf", str(checkpoint(family)), "--layout", "tp=2,pp=2")
    worst = max(layer["difference"] for layer in report["layers"])
    record(11, f"{family}: worst layer given the same input", worst, STREAMED_LAYER)
    assert (status, worst < STREAMED_LAYER.value) == (0, True)
    assert [rung for rung, passed in _verdicts(report).items() if passed] == [1, 2, 3]
    assert (tmp_path / "parity.html").read_text().count("<svg") == 2


def test_query_groups_in_the_wrong_place_fail_rungs_2_and_3(checkpoint: Checkpoint, tmp_path: Path) -> None:
    wrong = STACKED_BY_PROJECTION.write(checkpoint("qwen2"), tmp_path / "wrong")
    status, report = _parity(tmp_path / "out", "--hf", str(checkpoint("qwen2")), "--megatron", str(wrong))
    assert status == 1
    assert {rung for rung, passed in _verdicts(report).items() if passed is False} == {2, 3}


def test_values_in_the_wrong_place_fail_rungs_2_and_3_and_name_the_layer(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    wrong = GATE_AND_UP_SWAPPED.write(checkpoint("small-v3"), tmp_path / "wrong")
    status, report = _parity(tmp_path / "out", "--hf", str(checkpoint("small-v3")), "--megatron", str(wrong))
    assert status == 1
    assert {rung for rung, passed in _verdicts(report).items() if passed is False} >= {2, 3}
    assert "layer 0 departs first" in next(one["detail"] for one in report["rungs"] if one["rung"] == 3)


@pytest.mark.parametrize("machine", [*FP32, *BF16], ids=str)
def test_wrong_arithmetic_fails_rung_3_with_rung_2_green(
    checkpoint: Checkpoint, tmp_path: Path, machine: Machine
) -> None:
    error = "softmax_scale_rounded_to_bf16" if machine.precision is Precision.fp32 else "softmax_scale_halved"
    status, report = _parity(tmp_path, "--hf", str(checkpoint("small-v3")), error=error, machine=machine)
    verdicts = _verdicts(report)
    assert (status, verdicts[2], verdicts[3]) == (1, True, False)
    assert max(layer["difference"] for layer in report["layers"]) > report["limits"]["layer"]


def test_a_bias_in_the_weights_fails_the_router(checkpoint: Checkpoint, tmp_path: Path) -> None:
    status, report = _parity(tmp_path, "--hf", str(checkpoint("small-v3")), error="bias_rounded_to_bf16")
    assert status == 1
    assert _verdicts(report)[4] is False


def test_one_layer_of_one_side_is_in_memory_at_a_time(checkpoint: Checkpoint, tmp_path: Path) -> None:
    arguments = ["--hf", str(checkpoint("small-v3")), "--tokens", "8"]
    assert CPU_FP32.run(1, jobs.most_layers_alive, arguments, tmp_path, process_group=False) == [1]
