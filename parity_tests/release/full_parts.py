"""The parts that only a full release check runs, each where this machine has what it needs."""

import os
import shutil
import sys
from pathlib import Path

from benchmarks.bounded_process import ROOT
from megatron_ads.runtime.device import device
from parity_tests.release import results
from parity_tests.release.part import Findings, Part, Step
from parity_tests.release.request import Request

_MINUTE = 60.0


def full_parts(request: Request) -> list[Part]:
    """Return them all; what --quick leaves out, or this machine cannot run, says why."""
    parts = [_pipeline(request), *_faults(), _matrix(request), _slurm(request), _engines(request), _gpu(request)]
    if not request.quick:
        return parts
    return [Part(name=part.name, title=part.title, why_not="--quick leaves it out") for part in parts]


def _module(name: str, *arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", f"parity_tests.{name}", *arguments)


def _pipeline(request: Request) -> Part:
    file = request.out / "pipeline" / "figures.json"
    return Part(
        name="pipeline",
        title="rung 10: 61 layers on 31 processes compute what one process does",
        steps=(Step("rung_10_pipeline", _module("rung_10_pipeline", "--record", str(file)), 40 * _MINUTE),),
        read=lambda folder: results.of_pipeline(folder / "figures.json"),
    )


def _faults() -> list[Part]:
    crashes = "ranks that are killed at random moments: nothing complete is lost, no number changes"
    rewards = "everything that can go wrong in reinforcement learning: nothing finished is lost"
    return [
        Part(name="crashes", title=crashes, steps=(Step("crash_test", _module("crash_test"), 60 * _MINUTE),)),
        Part(name="rl-faults", title=rewards, steps=(Step("rl_faults", _module("rl_faults"), 240 * _MINUTE),)),
        Part(
            name="fuzz",
            title="damaged and absurd inputs: each ends in a result or in one line",
            steps=(Step("fuzz", _module("fuzz"), 60 * _MINUTE),),
        ),
    ]


def _suite(
    request: Request, name: str, title: str, script: str, *, minutes: float, environment: dict[str, str]
) -> Part:
    """Return a part that is a script which passes its arguments on to pytest."""
    report = request.out / name / "report.xml"

    def read(folder: Path) -> Findings:
        if not (folder / "report.xml").exists():  # the script has said in its last line why it cannot run here
            said = (folder / f"{name}.log").read_text(encoding="utf-8", errors="replace").strip().splitlines()
            return Findings(left_out=[said[-1]])
        return results.of_junit(folder / "report.xml")

    return Part(
        name=name,
        title=title,
        steps=(Step(name, (str(ROOT / script), f"--junitxml={report}"), minutes * _MINUTE),),
        read=read,
        environment=environment,
    )


def _matrix(request: Request) -> Part:
    title = "all tests on Python 3.12 with the newest Megatron-Core"
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    if not (shutil.which("python3.12") or list(pyenv.glob("3.12.*/bin/python"))):
        return Part(name="matrix", title=title, why_not="there is no Python 3.12 on this machine")
    own = {"MEGATRON_ADS_VENV": str(ROOT / ".venv-matrix"), "MEGATRON_ADS_PYTHON": ""}
    return _suite(request, "matrix", title, "launch/test_matrix.sh", minutes=150, environment=own)


def _slurm(request: Request) -> Part:
    title = "jobs on a real Slurm: requeue, preemption, lost nodes"
    if shutil.which("slurmctld") is None:
        why_not = "Slurm is not installed; ./tests/slurm/run.sh installs it, and then this runs too"
        return Part(name="slurm", title=title, why_not=why_not)
    return _suite(
        request, "slurm", title, "tests/slurm/run.sh", minutes=45, environment={"MEGATRON_ADS_VENV": sys.prefix}
    )


def _engines(request: Request) -> Part:
    title = "rollouts on a real vLLM"
    vllm = Path(os.environ.get("MEGATRON_ADS_VLLM") or ROOT / ".venv-vllm")
    if not vllm.is_dir():
        why_not = f"there is no vLLM in {vllm}; ./tests/engines/run.sh installs it, and then this runs too"
        return Part(name="engines", title=title, why_not=why_not)
    return _suite(
        request, "engines", title, "tests/engines/run.sh", minutes=90, environment={"MEGATRON_ADS_VENV": sys.prefix}
    )


def _gpu(request: Request) -> Part:
    title = "every GPU path on one GPU: kernels, layers of DeepSeek-R1's widths, jobs, parity"
    if device().type != "cuda":
        return Part(name="gpu", title=title, why_not="torch sees no GPU on this machine")
    command = (str(ROOT / "benchmarks/gpu.sh"), "--out", str(request.out / "gpu" / "results"))
    return Part(name="gpu", title=title, steps=(Step("gpu", command, 30 * _MINUTE),))
