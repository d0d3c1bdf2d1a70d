"""A run that is killed asks nothing twice that it had an answer to."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_ads.config.synthesis import SynthesisConfig, synthesis_recipe_yaml
from megatron_ads.errors import DataError
from megatron_ads.synthesis.pipeline import open_models, synthesize
from megatron_ads.synthesis.report import as_report
from tests.inference.scripted_server import Reply, scripted_server
from tests.synthesis.scripted_recipes import good_answer, recipe

AT_A_TIME = 3


class Gate:
    """A teacher and verifier that answers so many requests and lets the others wait until it is opened further."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._left, self._run = 0, 0

    def allow(self, answers: int) -> None:
        """Answer so many requests more."""
        with self._changed:
            self._left += answers
            self._changed.notify_all()

    def dismiss(self) -> None:
        """Answer what is waiting with an error: nobody is there any more."""
        with self._changed:
            self._left, self._run = 0, self._run + 1
            self._changed.notify_all()

    def __call__(self, body: dict[str, Any], _: int) -> Reply:
        with self._changed:
            run = self._run
            self._changed.wait_for(lambda: self._left > 0 or self._run > run, timeout=60)
            if self._run > run:
                return Reply(status=503)
            self._left -= 1
        return Reply(content=VERDICT if body["model"] == "judge" else good_answer(body))


VERDICT = "<Aligned>yes</Aligned><Sound>yes</Sound><Faithful>yes</Faithful>"


def verified_recipe(tmp_path: Path, url: str) -> SynthesisConfig:
    """Return 6 rows with 2 candidates, 2 golden rows in 3 wordings, and a verifier that sees 6 different texts."""
    verifier = [f"verifier.url='{url}'", "verifier.model=judge", f"verifier.concurrency={AT_A_TIME}"]
    teacher = [f"teacher.concurrency={AT_A_TIME}", "candidates=2", "golden.rows=2", "reject.max_similarity=1"]
    return recipe(tmp_path, url, *teacher, *verifier, rows=6)


ALL = 6 + (12 - 4) + 6
"""Of the golden check, for candidates that it did not ask for, to the verifier."""


def start(recipe_file: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "megatron_ads.cli", "data", "cook", "--recipe", str(recipe_file)]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a session in the background ignores it
    try:
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, before)


def lines_of(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.exists() else 0


def wait_until(state: Callable[[], object], wanted: object) -> None:
    deadline = time.monotonic() + 90
    while (found := state()) != wanted:
        assert time.monotonic() < deadline, f"{found}, not {wanted}, after 90 s"
        time.sleep(0.05)


def own_recipe(tmp_path: Path, config: SynthesisConfig) -> Path:
    file = tmp_path / "resolved.yaml"
    file.write_text("defaults: [/base_cook, _self_]\n" + synthesis_recipe_yaml(config))
    return file


def report_of(config: SynthesisConfig) -> dict[str, Any]:
    with open_models(config) as models:
        return as_report(synthesize(config, models), models, config)


def test_a_run_that_is_killed_again_and_again_asks_nothing_twice_that_was_answered(tmp_path: Path) -> None:
    # Killed in the golden check, among the candidates, and when the verifier has one answer left to give.
    kills = {2: AT_A_TIME, 8: AT_A_TIME, ALL - 1: 1}  # answers so far: requests in flight
    gate, known, lost = Gate(), 0, 0
    with scripted_server(gate) as server:
        config = verified_recipe(tmp_path, server.url)
        journal, file = tmp_path / "out" / "journal.jsonl", own_recipe(tmp_path, config)
        for answers, in_flight in kills.items():
            gate.allow(answers - known)
            known, lost = answers, lost + in_flight
            process = start(file)
            try:
                wait_until(lambda: (lines_of(journal), server.at_a_time), (answers, in_flight))
            finally:
                process.kill()
                process.communicate(timeout=10)
                gate.dismiss()
            assert lines_of(journal) == server.answered.total() == answers
            assert len(server.bodies) == answers + lost
        gate.allow(ALL)
        report = report_of(config)
        assert len(server.bodies) == ALL + lost
        assert set(server.answered.values()) == {1}
        asked = [(used["from_journal"], used["asked"]) for used in report["models"].values()]
        assert asked == [(14, 0), (5, 1)]
        # The same corpus as of a run that nobody disturbed.
        (tmp_path / "other").mkdir()
        gate.allow(ALL)
        report_of(verified_recipe(tmp_path / "other", server.url))
    corpora = [(tmp_path / name / "train.jsonl").read_text() for name in ("out", "other/out")]
    assert corpora[0] == corpora[1] != ""


def test_an_interrupted_run_waits_for_what_is_in_flight_and_keeps_it(tmp_path: Path) -> None:
    gate, journal = Gate(), tmp_path / "out" / "journal.jsonl"
    with scripted_server(gate) as server:
        file = own_recipe(tmp_path, verified_recipe(tmp_path, server.url))
        gate.allow(8)
        process = start(file)
        try:
            wait_until(lambda: (lines_of(journal), server.at_a_time), (8, AT_A_TIME))
            os.kill(process.pid, signal.SIGINT)
            assert process.stderr is not None
            assert any(f"waiting for {AT_A_TIME} requests in flight" in line for line in process.stderr)
            gate.allow(ALL)
            _, said = process.communicate(timeout=60)
        finally:
            process.kill()
            process.wait(timeout=10)
        assert len(server.bodies) == 8 + AT_A_TIME == lines_of(journal)
    assert process.returncode == 130
    assert said.endswith("megatron-ads: interrupted\n")
    assert "Traceback" not in said


def test_a_finished_run_asks_nothing_again(tmp_path: Path) -> None:
    with scripted_server(lambda body, _: Reply(content=good_answer(body))) as server:
        config = recipe(tmp_path, server.url)
        first, again = report_of(config), report_of(config)
        assert len(server.bodies) == 4
        # What changes an answer is asked anew, what does not is not.
        report_of(recipe(tmp_path, server.url, "teacher.timeout_seconds=7", "reject.min_words=3"))
        assert len(server.bodies) == 4
        report_of(recipe(tmp_path, server.url, "teacher.temperature=0.1"))
        assert len(server.bodies) == 8
    assert first["kept"] == again["kept"] == 4
    assert again["models"]["teacher"]["asked"] == 0


def test_empty_answers_of_a_broken_server_are_asked_again_once_it_is_mended(tmp_path: Path) -> None:
    broken = b'{"choices": [{"message": {"content": null, "reasoning_content": "Hm."}, "finish_reason": "stop"}]}'
    mended = False
    with scripted_server(lambda body, _: Reply(content=good_answer(body)) if mended else Reply(raw=broken)) as server:
        config = recipe(tmp_path, server.url, "golden.rows=4", "teacher.attempts=2", "teacher.concurrency=1", rows=6)
        with pytest.raises(DataError, match=r"5 consecutive requests .* \(reasoning_content\)\. Start the server"):
            report_of(config)
        assert (tmp_path / "out" / "journal.jsonl").read_bytes() == b""
        mended = True
        assert report_of(config)["kept"] == 6


@pytest.mark.parametrize("said", ["", " \n", "<think>Hm.</think>"])
def test_a_journal_with_empty_answers_is_mended_and_one_without_is_left_as_it_is(tmp_path: Path, said: str) -> None:
    with scripted_server(lambda body, _: Reply(content=good_answer(body))) as server:
        config = recipe(tmp_path, server.url)
        report_of(config)
        journal = tmp_path / "out" / "journal.jsonl"
        whole = journal.read_bytes()
        report_of(config)
        assert (journal.read_bytes(), len(server.bodies)) == (whole, 4)
        records = [json.loads(line) for line in whole.splitlines()]
        records[1]["text"] = records[3]["text"] = said
        journal.write_text("".join(json.dumps(record) + "\n" for record in records))
        for _ in range(2):
            report = report_of(config)
            assert (report["kept"], len(server.bodies)) == (4, 6)
