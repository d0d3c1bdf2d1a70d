"""Which machines the ladder runs on, and that ranks in processes of their own do what ranks on the CPU do."""

import os
from pathlib import Path

import pytest
import torch

from megatron_ads.config.model import Precision
from parity_tests import machines
from parity_tests.harness.ranks import RanksFailed
from parity_tests.machines import BF16, CPU_BF16, CPU_FP32, CUDA_FP32, FP32, Machine
from parity_tests.record import main, outcome, render


@pytest.mark.parametrize(
    ("available", "build", "reason"),
    [
        (True, "13.0", None),
        (False, None, "is built without CUDA; to run this, install a CUDA build of torch"),
        (False, "13.0", "finds no CUDA device; to run this, make nvidia-smi list one"),
    ],
    ids=["a device", "a CPU build", "no device"],
)
def test_what_is_missing_for_the_cuda_cases_is_said(
    monkeypatch: pytest.MonkeyPatch, available: bool, build: str | None, reason: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.version, "cuda", build)
    said = machines.why_no_gpu()
    assert said is None if reason is None else str(said).endswith(reason)


def test_the_cpu_is_always_among_the_machines_and_cuda_is_marked() -> None:
    for cases, precision in ((FP32, Precision.fp32), (BF16, Precision.bf16)):
        cpu, cuda = cases
        assert cpu == Machine("cpu", precision)
        assert cuda.values == (Machine("cuda", precision),)
        assert {mark.name for mark in cuda.marks} == {"gpu", "skipif"}
    assert [str(machine) for machine in (CPU_FP32, CPU_BF16, CUDA_FP32)] == ["cpu-fp32", "cpu-bf16", "cuda-fp32"]
    assert (CPU_FP32.dtype, CPU_BF16.dtype) == (torch.float32, torch.bfloat16)


def test_a_layout_of_more_ranks_than_gpus_is_skipped_with_the_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(pytest.skip.Exception, match="needs 8 GPUs, here 1"):
        CUDA_FP32.run(8, _environment)


def _environment() -> tuple[str, str, torch.Tensor]:
    return os.environ["RANK"], os.environ["WORLD_SIZE"], torch.full((2,), float(os.environ["LOCAL_RANK"]))


def _fail_on_rank_1() -> None:
    if os.environ["RANK"] == "1":
        raise ValueError("this rank cannot")
    _environment()


def _joined_sum() -> float:
    """Join the job as every job of the ladder does, and sum the ranks."""
    from megatron_ads.layout import ParallelLayout
    from megatron_ads.runtime import process_groups
    from megatron_ads.runtime.device import device

    process_groups.start(ParallelLayout(world=2), timeout_seconds=60)
    rank = torch.tensor(float(os.environ["RANK"]), device=device())
    torch.distributed.all_reduce(rank)
    return float(rank)


@pytest.fixture
def one_process_a_rank(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Return CUDA ranks that see no device: they fall back to the CPU and gloo."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    return CUDA_FP32


def test_ranks_in_processes_of_their_own_answer_in_order(one_process_a_rank: Machine) -> None:
    answers = one_process_a_rank.run(2, _environment)
    assert [(rank, world, tensor.tolist()) for rank, world, tensor in answers] == [
        ("0", "2", [0.0, 0.0]),
        ("1", "2", [1.0, 1.0]),
    ]


def test_ranks_in_processes_of_their_own_join_one_job(one_process_a_rank: Machine) -> None:
    assert one_process_a_rank.run(2, _joined_sum) == [1.0, 1.0]


def test_a_rank_that_fails_is_named_with_its_traceback(one_process_a_rank: Machine) -> None:
    with pytest.raises(RanksFailed, match="rank 1 of 2 died with exit status 1") as failed:
        one_process_a_rank.run(2, _fail_on_rank_1)
    assert "ValueError: this rank cannot" in str(failed.value)


def test_a_recording_on_cuda_without_a_device_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["cuda", "--page", str(tmp_path / "page.md")]) == 2
    assert "CUDA" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_page_says_what_failed_and_what_was_left_out(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text(
        '<testsuites><testsuite tests="3" failures="1" errors="0" skipped="1" time="12.4">'
        '<testcase name="test_a"/><testcase name="test_b"><failure message="wrong"/></testcase>'
        '<testcase name="test_c"><skipped message="needs 8 GPUs, here 1"/></testcase></testsuite></testsuites>'
    )
    figure = {"rung": 3, "machine": "cuda-bf16", "what": "noise", "value": 0.97, "limit": 1.5}
    measured = {
        "host": {"gpus": ["NVIDIA H200"], "cpu": "EPYC", "cores": 16, "memory_bytes": 128 * 2**30},
        "versions": {"torch": "2.13.0", "transformer-engine": None},
        "revision": "abc",
    }
    page = render([figure | {"value": 2.0}, figure], {}, outcome(report), [["pytest", "-m", "not gpu"]], measured)
    assert page.splitlines() == [
        "# Parity on NVIDIA H200",
        "",
        "- machine: EPYC, 16 cores, 128 GiB",
        "- versions: torch 2.13.0",
        "- revision: abc",
        '- commands: `python -m pytest -m "not gpu"`',
        "- 1 passed, 1 failed, 1 skipped in 12 s",
        "- failed: test_b",
        "- skipped: needs 8 GPUs, here 1",
        "",
        "| rung | on | figure | value | limit |",
        "| ---: | --- | --- | ---: | ---: |",
        "| 3 | cuda-bf16 | noise | 0.97 | 1.5 |",
    ]
