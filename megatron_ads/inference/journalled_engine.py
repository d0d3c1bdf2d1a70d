"""An engine of this process whose completions are kept, batch by batch: what is in the journal is not generated again.

Servers need none: their client keeps each answer as it comes.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from megatron_ads.config.generation import GenerationConfig, Method
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
        """Return the completions of every prompt; equal prompts have the same ones, unless they are sampled.

        Rules are not kept apart, and must be the same for equal prompts.
        """
        keys = _keys(prompts, config)
        found: dict[str, list[Completion]] = {}
        left: dict[str, int] = {}
        for number, key in enumerate(keys):
            if (known := self._journal.read(key, _completions)) is not None:
                found[key] = known
            else:
                left.setdefault(key, number)
        numbers = list(left.values())
        for start in range(0, len(numbers), self._batch_size):
            batch = numbers[start : start + self._batch_size]
            chosen = None if rules is None else [rules[number] for number in batch]
            said = self._engine.generate([prompts[number] for number in batch], config, rules=chosen)
            new = {keys[number]: of_one for number, of_one in zip(batch, said, strict=True)}
            self._journal.add_all({key: {"said": [one.as_record() for one in of_one]} for key, of_one in new.items()})
            found |= new
        return [found[key] for key in keys]

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


def _keys(prompts: Sequence[Prompt], config: GenerationConfig) -> list[str]:
    """Return what the completions of each prompt are found by; sampled, they depend on how often it came before."""
    how = digest_of({name: getattr(config, name) for name in config.__slots__})
    times: Counter[str] = Counter()
    keys = []
    for prompt in prompts:
        key = digest_of([how, _plain(prompt)])
        number, times[key] = times[key], times[key] + 1
        keys.append(digest_of([key, number]) if number and config.method is Method.sampled else key)
    return keys


def _plain(prompt: Prompt) -> list[Any]:
    return [part.as_dict() if isinstance(part, Message) else part for part in prompt]


def _completions(record: Any) -> list[Completion]:
    return [Completion.from_record(one) for one in record["said"]]
