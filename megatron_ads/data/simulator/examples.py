"""One row of a task, and the best answers that somebody could give who knows the model but not the dice."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_ads.data.rows import ChatRow


@dataclass(frozen=True, slots=True)
class Example:
    """A row and what is best to answer to it."""

    row: ChatRow
    best: tuple[str, ...]
    """Answers as the row's ``label`` would be written (without one: as its target), the likeliest first."""
    chances: tuple[float, ...]
    """Probability that each of ``best`` is the label that the simulation drew, given all that a prompt can show."""


def reachable_recall(examples: Sequence[Example], most: int) -> float:
    """Return the expected share of rows whose label is among the first ``most`` of the best answers.

    With ``most`` = 1 it is the best reachable accuracy. An expectation over what the simulation could have drawn for
    these users: the same answers score a little more or less on the labels that it did draw.
    """
    return sum(sum(example.chances[:most]) for example in examples) / len(examples)
