"""What prompts and rows are made of: versioned instructions, of which a row's id picks a wording, and labelled lines.

A version is never edited once rows were made with it: a change of wording is a new version.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from megatron_ads.errors import DataError
from megatron_ads.rows import ChatRow, Fact, Facts, Message, Role
from megatron_ads.stable_random import stable_integer
from megatron_ads.tasks.answer_format import render_reasoned
from megatron_ads.tasks.ground_truth import truth_facts

SELLER, DESCRIPTION = "seller", "description"
LABELS: dict[str, str] = {
    Fact.query: "Query", Fact.ad: "Ad", SELLER: "Seller", DESCRIPTION: "Text", Fact.keyword: "Keyword",
    Fact.queries_wanted: "Queries", Fact.goal: "Goal", Fact.keywords: "Keywords", Fact.pool: "Advertisers",
    Fact.request: "Request", Fact.current: "Current system", Fact.new: "New system", Fact.advertiser: "Advertiser",
    Fact.candidates: "Candidates",
}  # fmt: skip
"""What stands before each fact in a prompt; the sections of a user's history have headings of their own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Template:
    """What a task is asked, in several words for the same thing."""

    task: str
    version: int
    paraphrases: tuple[str, ...]
    """The first is the plain one."""
    answer_form: str = ""
    """How the answer is written, the same for every wording; empty: the model knows it from its training."""

    @property
    def name(self) -> str:
        """Task and version, for reports."""
        return f"{self.task}/{self.version}"

    def instruction(self, wording: int = 0) -> str:
        """Return one wording, with the form of the answer."""
        text = self.paraphrases[wording]
        return f"{text} {self.answer_form}" if self.answer_form else text

    def instructions(self) -> tuple[str, ...]:
        """Return every wording, with the form of the answer."""
        return tuple(map(self.instruction, range(len(self.paraphrases))))

    def wording_of(self, row_id: str) -> int:
        """Return which wording a row has; it depends on this template and the id alone."""
        return stable_integer(self.name, row_id) % len(self.paraphrases)

    def instruction_of(self, row_id: str) -> str:
        """Return the instruction that a row has."""
        return self.instruction(self.wording_of(row_id))


@dataclass(frozen=True, slots=True)
class Ad:
    """What the judge sees of an ad."""

    title: str
    description: str = ""
    seller: str = ""
    """Brand, advertiser or domain; empty if unknown."""

    def as_fact(self) -> Facts:
        """Return it as the fact ``ad``."""
        return {"title": self.title, "seller": self.seller, "description": self.description}

    def lines(self) -> list[str]:
        """Return the lines of a prompt."""
        parts = ((Fact.ad, self.title), (SELLER, self.seller), (DESCRIPTION, self.description))
        return [line(name, text) for name, text in parts if text or name is Fact.ad]


def ad_of(fact: Facts) -> Ad:
    """Return the ad that the fact ``ad`` describes."""
    return Ad(**{name: str(fact.get(name, "")) for name in ("title", "description", "seller")})


def line(name: str, text: str) -> str:
    """Return a fact as a line of a prompt."""
    return f"{LABELS[name]}: {text}"


def example(
    row_id: str,
    template: Template,
    shown: Iterable[str],
    truth: Any,
    answer: str,
    *,
    facts: Facts,
    group: str,
    label: str | None = None,
    task: str = "",
) -> ChatRow:
    """Return one question and its answer.

    Args:
        row_id: Unique in its source; decides the wording of the instruction.
        template: What is asked.
        shown: Lines of the prompt, below the instruction.
        truth: The record that the task's parser reads from the target, with its reasoning.
        answer: The target, without the reasoning.
        facts: What the prompt was rendered from.
        group: What must not be shared between training and validation.
        label: The true answer in short.
        task: The task's name; empty: the template's.

    Raises:
        DataError: If the reasoning holds a tag that would end it early.
    """
    prompt, target = "\n".join([template.instruction_of(row_id), *shown]), render_reasoned(truth.reasoning, answer)
    messages = (Message(Role.user, prompt), Message(Role.assistant, target))
    label = None if label is None else str(label)
    facts = {**facts, **truth_facts(truth)}
    return ChatRow(id=row_id, task=task or template.task, messages=messages, group=group, label=label, facts=facts)


def filled(name: str, text: str) -> str:
    """Return ``text`` without surrounding white space.

    Raises:
        DataError: If nothing is left.
    """
    if not text.strip():
        raise DataError(f"{name} is {text!r}; it must be text that is not empty.")
    return text.strip()
