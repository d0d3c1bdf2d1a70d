"""Keyword-based query generation: queries that are narrower than an advertiser's keyword, each with its reason.

Source: AdNanny, section 3.2 (rules); the tags are ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_ads.errors import DataError
from megatron_ads.metrics.ranking import mean
from megatron_ads.metrics.text import distinct_n, is_narrower, near_duplicates, words_of
from megatron_ads.rows import ChatRow, Fact, JsonValue
from megatron_ads.tasks.answer_format import ReadFailure, Unreadable, count_of, element, read_elements, strict_parser
from megatron_ads.tasks.ground_truth import Metrics, ground_truth, readable
from megatron_ads.tasks.prompts import Ad, Template, ad_of, example, filled, line

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


def chat_row(row_id: str, brief: KeywordBrief, queries: Sequence[GeneratedQuery], reasoning: str) -> ChatRow:
    """Return one example; rows of one keyword stay on one side of any split.

    Raises:
        DataError: If there is no query, or the keyword, a query or a reason is empty.
    """
    if not queries:
        raise DataError("there are no queries; at least one is needed.")
    keyword = line(Fact.keyword, filled("the keyword", brief.keyword))
    shown = [keyword, line(Fact.queries_wanted, str(brief.queries_wanted))]
    facts: dict[str, JsonValue] = {Fact.keyword: brief.keyword, Fact.queries_wanted: brief.queries_wanted}
    if brief.ad:
        shown += brief.ad.lines()
        facts[Fact.ad] = brief.ad.as_fact()
    answer = "\n".join(element("Query", query.text) + element("Reason", query.reason) for query in queries)
    return example(
        row_id, TEMPLATE, shown, Queries(tuple(queries), reasoning), answer, facts=facts, group=brief.keyword
    )


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


@strict_parser(reasons=True)
def parse(answer: str, reasoning: str) -> Queries:
    """Read queries, each with its reason, and nothing else."""
    if not count_of("Query", answer):
        raise Unreadable(ReadFailure.no_query)
    elements = read_elements(answer)
    if elements is None:
        raise Unreadable(ReadFailure.text_around_queries)
    if [name for name, _ in elements] != ["Query", "Reason"] * (len(elements) // 2):
        raise Unreadable(ReadFailure.unpaired_reason)
    values = [value for _, value in elements]
    if not all(values):
        raise Unreadable(ReadFailure.empty_query)
    return Queries(tuple(map(GeneratedQuery, values[::2], values[1::2])), reasoning)


def metrics(rows: Sequence[ChatRow], answers: Sequence[Queries | ReadFailure]) -> Metrics:
    """Return how far queries follow the rules; the paper's table 6 takes a judge and is ``metrics.text``.

    A query follows them if it is narrower than the keyword, shares a word with the keyword or one of the row's true
    queries, and does not repeat an earlier one (ours). An unreadable answer follows none. A row that says no keyword
    to compare with does not count.
    """
    given = [readable(answer) for answer in answers]
    texts = [answer.texts if answer else () for answer in given]
    keyed = [
        (keyword, said, ground_truth(row, Queries).texts)
        for row, said in zip(rows, texts, strict=True)
        if (keyword := keyword_of(row))
    ]
    queries = sum(map(len, texts))
    return {
        "follow_rules": mean([_follow_rules(*row) for row in keyed]),
        "narrower_rate": mean([is_narrower(query, keyword) for keyword, said, _ in keyed for query in said]),
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
