"""User profile generation: interests, intents, constraints and what to avoid, from what a user did.

Source: AdNanny, section 2; the tags are ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_ads.metrics.text import overlap, words_of
from megatron_ads.rows import ChatRow
from megatron_ads.tasks.answer_format import (
    ReadFailure,
    element,
    listed,
    read_parts,
    render_reasoned,
    split_reasoning,
    unlisted,
)
from megatron_ads.tasks.ground_truth import Metrics, ground_truth, mean, readable, truth_facts
from megatron_ads.tasks.prompts import Template, single_turn
from megatron_ads.tasks.user_history import FULL_VIEW, HistoryView, UserHistory, render_history, sections, user_facts

TASK = "user_profile"

TEMPLATE = Template(
    task=TASK,
    version=1,
    paraphrases=(
        "Describe this user's interests, intents, constraints and what to avoid.",
        "Write a profile of this user from what they did.",
        "What does this user like, plan and not want? Summarise it as a profile.",
    ),
    answer_form=(
        "Answer with <Summary>, <Interests>, <Intents>, <Constraints> and <Avoid>; lists separated by ';', or none."
    ),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """What is said of a user; a list may be empty."""

    summary: str
    """One or two sentences."""
    interests: tuple[str, ...]
    """Categories or topics, the strongest first."""
    intents: tuple[str, ...] = ()
    """What the user seems about to do or buy."""
    constraints: tuple[str, ...] = ()
    """Price level, place, brand."""
    avoid: tuple[str, ...] = ()
    """Topics that should not be shown."""
    reasoning: str = ""


def render_prompt(
    user: UserHistory, instruction: str = TEMPLATE.instruction(), *, view: HistoryView = FULL_VIEW
) -> str:
    """Return the user's message: the instruction, then the history section by section."""
    return f"{instruction}\n{render_history(sections(user, view))}"


def render_target(profile: Profile) -> str:
    """Return the assistant's message: reasoning, then one line per part.

    Raises:
        DataError: If the summary is empty, or a value cannot stand in a list.
    """
    lines = [
        element("Summary", profile.summary),
        element("Interests", listed(profile.interests)),
        element("Intents", listed(profile.intents)),
        element("Constraints", listed(profile.constraints)),
        element("Avoid", listed(profile.avoid)),
    ]
    return render_reasoned(profile.reasoning, "\n".join(lines))


def chat_row(row_id: str, user: UserHistory, profile: Profile, *, view: HistoryView = FULL_VIEW) -> ChatRow:
    """Return one example; rows of one user stay on one side of any split.

    Raises:
        DataError: If a part of the profile cannot be written.
    """
    prompt = render_prompt(user, TEMPLATE.instruction_of(row_id), view=view)
    facts = {**user_facts(user, view), **truth_facts(profile)}
    return single_turn(row_id, TASK, prompt, render_target(profile), facts=facts, group=user.user_id)


_PARTS = ("Summary", "Interests", "Intents", "Constraints", "Avoid")
_LISTS = ("interests", "intents", "constraints", "avoid")


def parse(text: str, *, reasoning_required: bool = True) -> Profile | ReadFailure:
    """Read an answer strictly: one ``<think>`` block, then the five parts in order, and nothing else."""
    parts = split_reasoning(text, required=reasoning_required)
    if isinstance(parts, ReadFailure):
        return parts
    given = read_parts(parts.answer, _PARTS)
    if isinstance(given, ReadFailure):
        return given
    return Profile(
        summary=given["Summary"],
        interests=unlisted(given["Interests"]),
        intents=unlisted(given["Intents"]),
        constraints=unlisted(given["Constraints"]),
        avoid=unlisted(given["Avoid"]),
        reasoning=parts.reasoning,
    )


def metrics(rows: Sequence[ChatRow], answers: Sequence[Profile | ReadFailure]) -> Metrics:
    """Return, averaged over rows, precision, recall and F1 of every list and the F1 of the summary's words (ours).

    An unreadable answer has 0 everywhere.
    """
    pairs = [(ground_truth(row, Profile), readable(answer)) for row, answer in zip(rows, answers, strict=True)]
    found: Metrics = {}
    for name in _LISTS:
        overlaps = [overlap(getattr(truth, name), getattr(answer, name)) if answer else None for truth, answer in pairs]
        for measure in ("precision", "recall", "f1"):
            found[f"{name}/{measure}"] = mean([getattr(value, measure) if value else 0.0 for value in overlaps])
    summaries = [
        overlap(words_of(truth.summary), words_of(answer.summary)).f1 if answer else 0.0 for truth, answer in pairs
    ]
    return {**found, "summary/word_f1": mean(summaries)}
