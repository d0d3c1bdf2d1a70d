"""Requests to a model and what comes of them, whatever answers: in parallel, through the journal, counted."""

import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any, Protocol

from megatron_ads.config.generation import EndpointConfig
from megatron_ads.errors import DataError
from megatron_ads.inference.engine import Completion, Failure, Finish
from megatron_ads.journal import Journal, digest_of
from megatron_ads.observability.log import get_logger
from megatron_ads.progress import Progress

logger = get_logger(__name__)

MAX_CONSECUTIVE_GIVE_UPS = 5
"""After so many consecutive requests without an answer the run stops: the server is gone, not busy."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One thing to ask. Equal requests have one answer."""

    body: Mapping[str, Any]
    """As the protocol has it: model, messages, temperature, seed and so on."""
    candidate: int = 0
    """Tells requests apart that ask the same thing again."""
    needs_words: bool = False
    """An empty answer is a failed attempt; no part of what an answer is found by."""


class Unanswered(DataError):
    """A request had no answer after all attempts; it is asked again by the next run."""

    def __init__(self, message: str, failures: tuple[Failure, ...]) -> None:
        """Keep why each attempt failed, besides the sentence."""
        super().__init__(message)
        self.failures = failures


class Answerer(Protocol):
    """A model that can be asked."""

    @property
    def state(self) -> str:
        """What its answers depend on besides the request, as far as can be known here."""

    def answer(self, request: Request, stop: threading.Event) -> Completion:
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
    gave_up_empty: int = 0
    """Of these, how many had an empty answer at the last attempt."""
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

    def count(self, answer: Completion, *, new: bool) -> None:
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
        none = self.finishes[str(Finish.refused)] + self.finishes[str(Finish.unanswered)]
        return self.finishes.total() - none

    @property
    def requests_per_second(self) -> float | None:
        """Return how fast this run got answers; None if it asked for none."""
        return self.asked / self.seconds if self.asked and self.seconds else None

    def cost(self, config: EndpointConfig) -> float | None:
        """Return what all answers cost; None where no prices are known."""
        if config.input_price is None or config.output_price is None:
            return None
        return (self.prompt_tokens * config.input_price + self.answer_tokens * config.output_price) / 1_000_000


class Client:
    """Asks one model, and never what the journal knows already."""

    def __init__(
        self,
        name: str,
        config: EndpointConfig,
        answerer: Answerer,
        journal: Journal | None,
        *,
        usage: Usage | None = None,
    ) -> None:
        """Ask ``answerer``; ``name`` is the model's section in the recipe; without a journal nothing is kept.

        ``usage`` is counted on; None begins with nothing.
        """
        self.usage = usage or Usage()
        self._name, self._config, self._answerer, self._journal = name, config, answerer, journal
        self._counted: set[str] = set()
        self._consecutive_give_ups = 0
        self._found_empty = False
        self._stopped, self._stop_asking = False, threading.Event()

    def stop(self) -> None:
        """Ask nothing more, for ever, and have another thread that asks give up; for the end of a job."""
        self._stopped = True
        self._stop_asking.set()

    def ask(self, requests: Iterable[Request], *, total: int, description: str) -> list[Completion | None]:
        """Return the answer to each request, in order; None where there is none after all attempts.

        Requests are taken as they can be sent, so an iterator may make them one by one; ``total`` is how many come.
        On Ctrl-C, those in flight are waited for, so that what they cost is not lost.

        Raises:
            ConfigError: If no request can succeed, such as with a wrong key.
            DataError: If the model stopped answering, or ``max_cost`` was reached.
        """
        keys: list[str] = []
        found: dict[str, Completion] = {}
        waiting: dict[Future[Completion], str] = {}
        stop, started = threading.Event(), time.monotonic()
        self._stop_asking = stop
        if self._stopped:
            stop.set()
        with (
            Progress(total, description=description, unit="request") as progress,
            ThreadPoolExecutor(self._config.concurrency) as pool,
        ):
            try:
                for request in requests:
                    keys.append(key := self._key(request))
                    if key in found or key in waiting.values() or self._take_known(key, request, found):
                        progress.update()
                    else:
                        self._require_affordable()
                        waiting[pool.submit(self._answer_and_record, key, request, stop)] = key
                        if len(waiting) >= self._config.concurrency:
                            self._collect(waiting, found, progress)
                while waiting:
                    self._collect(waiting, found, progress)
            finally:
                stop.set()  # after an error or Ctrl-C, workers finish the attempt they are at, and make no other
                if waiting:
                    logger.info("Ending: waiting for %d requests in flight, to keep their answers.", len(waiting))
                self.usage.seconds += time.monotonic() - started
        return [found.get(key) for key in keys]

    def _take_known(self, key: str, request: Request, found: dict[str, Completion]) -> bool:
        """Whether the journal has the answer, which is then counted and among those found."""
        if (answer := self._known(key, request)) is None:
            return False
        found[key] = answer
        self._count(key, answer, new=False)
        return True

    def _known(self, key: str, request: Request) -> Completion | None:
        answer = self._journal.read(key, Completion.from_record) if self._journal else None
        if answer is None or not (request.needs_words and answer.is_empty):
            return answer
        if not self._found_empty:
            self._found_empty = True
            logger.warning("the journal holds empty answers of the %s; they are asked for again.", self._name)
        return None

    def _key(self, request: Request) -> str:
        """Return what an answer is found by: everything that could change it."""
        return digest_of({"body": request.body, "candidate": request.candidate, "state": self._answerer.state})

    def _collect(
        self, waiting: dict[Future[Completion], str], found: dict[str, Completion], progress: Progress
    ) -> None:
        """Wait until an answer is there, and take all that are."""
        for future in wait(waiting, return_when=FIRST_COMPLETED).done:
            key = waiting.pop(future)
            if (answer := self._outcome(future)) is not None:
                found[key] = answer
                self._count(key, answer, new=True)
            progress.update()

    def _count(self, key: str, answer: Completion, *, new: bool) -> None:
        if key not in self._counted:  # what several stages ask for is paid for once
            self._counted.add(key)
            self.usage.count(answer, new=new)

    def _answer_and_record(self, key: str, request: Request, stop: threading.Event) -> Completion:
        answer = self._answerer.answer(request, stop)
        if request.needs_words and answer.is_empty:  # of a server, after all attempts; another model need not try again
            raise Unanswered("the answer is empty.", (*answer.failures, Failure.empty_answer))
        if self._journal and answer.finish is not Finish.refused:  # a server with other limits may take it
            self._journal.add(key, answer.as_record())
        return answer

    def _outcome(self, future: Future[Completion]) -> Completion | None:
        try:
            answer = future.result()
        except Unanswered as error:
            self.usage.gave_up += 1
            self.usage.gave_up_empty += error.failures[-1:] == (Failure.empty_answer,)
            self.usage.failures.update(map(str, error.failures))
            self._count_give_up(str(error))
            return None
        if answer.finish is not Finish.refused:
            self._consecutive_give_ups = 0
        elif not self.usage.answered:  # single refusals, such as of long prompts, are no reason to stop
            self._count_give_up(answer.text)
        return answer

    def _count_give_up(self, why: str) -> None:
        self._consecutive_give_ups += 1
        if self._consecutive_give_ups >= MAX_CONSECUTIVE_GIVE_UPS:
            raise DataError(
                f"the {self._name} left {MAX_CONSECUTIVE_GIVE_UPS} consecutive requests without an answer, the last "
                f"with: {why} Check that {self._config.url or self._config.model} works, and start again: {self.kept}."
            )

    def _require_affordable(self) -> None:
        cost, limit = self.usage.cost(self._config), self._config.max_cost
        if cost is not None and limit is not None and cost >= limit:
            raise DataError(
                f"answers of the {self._name} have cost {cost:.4g}, and {self._name}.max_cost is {limit:g}. Raise it "
                f"and start again: {self.kept}."
            )

    @property
    def kept(self) -> str:
        """Return what the next run has of this one's answers, in words."""
        if self._journal is None:
            return "answers were not kept, as no file for them was named"
        return "answers that are there are kept and not asked for again"
