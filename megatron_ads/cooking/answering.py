"""Requests to a model and what comes of them, whatever answers: through the journal, in parallel, counted."""

import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any, Protocol

from megatron_ads.cooking.config import AnsweringConfig
from megatron_ads.errors import DataError
from megatron_ads.journal import Journal, digest_of
from megatron_ads.observability.log import get_logger
from megatron_ads.progress import Progress

logger = get_logger(__name__)

GIVE_UPS_IN_A_ROW = 5
"""After so many requests on end without an answer the run stops: the server is gone, not busy."""
_MILLION = 1_000_000


class Finish(StrEnum):
    """How an answer ended."""

    ended = "ended"
    cut_off = "cut_off"
    """At the limit of tokens."""
    withheld = "withheld"
    """A content filter of the server's, or the model itself, declined."""
    refused = "refused"
    """The server calls the request impossible, such as one that is too long. It costs nothing and is not kept."""


class Failure(StrEnum):
    """Why an attempt brought no answer, although another one may."""

    rate_limited = "rate_limited"
    server_error = "server_error"
    timed_out = "timed_out"
    not_connected = "not_connected"
    """No such host, nobody listens, or no encrypted connection."""
    broken_connection = "broken_connection"
    no_completion = "no_completion"
    """What came is no JSON, or not of the protocol's form."""
    no_choice = "no_choice"
    """A completion without a choice in it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One thing to ask. Equal requests have one answer."""

    body: Mapping[str, Any]
    """As the protocol has it: model, messages, temperature, seed and so on."""
    candidate: int = 0
    """Tells requests apart that ask the same thing again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What a model said."""

    text: str
    finish: Finish = Finish.ended
    prompt_tokens: int = 0
    answer_tokens: int = 0
    seconds: float = 0.0
    failures: tuple[Failure, ...] = ()
    """Attempts before it."""

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "Answer":
        """Return the answer that a journal's record holds."""
        changed = {"finish": Finish(record["finish"]), "failures": tuple(map(Failure, record["failures"]))}
        return cls(**{**record, **changed})


class Unanswered(DataError):
    """A request had no answer after all attempts; it is asked again by the next run."""

    def __init__(self, message: str, failures: tuple[Failure, ...]) -> None:
        """Keep why each attempt failed beside the sentence."""
        super().__init__(message)
        self.failures = failures


class Answerer(Protocol):
    """A model that can be asked."""

    @property
    def state(self) -> str:
        """What its answers depend on besides the request, as far as can be known here."""

    def answer(self, request: Request, stop: threading.Event) -> Answer:
        """Return the answer; waits end early when ``stop`` is set.

        Raises:
            Unanswered: If there is none after all attempts.
            ConfigError: If no request can succeed, such as with a wrong key.
        """


@dataclass(slots=True)
class Usage:
    """What asking one model took, in this run and in those before."""

    from_journal: int = 0
    asked: int = 0
    """Requests answered in this run."""
    gave_up: int = 0
    """Requests without an answer after all attempts."""
    failures: Counter[str] = field(default_factory=Counter)
    """Attempts of this run that brought no answer, by reason."""
    prompt_tokens: int = 0
    answer_tokens: int = 0
    """Of all answers, those of earlier runs too."""
    seconds: float = 0.0
    """From first to last request of each stage of this run."""
    seconds_in_requests: float = 0.0
    """Summed over the requests of this run, which overlap."""
    finishes: Counter[str] = field(default_factory=Counter)
    """How many answers ended how."""

    def count(self, answer: Answer, *, new: bool) -> None:
        """Add one answer."""
        self.asked += new
        self.from_journal += not new
        self.prompt_tokens += answer.prompt_tokens
        self.answer_tokens += answer.answer_tokens
        self.finishes[str(answer.finish)] += 1
        if new:
            self.failures.update(map(str, answer.failures))
            self.seconds_in_requests += answer.seconds

    @property
    def answered(self) -> int:
        """Requests with an answer that is no refusal."""
        return self.finishes.total() - self.finishes[str(Finish.refused)]

    @property
    def requests_per_second(self) -> float | None:
        """Return how fast this run got answers; None if it asked for none."""
        return self.asked / self.seconds if self.asked and self.seconds else None

    def cost(self, config: AnsweringConfig) -> float | None:
        """Return what all answers cost; None where no prices are known."""
        if config.input_price is None or config.output_price is None:
            return None
        return (self.prompt_tokens * config.input_price + self.answer_tokens * config.output_price) / _MILLION


class Desk:
    """Asks one model, and never what the journal knows already."""

    def __init__(self, name: str, config: AnsweringConfig, answerer: Answerer, journal: Journal) -> None:
        """Ask ``answerer``; ``name`` is the model's section in the recipe."""
        self.usage = Usage()
        self._name, self._config, self._answerer, self._journal = name, config, answerer, journal
        self._counted: set[str] = set()
        self._gave_up_in_a_row = 0

    def ask(self, requests: Iterable[Request], *, total: int, description: str) -> list[Answer | None]:
        """Return the answer to each request, in order; None where there is none after all attempts.

        Requests are taken as they can be sent, so an iterator may make them one by one; ``total`` is how many come.
        On Ctrl-C, those in flight are waited for, so that what they cost is not lost.

        Raises:
            ConfigError: If no request can succeed, such as with a wrong key.
            DataError: If the model stopped answering, or ``most_cost`` was reached.
        """
        keys: list[str] = []
        found: dict[str, Answer] = {}
        waiting: dict[Future[Answer], str] = {}
        stop, started = threading.Event(), time.monotonic()
        with (
            Progress(total, description=description, unit="request") as progress,
            ThreadPoolExecutor(self._config.concurrency) as pool,
        ):
            try:
                for request in requests:
                    key = self._key(request)
                    keys.append(key)
                    if key in found or key in waiting.values():
                        progress.update()
                    elif (answer := self._journal.read(key, Answer.from_record)) is not None:
                        found[key] = answer
                        self._count(key, answer, new=False)
                        progress.update()
                    else:
                        self._require_affordable()
                        waiting[pool.submit(self._answer_and_record, key, request, stop)] = key
                        if len(waiting) >= self._config.concurrency:
                            self._collect(waiting, found, progress)
                while waiting:
                    self._collect(waiting, found, progress)
            except BaseException:
                stop.set()  # workers finish the attempt they are at, and make no other
                if waiting:
                    logger.info("Ending: waiting for %d requests in flight, to keep their answers.", len(waiting))
                raise
            finally:
                self.usage.seconds += time.monotonic() - started
        return [found.get(key) for key in keys]

    def _key(self, request: Request) -> str:
        """Return what an answer is found by: everything that could change it."""
        return digest_of({"body": request.body, "candidate": request.candidate, "state": self._answerer.state})

    def _collect(self, waiting: dict[Future[Answer], str], found: dict[str, Answer], progress: Progress) -> None:
        """Wait until an answer is there, and take all that are."""
        for future in wait(waiting, return_when=FIRST_COMPLETED).done:
            key = waiting.pop(future)
            if (answer := self._outcome(future)) is not None:
                found[key] = answer
                self._count(key, answer, new=True)
            progress.update()

    def _count(self, key: str, answer: Answer, *, new: bool) -> None:
        if key not in self._counted:  # what several stages ask for is paid for once
            self._counted.add(key)
            self.usage.count(answer, new=new)

    def _answer_and_record(self, key: str, request: Request, stop: threading.Event) -> Answer:
        answer = self._answerer.answer(request, stop)
        if answer.finish is not Finish.refused:  # a server with other limits may take it
            self._journal.add(key, asdict(answer))
        return answer

    def _outcome(self, future: Future[Answer]) -> Answer | None:
        try:
            answer = future.result()
        except Unanswered as error:
            self.usage.gave_up += 1
            self.usage.failures.update(map(str, error.failures))
            self._count_give_up(str(error))
            return None
        if answer.finish is not Finish.refused:
            self._gave_up_in_a_row = 0
        elif not self.usage.answered:  # single refusals, such as of long prompts, are no reason to stop
            self._count_give_up(answer.text)
        return answer

    def _count_give_up(self, why: str) -> None:
        self._gave_up_in_a_row += 1
        if self._gave_up_in_a_row >= GIVE_UPS_IN_A_ROW:
            raise DataError(
                f"the {self._name} left {GIVE_UPS_IN_A_ROW} requests on end without an answer, the last with: {why} "
                f"Check that {self._config.url or self._config.model} works, and start again: answers that are there "
                "are kept and not asked for again."
            )

    def _require_affordable(self) -> None:
        cost, limit = self.usage.cost(self._config), self._config.most_cost
        if cost is not None and limit is not None and cost >= limit:
            raise DataError(
                f"answers of the {self._name} have cost {cost:.4g}, and {self._name}.most_cost is {limit:g}. Raise it "
                "and start again: answers that are there are not asked for again."
            )
