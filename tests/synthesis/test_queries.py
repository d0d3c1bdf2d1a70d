"""Rows of query generation that are no material for reasoning, because their own queries break the rules."""

from dataclasses import replace

import pytest

from megatron_ads.config.data import AdsTask, SourceConfig, SourceKind
from megatron_ads.data.rows import ChatRow, Fact
from megatron_ads.data.sources import read_source
from megatron_ads.metrics.text import fit_embedding
from megatron_ads.synthesis.filters import TOPICS, QueryFault, queries_of, query_fault, topic_of
from megatron_ads.tasks import query_generation
from megatron_ads.tasks.prompts import Ad
from megatron_ads.tasks.query_generation import GeneratedQuery, KeywordBrief


def row_of(keyword: str, queries: list[str], ad: Ad | None = None) -> ChatRow:
    brief = KeywordBrief(keyword, ad=ad)
    return query_generation.chat_row("q", brief, [GeneratedQuery(text, "why") for text in queries], "r")


# Texts from which the embedding knows that notebooks are laptops, and garden sets are not.
TEXTS = ["laptop notebook", "laptop computer notebook", "gaming notebook", "garden furniture set", "garden set chairs"]


@pytest.mark.parametrize(
    ("queries", "fault"),
    [
        (["gaming laptop computer", "cheap laptop computer"], None),
        (["refurbished Corvo machine"], None),  # the ad's name is on topic
        (["gaming notebook"], None),  # a synonym
        (["laptop"], QueryFault.broader_query),
        (["computer laptop"], QueryFault.broader_query),  # it says nothing that the keyword does not
        (["cheap laptop computer", "laptop computer cheap"], QueryFault.repeated_query),
        (["cheap laptop computer", "garden furniture set"], QueryFault.off_topic_query),
    ],
)
def test_queries_that_break_the_rules_are_no_material(queries: list[str], fault: QueryFault | None) -> None:
    row = row_of("laptop computer", queries, Ad(title="Corvo 13"))
    assert query_fault(row, fit_embedding(TEXTS, dimensions=2).embed, min_similarity=0.1) == fault


def test_of_simulated_rows_most_are_kept_and_few_that_have_the_queries_of_another_keyword() -> None:
    source = SourceConfig(kind=SourceKind.simulator, task=AdsTask.query_generation, rows=300)
    rows = read_source(source, seed=0)
    for index in range(0, 300, 10):
        truth = rows[(index + 37) % 300].facts[Fact.ground_truth]
        rows[index] = replace(rows[index], facts={**rows[index].facts, Fact.ground_truth: truth})
    texts = [text for row in rows for text in (topic_of(row), " ".join(queries_of(row)))]
    embed = fit_embedding(texts, dimensions=TOPICS).embed
    kept = [query_fault(row, embed, min_similarity=0.1) is None for row in rows]
    assert sum(kept[index] for index in range(0, 300, 10)) <= 5  # of 30
    assert sum(kept[index] for index in range(300) if index % 10) >= 256  # of 270
