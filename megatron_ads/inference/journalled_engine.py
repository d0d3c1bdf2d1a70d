"""An engine of this process whose completions are kept, batch by batch: what is in the journal is not generated again.

Servers need none: their client keeps each answer as it comes.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from megatron_ads.config.generation import GenerationConfig
from megatron_ads.inference.engine import Completion, Engine, Prompt
from megatron_ads.journal import Journal, digest_of
from megatron_ads.rows import Message

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_ads.inference.beam_rules import Rules


class JournalledEngine:
    """Answers by another engine."""

    def __init__(self, engine: Engine, journal: Journal, *, batch_size: int) -> None:
        """Take the engine, where to keep what it says, and how many prompts it is given at once."""
        self._engine, self._journal, self._batch_size = engine, journal, batch_size

    def generate(
        self, prompts: Sequence[Prompt], config: GenerationConfig, *, rules: "Sequence[Rules] | None" = None
    ) -> list[list[Completion]]:
        """Return the completions of every prompt; rules are not kept apart, and must be the same for equal prompts."""
        how = digest_of({name: getattr(config, name) for name in config.__slots__})
        found: dict[int, list[Completion]] = {}
        keys = [digest_of([how, _plain(prompt)]) for prompt in prompts]
        for number, key in enumerate(keys):
            if (known := self._journal.read(key, _completions)) is not None:
                found[number] = known
        left = [number for number in range(len(prompts)) if number not in found]
        for start in range(0, len(left), self._batch_size):
            batch = left[start : start + self._batch_size]
            chosen = None if rules is None else [rules[number] for number in batch]
            said = self._engine.generate([prompts[number] for number in batch], config, rules=chosen)
            self._journal.add_all(
                {keys[number]: {"said": [one.as_record() for one in of_one]}
                 for number, of_one in zip(batch, said, strict=True)}
            )  # fmt: skip
            found |= dict(zip(batch, said, strict=True))
        return [found[number] for number in range(len(prompts))]

    def log_probabilities(
        self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
    ) -> list[list[float]]:
        """Return what the engine says; nothing of it is kept."""
        return self._engine.log_probabilities(prompts, answers)

    def update_weights(self, weights: "Iterator[tuple[str, Tensor]]") -> None:
        """Give the engine other weights, whose completions are then taken for those before: begin another journal."""
        self._engine.update_weights(weights)

    def close(self) -> None:
        """Leave the engine open: it is whoever's who opened it."""


def _plain(prompt: Prompt) -> list[Any]:
    return [part.as_dict() if isinstance(part, Message) else part for part in prompt]


def _completions(record: Any) -> list[Completion]:
    return [Completion.from_record(one) for one in record["said"]]
