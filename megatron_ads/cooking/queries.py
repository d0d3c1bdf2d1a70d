"""Rows of query generation whose own queries break the rules: broader than the keyword, off topic, or repeated.

The label is given, so this is about rows, before anything is asked. On topic means here: a query shares a word with
the keyword or the ad. Source: AdNanny, section 3.4; the measures are ours.
"""

from enum import StrEnum

from megatron_ads.cooking.prompts import question_of
from megatron_ads.data.rows import ChatRow
from megatron_ads.metrics.generated_queries import is_narrower, near_duplicates
from megatron_ads.metrics.text_similarity import words_of
from megatron_ads.tasks import query_generation
from megatron_ads.tasks.truths import truth_of


class QueryFault(StrEnum):
    """Why a row is left out; the first that applies."""

    broader_query = "broader_query"
    repeated_query = "repeated_query"
    off_topic_query = "off_topic_query"


def query_fault(row: ChatRow) -> QueryFault | None:
    """Return what is wrong with the queries of a row; None if nothing is, or the row is of another task."""
    if row.task != query_generation.TASK:
        return None
    queries = truth_of(row, query_generation.parse).texts
    keyword = row.group
    if keyword and not all(is_narrower(query, keyword) for query in queries):
        return QueryFault.broader_query
    if near_duplicates(queries):
        return QueryFault.repeated_query
    # Without the first line, the instruction, whose words every query of the task could share.
    topic = set(words_of(keyword)) | set(words_of(question_of(row).partition("\n")[2]))
    if not all(topic & set(words_of(query)) for query in queries):
        return QueryFault.off_topic_query
    return None
