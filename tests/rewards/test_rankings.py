"""Rewards of rankings: the advertiser's, and those of a group of beams; numbers by hand."""

import math

import pytest

from megatron_ads.errors import ConfigError
from megatron_ads.tasks import next_advertiser
from tests.rewards.rollouts import answers, chat_row, rewards, rollout, values
from tests.tasks.examples import POOL, RUNNER

REQUEST = next_advertiser.AdvertiserRequest(RUNNER)
RANKING = next_advertiser.ranking_row("r", REQUEST, POOL[:20], ["running"], label="Shop 2")
NEXT = next_advertiser.chat_row("r", REQUEST, "Shop 2")


def xml(names: list[str], interests: int = 1) -> str:
    entries = "".join(f"<advertiser>{name}</advertiser>" for name in names)
    tags = "".join(f"<interest>interest {number}</interest>" for number in range(interests))
    return f"<prediction><advertisers>{entries}</advertisers><interests>{tags}</interests></prediction>"


def ranked(position: int, count: int = 20) -> list[str]:
    names = [f"Other {number}" for number in range(1, count)]
    return [*names[: position - 1], "shop 2", *names[position - 1 :]]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (xml(ranked(1)), 0.1 + 0.9 + 0.2),
        (xml(ranked(3)), 0.1 + 0.9 / 2 + 0.2),
        (xml(ranked(7)), 0.1 + 0.9 / 3 + 0.2),
        (xml(["Other 1", *ranked(3)]), 0.1 + 0.9 / 2 + 0.2),  # a repeated name takes no place and is no entry
        (xml([f"Other {number}" for number in range(20)]), 0.2),
        (xml(ranked(1, 10)), 1.0 + 0.2 - 0.2 * 10 / 20),
        (xml(ranked(1), interests=7), 1.0 + 0.2 - 0.2 * 2 / 5),
        (xml(ranked(1, 30), interests=9), 1.0 + 0.2 - 0.2 * 1),  # 10/20 + 4/5 is more than 1
        (xml(ranked(1), interests=0), 1.2),
        ("Shop 2", -0.2),
        ("<prediction><advertisers><advertiser>Shop 2</advertiser></advertisers></prediction>", -0.2),
    ],
)
def test_an_advertiser_ranking(text: str, value: float) -> None:
    assert values("advertiser_ranking", answers(RANKING, [text])) == pytest.approx([value])


def test_its_constants_are_settings() -> None:
    settings = {"hit_base": 0.5, "format_weight": 1, "length_weight": 2.0, "advertisers": 10, "most_interests": 1}
    # 0.5 + 0.5/2 + 1 - 2 * (10/10 + 1/1, at most 1)
    found = values("advertiser_ranking", answers(RANKING, [xml(ranked(3), interests=2)]), settings)
    assert found == pytest.approx([0.75 + 1 - 2])
    with pytest.raises(ConfigError, match="advertisers = 0; it must be at least 1"):
        rewards("advertiser_ranking", {"advertisers": 0})


def test_other_tasks_are_not_ranked() -> None:
    assert math.isnan(values("advertiser_ranking", answers(NEXT, ["Shop 2"]))[0])


def test_wrong_beams_share_a_penalty_by_rank() -> None:
    # Shares 1, 1/log2(3) = 0.63093, 1/2, 1/log2(5) = 0.43068 of 2.56161, the likeliest first.
    texts = [("Shop 9", -3.0), ("SHOP 2", -2.0), ("Shop 4", -1.0), ("Shop 5", -4.0)]
    found = values("list_ranking", [rollout(NEXT, text, log_p=log_p) for text, log_p in texts])
    assert found == pytest.approx([-0.5 / 2.56161, 1.0, -1.0 / 2.56161, -0.43068 / 2.56161], abs=1e-5)


def test_a_group_without_a_hit_is_worth_nothing() -> None:
    hit, missed = answers(NEXT, ["Shop 2", "Shop 3"]), answers(NEXT, ["Shop 4", "two\nlines"], group=1)
    total = 1 + 1 / math.log2(3)
    assert values("list_ranking", hit + missed) == pytest.approx([1.0, -1 / math.log2(3) / total, 0.0, 0.0])
    assert values("list_ranking", hit, {"hit": 2.0, "penalty": 0.5})[0] == 2.0


def test_rows_of_any_task_can_be_hit() -> None:
    row = chat_row(target="<think>It is so.</think>Blue Shoes")
    found = values("list_ranking", answers(row, ["<think>x</think> blue  shoes", "red shoes"]))
    assert found[0] == 1.0 and found[1] < 0
