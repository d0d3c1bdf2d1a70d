"""Rankings of advertisers next to what needs no model: the most popular ones, and those bought from before.

A model ranks by beams, by how many samples name somebody, or in one answer of 20. Every method is judged by recall@{1,
5, 20}, as in the advertiser paper, and NDCG@20, with a bootstrap interval over users each; recall@k is left out where
fewer than k of more valid names were asked for. Rankings of more than 20 have hit rates at 50 and 100 as well, as in
Taiji: a hit rate is the recall of the one true name.
"""

from collections.abc import Sequence
from typing import Any

from megatron_ads.data.split import group_of
from megatron_ads.evaluation.answer_records import Answer
from megatron_ads.evaluation.category_scores import categories_of_names, category_scores
from megatron_ads.evaluation.label_scores import best_answers
from megatron_ads.inference.name_answers import AdvertiserNames, NearestNames, bought_from, recent_items
from megatron_ads.metrics import ranking as rank_metrics
from megatron_ads.metrics.intervals import ends, mean_interval
from megatron_ads.metrics.ranking import RECALLS, ndcg_at, position_of, recall_at, same_name
from megatron_ads.rows import ChatRow, Fact
from megatron_ads.tasks import next_advertiser, next_item

LONGEST = max(RECALLS)
_NEAREST = max(rank_metrics.HIT_RATES)
_GROUNDED = "model, nearest names"
_RESAMPLES = 1000


def advertiser_rankings(answers: Sequence[Answer]) -> list[list[str]]:
    """Return whom each answer names, the likeliest first; what cannot be read takes its place unchanged.

    Several samples stand in the order of ``sampled_answers.ranked_samples``.
    """
    rankings = []
    for answer in answers:
        if answer.row.task == next_advertiser.RANKING_TASK:
            ranking = next_advertiser.parse_ranking(answer.text, reasoning_required=False)
            rankings.append(list(ranking.advertisers) if isinstance(ranking, next_advertiser.Ranking) else [])
            continue
        texts = [beam.text for beam in answer.beams] or [answer.text]
        found = [(text, next_advertiser.parse(text, reasoning_required=False)) for text in texts]
        rankings.append(
            [read.advertiser if isinstance(read, next_advertiser.Prediction) else text for text, read in found]
        )
    return rankings


def ranking_scores(
    answers: Sequence[Answer], training: Sequence[ChatRow], advertisers: AdvertiserNames, *, ground: bool = False
) -> dict[str, Any]:
    """Return the scores of the model's rankings and of the baselines, as JSON values; what is undefined is None.

    Labels of ``training`` say what is popular; where somebody gave the valid names, baselines name no others.
    ``ground`` also ranks the 100 valid names that are nearest to the model's first one, valid or not: where names are
    titles of items, its hit rates are Taiji's of titles. Where events tell categories, there are accuracies of them.
    """
    rows = [answer.row for answer in answers]
    model = advertiser_rankings(answers)
    known = {same_name(name) for name in advertisers.names}
    labels = [row.label for row in training if row.task == rows[0].task and row.label is not None]
    if advertisers.given:
        labels = [label for label in labels if same_name(label) in known]
    asked_for = longest_ranking(answers)
    depth = max(LONGEST, asked_for)
    others = _without_a_model(rows, rank_metrics.most_popular(labels, depth), advertisers, depth)
    wanted = min(LONGEST, len(known))
    methods = {"model": _judged(rows, model, longest=asked_for, wanted=wanted)}
    rankings = {"model": model, **others}
    if ground and advertisers.names:
        first = [ranking[0] if ranking else "" for ranking in model]
        rankings[_GROUNDED] = NearestNames(advertisers.names).rank(first, _NEAREST)
        methods[_GROUNDED] = _judged(rows, rankings[_GROUNDED], longest=max(LONGEST, min(_NEAREST, len(known))))
    methods |= {name: _judged(rows, ranked, longest=depth) for name, ranked in others.items()}
    categories = categories_of_names([*rows, *training])
    for name, scores in methods.items():
        scores |= category_scores(rows, rankings[name], categories)
    return {
        "methods": methods,
        "valid_rate": rank_metrics.valid_rate(model, advertisers.names),
        "distinct_rate": rank_metrics.distinct_rate(model),
        "valid_names": len(advertisers.names),
        "names_from": advertisers.source,
        "truth_is_valid": sum(same_name(row.label or "") in known for row in rows) / len(rows),
    }


def _without_a_model(
    rows: Sequence[ChatRow], popular: list[str], advertisers: AdvertiserNames, depth: int
) -> dict[str, list[list[str]]]:
    """Return the rankings of the baselines, and the best that can be reached where that is known, by name."""
    recent = [rank_metrics.recent_then_popular(_recent(row, advertisers), popular, depth) for row in rows]
    best = best_answers(rows)
    reachable = {"best reachable": [list(ranking) for ranking in best]} if best else {}
    return {"popular": [popular for _ in rows], "recent, then popular": recent, **reachable}


def _recent(row: ChatRow, advertisers: AdvertiserNames) -> Sequence[str]:
    """Return whom a user bought from, as far as they exist; names that a prompt's text tells are no proof of that.

    Of rows that are answered with an item, the recent items.
    """
    past = recent_items(row) if row.task == next_item.TASK else bought_from(row)
    if not advertisers.given and Fact.read_from_prompt not in row.facts:
        return past
    known = {same_name(name) for name in advertisers.names}
    return [name for name in past if same_name(name) in known]


def _judged(
    rows: Sequence[ChatRow], rankings: Sequence[Sequence[str]], *, longest: int = LONGEST, wanted: int = LONGEST
) -> dict[str, Any]:
    groups = [group_of(row) for row in rows]
    found: dict[str, Any] = {}
    for name, values in _by_rows(rows, rankings, longest=longest, wanted=wanted).items():
        found[name] = rank_metrics.mean(values)
        found[f"{name}_95"] = ends(mean_interval(values, groups=groups, resamples=_RESAMPLES))
    return found


def found_by_rows(answers: Sequence[Answer], wanted: int = LONGEST) -> dict[str, list[float]]:
    """Return what the ranking of each answer finds, by metric: those whose mean the model is judged by.

    With fewer valid names than 20, ``wanted`` is their number.
    """
    rows = [answer.row for answer in answers]
    return _by_rows(rows, advertiser_rankings(answers), longest=longest_ranking(answers), wanted=wanted)


def longest_ranking(answers: Sequence[Answer]) -> int:
    """Return how many names were asked for: a ranking's number, or of beams and samples their most."""
    if answers[0].row.task == next_advertiser.RANKING_TASK:
        return LONGEST
    return max(sum(beam.samples or 1 for beam in answer.beams) or 1 for answer in answers)


def _by_rows(
    rows: Sequence[ChatRow], rankings: Sequence[Sequence[str]], *, longest: int, wanted: int
) -> dict[str, list[float]]:
    """Return the hits at each k that the rankings go as far as, and the NDCG of those that go all the way."""
    positions = [position_of(row.label or "", ranking) for row, ranking in zip(rows, rankings, strict=True)]
    shares = {f"recall@{k}": k for k in RECALLS if k == 1 or longest >= min(k, wanted)}
    shares |= {f"hr@{k}": k for k in rank_metrics.HIT_RATES if LONGEST < k <= longest}
    found = {name: [recall_at([position], k) or 0.0 for position in positions] for name, k in shares.items()}
    if longest >= wanted:
        found[f"ndcg@{LONGEST}"] = [ndcg_at([position], LONGEST) or 0.0 for position in positions]
    return found
