"""What features are worth to the ranking model: the same network, trained from the same seeds with and without them.

Every line is a ranker with the same fields, of which those that it does without are empty. Lines of a seed see the same
impressions in the same order. A change is the mean over seeds of the metric with the features less the one without; its
interval is of a paired bootstrap over users and seeds together, so that it covers the luck of training as well.

    predicted             advertisers and interests: the advertiser paper, table 5
    within the user       predicted, and the codes of the answer: Taiji, table 2, intra-user
    across users          the similar user's events: Taiji, table 2, cross-user
    both                  all of them
    ..., of other users   the same features, dealt out anew among the users of an anchor: what chance alone gives

Long-tail users are the third with the shortest histories (ours; Taiji has no number).

Shape suffixes: N = impressions, H = histories, V = lines, S = seeds, R = resamples, M = metrics of each target in turn,
T = targets.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_ads.downstream.examples import Examples, Place, held_out_examples, training_examples
from megatron_ads.downstream.feature_fields import FeatureFields, FeatureGroup
from megatron_ads.downstream.features import UserFeatures
from megatron_ads.downstream.logs import Logs
from megatron_ads.downstream.pipeline import Pipeline, one_thread
from megatron_ads.downstream.ranker import Shown, train_ranker
from megatron_ads.errors import DataError
from megatron_ads.metrics.intervals import ends, percentile_interval, resampled_counts
from megatron_ads.metrics.weighted_scores import METRICS, SortedRows
from megatron_ads.progress import Progress

BASE = "without features"
PREDICTED = frozenset({FeatureGroup.predicted})
INTRA, CROSS, BOTH = PREDICTED | {FeatureGroup.codes}, frozenset({FeatureGroup.similar}), frozenset(FeatureGroup)
_RESAMPLES = 200
_LONG_TAIL = 1 / 3
Numbers = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Line:
    """One way to use features."""

    groups: frozenset[FeatureGroup]
    of_others: bool = False
    """The features are those of another user."""


LINES: Mapping[str, Line] = {
    BASE: Line(frozenset()),
    "predicted": Line(PREDICTED),
    "predicted, of other users": Line(PREDICTED, of_others=True),
    "within the user": Line(INTRA),
    "across users": Line(CROSS),
    "both": Line(BOTH),
    "both, of other users": Line(BOTH, of_others=True),
}
TARGETS = ("click", "conversion", "ctcvr")
"""A click; a conversion after a click, of clicked impressions; both together."""


def feature_scores(
    pipeline: Pipeline, logs: Logs, features: Mapping[Place, UserFeatures], *, seeds: int
) -> dict[str, Any]:
    """Return what each line changes, for all users held out and for the long tail, as JSON values.

    Rankers are trained on the pipeline's training examples that have features, with its retriever, and judged on its
    held-out examples that have some.

    Raises:
        DataError: If too few examples have features.
    """
    learned = _with_features(training_examples(logs, pipeline.config), features, pipeline, "to learn from")
    judged = _with_features(held_out_examples(logs, pipeline.config), features, pipeline, "to evaluate on")
    with Progress(len(LINES) * seeds, description="training rankers", unit="ranker") as progress:
        chances: dict[str, list[Numbers]] = {}
        for name, line in LINES.items():
            chances[name] = []
            for seed in range(seeds):
                chances[name].append(_chances(pipeline, learned, judged, line, seed))
                progress.update()
    short = _long_tail(judged)
    return {
        "seeds": seeds,
        "users": {"learned": len(set(learned.users)), "judged": len(set(judged.users))},
        "impressions": {"learned": len(learned.examples.impressions), "judged": len(judged.examples.impressions)},
        "all": _changes(judged, chances, np.ones(len(short), dtype=bool)),
        "long_tail": _changes(judged, chances, short),
    }


@dataclass(frozen=True, slots=True)
class _Known:
    """Impressions after histories that have features."""

    examples: Examples
    shown: Shown
    fields: FeatureFields

    @property
    def users(self) -> list[str]:
        """Of each impression."""
        return [shown.user for _, shown in self.examples.impressions]


def _with_features(
    examples: Examples, features: Mapping[Place, UserFeatures], pipeline: Pipeline, purpose: str
) -> _Known:
    """Return the impressions after histories that have features, and these histories alone."""
    places = examples.places
    kept = sorted({number for number, _ in examples.impressions if places[number] in features})
    places_of = {number: place for place, number in enumerate(kept)}
    chosen = Examples(
        histories=[examples.histories[number] for number in kept],
        anchors=[examples.anchors[number] for number in kept],
        impressions=[(places_of[number], each) for number, each in examples.impressions if number in places_of],
    )
    clicked = [each for _, each in chosen.impressions if each.clicked]
    if len({each.converted for each in clicked}) < 2:
        raise DataError(
            f"Of {len(places)} histories {purpose}, {len(kept)} have features and impressions after them, with "
            f"{len(clicked)} clicks: too few to tell conversions. Make features of the rows that `megatron-ads "
            "downstream rows` wrote for this pipeline."
        )
    fields = FeatureFields(
        chosen, [features[places[number]] for number in kept], pipeline.items, buckets=pipeline.config.buckets
    )
    return _Known(chosen, Shown.of(chosen, pipeline.words), fields)


def _whose(known: Examples, line: Line, seed: int) -> NDArray[np.int64]:
    """Return whose features each history has: its own, or those of a history drawn from the same anchor's."""
    whose_H, anchor_H, draw = np.arange(len(known.histories)), np.array(known.anchors), np.random.default_rng([seed, 3])
    if line.of_others:
        for anchor in sorted(set(known.anchors)):
            here = np.flatnonzero(anchor_H == anchor)
            whose_H[here] = draw.permutation(here)
    return whose_H


def _chances(pipeline: Pipeline, learned: _Known, judged: _Known, line: Line, seed: int) -> Numbers:
    """Return (N, 2), P(click) and P(click and conversion), of a ranker trained for a line."""
    seed, towers = pipeline.config.seed + seed, pipeline.retriever
    of_learned, of_judged = (
        known.fields.of(line.groups, _whose(known.examples, line, seed)) for known in (learned, judged)
    )
    with one_thread():
        ranker = train_ranker(
            learned.shown, pipeline.item_JC, towers, pipeline.config.ranker, seed=seed, fields=of_learned
        )
        everything = np.arange(len(judged.shown.item_N))
        user_NC = judged.shown.users(towers, everything, np.ones(len(everything), dtype=bool))
        bags = [field.of(everything) for field in of_judged]
        chance_N2: Numbers = ranker.chances(user_NC, pipeline.item_JC[judged.shown.item_N], bags).numpy()
    return chance_N2.astype(np.float64)


def _long_tail(known: _Known) -> NDArray[np.bool_]:
    """Return whether each impression is of a user with a history among the shortest third."""
    lengths = {number: len(known.examples.histories[number].events) for number, _ in known.examples.impressions}
    longest = np.quantile(list(lengths.values()), _LONG_TAIL)
    return np.array([lengths[number] <= longest for number, _ in known.examples.impressions])


def _changes(known: _Known, chances: Mapping[str, Sequence[Numbers]], chosen_N: NDArray[np.bool_]) -> dict[str, Any]:
    """Return the metrics of every line over some impressions, with the change and its interval."""
    happened_N2 = known.shown.happened_N2.numpy()[chosen_N].astype(bool)
    users = [user for user, counts in zip(known.users, chosen_N, strict=True) if counts]
    reachable = _reachable(known, chosen_N, happened_N2)
    rows_VST = [[_sorted(chance_N2[chosen_N], happened_N2) for chance_N2 in of_line] for of_line in chances.values()]

    def measured(weight_N: NDArray[np.int64]) -> Numbers:
        """Return (V, S, M), the metrics of each target in turn."""
        of_target = (weight_N, weight_N[happened_N2[:, 0]], weight_N)
        return np.array([
            [np.concatenate([rows.metrics(weights) for rows, weights in zip(rows_T, of_target, strict=True)])
             for rows_T in rows_ST]
            for rows_ST in rows_VST
        ])  # fmt: skip

    whole_VSM = measured(np.ones(len(users), dtype=np.int64))
    draw, seeds = np.random.default_rng(1), whole_VSM.shape[1]
    mean_RVM = np.array([
        measured(weight_N)[:, draw.integers(seeds, size=seeds)].mean(axis=1)
        for weight_N in resampled_counts(users, resamples=_RESAMPLES)
    ]).reshape(-1, *whole_VSM[:, 0].shape)  # fmt: skip
    mean_VM = whole_VSM.mean(axis=1)
    return {
        "users": len(set(users)),
        "impressions": len(users),
        "conversions": int(happened_N2[:, 1].sum()),
        "reachable": reachable,
        "lines": {
            name: _line(mean_VM[number], mean_VM[0], mean_RVM[:, number], mean_RVM[:, 0])
            for number, name in enumerate(chances)
        },
    }


def _reachable(known: _Known, chosen_N: NDArray[np.bool_], happened_N2: NDArray[np.bool_]) -> dict[str, Any] | None:
    """Return the metrics of the true probabilities, where a simulation knows them."""
    true_N = [shown.chances for (_, shown), counts in zip(known.examples.impressions, chosen_N, strict=True) if counts]
    if any(chances is None for chances in true_N):
        return None
    rows_T = _sorted(np.array(true_N, dtype=np.float64), happened_N2)
    return {
        target: dict(zip(METRICS, rows.metrics(np.ones(rows.count)).tolist(), strict=True))
        for target, rows in zip(TARGETS, rows_T, strict=True)
    }


def _sorted(chance_N2: Numbers, happened_N2: NDArray[np.bool_]) -> list[SortedRows]:
    """Return the rows of each target, sorted."""
    clicked_N = happened_N2[:, 0]
    given = chance_N2[clicked_N, 1] / chance_N2[clicked_N, 0].clip(1e-12)
    return [
        SortedRows(clicked_N, chance_N2[:, 0]),
        SortedRows(happened_N2[clicked_N, 1], given),
        SortedRows(happened_N2[:, 1], chance_N2[:, 1]),
    ]


def _line(value_M: Numbers, base_M: Numbers, value_RM: Numbers, base_RM: Numbers) -> dict[str, Any]:
    """Return by target and metric the value, its change, and the change as a share of the value without features."""
    names = [(target, metric) for target in TARGETS for metric in METRICS]
    found: dict[str, Any] = {target: {} for target in TARGETS}
    for number, (target, metric) in enumerate(names):
        change_R = value_RM[:, number] - base_RM[:, number]
        interval = ends(percentile_interval(change_R[np.isfinite(change_R)]))
        base = float(base_M[number])
        found[target][metric] = {
            "value": float(value_M[number]),
            "change": float(value_M[number]) - base,
            "interval": interval,
            "relative": (float(value_M[number]) - base) / base,
            "relative_interval": interval and [end / base for end in interval],
        }
    return found
