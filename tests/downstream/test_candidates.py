"""A channel of predicted advertisers fills its quota and no more; the retriever learns from what it is told to."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_ads.config.downstream import RetrieverObjective
from megatron_ads.downstream.candidates import Merged, diversity, merged, targeted
from megatron_ads.downstream.examples import Examples, Purchase
from megatron_ads.downstream.logs import Impression, read_team_logs
from megatron_ads.downstream.retriever import positives_of
from megatron_ads.errors import DataError
from tests.downstream.logs import TABLES, write_tables


def test_the_filter_keeps_predicted_items_and_the_towers_order_them() -> None:
    scores = np.array([[0.1, 0.9, 0.5, 0.7], [0.4, 0.3, 0.2, 0.1]], dtype=np.float32)
    assert targeted(scores, [[0, 3, 2], []]) == [[3, 2, 0], []]


def test_the_channel_fills_its_quota_behind_the_main_retrieval_and_each_item_comes_once() -> None:
    main = [0, 1, 2, 3, 4, 5]
    assert merged(main, [9, 8, 7], k=4, quota=0) == Merged([0, 1, 2, 3], [], 0)
    assert merged(main, [9, 8, 7], k=4, quota=2) == Merged([0, 1, 9, 8], [9, 8], 0)
    # 1 is there already, so that 8 follows 9; main's third is given by the channel; without any, main fills the quota.
    assert merged(main, [1, 9, 8], k=4, quota=2) == Merged([0, 1, 9, 8], [9, 8], 1)
    assert merged(main, [2], k=4, quota=2) == Merged([0, 1, 2, 3], [2], 0)
    assert merged(main, [], k=4, quota=2) == Merged([0, 1, 2, 3], [], 0)
    assert merged(main, [9, 8, 7, 6], k=4, quota=4) == Merged([9, 8, 7, 6], [9, 8, 7, 6], 0)


def test_diversity_counts_what_the_main_retrieval_lacks_and_how_evenly_items_come() -> None:
    # k is 2. The channel gives 2 to the first user, whom main gives 0 and 1, and 1 to the second, whom main gives 2 and
    # 1: one of two is new. It wanted to repeat one. Items 0, 1, 2 are candidates once, once, twice: entropy 1.5 bits.
    candidates = [Merged([0, 2], [2], 0), Merged([2, 1], [1], 1)]
    found = diversity(candidates, [[0, 1, 2], [2, 1, 0]], k=2)
    assert (found.new_share, found.repeated_share) == (pytest.approx(1 / 2), pytest.approx(1 / 3))
    assert found.different_items == 3 and found.effective_items == pytest.approx(2**1.5)


def shown(item: int, *, clicked: bool, seconds: float | None = None) -> Impression:
    return Impression(
        user="u", time=0.0, item=item, query=f"q{item}", clicked=clicked, converted=False, seconds=seconds
    )


EXAMPLES = Examples(
    purchases=[Purchase(history=0, item=3, query="bought")],
    impressions=[
        (0, shown(0, clicked=False)),
        (1, shown(1, clicked=True, seconds=np.expm1(2.0))),
        (1, shown(2, clicked=True, seconds=np.expm1(4.0))),
        (2, shown(4, clicked=True)),
    ],
)


@pytest.mark.parametrize(
    ("objective", "items", "weights"),
    [
        (RetrieverObjective.conversions, [3], [1.0]),
        (RetrieverObjective.impressions, [0, 1, 2, 4], [1.0] * 4),
        # log(1 + seconds) of both visits; one of unknown length counts as their mean.
        (RetrieverObjective.clicks, [1, 2, 4], [2.0, 4.0, 3.0]),
    ],
)
def test_each_objective_has_its_examples_and_weights(
    objective: RetrieverObjective, items: list[int], weights: list[float]
) -> None:
    found = positives_of(EXAMPLES, objective)
    assert found.item_E.tolist() == items
    assert found.weight_E.tolist() == pytest.approx(weights)
    assert len(found.queries) == len(found.history_E) == len(items)


def test_clicks_without_durations_are_refused_where_they_are_learned_from() -> None:
    unknown = replace(EXAMPLES, impressions=[(0, shown(1, clicked=True))])
    with pytest.raises(DataError, match=r"objective is clicks, .* Clicks need the column seconds"):
        positives_of(unknown, RetrieverObjective.clicks)


def test_a_teams_durations_are_read_and_checked(tmp_path: Path) -> None:
    impressions = [{**row, "seconds": value} for row, value in zip(TABLES["impressions"], (12.5, None), strict=True)]
    logs = read_team_logs(write_tables(tmp_path, {**TABLES, "impressions": impressions}))
    assert {each.user: each.seconds for each in logs.impressions} == {"u1": 12.5, "u2": None}
    broken = [{**impressions[0], "seconds": "long"}]
    with pytest.raises(DataError, match=r"row 1: seconds is 'long'; it must be a number of seconds"):
        read_team_logs(write_tables(tmp_path, {**TABLES, "impressions": broken}))
