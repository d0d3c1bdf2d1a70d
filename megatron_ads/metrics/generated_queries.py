"""How good generated queries are. The names are those of AdNanny, table 6; the paper does not define them, so ours:

relevance    share of queries that a frozen judge calls on topic
diversity    mean embedding distance between the queries of one keyword, averaged over keywords
distinct-n   different n-grams / all n-grams of the queries of one keyword, averaged over keywords
difficulty   1 - share of queries for which a lexical matcher finds what they were written for
click attribute ratio   1 - total variation distance between the attributes of queries and of clicked queries
"""

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from statistics import fmean

from megatron_ads.metrics.lexical_matcher import LexicalMatcher
from megatron_ads.metrics.text_similarity import TextEmbedding, mean_pairwise_distance, words_of


def relevance(pairs: Sequence[tuple[str, str]], judge: Callable[[str, str], bool]) -> float | None:
    """Return the share of (keyword, query) pairs that ``judge`` calls on topic; None without pairs."""
    return fmean(judge(keyword, query) for keyword, query in pairs) if pairs else None


def diversity(queries_of_keywords: Sequence[Sequence[str]], embedding: TextEmbedding) -> float | None:
    """Return the mean distance; keywords with fewer than two queries do not count. None if none has two."""
    distances = [mean_pairwise_distance(embedding.embed(queries)) for queries in queries_of_keywords]
    known = [distance for distance in distances if distance is not None]
    return fmean(known) if known else None


def distinct_n(queries_of_keywords: Sequence[Sequence[str]], n: int) -> float | None:
    """Return the share of different n-grams of words; keywords without n-grams do not count. None if none has any."""
    shares = []
    for queries in queries_of_keywords:
        grams = [gram for query in queries for gram in _grams(words_of(query), n)]
        if grams:
            shares.append(len(set(grams)) / len(grams))
    return fmean(shares) if shares else None


def difficulty(pairs: Sequence[tuple[str, int]], matcher: LexicalMatcher, *, k: int = 10) -> float | None:
    """Return 1 - hit rate over pairs of a query and the number of its document; None without pairs."""
    if not pairs:
        return None
    return 1 - fmean(document in matcher.best(query, k) for query, document in pairs)


def click_attribute_ratio(generated: Sequence[str], clicked: Sequence[str]) -> float | None:
    """Return how alike two distributions of attributes (such as price, brand, place) are; None if one is empty."""
    if not generated or not clicked:
        return None
    ours, theirs = Counter(generated), Counter(clicked)
    apart = sum(abs(ours[name] / len(generated) - theirs[name] / len(clicked)) for name in ours.keys() | theirs.keys())
    return 1 - apart / 2


def is_narrower(query: str, keyword: str) -> bool:
    """Return whether a query says something that the keyword does not: it has a word that the keyword lacks.

    Its length does not matter, as searchers have longer and shorter names for one thing. That a new word is only
    another name for the same is beyond a rule on words.
    """
    return bool(set(words_of(query)) - set(words_of(keyword)))


def near_duplicates(queries: Sequence[str]) -> int:
    """Return how many queries have the same words as an earlier one, in whatever order."""
    return len(queries) - len({frozenset(words_of(query)) for query in queries})


def _grams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    if n == 2:
        return list(pairwise(words))
    return [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]
