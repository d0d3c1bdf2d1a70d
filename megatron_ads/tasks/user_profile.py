"""User profile generation: interests, intents, constraints and what to avoid, from what a user did.

Source: AdNanny, section 2; the tags are ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_ads.metrics.ranking import mean
from megatron_ads.metrics.text import overlap, words_of
from megatron_ads.rows import ChatRow
from megatron_ads.tasks.answer_format import ReadFailure, read_parts, render_parts, strict_parser, unlisted
from megatron_ads.tasks.ground_truth import Metrics, judged
from megatron_ads.tasks.prompts import Template, example
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


_PARTS = ("Summary", "Interests", "Intents", "Constraints", "Avoid")


def chat_row(row_id: str, user: UserHistory, profile: Profile, *, view: HistoryView = FULL_VIEW) -> ChatRow:
    """Return one example; rows of one user stay on one side of any split.

    Raises:
        DataError: If the summary is empty, or a value cannot stand in a list.
    """
    answer, facts = render_parts(profile, _PARTS), user_facts(user, view)
    shown = [render_history(sections(user, view))]
    return example(row_id, TEMPLATE, shown, profile, answer, facts=facts, group=user.user_id)


@strict_parser(reasons=True)
def parse(answer: str, reasoning: str) -> Profile:
    """Read the five parts in order, and nothing else."""
    lists = read_parts(answer, _PARTS)
    summary = lists.pop("Summary")
    values = {name.lower(): unlisted(text) for name, text in lists.items()}
    return Profile(summary=summary, reasoning=reasoning, **values)


def metrics(rows: Sequence[ChatRow], answers: Sequence[Profile | ReadFailure]) -> Metrics:
    """Return, averaged over rows, precision, recall and F1 of every list and the F1 of the summary's words (ours).

    An unreadable answer has 0 everywhere.
    """
    pairs = judged(rows, answers, Profile)
    found: Metrics = {}
    for name in ("interests", "intents", "constraints", "avoid"):
        overlaps = [overlap(getattr(truth, name), getattr(answer, name)) if answer else None for truth, answer in pairs]
        for measure in ("precision", "recall", "f1"):
            found[f"{name}/{measure}"] = mean([getattr(value, measure) if value else 0.0 for value in overlaps])
    summaries = [
        overlap(words_of(truth.summary), words_of(answer.summary)).f1 if answer else 0.0 for truth, answer in pairs
    ]
    return {**found, "summary/word_f1": mean(summaries)}
