"""Whether the first name of a ranking is of the true one's category: Taiji's accuracies of categories, L1 to L3.

A name's category is the most frequent one among what users did with it, in the events that rows carry. Levels are the
parts of a category between " > ", as in "Home > Kitchen > Knives". A name without a known category is wrong; rows whose
true name has none are not judged. Source: Taiji, tables 1 and 3, whose answers say a category; ours name what has one.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

from megatron_ads.data.split import group_of
from megatron_ads.metrics.intervals import ends, mean_interval
from megatron_ads.metrics.ranking import mean, same_name
from megatron_ads.rows import ChatRow, Fact

LEVELS = 3
_SEPARATOR = " > "
_RESAMPLES = 1000

Path = tuple[str, ...]
"""A category from its widest level on."""


def categories_of_names(rows: Iterable[ChatRow]) -> dict[str, Path]:
    """Return the category of each name that events of the rows' users tell one of, by ``same_name``."""
    seen: dict[str, Counter[Path]] = defaultdict(Counter)
    for row in rows:
        events = row.facts.get(Fact.events, ())
        for event in events if isinstance(events, list | tuple) else ():
            if isinstance(event, Mapping) and event.get("advertiser") and event.get("category"):
                levels = tuple(map(same_name, str(event["category"]).split(_SEPARATOR)))
                seen[same_name(str(event["advertiser"]))][levels] += 1
    return {name: min(counts, key=lambda path: (-counts[path], path)) for name, counts in seen.items()}


def category_scores(
    rows: Sequence[ChatRow], rankings: Sequence[Sequence[str]], categories: Mapping[str, Path]
) -> dict[str, float | list[float] | None]:
    """Return the accuracy at each level that true names have, with a bootstrap interval over users; empty without."""
    scores: dict[str, float | list[float] | None] = {}
    for level in range(1, LEVELS + 1):
        right, groups = [], []
        for row, ranking in zip(rows, rankings, strict=True):
            true = categories.get(same_name(row.label or ""), ())
            if len(true) >= level:
                said = categories.get(same_name(ranking[0]), ()) if ranking else ()
                right.append(float(said[:level] == true[:level]))
                groups.append(group_of(row))
        if right:
            scores[f"category L{level}"] = mean(right)
            scores[f"category L{level}_95"] = ends(mean_interval(right, groups=groups, resamples=_RESAMPLES))
    return scores
