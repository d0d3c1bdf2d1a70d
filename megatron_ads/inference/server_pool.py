"""The engine behind several inference servers: one set of requests, and one set of weights, which are checked.

New weights go through a folder that the servers must be able to read. A server can say that it took them and compute
with others, so that a probe is scored on each by itself and held against the trainer's numbers.
"""

import math
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from conversion.hf_stream import write_hf_folder
from conversion.sources import WeightSource
from megatron_ads.config.generation import GenerationConfig
from megatron_ads.config.rl import RolloutConfig
from megatron_ads.errors import DataError
from megatron_ads.inference.engine import Completion, Prompt
from megatron_ads.inference.openai_engine import OpenAIEngine
from megatron_ads.inference.server_weights import load_by_command, load_by_request
from megatron_ads.inference.servers import Server, Servers
from megatron_ads.journal import Journal
from megatron_ads.observability.log import get_logger

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_ads.inference.beam_rules import Rules

logger = get_logger(__name__)
_NAME = "rollout servers"


class WrongWeightsError(DataError):
    """A server computes with other weights than the trainer."""


@dataclass(frozen=True, slots=True)
class Probe:
    """Answers whose log-probabilities the trainer knows."""

    prompts: Sequence[Sequence[int]]
    answers: Sequence[Sequence[int]]
    log_probabilities: Sequence[Sequence[float]]
    """The trainer's, in nats, of each token of each answer."""

    def gap(self, found: Sequence[Sequence[float]]) -> float:
        """Return the mean |difference| over all tokens, in nats."""
        pairs = [
            pair
            for row, wanted in zip(found, self.log_probabilities, strict=True)
            for pair in zip(row, wanted, strict=True)
        ]
        return math.fsum(abs(one - other) for one, other in pairs) / len(pairs)


class ServerPool:
    """All of ``rollout.servers`` as one engine. Completions that a journal holds are not asked for again."""

    def __init__(
        self,
        config: RolloutConfig,
        source: WeightSource,
        weights_dir: Path,
        journal: Journal | None = None,
    ) -> None:
        """Prepare to ask; nothing is sent yet.

        Args:
            config: The servers, and what is expected of them.
            source: What the job was loaded from: its config and tokenizer go with new weights.
            weights_dir: Where new weights are written; the servers read it under the same path.
            journal: Keeps every answer, under the name of the weights.
        """
        self.version = 0
        """Updates that the servers were given."""
        self._config, self._source, self._weights_dir = config, source, weights_dir.absolute()
        self._folder: Path | None = None
        self._probe: Probe | None = None
        each = [Server(f"rollout.servers[{index}]", server) for index, server in enumerate(config.servers)]
        self.servers = Servers(each, wait_seconds=config.server_wait_seconds, renew=self._renew)
        together = replace(
            config.servers[0],
            url=", ".join(server.url for server in each),
            concurrency=sum(server.concurrency for server in config.servers),
        )
        self._engine = OpenAIEngine(_NAME, together, journal, servers=self.servers)
        self.name_weights("before any update")

    def generate(
        self, prompts: Sequence[Prompt], config: GenerationConfig, *, rules: "Sequence[Rules] | None" = None
    ) -> list[list[Completion]]:
        """Return the samples of every prompt; their seeds do not depend on which server answers."""
        return self._engine.generate(prompts, config, rules=rules)

    def log_probabilities(
        self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
    ) -> list[list[float]]:
        """Return the log-probability of every token of every answer, by whichever server is free."""
        return self._engine.log_probabilities(prompts, answers)

    def update_weights(self, weights: "Iterator[tuple[str, Tensor]]") -> None:
        """Write all weights to a folder and have every server use them; ``weights`` is always read to its end.

        A server that cannot be reached is left out until it takes them. Older folders are removed.

        Raises:
            DataError: If no server took them.
            ConfigError: If a server cannot be asked to, and there is no ``rollout.reload_command``.
            DiskFullError: If they do not fit the disk.
            ConversionError: If the folder cannot be written for another reason.
        """
        folder = self._weights_dir / f"update-{self.version + 1:06d}"
        try:
            write_hf_folder(folder, weights, self._source)
        finally:
            for _ in weights:  # they come out of a collective, in which other ranks would wait
                pass
        self.version, self._folder, self._probe = self.version + 1, folder, None
        self.name_weights(f"update {self.version}")
        self._load_everywhere()
        for old in self._weights_dir.glob("update-*"):
            if old != folder:
                shutil.rmtree(old, ignore_errors=True)

    def require_agreement(self, probe: Probe) -> float:
        """Return the largest gap between a server and the trainer, in nats; servers that come back are held to it too.

        A server above ``rollout.max_logprob_diff`` is restarted once by ``rollout.reload_command``; one that does not
        answer is left out.

        Raises:
            WrongWeightsError: If a server is above it all the same.
            DataError: If none answers.
        """
        self._probe = probe
        gaps = []
        for server in self.servers.servers:
            if not server.needs_weights:
                try:
                    gaps.append(self._require_right(server, threading.Event()))
                except WrongWeightsError:
                    raise
                except DataError as error:
                    self.servers.lose(server, str(error))
        if not gaps:
            reasons = " ".join(f"{server.url}: {server.lost_because}" for server in self.servers.servers)
            raise DataError(f"no inference server scored the probe. {reasons} Start them, then the job again.")
        return max(gaps)

    def name_weights(self, name: str) -> None:
        """Say what the current weights are called: answers that a journal holds are found again under it."""
        self.servers.state = name

    def stop(self) -> None:
        """Ask nothing more, for ever; other threads that generate or score raise once requests in flight are over."""
        self._engine.client.stop()

    def close(self) -> None:
        """Close the connections."""
        self._engine.close()

    def _load_everywhere(self) -> None:
        """Have all servers load the current folder; where none does, try again until ``server_wait_seconds`` passed."""
        deadline = time.monotonic() + self._config.server_wait_seconds
        with ThreadPoolExecutor(len(self.servers.servers)) as pool:
            while True:
                faults = list(pool.map(self._load_or_lose, self.servers.servers))
                if None in faults:
                    return
                if self._config.reload_command or time.monotonic() > deadline:
                    raise DataError(
                        f"no inference server took the weights of update {self.version}. {' '.join(map(str, faults))}"
                    )
                time.sleep(self._config.servers[0].first_wait_seconds)

    def _load_or_lose(self, server: Server) -> str | None:
        try:
            self._load(server, threading.Event())
        except DataError as error:
            self.servers.lose(server, str(error))
            return str(error)
        server.needs_weights = False
        return None

    def _load(self, server: Server, stop: threading.Event) -> None:
        assert self._folder is not None, "there is no update yet"
        seconds = self._config.server_wait_seconds
        if self._config.reload_command is None:
            load_by_request(server.endpoint, server.url, self._folder, seconds=seconds)
        else:
            load_by_command(self._config.reload_command, server.config, self._folder, seconds=seconds, stop=stop)

    def _renew(self, server: Server, stop: threading.Event) -> None:
        """Bring the current weights to a server that may have been restarted, and check them."""
        if self._folder is not None:
            self._load(server, stop)
            if self._probe is not None:
                self._require_right(server, stop)

    def _require_right(self, server: Server, stop: threading.Event) -> float:
        gap, restarted = self._gap(server), ""
        if (
            not gap <= self._config.max_logprob_diff and self._config.reload_command and self._folder
        ):  # NaN is wrong too
            logger.warning("%s differs from the trainer by %.3g nats on the probe: restarting it.", server.url, gap)
            self._load(server, stop)
            gap, restarted = self._gap(server), ", also after another restart"
        if not gap <= self._config.max_logprob_diff:
            raise self._wrong(server, gap, restarted)
        return gap

    def _wrong(self, server: Server, gap: float, restarted: str) -> WrongWeightsError:
        hint = "" if self._config.reload_command else " Set rollout.reload_command, which restarts a server on them."
        return WrongWeightsError(
            f"the inference server at {server.url} differs from the trainer by {gap:.3g} nats a token on the probe"
            f"{restarted} (rollout.max_logprob_diff is {self._config.max_logprob_diff:g}): it does not compute "
            f"with the weights of {self._folder or 'this job'}.{hint}"
        )

    def _gap(self, server: Server) -> float:
        assert self._probe is not None, "was given"
        return self._probe.gap(self._scores(server, self._probe.prompts, self._probe.answers))

    def _scores(
        self, server: Server, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
    ) -> list[list[float]]:
        with closing(OpenAIEngine(server.section, server.config)) as engine:
            return engine.log_probabilities(prompts, answers)
