"""Keyword-based query generation: queries that are narrower than an advertiser's keyword, each with its reason.

Source: AdNanny, section 3.2 (rules); the tags are ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_ads.errors import DataError
from megatron_ads.metrics.text import distinct_n, is_narrower, near_duplicates, words_of
from megatron_ads.rows import ChatRow, Fact, JsonValue
from megatron_ads.tasks.answer_format import (
    ReadFailure,
    count_of,
    element,
    read_elements,
    render_reasoned,
    split_reasoning,
)
from megatron_ads.tasks.ground_truth import Metrics, ground_truth, mean, readable, share, truth_facts
from megatron_ads.tasks.prompts import Ad, Template, ad_of, filled, line, single_turn

TASK = "query_generation"

TEMPLATE = Template(
    task=TASK,
    version=1,
    paraphrases=(
        "Write search queries that are narrower than the keyword, stay in its category and sound natural.",
        "Which more specific searches would people type who are after what this keyword stands for?",
        "Refine the keyword into natural queries of the same category, each more specific than the keyword.",
    ),
    answer_form="Answer with <Query>text</Query><Reason>why</Reason> for each.",
)


@dataclass(frozen=True, slots=True)
class KeywordBrief:
    """What queries are written for."""

    keyword: str
    ad: Ad | None = None
    """An ad that the keyword is bid on; None: the keyword alone is known."""
    queries_wanted: int = 4


@dataclass(frozen=True, slots=True)
class GeneratedQuery:
    """One query and why it fits the keyword."""

    text: str
    reason: str


@dataclass(frozen=True, slots=True)
class Queries:
    """An answer that could be read."""

    queries: tuple[GeneratedQuery, ...]
    reasoning: str

    @property
    def texts(self) -> tuple[str, ...]:
        """The queries without their reasons."""
        return tuple(query.text for query in self.queries)


def render_prompt(brief: KeywordBrief, instruction: str = TEMPLATE.instruction()) -> str:
    """Return the user's message: the instruction, the keyword, the ad if there is one.

    Raises:
        DataError: If the keyword is empty.
    """
    keyword = line(Fact.keyword, filled("the keyword", brief.keyword))
    wanted = line(Fact.queries_wanted, str(brief.queries_wanted))
    return "\n".join([instruction, keyword, wanted, *(brief.ad.lines() if brief.ad else ())])


def render_target(queries: Sequence[GeneratedQuery], reasoning: str) -> str:
    """Return the assistant's message: reasoning, then one line per query.

    Raises:
        DataError: If there is no query, or one is without text or reason.
    """
    if not queries:
        raise DataError("there are no queries; at least one is needed.")
    lines = [element("Query", query.text) + element("Reason", query.reason) for query in queries]
    return render_reasoned(reasoning, "\n".join(lines))


def chat_row(row_id: str, brief: KeywordBrief, queries: Sequence[GeneratedQuery], reasoning: str) -> ChatRow:
    """Return one example; rows of one keyword stay on one side of any split.

    Raises:
        DataError: If there is no query, or a text is empty.
    """
    prompt = render_prompt(brief, TEMPLATE.instruction_of(row_id))
    facts: dict[str, JsonValue] = {Fact.keyword: brief.keyword, Fact.queries_wanted: brief.queries_wanted}
    facts |= {Fact.ad: brief.ad.as_fact()} if brief.ad else {}
    facts |= truth_facts(Queries(tuple(queries), reasoning))
    return single_turn(row_id, TASK, prompt, render_target(queries, reasoning), facts=facts, group=brief.keyword)


def keyword_of(row: ChatRow) -> str:
    """Return the keyword that a row's queries are written for: its fact, else the row's group; empty without both."""
    return row.text_fact(Fact.keyword) if Fact.keyword in row.facts else row.group


def subject_of(row: ChatRow) -> str:
    """Return keyword and ad as the one text that embeddings and matchers compare queries with.

    The words before each part are those of the first version of the prompt, and stay when prompts change: what is
    fitted to such texts, and the scores, then stay comparable. Of a prompt in a form of its own it is all but the
    first line, the instruction.
    """
    if Fact.text in row.facts:
        text = row.text_fact(Fact.text)
        return text.partition("\n")[2] or text
    lines = [f"Keyword: {keyword_of(row).strip()}", f"Queries: {row.facts.get(Fact.queries_wanted, '')}"]
    if Fact.ad in row.facts:
        ad = ad_of(row.object_fact(Fact.ad))
        lines += [f"Ad: {ad.title}", *([f"Seller: {ad.seller}"] if ad.seller else [])]
        lines += [f"Text: {ad.description}"] if ad.description else []
    return "\n".join(lines)


def parse(text: str, *, reasoning_required: bool = True) -> Queries | ReadFailure:
    """Read an answer strictly: one ``<think>`` block, then queries, each with its reason, and nothing else."""
    parts = split_reasoning(text, required=reasoning_required)
    if isinstance(parts, ReadFailure):
        return parts
    if not count_of("Query", parts.answer):
        return ReadFailure.no_query
    elements = read_elements(parts.answer)
    if elements is None:
        return ReadFailure.text_around_queries
    if [name for name, _ in elements] != ["Query", "Reason"] * (len(elements) // 2):
        return ReadFailure.unpaired_reason
    values = [value for _, value in elements]
    if not all(values):
        return ReadFailure.empty_query
    pairs = zip(values[::2], values[1::2], strict=True)
    return Queries(queries=tuple(GeneratedQuery(*pair) for pair in pairs), reasoning=parts.reasoning)


def metrics(rows: Sequence[ChatRow], answers: Sequence[Queries | ReadFailure]) -> Metrics:
    """Return how far queries follow the rules; the paper's table 6 takes a judge and is ``metrics.text``.

    A query follows them if it is narrower than the keyword, shares a word with the keyword or one of the row's true
    queries, and does not repeat an earlier one (ours). An unreadable answer follows none. A row that says no keyword
    to compare with does not count.
    """
    given = [readable(answer) for answer in answers]
    texts = [answer.texts if answer else () for answer in given]
    keyed = [(keyword_of(row), row, queries) for row, queries in zip(rows, texts, strict=True) if keyword_of(row)]
    narrower = [is_narrower(query, keyword) for keyword, _, queries in keyed for query in queries]
    followed = [_follow_rules(keyword, queries, ground_truth(row, Queries).texts) for keyword, row, queries in keyed]
    queries = sum(map(len, texts))
    return {
        "follow_rules": mean(followed),
        "narrower_rate": share(narrower),
        "repeated_rate": sum(map(near_duplicates, texts)) / queries if queries else None,
        "distinct_2": distinct_n(texts, 2),
        "queries_per_answer": mean([float(len(answer.queries)) for answer in given if answer]),
    }


def _follow_rules(keyword: str, queries: Sequence[str], true: Sequence[str]) -> float:
    """Return the share of one row's queries that follow the rules; 0 without queries."""
    on_topic = {word for text in (keyword, *true) for word in words_of(text)}
    seen: set[frozenset[str]] = set()
    followed = 0
    for query in queries:
        words = frozenset(words_of(query))
        followed += is_narrower(query, keyword) and bool(words & on_topic) and words not in seen
        seen.add(words)
    return followed / len(queries) if queries else 0.0
