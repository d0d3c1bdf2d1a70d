"""Answers that reason first: one ``<think>...</think>`` block, then what the task asks for.

A target without reasoning, for tasks or comparisons that leave it out, has an empty block: models that think by
themselves, and chat templates that open the block, then learn to close it at once.
"""

from dataclasses import dataclass

from megatron_ads.errors import DataError
from megatron_ads.tasks.elements import ReadFailure

OPEN, CLOSE = "<think>", "</think>"


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
    return target if isinstance(parts, ReadFailure) else render_reasoned("", parts.answer)


def split_reasoning(text: str, *, required: bool = True) -> Reasoned | ReadFailure:
    """Separate the reasoning from the answer, strictly: nothing may precede ``<think>``.

    Args:
        text: What the model said.
        required: False admits an empty block and none at all, for models that are not asked to reason.
    """
    whole = text.strip()
    if not whole:
        return ReadFailure.empty
    if not whole.startswith(OPEN):
        return ReadFailure.no_reasoning if required else Reasoned("", whole)
    reasoning, closing, answer = whole.removeprefix(OPEN).partition(CLOSE)
    if not closing:
        return ReadFailure.unclosed_reasoning
    if required and not reasoning.strip():
        return ReadFailure.no_reasoning
    return Reasoned(reasoning.strip(), answer.strip())
