"""The texts of an answer without its form: as one text, or as lines, the most important first."""

from megatron_ads.rows import ChatRow, Fact, texts_in
from megatron_ads.tasks.answer_format import ReadFailure, split_reasoning
from megatron_ads.tasks.ground_truth import truth_facts
from megatron_ads.tasks.next_advertiser import Ranking
from megatron_ads.tasks.query_generation import Queries
from megatron_ads.tasks.registry import TASKS, read_answer
from megatron_ads.tasks.user_profile import Profile


def said_text(row: ChatRow, text: str) -> str:
    """Return the texts of an answer, without reasoning and, in ads tasks, without markup; empty if it is unreadable."""
    if row.task not in TASKS:
        parts = split_reasoning(text, required=False)
        return "" if isinstance(parts, ReadFailure) else parts.answer
    answer = read_answer(row, text)
    return "" if isinstance(answer, ReadFailure) else " ".join(texts_in(truth_facts(answer)[Fact.ground_truth]))


def texts_of_answer(row: ChatRow, text: str) -> list[str]:
    """Return the lines that an answer adds to a query, the most important first; none if it cannot be read."""
    answer = read_answer(row, text) if row.task in TASKS else None
    if isinstance(answer, ReadFailure):
        return []
    if isinstance(answer, Ranking):
        return [*answer.advertisers, *answer.interests]
    if isinstance(answer, Queries):
        return list(answer.texts)
    if isinstance(answer, Profile):  # what the user avoids is no query
        return [*answer.intents, *answer.interests, *answer.constraints, answer.summary]
    said = said_text(row, text)
    return [said] if said else []
