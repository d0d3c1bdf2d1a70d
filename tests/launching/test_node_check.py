"""What would stop a node is found before ranks are started on it, each problem in one line."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_ads.launching.node_check import (
    compiler_problems,
    folder_problems,
    gpu_problems,
    python_problems,
    wants_gpu,
)

SMI = "#!/bin/sh\n"


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Put a stand-in for the driver's program first on the path; tests write what it does."""
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.touch(mode=0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    yield program


def test_an_old_python_is_a_problem() -> None:
    assert python_problems((3, 11)) == python_problems((3, 13)) == []
    (problem,) = python_problems((3, 10))
    assert "3.11 or newer is needed" in problem


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        ({"SLURM_GPUS_ON_NODE": "8"}, True),
        ({"SLURM_GPUS_ON_NODE": "8", "CUDA_VISIBLE_DEVICES": ""}, False),  # hidden on purpose: a run on the CPU
    ],
)
def test_gpus_are_wanted_where_slurm_gave_some(environment: dict[str, str], wanted: bool) -> None:
    assert wants_gpu(environment) is wanted


def test_fewer_gpus_than_ranks_are_a_problem(smi: Path) -> None:
    smi.write_text(f"{SMI}for i in 1 2 3 4; do echo 'NVIDIA H100, 550.1'; done\n")
    assert gpu_problems(4, {}) == []
    (problem,) = gpu_problems(8, {})
    assert problem.startswith("4 GPUs are visible, but 8 ranks are to run here.")
    (problem,) = gpu_problems(4, {"CUDA_VISIBLE_DEVICES": "0,1"})
    assert problem.startswith("2 GPUs are visible (CUDA_VISIBLE_DEVICES is 0,1)")


def test_a_driver_that_does_not_work_is_a_problem(smi: Path) -> None:
    smi.write_text(f"{SMI}echo 'Failed to initialize NVML'; exit 9\n")
    (problem,) = gpu_problems(1, {})
    assert "Failed to initialize NVML" in problem


def test_a_missing_driver_is_a_problem(smi: Path) -> None:
    smi.unlink()
    (problem,) = gpu_problems(1, {})
    assert "the NVIDIA driver is not installed" in problem


def test_a_folder_that_cannot_be_made_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (problem,) = folder_problems(tmp_path / "file" / "run")
    assert "cannot be written" in problem
    assert folder_problems(tmp_path / "run") == []
    assert not (tmp_path / "run").exists()


def test_storage_that_is_not_shared_is_found_by_the_node(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "megatron_ads.launching.node_check", "--local-ranks=1", f"--folder={tmp_path}"]
    expect = tmp_path / "attempt.json"
    answer = subprocess.run([*command, f"--expect={expect}"], capture_output=True, text=True, timeout=60, check=False)
    assert answer.returncode == 2
    assert "log.dir is not on storage that all nodes share" in answer.stdout
    expect.touch()
    assert subprocess.run([*command, f"--expect={expect}"], timeout=60, check=False).returncode == 0


def test_what_kernels_are_compiled_with_must_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    compiler, header = compiler_problems({})
    assert compiler.startswith("no C compiler (gcc or clang) is found")
    assert header.startswith(f"{tmp_path}/Python.h does not exist")
    for name in ("Python.h", "clang"):
        (tmp_path / name).touch(mode=0o755)
    assert compiler_problems({"TRITON_CACHE_DIR": str(tmp_path / "cache")}) == []
    (compiler,) = compiler_problems({"CC": "icx"})
    assert "(icx)" in compiler
    (cache,) = compiler_problems({"TRITON_CACHE_DIR": str(tmp_path / "clang" / "cache")})
    assert "cannot be written" in cache
