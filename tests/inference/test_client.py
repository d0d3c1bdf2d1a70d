"""Requests through the journal, whatever answers them."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

from megatron_ads.config.generation import AnsweringConfig
from megatron_ads.inference.client import Client, Request
from megatron_ads.inference.engine import Completion
from megatron_ads.journal import Journal


class Echo:
    """A model that repeats what it is asked, and notes it."""

    state = ""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def answer(self, request: Request, stop: threading.Event) -> Completion:
        self.asked.append(request.body["text"])
        return Completion(text=request.body["text"])


def test_a_request_that_comes_again_is_answered_and_counted_once(tmp_path: Path) -> None:
    echo = Echo()
    with Journal(tmp_path / "journal") as journal:
        client = Client("teacher", AnsweringConfig(concurrency=8), echo, journal)

        def requests() -> Iterator[Request]:
            yield Request(body={"text": "a"})
            deadline = time.monotonic() + 30
            while not journal.records:  # it is answered, and nobody has taken the answer
                assert time.monotonic() < deadline
                time.sleep(0.01)
            yield Request(body={"text": "a"})
            yield Request(body={"text": "b"})
            yield Request(body={"text": "a"}, candidate=1)

        answers = client.ask(requests(), total=4, description="asking")
        assert [answer and answer.text for answer in answers] == ["a", "a", "b", "a"]
        assert sorted(echo.asked) == ["a", "a", "b"]
        assert (client.usage.asked, client.usage.from_journal) == (3, 0)
        client.ask([Request(body={"text": "b"})], total=1, description="asking")  # paid for, and counted, already
        assert (client.usage.asked, client.usage.from_journal) == (3, 0)
    with Journal(tmp_path / "journal") as journal:
        again = Client("teacher", AnsweringConfig(concurrency=8), echo, journal)
        again.ask([Request(body={"text": text}) for text in "abc"], total=3, description="asking")
        assert (again.usage.asked, again.usage.from_journal) == (1, 2)
        assert again.usage.requests_per_second is not None
