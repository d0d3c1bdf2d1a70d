"""Facts of rows that came as text: the one place where a prompt and a target are read back."""

from collections.abc import Mapping
from dataclasses import replace

from megatron_ads.rows import FACTS_OF_ANSWERS, ChatRow, Fact, Facts, JsonValue
from megatron_ads.tasks import (
    ad_rewriting,
    ad_user_relevance,
    advertiser_question,
    next_advertiser,
    next_item,
    user_profile,
    variants,
)
from megatron_ads.tasks.answer_format import NOTHING, ReadFailure, unlisted
from megatron_ads.tasks.ground_truth import truth_facts
from megatron_ads.tasks.prompts import DESCRIPTION, LABELS, SELLER, Ad
from megatron_ads.tasks.registry import TASKS
from megatron_ads.tasks.user_history import HEADINGS, NOTHING_KNOWN, SEPARATOR

_ONE_LINE = frozenset({*HEADINGS, Fact.pool, Fact.keywords, Fact.queries_wanted})
_OF_PROMPTS = frozenset(Fact) - FACTS_OF_ANSWERS
_TEXTS = (Fact.query, Fact.keyword, Fact.goal, Fact.request, Fact.current, Fact.new, Fact.advertiser)
_ABOUT_USERS = frozenset({
    ad_user_relevance.TASK, next_advertiser.TASK, next_advertiser.RANKING_TASK, user_profile.TASK, variants.YES_NO,
    advertiser_question.CHOOSE_ONE, advertiser_question.LIST_RANKING,
    next_item.TASK,
})  # fmt: skip


def facts_of_text_row(row: ChatRow) -> ChatRow:
    """Return a row of an ads task with the facts that its texts tell; facts that it has stay, and so do other rows.

    A prompt in the form of the task's templates is taken apart, unless the row has facts of its prompt. Any other is
    the fact ``text``, besides the lines that look like those of a template. A target that is unreadable, or stands in
    for one, tells no answer. No name that may be answered is taken from a prompt: an entry with the separator in it has
    come apart there.
    """
    task = TASKS.get(row.task)
    if task is None or not row.messages:
        return row
    answer = task.parse(row.target, reasoning_required=False)
    told = not (isinstance(answer, ReadFailure) or row.facts.get(Fact.prompt_alone))
    truth: Facts = truth_facts(answer) if told else {}
    prompt: Facts = {} if row.facts.keys() & _OF_PROMPTS else _facts_of_prompt(row)
    return replace(row, facts={**prompt, **truth, **row.facts})


def _facts_of_prompt(row: ChatRow) -> Facts:
    content = row.prompt[-1].content if row.prompt else ""
    instruction, _, shown = content.partition("\n")
    known = {wording for template in TASKS[row.task].templates for wording in template.instructions()}
    before, listed, names = shown.rpartition(f"\n{LABELS[Fact.candidates]}:\n")
    parts, complete = _labelled_parts(before if listed else shown)
    facts = _as_facts(parts, row.task)
    if listed:
        numbered = row.task == advertiser_question.LIST_RANKING
        facts[Fact.candidates] = [name.partition(". ")[2] if numbered else name for name in names.splitlines()]
    if instruction not in known or not complete or not shown:
        facts[Fact.text] = content
    return facts | {Fact.read_from_prompt: True}


def _labelled_parts(shown: str) -> tuple[dict[str, str], bool]:
    """Return the text behind each label, and whether that is all there is; a text may continue on further lines."""
    labels: dict[str, str] = {label: name for table in (LABELS, HEADINGS) for name, label in table.items()}
    parts: dict[str, str] = {}
    complete, name = True, ""
    for line in shown.split("\n"):
        label, mark, text = line.partition(": ")
        if mark and label in labels and labels[label] not in parts:
            name = labels[label]
            parts[name] = text
        elif name and name not in _ONE_LINE:
            parts[name] += f"\n{line}"
        else:
            complete = complete and line == NOTHING_KNOWN
    return parts, complete


def _as_facts(parts: Mapping[str, str], task: str) -> dict[str, JsonValue]:
    facts: dict[str, JsonValue] = {name: parts[name] for name in _TEXTS if name in parts}
    if task in _ABOUT_USERS and Fact.query not in parts:
        facts[Fact.history] = {str(name): text.split(SEPARATOR) for name, text in parts.items() if name in HEADINGS}
    if task == ad_rewriting.TASK:
        facts[Fact.keywords] = list(unlisted(parts.get(Fact.keywords, NOTHING)))
    if Fact.queries_wanted in parts and parts[Fact.queries_wanted].isdecimal():
        facts[Fact.queries_wanted] = int(parts[Fact.queries_wanted])
    if Fact.ad in parts:
        ad = Ad(parts[Fact.ad], description=parts.get(DESCRIPTION, ""), seller=parts.get(SELLER, ""))
        facts[Fact.ad] = ad.as_fact()
    if Fact.pool in parts:
        facts[Fact.pool] = parts[Fact.pool].split(SEPARATOR)
    return facts
