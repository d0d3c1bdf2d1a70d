"""Rewards by a frozen pipeline: eq. 8 and CTCVR by hand, and what a real pipeline makes of good and bad answers."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_ads.errors import ConfigError, DataError
from megatron_ads.rewards import frozen_pipeline
from megatron_ads.rollouts import Rollout
from megatron_ads.rows import ChatRow, Fact, JsonValue
from megatron_ads.tasks import next_advertiser, query_generation
from megatron_ads.tasks.query_generation import GeneratedQuery, KeywordBrief
from megatron_ads.tasks.user_history import UserHistory
from tests.rewards.frozen import by_hand
from tests.rewards.rollouts import answers, chat_row, rewards, values

HAND = {"pipeline": "by hand"}


@pytest.fixture(autouse=True)
def _pipeline_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frozen_pipeline, "load_pipeline", by_hand)


def user_row(bought: str, name: str = "u") -> ChatRow:
    return next_advertiser.chat_row(name, next_advertiser.AdvertiserRequest(UserHistory(user_id=name)), bought)


def ranking_row(bought: str) -> ChatRow:
    request = next_advertiser.AdvertiserRequest(UserHistory(user_id="u"))
    return next_advertiser.ranking_row("u", request, ["Acme"], ["shoes"], label=bought)


def ranking(*names: str) -> str:
    listed = "".join(f"<advertiser>{name}</advertiser>" for name in names)
    return f"<prediction><advertisers>{listed}</advertisers><interests></interests></prediction>"


def two_prompts() -> list[Rollout]:
    """Two answers to each of two prompts, whose users bought Crown and Dune: without answers both are below place 2."""
    return [
        *answers(user_row("Crown", "u"), ["Crown", "Acme"], group=0),
        *answers(user_row("Dune", "v"), ["Blue", "two\nlines"], group=1),
    ]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        # recall@2 without: 0 and 0. First answers: Crown is found, Dune is not: mean change 1/2; second ones: 0.
        ({"k": 2}, [0.5, 0.0, 0.5, 0.0]),
        ({"k": 2, "per_sample": True}, [1.0, 0.0, 0.0, 0.0]),
        # "two\nlines" cannot be read.
        ({"k": 2, "per_sample": True, "unreadable_penalty": 0.4}, [1.0, 0.0, 0.0, -0.4]),
        ({"k": 2, "unreadable_penalty": 0.4}, [0.5, 0.0, 0.5, -0.4]),
        ({"k": 2, "g": "sign"}, [1.0, 0.0, 1.0, 0.0]),
        ({"k": 2, "g": "tanh", "scale": 3.0}, [math.tanh(1.5), 0.0, math.tanh(1.5), 0.0]),
        # Crown from place 3 to 1: 1 - 1/log2(4) = 1/2. Dune stays at 4 in all: 0.
        ({"k": 4, "metric": "ndcg"}, [0.25, 0.0, 0.25, 0.0]),
        # Clicks on the 2 retrieved: Acme and Blue 0.15. Crown, Acme: 0.2; Acme, Blue: 0.15; Blue, Acme: 0.15.
        ({"k": 2, "metric": "ctr", "per_sample": True}, [0.05, 0.0, 0.0, 0.0]),
        ({"k": 2, "metric": "ctr"}, [0.025, 0.0, 0.025, 0.0]),
        ({"k": 2, "inject": "filter"}, [0.5, 0.0, 0.5, 0.0]),
    ],
    ids=str,
)
def test_a_batch_is_worth_what_it_adds_to_the_frozen_pipeline(settings: dict[str, Any], expected: list[float]) -> None:
    assert values("downstream_batch", two_prompts(), HAND | settings) == pytest.approx(expected, abs=1e-6)


def test_an_answer_can_do_harm() -> None:
    # Acme, first for everybody, falls to place 3 behind the two that the ranking names.
    row = ranking_row("Acme")
    texts = [ranking("Dune", "Crown"), ranking("Acme"), "no xml"]
    assert values("downstream_batch", answers(row, texts), HAND | {"k": 2}) == [-1.0, 0.0, 0.0]
    assert values("downstream_batch", answers(row, texts), HAND | {"k": 2, "inject": "filter"}) == [-1.0, 0.0, 0.0]
    # NDCG: place 1 is worth 1, place 3 is worth 1/2.
    found = values("downstream_batch", answers(row, texts), HAND | {"k": 4, "metric": "ndcg"})
    assert found == pytest.approx([-0.5, 0.0, 0.0])


def test_generated_queries_join_the_keyword_and_are_for_the_seller_of_the_ad() -> None:
    brief = KeywordBrief("Blue")  # asked alone it puts Blue first, then Acme
    row = query_generation.chat_row("q", brief, [GeneratedQuery("Dune", "r")], "why")
    row = chat_row("q", row.task, row.target, facts={**row.facts, Fact.ad: {"title": "t", "seller": "Dune"}})
    texts = [f"<think>w</think><Query>{query}</Query><Reason>Crown</Reason>" for query in ("Dune", "Acme")]
    # Dune gets 10/2 in the second line: 6, behind Blue's 13 and before Acme's 4. Reasons are no queries.
    assert values("downstream_batch", answers(row, texts), HAND | {"k": 2}) == [1.0, 0.0]


def test_rows_without_a_true_item_are_left_to_other_rewards() -> None:
    rollouts = [*two_prompts(), *answers(chat_row("other", label="Bad"), ["x", "y"], group=2)]
    found = values("downstream_batch", rollouts, HAND | {"k": 2})
    assert found[:4] == [0.5, 0.0, 0.5, 0.0]
    assert all(map(math.isnan, found[4:]))


@pytest.mark.parametrize("settings", [{}, {"per_sample": True}, {"metric": "ctr"}], ids=str)
@pytest.mark.parametrize(
    "facts", [{Fact.events: [{"kind": "click"}]}, {Fact.history: {"clicks": 5}}, {Fact.history: {"top_brands": [1]}}]
)
def test_a_row_whose_history_cannot_be_read_costs_its_own_answers_alone(
    facts: dict[str, JsonValue], settings: dict[str, Any]
) -> None:
    broken = user_row("Blue", "broken")
    others = {name: value for name, value in broken.facts.items() if name != Fact.events}
    broken = replace(broken, facts=others | facts)
    for one in two_prompts()[:2], two_prompts()[2:]:
        rollouts = [*answers(broken, ["Crown", "Dune"], group=9), *one]
        scores = rewards("downstream_batch", HAND | {"k": 2} | settings).score(rollouts)
        found = scores.values["downstream_batch"].tolist()
        assert scores.faults == {"downstream_batch/raised": 2} and all(map(math.isnan, found[:2]))
        assert found[2:] == values("downstream_batch", one, HAND | {"k": 2} | settings), "as if it were not there"


def test_ctcvr_is_normalised_over_the_table_and_unknown_names_are_worth_nothing() -> None:
    # CTCVR = click / 2, from 0.05 to 0.2; the table's range is 0.05 to 0.25.
    texts = ["Acme", " blue ", "Dune", "Nobody", "two\nlines"]
    found = values("ctcvr", answers(user_row("Acme"), texts), HAND)
    assert found == pytest.approx([0.0, 0.25, 0.75, 0.0, 0.0])
    rankings = [ranking("Crown", "Acme"), ranking("Nobody", "Dune"), "<prediction/>"]
    assert values("ctcvr", answers(ranking_row("Acme"), rankings), HAND) == pytest.approx([0.5, 0.75, 0.0])
    assert math.isnan(values("ctcvr", answers(chat_row(), ["Acme"]), HAND)[0])


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("ctcvr", {}, "ctcvr has no pipeline. Name the folder"),
        ("downstream_batch", {}, "downstream_batch has no pipeline"),
        ("downstream_batch", HAND | {"metric": "auc"}, "metric = 'auc'; known: recall, ndcg, ctr"),
        ("downstream_batch", HAND | {"inject": "user"}, "inject = 'user'; known: query, filter"),
        ("downstream_batch", HAND | {"g": "log"}, "g = 'log'; known: identity, tanh, sign"),
        ("downstream_batch", HAND | {"scale": 2.0}, "scale = 2.0, which has no effect with g identity"),
        ("downstream_batch", HAND | {"k": 0}, "k = 0; it must be at least 1"),
    ],
)
def test_settings_are_checked_when_rewards_are_opened(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        values(name, two_prompts(), settings)


def test_a_folder_without_a_pipeline_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.undo()
    for name in ("ctcvr", "downstream_batch"):
        with pytest.raises(DataError, match="is no downstream pipeline"):
            values(name, two_prompts(), {"pipeline": str(tmp_path)})


def test_batches_of_groups_of_different_sizes() -> None:
    rollouts: Sequence[Rollout] = [*two_prompts(), *answers(user_row("Dune", "w"), ["Dune"], group=2)]
    # The first answers: Crown found, Dune not, Dune found: 2/3. The second ones: only two, neither finds anything.
    assert values("downstream_batch", rollouts, HAND | {"k": 2}) == pytest.approx([2 / 3, 0.0, 2 / 3, 0.0, 2 / 3])
