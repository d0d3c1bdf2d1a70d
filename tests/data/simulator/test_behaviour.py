"""What is drawn agrees with the probabilities that are reported for it."""

from itertools import pairwise

import numpy as np
import pytest

from megatron_ads.data.simulator.behaviour import Behaviour, InverseTable
from megatron_ads.data.simulator.histories import PIECE, draw_pieces, read_users
from megatron_ads.data.simulator.population import NOBODY, Moment, next_advertiser, same_need
from megatron_ads.data.simulator.world import World, draw_world

USERS, DAYS, ANCHOR, WINDOW = 4 * PIECE, 35, 27, 7


@pytest.fixture(scope="module")
def world() -> World:
    return draw_world(0)


@pytest.fixture(scope="module")
def pieces(world: World) -> list[Behaviour]:
    return list(draw_pieces(world, users=USERS, days=DAYS, anchor=ANCHOR))


def within_four_standard_errors(drawn: np.ndarray, chance: np.ndarray) -> bool:
    """Compare a sum of draws with what is expected; their variance is that of independent coins."""
    deviation = drawn.sum() - chance.sum()
    return bool(abs(deviation) < 4 * np.sqrt((chance * (1 - chance)).sum()))


@pytest.mark.parametrize(("what", "chance"), [("clicked", "click_chance"), ("converted", "conversion_chance")])
def test_clicks_and_conversions_are_as_frequent_as_stated_at_every_level(
    pieces: list[Behaviour], what: str, chance: str
) -> None:
    drawn = np.concatenate([piece.impressions[what] for piece in pieces]).astype(float)
    stated = np.concatenate([piece.impressions[chance] for piece in pieces])
    edges = np.quantile(stated, [0, 0.5, 0.8, 0.9, 0.95, 0.99, 1])
    for low, high in pairwise(edges):
        chosen = (stated >= low) & (stated <= high)
        assert chosen.sum() > 1000
        assert within_four_standard_errors(drawn[chosen], stated[chosen])
    # The check can fail: probabilities a tenth too high are noticed.
    assert not within_four_standard_errors(drawn, np.clip(stated * 1.1, 0, 1))


def ranks(moment: Moment, piece: Behaviour, world: World) -> tuple[np.ndarray, np.ndarray]:
    """Return, for everybody who converts after the anchor, the rank of the advertiser and the sorted probabilities."""
    later = piece.conversions["day"] > ANCHOR
    users, first = np.unique(piece.conversions["user"][later], return_index=True)
    label = piece.conversions["advertiser"][later][first]
    chance = next_advertiser(moment, world, window_days=WINDOW)[users]
    assert np.allclose(chance.sum(axis=1), 1)
    order = np.argsort(-chance, axis=1)
    return np.argmax(order == label[:, None], axis=1), -np.sort(-chance, axis=1)


@pytest.mark.parametrize("most", [1, 5, 20])
def test_the_true_probabilities_of_the_next_advertiser_hold(pieces: list[Behaviour], world: World, most: int) -> None:
    hits, chances = [], []
    for piece in pieces:
        assert piece.true is not None
        rank, chance = ranks(piece.true, piece, world)
        hits.append(rank < most)
        chances.append(chance[:, :most].sum(axis=1))
    assert within_four_standard_errors(np.concatenate(hits).astype(float), np.concatenate(chances))


def test_who_knows_the_interests_ranks_better_than_who_reads_the_history_and_that_better_than_popularity(
    pieces: list[Behaviour], world: World
) -> None:
    found = {"true": [], "known": [], "popular": []}
    popular = np.argsort(-world.popularity_A)[:5]
    for piece in pieces:
        for name, moment in (("true", piece.true), ("known", piece.known)):
            assert moment is not None
            found[name].append(ranks(moment, piece, world)[0] < 5)
        later = piece.conversions["day"] > ANCHOR
        found["popular"].append(np.isin(piece.conversions["advertiser"][later], popular))
    true, known, by_popularity = (float(np.concatenate(found[name]).mean()) for name in ("true", "known", "popular"))
    assert 0.9 > true > known > 0.8
    assert by_popularity < 0.4


def test_the_chance_that_a_need_is_kept_by_hand() -> None:
    # One day: a session with probability a, which keeps the need with 0.75; given that it converts: 0.75.
    # Two days and a = 1: kept and converted 0.3 * 0.75 + 0.7 * 0.75 * 0.3 * 0.75 = 0.343125, of 1 - 0.7^2 = 0.51.
    assert same_need(np.array([0.2]), window_days=1) == pytest.approx(0.75)
    assert same_need(np.array([1.0]), window_days=2) == pytest.approx(0.343125 / 0.51)


def test_the_next_advertiser_by_hand(world: World) -> None:
    recent = np.full((2, 8), NOBODY)
    recent[0, :2] = (7, 3)
    day = np.zeros((2, 8), dtype=np.int64)
    day[0, :2] = (10, 9)
    interest = np.zeros((2, world.intent_KPA.shape[0]))
    interest[:, 5] = 1.0
    moment = Moment(
        day=10,
        need_U=np.array([5, 5]),
        recent_UM=recent,
        recent_day_UM=day,
        interest_UK=interest,
        activity_U=np.array([0.3, 0.3]),
        price_U=np.array([1, 1]),
    )
    chance = next_advertiser(moment, world, window_days=7)
    # The need is kind 5 in any case. Conversions 0 and 1 day old weigh 1 and 0.9: shares 1/1.9 and 0.9/1.9.
    intent, popular = world.intent_KPA[5, 1], world.popularity_A
    for advertiser, loyal in ((7, 1 / 1.9), (3, 0.9 / 1.9), (0, 0.0)):
        expected = 0.45 * loyal + 0.5 * intent[advertiser] + 0.05 * popular[advertiser]
        assert chance[0, advertiser] == pytest.approx(expected)
    # Without conversions the share of loyalty goes to the intent.
    assert chance[1, 7] == pytest.approx(0.95 * intent[7] + 0.05 * popular[7])


def test_a_history_holds_nothing_from_after_the_anchor_and_the_label_is_the_first_conversion_after_it(
    world: World,
) -> None:
    (piece,) = draw_pieces(world, users=300, days=DAYS, anchor=ANCHOR)
    bought = piece.conversions
    users = list(read_users(world, piece, anchor=ANCHOR))
    assert len(users) > 250
    for user in users:
        assert all(0 < event.days_ago <= ANCHOR + 1 for event in user.history.events)
        mine = bought["user"] == user.place_in_piece
        after = bought["advertiser"][mine & (bought["day"] > ANCHOR)]
        assert user.next_advertiser == (int(after[0]) if len(after) else None)


def test_an_inverse_table_draws_each_outcome_as_often_as_it_should() -> None:
    chances = np.array([[0.0, 1.0, 0.0], [0.2, 0.3, 0.5]])
    draw = np.random.default_rng(0)
    assert set(InverseTable(chances).draw(np.zeros(1000, dtype=np.int64), draw).tolist()) == {1}
    drawn = InverseTable(chances).draw(np.ones(100_000, dtype=np.int64), draw)
    # Standard error of a share over 100,000 draws: at most 0.0016.
    assert np.bincount(drawn, minlength=3) / 100_000 == pytest.approx([0.2, 0.3, 0.5], abs=4 * 0.0016)
