"""What a channel of predicted advertisers adds to retrieval, by its quota, and by what its two towers were trained for.

For each user held out, of those with features, with k candidates of which at most the quota are the channel's:

    bought      share of users whose first purchase is among the candidates (recall@k), and its change, paired
    clicked     of the items that a user clicked on, the share among the channel's candidates, averaged over users
    survival    share of the channel's candidates that are among the k / 4 best by CTCVR of all candidates
    repeated, new, items, effective   as in ``candidates``, after de-duplication

The objectives are those of the advertiser paper, 4.5.1; the paper names survival and engagement without a formula, so
these are ours.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_ads.config.downstream import RetrieverObjective
from megatron_ads.downstream.candidates import Merged, diversity, merged, targeted
from megatron_ads.downstream.examples import Examples, Place, held_out_examples, training_examples
from megatron_ads.downstream.features import UserFeatures
from megatron_ads.downstream.logs import Logs
from megatron_ads.downstream.pipeline import Pipeline, one_thread
from megatron_ads.downstream.retriever import Retriever, top_k, train_retriever
from megatron_ads.errors import DataError
from megatron_ads.metrics.intervals import ends, mean_interval

K = 20
QUOTAS = (0, 2, 5, 10, 20)
OBJECTIVE_QUOTA = 5
_SURVIVORS = 4
"""One in so many candidates survives."""


def candidate_scores(
    pipeline: Pipeline, logs: Logs, features: Mapping[Place, UserFeatures], *, objectives: bool
) -> dict[str, Any]:
    """Return the scores of every quota and, if asked for, of every objective at one quota, as JSON values.

    Raises:
        DataError: If no user held out has features and bought something.
    """
    buyers = _Buyers.prepare(pipeline, held_out_examples(logs, pipeline.config), features)
    trained = _towers(pipeline, logs) if objectives else {}
    return {
        "k": K,
        "users": len(buyers.numbers),
        "quotas": {str(quota): buyers.scores(pipeline.retriever, quota) for quota in QUOTAS},
        "objective_quota": OBJECTIVE_QUOTA,
        "objectives": {str(name): buyers.scores(tower, OBJECTIVE_QUOTA) for name, tower in trained.items()},
    }


def _towers(pipeline: Pipeline, logs: Logs) -> dict[RetrieverObjective, Retriever]:
    """Return towers trained for each objective; the pipeline's own where it is theirs."""
    found, own = {}, pipeline.config.retriever
    learned = training_examples(logs, pipeline.config)
    for objective in RetrieverObjective:
        config = replace(own, objective=objective)
        with one_thread():
            found[objective] = (
                pipeline.retriever
                if objective is own.objective
                else train_retriever(learned, pipeline.items, pipeline.words, config, seed=pipeline.config.seed)
            )
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class _Buyers:
    """Users held out who bought something and have features."""

    pipeline: Pipeline
    examples: Examples
    numbers: list[int]
    """Of their histories."""
    bought: list[int]
    """First purchase of each."""
    clicked: list[set[int]]
    predicted: list[list[int]]
    """Known items, the likeliest first."""
    main_NJ: NDArray[np.int64]
    """All items, the main retrieval's best first."""

    @classmethod
    def prepare(cls, pipeline: Pipeline, examples: Examples, features: Mapping[Place, UserFeatures]) -> "_Buyers":
        first: dict[int, int] = {}
        for purchase in examples.purchases:
            first.setdefault(purchase.history, purchase.item)
        places = examples.places
        numbers = [number for number in sorted(first) if places[number] in features]
        if not numbers:
            raise DataError(
                f"None of the {len(first)} users held out who bought something has features. Make features of the rows "
                "that `megatron-ads downstream rows` wrote for this pipeline."
            )
        clicked: dict[int, set[int]] = defaultdict(set)
        for number, shown in examples.impressions:
            if shown.clicked:
                clicked[number].add(shown.item)
        named = [map(pipeline.number_of, features[places[number]].advertisers) for number in numbers]
        user_NC = pipeline.users([examples.histories[number] for number in numbers], [""] * len(numbers))
        return cls(
            pipeline=pipeline,
            examples=examples,
            numbers=numbers,
            bought=[first[number] for number in numbers],
            clicked=[clicked[number] for number in numbers],
            predicted=[list(dict.fromkeys(item for item in items if item is not None)) for items in named],
            main_NJ=pipeline.retrieve(user_NC, len(pipeline.items)),
        )

    def scores(self, tower: Retriever, quota: int) -> dict[str, Any]:
        """Return the scores of a channel with these towers and quota."""
        words, main_NJ = self.pipeline.words, self.main_NJ.tolist()
        histories = words.histories(self.examples.histories[number] for number in self.numbers)
        user_NC = tower.users(histories, words.queries([""] * len(self.numbers)))
        channel = targeted((user_NC @ tower.items(words.items(self.pipeline.items)).T).numpy(), self.predicted)
        together = [merged(main, own, k=K, quota=quota) for main, own in zip(main_NJ, channel, strict=True)]
        hits = [float(truth in found.all) for truth, found in zip(self.bought, together, strict=True)]
        before = [float(truth in main[:K]) for truth, main in zip(self.bought, main_NJ, strict=True)]
        changes = [after - earlier for after, earlier in zip(hits, before, strict=True)]
        pairs = zip(self.clicked, together, strict=True)
        engaged = [len(those & set(found.channel)) / len(those) for those, found in pairs if those]
        return {
            "recall": float(np.mean(hits)),
            "recall_interval": ends(mean_interval(hits)),
            "change": float(np.mean(changes)),
            "change_interval": ends(mean_interval(changes)),
            "clicked": float(np.mean(engaged)) if engaged else None,
            "survival": self._survival(together),
            **asdict(diversity(together, main_NJ, k=K)),
        }

    def _survival(self, together: Sequence[Merged]) -> float | None:
        histories = [self.examples.histories[number] for number in self.numbers]
        user_NC = self.pipeline.users(histories, [""] * len(histories))
        given = survived = 0
        for user_C, found in zip(user_NC, together, strict=True):
            chances_K2 = self.pipeline.chances(user_C.expand(len(found.all), -1), found.all)
            best = top_k(chances_K2[None, :, 1].astype(np.float32), len(found.all) // _SURVIVORS)[0]
            chosen = {found.all[place] for place in best}
            given, survived = given + len(found.channel), survived + len(chosen.intersection(found.channel))
        return survived / given if given else None
