"""The driver of the speed cases: what is finished is not run again, what is slower is named, and a case that fails too.

The cases of these tests stand below; each runs in a process of its own, as those of the driver do.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from benchmarks.run import main, run_cases
from benchmarks.speed.cases import CASES, Case
from benchmarks.speed.measure import Comparison, Effort, Finding, Share

HERE = "tests.benchmarks.test_speed_run"
ABOUT: dict[str, Any] = {
    "host": {"cpu": "a processor", "cores": 2, "gpus": []},
    "versions": {"python": "3"},
    "revision": "0123456789ab",
}
PLANTED_SECONDS = 1.0
"""Some four times a training step below: at half the speed and less it is found on a machine that is busy besides."""


def found(name: str, work: float) -> Comparison:
    return Comparison(name=name, work="w", reference="r", work_seconds=[work] * 5, reference_seconds=[1.0] * 5)


def even(effort: Effort) -> Iterator[Finding]:
    with (effort.folder.parents[1] / "runs").open("a") as runs:  # how often it ran
        runs.write("x")
    yield found("even/one", 1.0)
    yield Share(name="even/share", about="s", value=0.99, least=0.98)


def slow(effort: Effort) -> Iterator[Finding]:
    with (effort.folder.parents[1] / "slow-runs").open("a") as runs:
        runs.write("x")
    yield found("slow/one", 2.0)


def slow_at_first(effort: Effort) -> Iterator[Finding]:
    marker = effort.folder.parents[1] / "was-slow"
    yield found("at-first/one", 1.0 if marker.exists() else 2.0)
    marker.touch()


def dies(effort: Effort) -> Iterator[Finding]:
    yield found("dies/one", 1.0)
    os._exit(9)


def hangs(effort: Effort) -> Iterator[Finding]:
    subprocess.Popen(["sleep", "600"])
    time.sleep(600)
    yield found("hangs/one", 1.0)


def case(name: str, seconds: float = 120) -> Case:
    return Case(name, f"{name} next to itself", f"{HERE}:{name}", seconds, seconds)


def report_of(names: list[str], out: Path, baselines: dict[str, Any]) -> dict[str, Any]:
    return run_cases([case(name) for name in names], out, quick=True, baselines=baselines, about=ABOUT)


BASELINES = {name: {"ratio": 1.0, "error": 0.0} for name in ("even/one", "slow/one", "at-first/one")}


def test_a_finished_case_is_not_run_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = report_of(["even"], tmp_path, BASELINES)
    second = report_of(["even"], tmp_path, BASELINES)
    assert (tmp_path / "runs").read_text() == "x"
    assert not first["failed"] and first["cases"] == second["cases"]
    other = ABOUT | {"versions": {"python": "4"}}
    run_cases([case("even")], tmp_path, quick=True, baselines=BASELINES, about=other)
    assert (tmp_path / "runs").read_text() == "xx"
    assert [path.name for path in tmp_path.glob("case-*")] == []
    record = json.loads((tmp_path / "speed.json").read_text())["cases"]["even"]
    assert (record["found"][0]["ratio"], record["found"][0]["repetitions"]) == (1.0, 5)
    assert (record["versions"], record["revision"]) == (other["versions"], ABOUT["revision"])
    assert "even/share" in (tmp_path / "speed.html").read_text()
    assert "even/one" in capsys.readouterr().out


def test_what_is_slower_twice_is_named_and_what_was_slow_once_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = report_of(["slow", "slow_at_first"], tmp_path, BASELINES)
    assert report["failed"]
    # exp(-0.1) = 0.905: the limit without any spread.
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("! ")]
    assert said == ["! slow/one is slower: ratio now 0.500, of the baseline 1.000, limit 0.905"]
    assert (tmp_path / "slow-runs").read_text() == "xx"
    report_of(["slow"], tmp_path, BASELINES)
    assert (tmp_path / "slow-runs").read_text() == "xx"


@pytest.mark.slow
def test_a_case_that_dies_or_hangs_fails_and_stops_no_other(tmp_path: Path) -> None:
    cases = [case("dies"), case("hangs", seconds=15), case("even")]
    report = run_cases(cases, tmp_path, quick=True, baselines={}, about=ABOUT)
    errors = {name: record["error"] for name, record in report["cases"].items()}
    assert report["failed"] and errors["even"] is None
    assert errors["dies"].startswith("exit status 9") and errors["hangs"].startswith("was not done after")
    assert report["verdicts"].keys() == {"even/one", "even/share"}


def test_every_case_is_there_and_names_are_unique(capsys: pytest.CaptureFixture[str]) -> None:
    from importlib import import_module

    for each in CASES:
        module, function = each.function.split(":")
        assert callable(getattr(import_module(module), function))
    assert main(["--list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len({each.name for each in CASES}) == len(CASES)


def test_what_cannot_be_carried_out_is_said_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", str(tmp_path), "--case", "packin"]) == 2
    assert capsys.readouterr().err.startswith("benchmarks.run: There is no case packin; there are train-step, ")
    assert main([]) == 2
    assert "--out is missing" in capsys.readouterr().err
    assert main(["--out", str(tmp_path), "--baseline", str(tmp_path / "none.json")]) == 2
    assert "none.json does not exist" in capsys.readouterr().err


# ---- a slowdown that is planted in the training step ----


def small_step(effort: Effort) -> Iterator[Finding]:
    """The first part of the driver's own case, on few tokens: a step next to transformers'."""
    from benchmarks.speed import training

    training.BATCHES.clear()
    training.BATCHES["full"] = (96, 96)
    yield from training.train_step(effort)


def small_step_with_a_sleep(effort: Effort) -> Iterator[Finding]:
    from megatron_ads.runtime import cpu_compat

    cpu_compat.install()
    from megatron_ads.training import step

    right = step.run_step

    def asleep(*arguments: Any, **named: Any) -> Any:
        time.sleep(PLANTED_SECONDS)
        return right(*arguments, **named)

    step.run_step = asleep
    yield from small_step(effort)


@contextmanager
def busy_core() -> Iterator[None]:
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        try:
            yield
        finally:
            process.kill()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(
    os.environ.get("MEGATRON_ADS_BUSY_CORE") != "1",
    reason="keeps a core busy: MEGATRON_ADS_BUSY_CORE=1 ./launch/test.sh tests/benchmarks/test_speed_run.py",
)
def test_a_sleep_in_the_training_step_is_found_while_a_core_is_busy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def measured(name: str, baselines: dict[str, Any]) -> dict[str, Any]:
        return run_cases([case(name, 600)], tmp_path / name, quick=True, baselines=baselines, about=ABOUT)

    quiet = run_cases([case("small_step", 600)], tmp_path / "quiet", quick=True, baselines={}, about=ABOUT)
    (baseline,) = quiet["cases"]["small_step"]["found"]
    baselines = {baseline["name"]: baseline}
    with busy_core():
        assert not measured("small_step", baselines)["failed"]
        capsys.readouterr()
        assert measured("small_step_with_a_sleep", baselines)["failed"]
    assert "! train-step/full is slower: ratio now" in capsys.readouterr().out
