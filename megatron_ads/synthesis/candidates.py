"""One piece of reasoning for one row, and what can be said against it without looking at any other.

Source: AdNanny, sections 3.3 and 3.4. Where the paper names an aim (no boilerplate, faithful), the measure is ours.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from megatron_ads.config.synthesis import RejectConfig, SynthesisConfig
from megatron_ads.inference.client import Client
from megatron_ads.inference.engine import Completion, Finish
from megatron_ads.metrics.text import words_of
from megatron_ads.rows import ChatRow
from megatron_ads.synthesis.prompts import FormFailure, ReasoningTemplate, answer_of, read_teacher, reasoning_request
from megatron_ads.tasks.answer_format import ReadFailure, render_reasoned
from megatron_ads.tasks.ground_truth import agrees
from megatron_ads.tasks.registry import TASKS, task_named

SHORTEST_DETAIL = 3
"""Shorter words are not counted as details, unless they hold a digit."""

_TELLS = re.compile(
    r"\b(?:(?:given|provided|stated|supplied|known|assigned|settled) (?:the )?(?:answer|label|score|"
    r"outcome|verdict)|(?:answer|label|score|outcome|verdict) (?:that )?(?:is|was|were|has been|i was|we were) "
    r"(?:already )?(?:given|provided|stated|supplied|known|settled)|as (?:given|provided|instructed) above)\b",
    re.IGNORECASE,
)


class Removed(StrEnum):
    """Why a candidate is not used; the first that applies, in this order, is counted."""

    no_answer = "no_answer"
    """The teacher did not answer after all attempts, or called the request impossible."""
    withheld = "withheld"
    """By a content filter, or by the teacher itself."""
    cut_off = "cut_off"
    """At the limit of tokens."""
    schema = "schema"
    """Not reasoning followed by an answer that the task's own parser reads."""
    label_differs = "label_differs"
    """The repeated answer is not the row's."""
    tells_the_answer_was_given = "tells_the_answer_was_given"
    too_short = "too_short"
    boilerplate = "boilerplate"
    """It mentions too few details of the row's input."""
    unlike_the_others = "unlike_the_others"
    """The row's other candidates say something else: not self-consistent."""
    repeats_another = "repeats_another"
    verifier_rejects = "verifier_rejects"
    verifier_unreadable = "verifier_unreadable"
    """The verifier gave no verdict."""
    high_perplexity = "high_perplexity"
    """The answer does not follow from the reasoning: PPL(answer | prompt, reasoning) >= R."""
    too_long_to_measure = "too_long_to_measure"
    """Prompt, reasoning and answer are longer than the perplexity model's positions."""
    more_than_kept = "more_than_kept"
    """It passed, but ``keep_per_row`` others of its row are better."""


@dataclass(slots=True)
class Candidate:
    """One answer of the teacher on its way through the filters."""

    row: ChatRow
    number: int
    text: str
    reasoning: str = ""
    removed: Removed | None = None
    reason: str = ""
    """More on the removal, the same for many, such as the parser's failure: the report counts it."""
    measured: str = ""
    """What the removal was decided by, in numbers of this candidate's own."""
    similarity: float | None = None
    """Mean similarity with the row's other candidates; None where there are none."""
    perplexity: float | None = None

    @property
    def name(self) -> str:
        """Row and number: the id in the corpus."""
        return f"{self.row.id}/{self.number}"

    @property
    def target(self) -> str:
        """The assistant's message: this reasoning, the row's own answer."""
        return render_reasoned(self.reasoning, answer_of(self.row))

    def remove(self, why: Removed, reason: str = "", *, measured: str = "") -> None:
        """Take it out."""
        self.removed, self.reason, self.measured = why, reason, measured


def details_in(rows: Sequence[ChatRow]) -> Callable[[ChatRow], frozenset[str]]:
    """Return what tells the details of one of ``rows``: the words of its input that neither are common nor its answer.

    Common are the words of the tasks' templates, and those in more than half of the inputs.
    """
    templates = [template for task in TASKS.values() for template in task.templates]
    said = " ".join(text for template in templates for text in (*template.paraphrases, template.answer_form))
    counts = Counter(word for row in rows for word in _weighty(row))
    frequent = {word for word, count in counts.items() if count > max(1, len(rows) / 2)}
    common = frozenset(words_of(said)) | frequent
    return lambda row: _weighty(row) - common - frozenset(words_of(answer_of(row)))


def ask_teacher(
    asked: Sequence[tuple[ChatRow, int, ReasoningTemplate, int]],
    teacher: Client,
    config: SynthesisConfig,
    *,
    description: str,
) -> list[Candidate]:
    """Ask for reasoning and read what comes, as :func:`read_candidate` does.

    Args:
        asked: Row and number of each candidate, the template it is asked with, and its number among those of template
            and row, which decides wording and seed.
        teacher: Who is asked.
        config: How.
        description: Of the progress.
    """
    requests = (
        reasoning_request(row, template, place, config.teacher, seed=config.seed) for row, _, template, place in asked
    )
    answers = teacher.ask(requests, total=len(asked), description=description)
    details_of = details_in(list(dict.fromkeys(row for row, *_ in asked)))
    return [
        read_candidate(row, number, answer, details=details_of(row), config=config.reject)
        for (row, number, _, _), answer in zip(asked, answers, strict=True)
    ]


def read_candidate(
    row: ChatRow, number: int, answer: Completion | None, *, details: frozenset[str], config: RejectConfig
) -> Candidate:
    """Return a candidate, removed if its form, its label or its content is not what was asked for."""
    candidate = Candidate(row=row, number=number, text=answer.text if answer else "")
    if answer is None or answer.finish is Finish.refused:
        candidate.remove(Removed.no_answer, candidate.text or "none after all attempts")
    elif answer.finish is Finish.withheld:
        candidate.remove(Removed.withheld)
    elif answer.finish is Finish.cut_off:
        candidate.remove(Removed.cut_off)
    else:
        _read_text(candidate, details, config)
    return candidate


def _read_text(candidate: Candidate, details: frozenset[str], config: RejectConfig) -> None:
    """Read the reasoning into the candidate and judge it, or remove it for its form or label."""
    parts = read_teacher(candidate.text)
    if isinstance(parts, FormFailure):
        candidate.remove(Removed.schema, str(parts))
        return
    parse = task_named(candidate.row.task).parse
    said = parse(render_reasoned(parts.reasoning, parts.answer), reasoning_required=True)
    if isinstance(said, ReadFailure):
        candidate.remove(Removed.schema, str(said))
        return
    if not agrees(said, candidate.row):
        candidate.remove(Removed.label_differs, parts.answer)
        return
    candidate.reasoning = parts.reasoning
    if told := _TELLS.search(candidate.reasoning):
        candidate.remove(Removed.tells_the_answer_was_given, told[0])
    elif says_little := lack_of_content(
        candidate.reasoning, details, min_words=config.min_words, min_details=config.min_details
    ):
        why, measured = says_little
        candidate.remove(why, measured=measured)


def lack_of_content(
    reasoning: str, details: frozenset[str], *, min_words: int, min_details: int
) -> tuple[Removed, str] | None:
    """Return what reasoning lacks, and that in numbers: it is ``too_short``, or ``boilerplate``; None if it is neither.

    Args:
        details: Of the row, as ``details_in`` tells them; all must be mentioned where there are fewer than asked for.
    """
    words = words_of(reasoning)
    if len(words) < min_words:
        return Removed.too_short, f"{len(words)} words"
    if (mentioned := len(details & set(words))) < min(min_details, len(details)):
        return Removed.boilerplate, f"{mentioned} of {len(details)} details"
    return None


def _weighty(row: ChatRow) -> frozenset[str]:
    words = words_of("\n".join(row.shown_texts()))
    return frozenset(word for word in words if len(word) >= SHORTEST_DETAIL or any(map(str.isdigit, word)))


def passing(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return the candidates that nothing has removed so far, in order."""
    return [candidate for candidate in candidates if candidate.removed is None]


def by_row(candidates: Sequence[Candidate]) -> Mapping[str, list[Candidate]]:
    """Return candidates by the id of their row."""
    found = defaultdict(list)
    for candidate in candidates:
        found[candidate.row.id].append(candidate)
    return found
