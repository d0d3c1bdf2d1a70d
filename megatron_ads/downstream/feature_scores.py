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

Shape suffixes: N = impressions, V = lines, S = seeds, R = resamples, M = metrics.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_ads.downstream.examples import Examples, Place, held_out_examples, training_examples
from megatron_ads.downstream.feature_fields import FeatureFields, Part
from megatron_ads.downstream.features import UserFeatures
from megatron_ads.downstream.logs import Logs
from megatron_ads.downstream.pipeline import Pipeline, one_thread
from megatron_ads.downstream.ranker import train_ranker
from megatron_ads.errors import DataError
from megatron_ads.metrics.classification import auc, average_precision, log_loss
from megatron_ads.metrics.intervals import ends, percentile_interval, resampled_rows
from megatron_ads.progress import Progress

BASE = "without"
PREDICTED = frozenset({Part.predicted})
INTRA, CROSS, BOTH = PREDICTED | {Part.codes}, frozenset({Part.similar}), frozenset(Part)
_RESAMPLES = 200
_LONG_TAIL = 1 / 3
Numbers = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Line:
    """One way to use features."""

    parts: frozenset[Part]
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
METRICS: Mapping[str, Callable[[Any, Any], float | None]] = {
    "loss": log_loss, "auc": auc, "pr_auc": average_precision,
}  # fmt: skip


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
        chances = {}
        for name, line in LINES.items():
            chances[name] = [_chances(pipeline, learned, judged, line, seed, progress) for seed in range(seeds)]
    short = _long_tail(judged)
    return {
        "seeds": seeds,
        "users": {"learned": len(learned.users), "judged": len(judged.users)},
        "impressions": {"learned": len(learned.examples.impressions), "judged": len(judged.examples.impressions)},
        "all": _changes(judged, chances, np.ones(len(short), dtype=bool)),
        "long_tail": _changes(judged, chances, short),
    }


@dataclass(frozen=True, slots=True)
class _Known:
    """Examples with features."""

    examples: Examples
    fields: FeatureFields

    @property
    def users(self) -> set[str]:
        return {shown.user for _, shown in self.examples.impressions}


def _with_features(
    examples: Examples, features: Mapping[Place, UserFeatures], pipeline: Pipeline, purpose: str
) -> _Known:
    """Return the impressions after histories that have features."""
    found = [features.get(place) for place in examples.places]
    shown = [(number, each) for number, each in examples.impressions if found[number] is not None]
    clicked = [each for _, each in shown if each.clicked]
    if not any(each.converted for each in clicked) or all(each.converted for each in clicked):
        raise DataError(
            f"Of {len(examples.histories)} histories {purpose}, {len(found) - found.count(None)} have features, and "
            f"{len(shown)} impressions follow these, with {len(clicked)} clicks: too few to tell conversions. Make "
            "features of the rows that `megatron-ads downstream rows` wrote for this pipeline."
        )
    blank = [UserFeatures(user=user, anchor=anchor) for user, anchor in examples.places]
    known = [one or empty for one, empty in zip(found, blank, strict=True)]
    chosen, buckets = replace(examples, impressions=shown), pipeline.config.buckets
    return _Known(chosen, FeatureFields(chosen, known, pipeline.items, buckets=buckets))


def _whose(known: Examples, line: Line, seed: int) -> NDArray[np.int64]:
    """Return whose features each history has: its own, or those of a history drawn from the same anchor's."""
    whose_H, draw = np.arange(len(known.histories)), np.random.default_rng([seed, 3])
    if line.of_others:
        shown = sorted({number for number, _ in known.impressions})  # others may have no features
        for anchor in sorted(set(known.anchors)):
            here = [number for number in shown if known.anchors[number] == anchor]
            whose_H[here] = draw.permutation(here)
    return whose_H


def _chances(pipeline: Pipeline, learned: _Known, judged: _Known, line: Line, seed: int, progress: Progress) -> Numbers:
    """Return (N, 2), P(click) and P(click and conversion), of a ranker trained for a line."""
    seed = pipeline.config.seed + seed
    fields = [known.fields.of(line.parts, _whose(known.examples, line, seed)) for known in (learned, judged)]
    with one_thread():
        ranker = train_ranker(
            learned.examples, pipeline.items, pipeline.words, pipeline.retriever, pipeline.config.ranker, seed=seed,
            fields=fields[0],
        )  # fmt: skip
        shown = judged.examples.impressions
        histories = [judged.examples.histories[number] for number, _ in shown]
        user_NC = pipeline.users(histories, [each.query for _, each in shown])
        item_NC = pipeline.item_JC[[each.item for _, each in shown]]
        everything = np.arange(len(shown))
        chance_N2: Numbers = ranker.chances(user_NC, item_NC, [field.of(everything) for field in fields[1]]).numpy()
    progress.update()
    return chance_N2.astype(np.float64)


def _long_tail(known: _Known) -> NDArray[np.bool_]:
    """Return whether each impression is of a user with a history among the shortest third."""
    lengths = {number: len(known.examples.histories[number].events) for number, _ in known.examples.impressions}
    longest = np.quantile(list(lengths.values()), _LONG_TAIL)
    return np.array([lengths[number] <= longest for number, _ in known.examples.impressions])


def _changes(known: _Known, chances: Mapping[str, Sequence[Numbers]], chosen_N: NDArray[np.bool_]) -> dict[str, Any]:
    """Return the metrics of every line over some impressions, with the change and its interval."""
    shown = [each for (_, each), counts in zip(known.examples.impressions, chosen_N, strict=True) if counts]
    chance_VSN2 = np.array([[of_seed[chosen_N] for of_seed in of_line] for of_line in chances.values()])
    happened_N2 = np.array([(each.clicked, each.clicked and each.converted) for each in shown])
    users = [each.user for each in shown]
    whole_VSM = _measured(chance_VSN2, happened_N2, np.arange(len(shown)))
    resampled = [
        _measured(chance_VSN2, happened_N2, rows)
        for rows in resampled_rows(len(shown), groups=users, resamples=_RESAMPLES)
    ]
    draw, seeds = np.random.default_rng(1), whole_VSM.shape[1]
    mean_RVM = np.array([each_VSM[:, draw.integers(seeds, size=seeds)].mean(axis=1) for each_VSM in resampled])
    mean_VM = whole_VSM.mean(axis=1)
    return {
        "users": len(set(users)),
        "impressions": len(shown),
        "conversions": int(happened_N2[:, 1].sum()),
        "lines": {
            name: _line(mean_VM[number], mean_VM[0], mean_RVM[:, number], mean_RVM[:, 0])
            for number, name in enumerate(chances)
        },
    }


def _measured(chance_VSN2: Numbers, happened_N2: NDArray[np.bool_], rows: NDArray[np.int64]) -> Numbers:
    """Return (V, S, M), the metrics of each target in turn over some rows; NaN where one is undefined."""
    clicked = rows[happened_N2[rows, 0]]
    clicked_N2 = happened_N2[clicked]
    truths = (happened_N2[rows, 0], clicked_N2[:, 1], happened_N2[rows, 1])
    found = np.full((*chance_VSN2.shape[:2], len(TARGETS) * len(METRICS)), np.nan)
    for place in np.ndindex(found.shape[:2]):
        chance_N2 = chance_VSN2[place]
        given_N = chance_N2[clicked, 1] / chance_N2[clicked, 0].clip(1e-12)
        scored = zip(truths, (chance_N2[rows, 0], given_N, chance_N2[rows, 1]), strict=True)
        values = [compute(truth_N, score_N) for truth_N, score_N in scored for compute in METRICS.values()]
        found[place] = [np.nan if value is None else value for value in values]
    return found


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
