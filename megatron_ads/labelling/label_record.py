"""What became of one row: its label, or why it has none; a line of the Parquet files in DIR/labels.

The label's log-probability is that of its tokens, given all that was written before them.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import pyarrow as pa

from megatron_ads.inference.engine import Completion, Finish
from megatron_ads.labelling.question_store import Question
from megatron_ads.rows import Fact
from megatron_ads.tasks.answer_format import (
    CLOSE,
    OPEN,
    ReadFailure,
    place_in_element,
    place_of_answer,
    split_reasoning,
)
from megatron_ads.tasks.ground_truth import truth_facts
from megatron_ads.tasks.registry import TASKS

OF_QUESTION = ("row", "source", "id", "task", "user", "digest")
"""What a label has of its question."""
TOO_LONG, REFUSED_BY_TEMPLATE = "prompt_too_long", "refused_by_template"
NO_ANSWER = (Finish.refused, Finish.withheld, Finish.unanswered)
"""Nothing in such a completion is the model's answer."""
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
SCHEMA = pa.schema(
    [
        ("row", pa.int64()), ("source", pa.int32()), ("id", pa.string()), ("task", pa.string()),
        ("user", pa.string()), ("label", pa.string()), ("answer", pa.string()), ("reasoning", pa.string()),
        ("text", pa.string()), ("log_probability", pa.float64()), ("failure", pa.string()), ("finish", pa.string()),
        ("draws", pa.int32()), ("prompt_tokens", pa.int32()), ("cached_tokens", pa.int32()),
        ("answer_tokens", pa.int32()), ("seconds", pa.float32()), ("digest", pa.binary(16)),
    ]
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelRecord:
    """One row of the result. Tokens and seconds are those of all its draws."""

    row: int
    source: int
    id: str
    task: str
    user: str
    digest: bytes
    label: str | None = None
    """In the task's own words; None: the task's answers are longer, or it could not be read."""
    answer: str | None = None
    """All that the answer says, as a JSON object by the names of the task's record, without the reasoning."""
    reasoning: str | None = None
    text: str | None = None
    """What the model wrote, or why nothing could be asked or answered."""
    log_probability: float | None = None
    """Of the label, in nats."""
    failure: str | None = None
    """Why there is no label: a failure of reading, of asking, or of the row itself."""
    finish: str | None = None
    draws: int = 0
    """How often the model was asked; 0: never, or the row shares the answer of an equal one."""
    prompt_tokens: int = 0
    cached_tokens: int | None = None
    answer_tokens: int = 0
    seconds: float = 0.0


def as_table(labels: Sequence[LabelRecord]) -> pa.Table:
    """Return labels as a table of ``SCHEMA``."""
    return pa.table({part.name: [getattr(one, part.name) for one in labels] for part in fields(LabelRecord)}, SCHEMA)


def read_label(
    question: Question,
    completions: Sequence[Completion],
    *,
    opened: str = "",
    reasoning_required: bool,
    decode: Callable[[Sequence[int]], str] | None = None,
) -> LabelRecord:
    """Return what the last of a row's completions says.

    Args:
        question: What was asked.
        completions: All draws so far.
        opened: What of the answer stands in front of a completion.
        reasoning_required: Whether an answer without reasoning is none, in tasks that reason.
        decode: Turns token ids into text, for the label's log-probability.
    """
    last, text = completions[-1], opened + completions[-1].text
    cached = [one.cached_tokens for one in completions if one.cached_tokens is not None]
    common: dict[str, Any] = {name: getattr(question, name) for name in OF_QUESTION} | {
        "text": text,
        "finish": str(last.finish),
        "draws": len(completions),
        "prompt_tokens": sum(one.prompt_tokens for one in completions),
        "cached_tokens": sum(cached) if cached else None,
        "answer_tokens": sum(one.answer_tokens for one in completions),
        "seconds": sum(one.seconds for one in completions),
    }
    if last.finish in NO_ANSWER:
        return LabelRecord(**common, failure=str(last.finish))
    said = _read(question.task, text, reasoning_required=reasoning_required)
    if isinstance(said, ReadFailure):
        return LabelRecord(**common, failure=str(said))
    label, answer, reasoning = said
    found = None
    if label is not None and decode is not None:
        found = label_log_probability(last, label, TASKS[question.task].label_in, opened=opened, decode=decode)
    return LabelRecord(**common, label=label, answer=answer, reasoning=reasoning, log_probability=found)


def _read(task: str, text: str, *, reasoning_required: bool) -> tuple[str | None, str, str] | ReadFailure:
    """Return label, answer as JSON, and reasoning; of a task that nothing is known of, the answer is a text."""
    if task not in TASKS:
        parts = split_reasoning(text, required=False)
        if isinstance(parts, ReadFailure):
            return parts
        if not parts.answer:
            return ReadFailure.empty
        return None, json.dumps(parts.answer, ensure_ascii=False), parts.reasoning
    known = TASKS[task]
    said = known.parse(text, reasoning_required=reasoning_required and known.reasons)
    if isinstance(said, ReadFailure):
        return said
    facts = truth_facts(said)
    label = None if known.label_of is None else known.label_of(said)
    return label, json.dumps(facts[Fact.ground_truth], ensure_ascii=False), str(facts[Fact.reasoning])


def label_log_probability(
    completion: Completion,
    label: str,
    label_in: str | None,
    *,
    opened: str = "",
    decode: Callable[[Sequence[int]], str],
) -> float | None:
    """Return log P(label | what is before it), in nats: of the tokens that its characters are in.

    Args:
        completion: An answer that was read.
        label: What it says.
        label_in: Name of the element that the label stands in, behind the reasoning; None: it begins the answer.
        opened: What of the answer stands in front of the completion.
        decode: Turns token ids into text.

    Returns:
        None if the server reported no tokens, or they are not those of the answer.
    """
    tokens, values = completion.token_ids, completion.log_probabilities
    if tokens is None or values is None:
        return None
    text = opened + decode(tokens)
    start: int | None = place_of_answer(text) if CLOSE in text or OPEN not in text else None
    if start is not None and label_in is not None:
        place = place_in_element(label_in, text[start:])
        start = None if place is None else start + place
    start = -1 if start is None else text.find(label, start)
    if start < len(opened):
        return None
    first = _token_with(tokens, start - len(opened), decode)
    last = _token_with(tokens, start - len(opened) + len(label) - 1, decode)
    return float(sum(values[first : last + 1]))


def _token_with(tokens: Sequence[int], character: int, decode: Callable[[Sequence[int]], str]) -> int:
    """Return the place of the token that ends a character of the text, by bisection over the texts of prefixes."""
    low, high = 0, len(tokens) - 1
    while low < high:
        middle = (low + high) // 2
        # The first bytes of a character decode to replacement characters, one or several.
        if len(decode(tokens[: middle + 1]).rstrip(_INCOMPLETE)) > character:
            high = middle
        else:
            low = middle + 1
    return low
