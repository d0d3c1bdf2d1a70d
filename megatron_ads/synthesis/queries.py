"""Rows of query generation whose own queries break the rules: broader than the keyword, off topic, or repeated.

The label is given, so this is about rows, before anything is asked. Ours, as the paper names the aims only:

broader     the query has no word that the keyword lacks
off topic   it shares no word with keyword and ad, and its embedding is not similar to theirs: synonyms are wanted
repeated    it has the words of another query of the row

Source: AdNanny, section 3.4.
"""

from collections.abc import Sequence
from enum import StrEnum

from megatron_ads.data.rows import ChatRow
from megatron_ads.metrics.text import is_narrower, near_duplicates, words_of
from megatron_ads.synthesis.filters import Embed
from megatron_ads.tasks.ground_truth import ground_truth
from megatron_ads.tasks.query_generation import Queries, keyword_of, subject_of

TOPICS = 32
"""Dimensions of the embedding: with fewer all topics look alike, with more synonyms do not. On 300 simulated rows, a
tenth of them with the queries of another keyword, 97 % of the others and 10 % of these are kept."""


class QueryFault(StrEnum):
    """Why a row is left out; the first that applies."""

    broader_query = "broader_query"
    repeated_query = "repeated_query"
    off_topic_query = "off_topic_query"


def topic_of(row: ChatRow) -> str:
    """Return keyword and ad."""
    return f"{keyword_of(row)}\n{subject_of(row)}"


def queries_of(row: ChatRow) -> tuple[str, ...]:
    """Return the queries of a row's answer."""
    return ground_truth(row, Queries).texts


def query_fault(row: ChatRow, embed: Embed, *, min_similarity: float) -> QueryFault | None:
    """Return what is wrong with the queries of a row; None if nothing is."""
    queries, topic, keyword = queries_of(row), topic_of(row), keyword_of(row)
    if not all(is_narrower(query, keyword) for query in queries):
        return QueryFault.broader_query
    if near_duplicates(queries):
        return QueryFault.repeated_query
    unshared = [query for query in queries if not set(words_of(topic)) & set(words_of(query))]
    return QueryFault.off_topic_query if _any_unlike(unshared, (keyword, topic), embed, min_similarity) else None


def _any_unlike(queries: Sequence[str], topics: Sequence[str], embed: Embed, min_similarity: float) -> bool:
    """Return whether one of the queries resembles none of the topics."""
    if not queries:
        return False
    nearest_Q = (embed(queries) @ embed(topics).T).max(axis=1)
    return bool((nearest_Q < min_similarity).any())
