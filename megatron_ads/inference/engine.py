"""What every engine does: generate, say how probable an answer is, take new weights."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from functools import reduce
from operator import add
from typing import TYPE_CHECKING, Any, Protocol

from megatron_ads.config.generation import GenerationConfig
from megatron_ads.errors import ConfigError
from megatron_ads.rows import Message
from megatron_ads.tasks.answer_format import CLOSE

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_ads.inference.beam_rules import Rules

Prompt = Sequence[int] | Sequence[Message]
"""Token ids, or a conversation that the engine renders with its model's chat template."""


class Finish(StrEnum):
    """How a completion ended."""

    ended = "ended"
    """The model ended it with its end token."""
    cut_off = "cut_off"
    """At the limit of tokens."""
    withheld = "withheld"
    """A content filter of the server's, or the model itself, declined."""
    refused = "refused"
    """The server calls the request impossible, such as one that is too long. It costs nothing and is not kept."""
    unanswered = "unanswered"
    """The server answered others, and this one at no attempt. It is not kept."""


class Failure(StrEnum):
    """Why an attempt brought no completion, although another one may."""

    rate_limited = "rate_limited"
    server_error = "server_error"
    timed_out = "timed_out"
    not_connected = "not_connected"
    """No such host, nobody listens or says so in time, or no encrypted connection."""
    broken_connection = "broken_connection"
    no_completion = "no_completion"
    """What came is no JSON, or not of the protocol's form."""
    no_choice = "no_choice"
    """A completion without a choice in it."""
    empty_answer = "empty_answer"
    """Nothing, or nothing behind the reasoning, where words were asked for."""


class UnsupportedError(ConfigError):
    """An engine cannot do what it is asked for; the message names an engine that can."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """What a model wrote behind one prompt."""

    text: str
    """Special tokens are left out."""
    finish: Finish = Finish.ended
    token_ids: tuple[int, ...] | None = None
    """(T,), the end token included where the model wrote one; None: the server does not report them."""
    log_probabilities: tuple[float, ...] | None = None
    """(T,), in nats, of every token: the model's own, whatever temperature and top-p. None: not asked for."""
    prompt_log_probabilities: tuple[float, ...] | None = None
    """In nats, of the prompt's tokens but the first, where a server was asked for them."""
    score: float | None = None
    """Of a beam: what beams are ordered by."""
    prompt_tokens: int = 0
    cached_tokens: int | None = None
    """Of the prompt's tokens, those that the server had in its prefix cache; None: it does not say."""
    answer_tokens: int = 0
    seconds: float = 0.0
    """From sending the request to its answer, waits between attempts included."""
    failures: tuple[Failure, ...] = ()
    """Attempts before it."""

    @property
    def is_empty(self) -> bool:
        """Return whether it says nothing, or ended behind its reasoning, and nobody declined to answer."""
        if self.finish in (Finish.withheld, Finish.refused, Finish.unanswered):
            return False
        return not (self.text.rpartition(CLOSE)[2] if self.finish is Finish.ended else self.text).strip()

    @property
    def log_probability(self) -> float:
        assert self.log_probabilities is not None, "was asked for"
        # Rounded after every addition, as a running sum is; ``sum`` is more exact from Python 3.12 on.
        return reduce(add, self.log_probabilities, 0.0)

    def as_record(self) -> dict[str, Any]:
        """Return JSON values for a journal, without what was not reported."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "Completion":
        optional = ("token_ids", "log_probabilities", "prompt_log_probabilities")
        tuples = {name: tuple(record[name]) for name in optional if name in record}
        failures = tuple(map(Failure, record["failures"]))
        return cls(**{**record, **tuples, "finish": Finish(record["finish"]), "failures": failures})


class Engine(Protocol):
    """A model that can be asked, wherever it runs. Engines that cannot do a thing raise :class:`UnsupportedError`."""

    def generate(
        self, prompts: Sequence[Prompt], config: GenerationConfig, *, rules: "Sequence[Rules] | None" = None
    ) -> list[list[Completion]]:
        """Return, for every prompt in order, its samples, or its beams from the best on; one where there is no choice.

        Args:
            prompts: Token ids or conversations; those of one call may be one batch.
            config: How.
            rules: What each completion may say; as many as prompts. Constrained beams need them.

        Raises:
            UnsupportedError: If the engine cannot generate so.
            ConfigError: If no request can succeed, such as with a wrong key.
            DataError: If the engine stopped answering.
        """

    def log_probabilities(
        self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
    ) -> list[list[float]]:
        """Return log P(y_t | prompt, y_<t), in nats, of every token of every answer, at temperature 1.

        Args:
            prompts: Token ids in front of each answer; at least one.
            answers: As many, in token ids; at least one each.

        Raises:
            UnsupportedError: If the engine does not say.
        """

    def update_weights(self, weights: "Iterator[tuple[str, Tensor]]") -> None:
        """Replace all weights, given with their Hugging Face names, in any order and dtype.

        Raises:
            UnsupportedError: If the engine cannot take weights.
            ConversionError: If a name is unknown, a shape differs, or weights are missing.
        """

    def close(self) -> None:
        """Give back connections and memory; the engine is not used again."""
