"""A run that is killed asks nothing twice that it had an answer to."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_ads.cooking.config import CookConfig, cook_recipe_yaml
from megatron_ads.cooking.cook import cook, open_kitchen
from megatron_ads.cooking.report import as_report
from tests.cooking.kitchens import good_answer, recipe
from tests.cooking.scripted_server import Reply, scripted_server

_RUN = """
import sys
from megatron_ads.cooking.config import load_cook_recipe
from megatron_ads.cooking.cook import cook, open_kitchen
config = load_cook_recipe(sys.argv[1])
with open_kitchen(config) as kitchen:
    cook(config, kitchen)
"""


def start(recipe_file: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", _RUN, str(recipe_file)], stderr=subprocess.DEVNULL)


def lines_of(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.exists() else 0


def wait_for_lines(file: Path, count: int) -> None:
    deadline = time.monotonic() + 60
    while lines_of(file) < count:
        assert time.monotonic() < deadline, f"{lines_of(file)} of {count} answers after 60 s"
        time.sleep(0.05)


def own_recipe(tmp_path: Path, config: CookConfig) -> Path:
    file = tmp_path / "resolved.yaml"
    file.write_text("defaults: [/base_cook, _self_]\n" + cook_recipe_yaml(config))
    return file


def report_of(config: CookConfig) -> dict[str, Any]:
    with open_kitchen(config) as kitchen:
        return as_report(cook(config, kitchen), kitchen, config)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["SIGKILL", "SIGINT"])
def test_a_killed_run_goes_on_and_no_answer_is_asked_for_twice(tmp_path: Path, how: signal.Signals) -> None:
    # The first 7 requests are answered, the others hang until the process is gone.
    gone, first = threading.Event(), iter(range(7))
    lock = threading.Lock()

    def teacher(body: dict[str, Any], _: int) -> Reply:
        with lock:
            hangs = next(first, None) is None and not gone.is_set()
        if hangs:
            gone.wait(30)
            return Reply(status=503)
        return Reply(content=good_answer(body))

    with scripted_server(teacher) as server:
        config = recipe(tmp_path, server.url, "candidates=2", "teacher.concurrency=2", rows=8)
        journal = tmp_path / "out" / "journal.jsonl"
        process = start(own_recipe(tmp_path, config))
        try:
            wait_for_lines(journal, 7)
            os.kill(process.pid, how)
            if how is signal.SIGINT:
                time.sleep(0.3)  # it waits for what is in flight, and sends nothing more
                gone.set()
            assert process.wait(timeout=60) != 0
        finally:
            process.kill()
            process.wait(timeout=10)
            gone.set()
        assert lines_of(journal) == 7
        unanswered = len(server.bodies) - 7
        assert 0 < unanswered <= 2  # in flight when the process ended
        report = report_of(config)
        assert len(server.bodies) == 16 + unanswered
        assert max(server.answered.values()) == 1
        assert len(server.answered) == 16
    assert (report["models"]["teacher"]["from_journal"], report["models"]["teacher"]["asked"]) == (7, 9)
    # The same corpus as of a run that nobody disturbed.
    with scripted_server(lambda body, _: Reply(content=good_answer(body))) as server:
        (tmp_path / "other").mkdir()
        undisturbed = recipe(tmp_path / "other", server.url, "candidates=2", rows=8)
        report_of(undisturbed)
    corpora = [(tmp_path / name / "train.jsonl").read_text() for name in ("out", "other/out")]
    assert corpora[0] == corpora[1] != ""


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
