"""Filters of candidates: those that disagree, that a verifier rejects, or from which the answer does not follow.

Agreement. Do the candidates of a row say the same in other words? Those unlike the others go, and so do repetitions.

    similarity(c) = mean over the row's other candidates of cos(e(c), e(other))

Two candidates that do not resemble each other both go: nothing says which is right. Source: AdNanny, section 3.4
(self-consistency by embedding similarity; different but valid perspectives are wanted, so repetitions go as well).

Verifier. A second model judges each piece of reasoning: does it fit the input, does it support the answer, is it sound?
Source: AdNanny, section 3.4 (textual alignment with the input, logical soundness, faithfulness); the words are ours.

Perplexity. Keep reasoning from which the answer follows: PPL(answer | prompt, reasoning) < R.

    PPL = exp(-(1/T) sum_t log P(y_t | prompt, reasoning, y_<t)), over the T tokens of the answer, without the end token
    R   = the median (or another quantile) of PPL over a sample of the candidates

Source: Taiji, equation 1 and section 2.2.1.

Queries. Rows of query generation whose own queries break the rules are left out. The label is given, so this is about
rows, before anything is asked. Ours, as the paper names the aims only (AdNanny, section 3.4):

    broader     the query has no word that the keyword lacks
    off topic   it shares no word with keyword and ad, and its embedding is not similar to theirs: synonyms are wanted
    repeated    it has the words of another query of the row
"""

from collections.abc import Sequence
from enum import StrEnum
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_ads.config.generation import AnsweringConfig
from megatron_ads.config.synthesis import PerplexityConfig, RejectConfig
from megatron_ads.inference.client import Client
from megatron_ads.inference.engine import Completion, Finish
from megatron_ads.metrics.encoder import Embed, sentence_encoder
from megatron_ads.metrics.text import fit_embedding, is_narrower, mean_similarities, near_duplicates, words_of
from megatron_ads.rows import ChatRow, Role
from megatron_ads.synthesis.candidates import Candidate, Removed, by_row, passing
from megatron_ads.synthesis.prompts import answer_of, chat_request, drawn, question_of
from megatron_ads.tasks.answer_format import CLOSE, Unreadable, read_parts
from megatron_ads.tasks.ground_truth import ground_truth
from megatron_ads.tasks.query_generation import Queries, keyword_of, subject_of

MOST_FITTED = 5000
"""Texts that TF-IDF is fitted on at most; the first ones."""
_ROUNDING = 1e-9


def embedder(config: RejectConfig, texts: Sequence[str], *, dimensions: int = 64) -> Embed:
    """Return what turns texts into vectors: TF-IDF fitted on ``texts``, or the model that the recipe names."""
    if config.embedding is None:
        return fit_embedding(list(texts[:MOST_FITTED]), dimensions=dimensions).embed
    return sentence_encoder(config.embedding, "reject.embedding")


def remove_disagreeing(candidates: Sequence[Candidate], embed: Embed, config: RejectConfig) -> None:
    """Remove, row by row, candidates unlike the others, then repetitions of an earlier one; note the similarities."""
    for group in by_row(passing(candidates)).values():
        if len(group) < 2:
            continue
        vectors_ND = embed([candidate.reasoning for candidate in group])
        for candidate, similarity in zip(group, mean_similarities(vectors_ND), strict=True):
            candidate.similarity = float(similarity)
            if config.min_similarity > 0 and similarity < config.min_similarity:
                candidate.remove(Removed.unlike_the_others, measured=f"similarity {similarity:.3f}")
        _remove_repetitions(group, vectors_ND, config.max_similarity)


def _remove_repetitions(group: Sequence[Candidate], vectors_ND: NDArray[np.float64], limit: float) -> None:
    if limit >= 1:
        return
    kept: list[int] = []
    for index, candidate in enumerate(group):
        if candidate.removed is not None:
            continue
        nearest = max(kept, key=lambda other: float(vectors_ND[index] @ vectors_ND[other]), default=None)
        if nearest is not None and vectors_ND[index] @ vectors_ND[nearest] > limit + _ROUNDING:
            candidate.remove(Removed.repeats_another, measured=f"candidate {group[nearest].number}")
        else:
            kept.append(index)


ASPECTS = ("Aligned", "Sound", "Faithful")
_TEXT = (
    "Judge the reasoning. Aligned: everything it says about the case stands in the question. Sound: its steps follow "
    "from one another. Faithful: it supports the answer and does not contradict it. Answer with "
    "<Aligned>yes or no</Aligned><Sound>yes or no</Sound><Faithful>yes or no</Faithful> and nothing else."
)


def remove_rejected(candidates: Sequence[Candidate], client: Client, config: AnsweringConfig, *, seed: int) -> None:
    """Ask about every candidate that is left, and remove those that fail in any aspect."""
    left = passing(candidates)
    requests = (chat_request(verifier_messages(candidate), config, seed=seed) for candidate in left)
    answers = client.ask(requests, total=len(left), description="verifying")
    for candidate, answer in zip(left, answers, strict=True):
        _judge(candidate, answer)


def verifier_messages(candidate: Candidate) -> list[dict[str, str]]:
    """Return the conversation that asks for a verdict on one piece of reasoning."""
    content = (
        f"A question:\n\n{question_of(candidate.row)}\n\nReasoning:\n\n{candidate.reasoning}\n\nIts answer:\n\n"
        f"{answer_of(candidate.row)}\n\n{_TEXT}"
    )
    return [{"role": str(Role.user), "content": content}]


def _judge(candidate: Candidate, answer: Completion | None) -> None:
    if answer is None or answer.finish is not Finish.ended:
        candidate.remove(Removed.verifier_unreadable, "no answer" if answer is None else str(answer.finish))
        return
    try:
        verdicts = read_parts(answer.text.rpartition(CLOSE)[2].strip(), ASPECTS)  # without thoughts of its own
    except Unreadable as error:
        candidate.remove(Removed.verifier_unreadable, str(error))
        return
    said = {aspect: verdict.lower() for aspect, verdict in verdicts.items()}
    if not set(said.values()) <= {"yes", "no"}:
        candidate.remove(Removed.verifier_unreadable, "neither yes nor no")
    elif failed := [aspect for aspect, verdict in said.items() if verdict == "no"]:
        candidate.remove(Removed.verifier_rejects, f"not {', not '.join(failed).lower()}")


class Scorer(Protocol):
    """A model that says how probable an answer is."""

    def perplexities(self, candidates: Sequence[Candidate]) -> list[float | None]:
        """Return PPL of each row's answer behind the candidate's reasoning; None if the model cannot read that much."""


def remove_unlikely(
    candidates: Sequence[Candidate], scorer: Scorer, config: PerplexityConfig, *, seed: int
) -> float | None:
    """Note the perplexity of every candidate that is left, and remove those not below R; return R.

    R is None where there is nothing to find it from.
    """
    left = passing(candidates)
    for candidate, perplexity in zip(left, scorer.perplexities(left), strict=True):
        candidate.perplexity = perplexity
        if perplexity is None:
            candidate.remove(Removed.too_long_to_measure)
    scored = passing(candidates)
    if not scored:
        return config.threshold
    limit = config.threshold
    if limit is None:
        sample = sorted(scored, key=lambda candidate: drawn(seed, "sample", candidate.name))[: config.sample]
        limit = float(np.quantile([candidate.perplexity or 0.0 for candidate in sample], config.quantile))
    for candidate in scored:
        assert candidate.perplexity is not None, "noted above"
        if not candidate.perplexity < limit:
            candidate.remove(Removed.high_perplexity, measured=f"PPL {candidate.perplexity:.4g}, R {limit:.4g}")
    return limit


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


def query_faults(rows: Sequence[ChatRow], config: RejectConfig) -> list[QueryFault | None]:
    """Return what is wrong with the queries of each row, in an embedding of the topics and queries of all."""
    queries = [" ".join(ground_truth(row, Queries).texts) for row in rows]
    texts = [text for row, said in zip(rows, queries, strict=True) for text in (topic_of(row), said)]
    embed = embedder(config, texts, dimensions=TOPICS)
    return [query_fault(row, embed, min_similarity=config.query_similarity) for row in rows]


def query_fault(row: ChatRow, embed: Embed, *, min_similarity: float) -> QueryFault | None:
    """Return what is wrong with the queries of a row; None if nothing is."""
    queries, topic, keyword = ground_truth(row, Queries).texts, topic_of(row), keyword_of(row)
    if not all(is_narrower(query, keyword) for query in queries):
        return QueryFault.broader_query
    if near_duplicates(queries):
        return QueryFault.repeated_query
    unshared = [query for query in queries if not set(words_of(topic)) & set(words_of(query))]
    if unshared and ((embed(unshared) @ embed((keyword, topic)).T).max(axis=1) < min_similarity).any():
        return QueryFault.off_topic_query
    return None
