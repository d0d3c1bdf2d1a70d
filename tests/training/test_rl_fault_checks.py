"""The checks of ``parity_tests.rl_faults`` find what they are there to find."""

import json
import os
import random
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path
from threading import Event, Timer
from typing import Any

import pytest

from megatron_ads.journal import Journal
from megatron_ads.runtime.health.rank_record import ExitStatus
from megatron_ads.training.rollout.metrics import PhaseTimes
from parity_tests import rl_faults
from parity_tests.crash_test import BrokenPromiseError
from parity_tests.harness.inflicted import Fault, inflicted
from parity_tests.rl_faults import FAULTS, STEPS, Case, RlJob, check_continued, check_counted, draw, run_case

KILL = Case("kill-update", rank=1, phase="update", step=3, share=0.5)


class FinishedJob(RlJob):
    """A job whose runs have come and gone, with ``statuses`` in turn."""

    statuses: tuple[list[int], ...] = ([ExitStatus.DONE] * 4,)

    def run(self, fault: Fault | None = None) -> list[int]:
        first, *rest = self.statuses
        self.statuses = tuple(rest)
        return first


def job(root: Path, *, loss: float = 1.0, weights: bytes = b"w", reward: float | None = 0.5, counted: int = 0) -> RlJob:
    made = FinishedJob(model=root / "model", root=root)
    for name in ("rollouts", "export"):
        (root / name).mkdir(parents=True)
    lines = [{"step": step, "loss": loss, "rollout/faults/r/raised": counted} for step in range(1, STEPS + 1)]
    (root / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for step in range(1, STEPS + 1):
        text = "{}\n" + json.dumps({"rewards": {"r": reward}}) + "\n"
        (root / "rollouts" / f"step-{step:06d}.jsonl").write_text(text)
    (root / "export" / "pp00.safetensors").write_bytes(weights)
    made.beside("generated.txt").write_text("a\nb\n")
    made.log(0).write_text("rank 1 (stage 0) has gone (killed, or its machine lost), after step 2\n")
    return made


@pytest.mark.parametrize(
    ("changed", "said"),
    [({"loss": 1.0000000000000002}, "losses"), ({"reward": 0.25}, "rollouts"), ({"weights": b"v"}, "exported weights")],
)
def test_another_end_is_found(tmp_path: Path, changed: dict[str, float], said: str) -> None:
    check_continued(job(tmp_path / "same"), job(tmp_path / "whole"))
    with pytest.raises(BrokenPromiseError, match=f"the {said} differ"):
        check_continued(job(tmp_path / "other", **changed), job(tmp_path / "undisturbed"))  # type: ignore[arg-type]


def test_a_chunk_that_was_generated_twice_is_found(tmp_path: Path) -> None:
    again = job(tmp_path / "again")
    again.beside("generated.txt").write_text("a\nb\na\n")
    with pytest.raises(BrokenPromiseError, match="1 finished chunks were generated again"):
        check_continued(again, job(tmp_path / "whole"))


def test_statuses_and_silence_of_the_ranks_are_found(tmp_path: Path) -> None:
    lost = [ExitStatus.PEER_LOST, -signal.SIGKILL, ExitStatus.PEER_LOST, ExitStatus.PEER_LOST]
    killed, whole = job(tmp_path / "killed"), job(tmp_path / "whole")
    assert isinstance(killed, FinishedJob)
    killed.statuses = (lost, [ExitStatus.DONE] * 4)
    assert "rank 1 (stage 0) has gone" in run_case(KILL, killed, whole, 1.0)
    killed.statuses = (lost,)
    with pytest.raises(BrokenPromiseError, match="no rank said: rank 2"):
        run_case(replace(KILL, rank=2), _with(killed, [lost[0], lost[0], lost[1], lost[0]]), whole, 1.0)
    with pytest.raises(BrokenPromiseError, match="exit statuses"):
        run_case(KILL, _with(killed, [ExitStatus.DONE] * 4), whole, 1.0)


def _with(made: FinishedJob, statuses: list[int]) -> FinishedJob:
    made.statuses = (statuses,)
    return made


def test_faults_that_are_not_counted_are_found(tmp_path: Path) -> None:
    case, done = Case("reward-fails-for-some", 0, "reward", 1, 0.0), [ExitStatus.DONE] * 4
    assert "4 faults counted" in check_counted(case, job(tmp_path / "counted", reward=None, counted=1), done)
    with pytest.raises(BrokenPromiseError, match="step 1 has 1 answers without a reward, 0 counted"):
        check_counted(case, job(tmp_path / "uncounted", reward=None), done)


def test_ranks_that_end_wrongly_say_what_they_waited_for(tmp_path: Path) -> None:
    hung = job(tmp_path / "hung")
    hung.log(2).write_text("step 1\nstep 2\n")
    said = "rank 0: rank 1 (stage 0) has gone (killed, or its machine lost), after step 2; rank 2: step 2"
    assert hung.last_words() == said
    (hung.root / "hang.txt").write_text("the job hangs: rank 3 (stage 1) does not answer\n  rank 0 has waited\n")
    assert hung.last_words() == "the job hangs: rank 3 (stage 1) does not answer"


@pytest.mark.parametrize(
    ("outcomes", "interrupted", "status", "told"),
    [
        ([True, True, True], False, 0, "sigterm: 3 of 3 held, 0 not run"),
        ([True, True], True, 130, "sigterm: 2 of 2 held, 1 not run"),
        ([True, False], True, 1, "sigterm: 1 of 2 held, 1 not run"),
        ([], False, 1, "sigterm: 0 of 0 held, 3 not run"),
    ],
    ids=["held", "interrupted", "broken", "none_run"],
)
def test_what_was_run_is_told_however_it_ends(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    outcomes: list[bool],
    interrupted: bool,
    status: int,
    told: str,
) -> None:
    def run_all(root: Path, held: dict[str, list[bool]], *others: Any) -> None:
        held["sigterm"] += outcomes
        if interrupted:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(rl_faults, "run_all", run_all)
    arguments = ["--fault", "sigterm", "--fault", "disk-full", "--times", "3", "--out", str(tmp_path / "out")]
    assert rl_faults.main(arguments) == status
    assert capsys.readouterr().out.splitlines() == [told, "disk-full: 0 of 0 held, 3 not run"]


def test_a_fault_strikes_once_in_its_rank_phase_and_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    struck: Counter[str] = Counter()
    times, monkeypatched = PhaseTimes(), monkeypatch.setitem(os.environ, "RANK", "2")
    assert monkeypatched is None
    fault = Fault(rank=2, phase="sync", step=2, delay_seconds=60, strike=lambda: struck.update(["now"]))
    with inflicted(fault, tmp_path / "generated.txt"), Journal(tmp_path / "journal") as journal:
        for phase, so_far in (("sync", 0), ("update", 0), ("sync", 1), ("sync", 1)):
            with times.measured(phase):
                pass
            assert struck["now"] == so_far  # its delay is longer than the phase: at the end of it
        journal.add("key", {})
    assert (tmp_path / "generated.txt").read_text() == "key\n"


def test_a_phase_does_not_end_while_its_fault_is_still_happening(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    begun, may_end, happened = Event(), Event(), Event()

    def fill_slowly() -> None:
        begun.set()
        assert may_end.wait(10)
        happened.set()

    fault = Fault(rank=0, phase="sync", step=1, delay_seconds=0.01, strike=fill_slowly)
    with inflicted(fault, tmp_path / "generated.txt"):
        with PhaseTimes().measured("sync"):
            assert begun.wait(10) and not happened.is_set()
            Timer(0.2, may_end.set).start()
        assert happened.is_set()


def test_every_fault_is_drawn_for_a_rank_and_step_that_it_can_meet() -> None:
    generator = random.Random(0)
    for name in FAULTS:
        cases = [draw(name, generator) for _ in range(40)]
        assert {case.rank for case in cases} == ({0} if name.startswith("reward") else {0, 1, 2, 3})
        assert max(case.step for case in cases) == (STEPS - 1 if name == "sigterm" else STEPS)
