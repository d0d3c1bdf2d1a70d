"""Several inference servers that hold the same weights, asked as one: by free capacity, around those that are lost."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from megatron_ads.config.generation import EndpointConfig
from megatron_ads.errors import DataError
from megatron_ads.inference.client import Request, Unanswered
from megatron_ads.inference.endpoint import Endpoint
from megatron_ads.inference.engine import Completion, Failure
from megatron_ads.observability.log import get_logger

logger = get_logger(__name__)


class Server:
    """One of them, and how it fares. What changes is guarded by the lock of :class:`Servers`."""

    def __init__(self, section: str, config: EndpointConfig) -> None:
        """Prepare to ask; ``section`` is its name in the recipe."""
        self.section, self.config = section, config
        self.url = config.url or ""
        self.endpoint = Endpoint(section, replace(config, attempts=1))  # another attempt may be another server's
        self.needs_weights = False
        """It may have been restarted, and compute with the weights that it was started on."""
        self.in_flight = 0
        self.lost_because: str | None = None
        """Why its last request failed; None: it did not."""
        self.lost_at = self.rests_until = self.pause = 0.0

    def free_share(self, now: float) -> float:
        """Return the part of its capacity that is free. A lost one is tried with one request at a time."""
        if self.lost_because is None:
            return 1 - self.in_flight / self.config.concurrency
        return 0.0 if self.in_flight or now < self.rests_until else 1 / (2 * self.config.concurrency)

    def lose(self, why: str, began: float) -> bool:
        """Note that what began then failed, and rest, longer each time; return whether it was not lost before."""
        now, new = time.monotonic(), self.lost_because is None
        if new:
            self.lost_at, self.pause = now, self.config.first_wait_seconds
        elif began >= self.lost_at:  # what was in flight when it was lost is no other sign
            self.pause = min(2 * self.pause, self.config.longest_wait_seconds)
        self.lost_because, self.rests_until = why, now + self.pause
        return new


class Servers:
    """Answers requests by any of the servers; any number of threads may ask."""

    def __init__(
        self,
        servers: Sequence[Server],
        *,
        wait_seconds: float,
        renew: Callable[[Server, threading.Event], None] = lambda server, stop: None,
        section: str = "rollout",
    ) -> None:
        """Take the servers.

        Args:
            servers: At least one.
            wait_seconds: How long all may be lost.
            renew: Brings the current weights to a server that may be a restarted one. Raises DataError where it cannot.
            section: Where ``server_wait_seconds`` is set in the recipe.
        """
        self.servers = servers
        self.state = ""
        """The weights that they hold; answers by other weights are other answers."""
        self.losses = 0
        """How often one was lost."""
        self._wait_seconds, self._renew, self._section = wait_seconds, renew, section
        self._changed = threading.Condition()

    def answer(self, request: Request, stop: threading.Event) -> Completion:
        """Return the answer of the first server that gives one.

        Raises:
            Unanswered: If ``attempts`` a server failed, those at servers that are not there not counted, or ``stop``
                was set.
            DataError: If all servers were lost for too long.
            ConfigError: If the key, the address or the model's name of a server is wrong.
        """
        started, failures = time.monotonic(), list[Failure]()
        while (taken := self._take(stop)) is not None:
            (server, is_stale), began, why, restarted = taken, time.monotonic(), None, False
            try:
                if is_stale:
                    self._bring_up_to_date(server, stop)
                body = {**request.body, "model": server.config.model}
                answer = server.endpoint.answer(replace(request, body=body), stop)
                return replace(answer, seconds=time.monotonic() - started, failures=tuple(failures))
            except Unanswered as error:
                failures += error.failures
                why, restarted = str(error), _may_be_restarted(error.failures)
                tried = len(failures) - failures.count(Failure.not_connected)
                if tried >= server.config.attempts * len(self.servers):
                    raise Unanswered(str(error), tuple(failures)) from None
            finally:
                self._give_back(server, why, began, restarted=restarted)
        raise Unanswered("the run was stopped.", tuple(failures))

    def lose(self, server: Server, why: str) -> None:
        """Note that a server is not there, or has not the current weights, until it can be given them."""
        with self._changed:
            server.needs_weights = True
            self._note_loss(server, why, time.monotonic())

    def close(self) -> None:
        """Close the connections."""
        for server in self.servers:
            server.endpoint.close()

    def _take(self, stop: threading.Event) -> tuple[Server, bool] | None:
        """Wait for free capacity and take a place of the server with most of it; None: ``stop`` was set.

        Also return whether it needs the weights first: it is lost then, and nobody else has a place of it.
        """
        with self._changed:
            while not stop.is_set():
                now = time.monotonic()
                best = max(self.servers, key=lambda server: server.free_share(now))
                if best.free_share(now) > 0:
                    best.in_flight += 1
                    return best, best.needs_weights
                self._require_hope(now)
                self._changed.wait(0.1)  # a rest may end meanwhile
        return None

    def _require_hope(self, now: float) -> None:
        if any(server.lost_because is None or server.in_flight for server in self.servers):
            return
        if now - max(server.lost_at for server in self.servers) > self._wait_seconds:
            reasons = " ".join(f"{server.url}: {server.lost_because}" for server in self.servers)
            raise DataError(
                f"no inference server answered for {self._wait_seconds:g} s ({self._section}.server_wait_seconds). "
                f"{reasons} "
                "Start the servers, then the job again: answers that are there are kept."
            )

    def _bring_up_to_date(self, server: Server, stop: threading.Event) -> None:
        try:
            self._renew(server, stop)
        except DataError as error:
            raise Unanswered(str(error), (Failure.not_connected,)) from None
        server.needs_weights = False

    def _give_back(self, server: Server, why: str | None, began: float, *, restarted: bool) -> None:
        with self._changed:
            server.in_flight -= 1
            server.needs_weights |= restarted
            if why is not None:
                self._note_loss(server, why, began)
            elif server.lost_because is not None and began >= server.lost_at:
                logger.info("%s answers again after %.0f s.", server.url, time.monotonic() - server.lost_at)
                server.lost_because = None
            self._changed.notify_all()

    def _note_loss(self, server: Server, why: str, began: float) -> None:
        if server.lose(why, began):
            self.losses += 1
            logger.warning(
                "%s is lost (%s) Its requests go to the other servers, or wait while there is none.", server.url, why
            )


def _may_be_restarted(failures: Sequence[Failure]) -> bool:
    """Whether a server that failed so may come back with other weights; one that is busy, or said nothing, does not.

    A proxy answers for a server that restarts, with 502 or a page of its own, or keeps the request until it times out.
    """
    return not {Failure.rate_limited, Failure.empty_answer}.issuperset(failures)
