"""Answers that reason first: one ``<think>...</think>`` block, then what the task asks for.

A target without reasoning, for tasks or comparisons that leave it out, has an empty block: models that think by
themselves, and chat templates that open the block, then learn to close it at once.
"""

from dataclasses import dataclass
from enum import StrEnum

from megatron_ads.errors import DataError

OPEN, CLOSE = "<think>", "</think>"


class ReasoningFailure(StrEnum):
    """Why no reasoning can be read. The failures of every task have these members too, first."""

    empty = "empty"
    no_reasoning = "no_reasoning"
    """No ``<think>`` block, or an empty one."""
    unclosed_reasoning = "unclosed_reasoning"
    """``<think>`` without ``</think>``: usually the answer was cut off."""


@dataclass(frozen=True, slots=True)
class Reasoned:
    """The two parts of an answer, without surrounding white space."""

    reasoning: str
    answer: str


def render_reasoned(reasoning: str, answer: str) -> str:
    """Return the assistant's message.

    Raises:
        DataError: If the reasoning holds a tag that would end it early.
    """
    for tag in (OPEN, CLOSE):
        if tag in reasoning:
            raise DataError(f"the reasoning holds {tag}: {reasoning!r:.80}. Remove the tag; the target adds its own.")
    return f"{OPEN}{reasoning}{CLOSE}{answer}"


def without_reasoning(target: str) -> str:
    """Return a readable target with an empty block of reasoning."""
    parts = split_reasoning(target, required=False)
    return target if isinstance(parts, ReasoningFailure) else render_reasoned("", parts.answer)


def split_reasoning(text: str, *, required: bool = True) -> Reasoned | ReasoningFailure:
    """Separate the reasoning from the answer, strictly: nothing may precede ``<think>``.

    Args:
        text: What the model said.
        required: False admits an empty block and none at all, for models that are not asked to reason.
    """
    whole = text.strip()
    if not whole:
        return ReasoningFailure.empty
    if not whole.startswith(OPEN):
        return ReasoningFailure.no_reasoning if required else Reasoned("", whole)
    reasoning, closing, answer = whole.removeprefix(OPEN).partition(CLOSE)
    if not closing:
        return ReasoningFailure.unclosed_reasoning
    if required and not reasoning.strip():
        return ReasoningFailure.no_reasoning
    return Reasoned(reasoning.strip(), answer.strip())
