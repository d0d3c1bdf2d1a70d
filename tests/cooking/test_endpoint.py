"""A server that is busy, breaks, is slow or says no: what is asked again, how often, and what ends the run."""

import itertools
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_ads.cooking.answering import Answer, Finish, Request, Unanswered
from megatron_ads.cooking.config import AnsweringConfig
from megatron_ads.cooking.cook import cook, open_kitchen
from megatron_ads.cooking.endpoint import Endpoint
from megatron_ads.cooking.report import as_report, write_report
from megatron_ads.errors import ConfigError, DataError
from tests.cooking.kitchens import good_answer, recipe
from tests.cooking.scripted_server import Record, Reply, Script, scripted_server


def settings(url: str, **changes: Any) -> AnsweringConfig:
    values: dict[str, Any] = {
        "model": "scripted",
        "url": url,
        "attempts": 4,
        "first_wait_seconds": 0.01,
        "longest_wait_seconds": 0.04,
        "timeout_seconds": 5.0,
    }
    return AnsweringConfig(**(values | changes))


def ask(server: Record, **changes: Any) -> Answer:
    endpoint = Endpoint("teacher", settings(server.url, **changes))
    return endpoint.answer(Request(body={"model": "scripted", "messages": []}), threading.Event())


def failing(times: int, failure: Reply) -> Script:
    """Return a script that fails so many times and then answers."""
    return lambda _, before: failure if before < times else Reply(content="here")


@pytest.mark.parametrize(
    "failure",
    [
        Reply(status=429, headers={"Retry-After": "0"}),
        Reply(status=500),
        Reply(status=503, headers={"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}),
        Reply(raw=b"<html>proxy error</html>"),
        Reply(raw=b'{"choices": []}'),
        Reply(content="late", delay_seconds=0.6),
    ],
    ids=["429", "500", "503", "no_json", "no_choice", "timeout"],
)
def test_a_failure_that_may_pass_is_tried_again(failure: Reply) -> None:
    with scripted_server(failing(2, failure)) as server:
        answer = ask(server, timeout_seconds=0.2 if failure.delay_seconds else 5.0)
        assert (answer.text, answer.attempts, answer.finish) == ("here", 3, Finish.ended)
        assert (answer.prompt_tokens, answer.answer_tokens) == (100, 10)
        assert len(server.bodies) == 3


def test_attempts_and_pauses_are_bounded() -> None:
    with scripted_server(failing(100, Reply(status=500, headers={"Retry-After": "3600"}))) as server:
        started = time.monotonic()
        with pytest.raises(Unanswered, match="attempt 4 of 4: HTTP 500"):
            ask(server)
        assert time.monotonic() - started < 3  # three pauses of 0.04 s, not of an hour
        assert len(server.bodies) == 4


def test_a_pause_that_the_server_asks_for_is_kept() -> None:
    with scripted_server(failing(1, Reply(status=429, headers={"Retry-After": "0.3"}))) as server:
        started = time.monotonic()
        ask(server, longest_wait_seconds=1.0)
        assert time.monotonic() - started >= 0.3


def test_a_server_that_is_not_there_is_tried_again_and_named() -> None:
    with scripted_server(failing(0, Reply())) as server:
        pass  # its port is free now
    with pytest.raises(Unanswered, match=r"127\.0\.0\.1.*attempt 4 of 4.*refused"):
        ask(server)


@pytest.mark.parametrize("status", [401, 403, 404, 302])
def test_what_no_request_can_get_past_ends_the_run_at_once(status: int) -> None:
    with scripted_server(failing(100, Reply(status=status, headers={"Location": "http://127.0.0.1:1/"}))) as server:
        with pytest.raises(ConfigError, match=rf"HTTP {status}.*teacher\.url, teacher\.model = 'scripted'"):
            ask(server)
        assert len(server.bodies) == 1


def test_a_request_that_is_impossible_is_an_outcome_and_not_tried_again() -> None:
    with scripted_server(failing(100, Reply(status=400, content="too long"))) as server:
        answer = ask(server)
        assert answer.finish is Finish.refused
        assert "too long" in answer.text
        assert len(server.bodies) == 1


def test_the_key_goes_to_the_server_and_nowhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = "sk-very-secret-0123456789"
    monkeypatch.setenv("TEST_TEACHER_KEY", key)
    # A server that repeats the key in whatever it says.
    replies: Callable[[dict[str, Any], int], Reply] = lambda body, _: (  # noqa: E731
        Reply(status=400, content=f"bad key {key}")
        if "number0" in str(body)
        else Reply(content=good_answer(body) + key)
    )
    with scripted_server(replies) as server:
        config = recipe(tmp_path, server.url, "teacher.api_key_env=TEST_TEACHER_KEY")
        with open_kitchen(config) as kitchen:
            write_report(cook(config, kitchen), kitchen, config)
        assert {headers["Authorization"] for headers in server.headers} == {f"Bearer {key}"}
    files = [file for file in (tmp_path / "out").iterdir() if file.is_file()]
    assert {file.name for file in files} == {"journal.jsonl", "train.jsonl", "report.json", "report.md", "recipe.yaml"}
    assert [file.name for file in files if key in file.read_text()] == []
    assert "bad key ***" in (tmp_path / "out" / "report.md").read_text()


def test_a_key_that_is_named_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TEST_TEACHER_KEY", raising=False)
    with pytest.raises(ConfigError, match=r"teacher\.api_key_env names TEST_TEACHER_KEY, which is not set"):
        Endpoint("teacher", settings("http://127.0.0.1:1/v1", api_key_env="TEST_TEACHER_KEY"))


def test_requests_run_side_by_side_but_no_more_than_asked_for(tmp_path: Path) -> None:
    with scripted_server(lambda body, _: Reply(content=good_answer(body), delay_seconds=0.05)) as server:
        config = recipe(tmp_path, server.url, "teacher.concurrency=3", rows=12)
        with open_kitchen(config) as kitchen:
            cook(config, kitchen)
        assert server.most_at_a_time == 3


def test_starts_are_spread_when_the_rate_is_limited(tmp_path: Path) -> None:
    with scripted_server(lambda body, _: Reply(content=good_answer(body))) as server:
        config = recipe(tmp_path, server.url, "teacher.requests_per_minute=600", rows=5)
        started = time.monotonic()
        with open_kitchen(config) as kitchen:
            cook(config, kitchen)
        assert time.monotonic() - started >= 0.4  # five starts, four gaps of 0.1 s
        assert len(server.bodies) == 5


def test_a_server_that_has_gone_ends_the_run_and_keeps_the_answers(tmp_path: Path) -> None:
    numbers = itertools.count()
    script: Script = lambda body, _: (  # noqa: E731
        Reply(content=good_answer(body)) if next(numbers) < 3 else Reply(status=500)
    )
    with scripted_server(script) as server:
        config = recipe(tmp_path, server.url, "teacher.concurrency=1", "teacher.attempts=2", rows=20)
        with open_kitchen(config) as kitchen, pytest.raises(DataError, match="5 requests on end without an answer"):
            cook(config, kitchen)
        assert len(server.bodies) == 3 + 5 * 2
    assert len((tmp_path / "out" / "journal.jsonl").read_text().splitlines()) == 3


def test_the_cost_is_counted_and_ends_the_run_at_its_limit(tmp_path: Path) -> None:
    prices = ["teacher.input_price=1000", "teacher.output_price=5000"]  # 100 + 10 tokens: 0.1 + 0.05 an answer
    with scripted_server(lambda body, _: Reply(content=good_answer(body))) as server:
        config = recipe(tmp_path, server.url, "teacher.concurrency=1", "teacher.most_cost=0.4", *prices, rows=6)
        with (
            open_kitchen(config) as kitchen,
            pytest.raises(DataError, match=r"have cost 0\.45, and teacher\.most_cost"),
        ):
            cook(config, kitchen)
        assert len(server.bodies) == 3
        config = recipe(tmp_path, server.url, "teacher.concurrency=1", "teacher.most_cost=9", *prices, rows=6)
        with open_kitchen(config) as kitchen:
            used = as_report(cook(config, kitchen), kitchen, config)["models"]["teacher"]
        assert len(server.bodies) == 6  # the limit is no part of a request
    assert used["cost"] == pytest.approx(0.9)
    assert (used["asked"], used["from_journal"]) == (3, 3)
