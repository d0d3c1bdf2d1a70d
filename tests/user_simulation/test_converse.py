"""Conversations: success needs the goal, turns and calls are bounded, and a model may use its one tool only."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_ads.cli import main
from megatron_ads.config.user_simulation import ConverseConfig, SimulatedWorldConfig, load_users_recipe
from megatron_ads.data.simulator.vocabulary import KINDS
from megatron_ads.inference.engine import Completion
from megatron_ads.user_simulation.assistants import LanguageAssistant, RulesAssistant
from megatron_ads.user_simulation.business import Business, open_business
from megatron_ads.user_simulation.conversations import (
    Breakdown,
    ClarifyingQuestion,
    Conversation,
    Recommendation,
    Said,
    Search,
    converse,
    pipeline_retriever,
)
from megatron_ads.user_simulation.converse_run import ASKING, BEST, LISTENING, OPENING, converse_pages, run_converse
from megatron_ads.user_simulation.reports import write
from megatron_ads.user_simulation.talking_users import TalkingUsers, Topic
from tests.inference.scripted_server import Reply, scripted_server
from tests.user_simulation.players import assistant

USERS = 60


def recipe(given: list[str], out: Path, *overrides: str) -> ConverseConfig:
    chosen = [f"simulated={USERS}", "model.attempts=1", *given, *overrides]
    return load_users_recipe(ConverseConfig, "users/converse", chosen, out=str(out))


@pytest.fixture(scope="module")
def business(world: SimulatedWorldConfig) -> Business:
    return open_business(world, Path("unused"), simulated=USERS)


@pytest.fixture(scope="module")
def users(business: Business) -> TalkingUsers:
    return TalkingUsers(business.world, business.users, seed=0)


def test_asking_pays_where_nothing_is_known_of_the_user(
    given: list[str], out: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["users", "converse", "--recipe", "users/converse", "--out", out, "simulated=200", *given, "--json"]
    assert main(command) == 0
    report = json.loads(capsys.readouterr().out)
    assert list(report["assistants"]) == [OPENING, LISTENING, ASKING, BEST]
    rates = {name: [turn["value"] for turn in line["success"]] for name, line in report["assistants"].items()}
    assert all(sorted(rate) == rate and len(rate) == 5 for rate in rates.values())
    assert rates[ASKING][0] == 0.0 and rates[ASKING][4] > rates[OPENING][4]
    assert all(rates[BEST][turn] > rates[name][turn] for name in (OPENING, LISTENING, ASKING) for turn in range(5))
    assert report["assistants"][ASKING]["questions"] == 1.0
    assert report["assistants"][OPENING]["change"]["value"] == 0.0
    assert report["assistants"][ASKING]["change"]["value"] == pytest.approx(rates[ASKING][4] - rates[OPENING][4])


def test_a_model_talks_through_the_retriever_and_is_asked_once(given: list[str], tmp_path: Path) -> None:
    with scripted_server(assistant) as server:
        config = recipe(given, tmp_path, "model.model=scripted", f"model.url='{server.url}'")
        report = run_converse(config)
        asked = len(server.bodies)
        assert run_converse(config) == report and len(server.bodies) == asked
    line = report["assistants"]["scripted"]
    assert line["failures"] == {}
    assert line["success"][4]["value"] > report["assistants"][OPENING]["success"][1]["value"]
    roles = [message["role"] for message in max((body["messages"] for body in server.bodies), key=len)]
    assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]


def test_half_characters_in_what_a_model_says_end_no_conversation(given: list[str], tmp_path: Path) -> None:
    def halves(body: dict[str, Any], times: int) -> Reply:
        said = assistant(body, times).content.replace("hm", "\udca9")
        for words, more in (("You said", r"\ud83d"), ("Where did", "\ud83d"), ("I am looking for", r"\udca9")):
            said = said.replace(words, f"{words} {more}")  # as JSON writes it, and as it is
        return Reply(content=said)

    with scripted_server(halves) as server:
        report = run_converse(recipe(given, tmp_path, "model.model=m", f"model.url='{server.url}'", "simulated=5"))
        asked = len(server.bodies)
        again = run_converse(recipe(given, tmp_path, "model.model=m", f"model.url='{server.url}'", "simulated=5"))
        assert again == report and len(server.bodies) == asked
    assert report["assistants"]["m"]["failures"] == {}
    spoken = [message["content"] for body in server.bodies for message in body["messages"]]
    assert sum("\ufffd" in text for text in spoken) > 10 and "".join(spoken).encode()
    write(tmp_path, report, converse_pages(report), "")


def test_a_model_that_only_searches_is_stopped(given: list[str], tmp_path: Path) -> None:
    script = json.dumps({"call": "search", "query": "shoes"})
    with scripted_server(lambda *_: Reply(content=script)) as server:
        report = run_converse(recipe(given, tmp_path, "model.model=scripted", f"model.url='{server.url}'"))
        assert len(server.bodies) <= 3 * USERS
    assert report["assistants"]["scripted"]["failures"] == {"too_many_calls": USERS}


def test_turns_are_bounded(business: Business, users: TalkingUsers, given: list[str], tmp_path: Path) -> None:
    config = recipe(given, tmp_path, "turns=3")
    asker = RulesAssistant(shown=3, asks=dict.fromkeys(range(1, 99), Topic.place))
    talks = converse(asker, users, pipeline_retriever(business, history=False), 5, config, name="asker")
    assert all((one.turns, one.success, len(one.steps)) == (3, None, 7) for one in talks)


def test_nothing_is_recommended_twice_and_success_is_the_goal(
    business: Business, users: TalkingUsers, given: list[str], tmp_path: Path
) -> None:
    retriever, config = pipeline_retriever(business, history=True), recipe(given, tmp_path)
    talks = converse(RulesAssistant(shown=3, asks={}), users, retriever, USERS, config, name="rules")
    assert 0 < sum(one.success is not None for one in talks) < USERS
    for one in talks:
        lists = [step.shown for step in one.steps if isinstance(step, Recommendation)]
        shown = [number for each in lists for number in each]
        assert len(set(shown)) == len(shown)
        goal = int(users.goal_U[one.user])
        assert (one.success is not None) == (goal in shown)
        assert one.success in (None, len(lists))


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ('{"call": "shell", "query": "ls"}', "unknown_name"),
        ('{"recommend": ["NOT FOUND"], "why": "x"}', "unknown_name"),
        ('{"recommend": ["SHOWN"], "why": "x"}', "unknown_name"),
        ('{"recommend": ["A", "B", "C", "D"], "why": "x"}', "no_list"),
        ('{"recommend": [], "why": "x"}', "no_list"),
        ('{"ask": "How old are you?", "about": "age"}', "unknown_name"),
        ('{"ask": "", "about": "price"}', "no_text"),
        ("Sure! Here is what I found.", "no_json"),
    ],
)
def test_a_model_can_do_nothing_else(said: str, why: str, business: Business, given: list[str], tmp_path: Path) -> None:
    items = business.past.items
    one = Conversation(
        0, [Said("I want shoes."), Search("shoes", (0, 1, 2, 3, 4)), Recommendation((4,), "good"), Said("No.")]
    )
    for letter, number in zip("ABCD", range(4), strict=True):
        said = said.replace(f'"{letter}"', json.dumps(items[number].name))
    said = said.replace("NOT FOUND", items[9].name).replace("SHOWN", items[4].name)
    reader = LanguageAssistant(None, items, recipe(given, tmp_path))  # type: ignore[arg-type]
    assert reader.read(one, Completion(text=said)) == Breakdown(why)
    good = json.dumps({"recommend": [items[2].name, items[0].name], "why": "They are near."})
    assert reader.read(one, Completion(text=good)) == Recommendation((2, 0), "They are near.")
    asked = '{"ask": "How much?", "about": "price"}'
    assert reader.read(one, Completion(text=asked)) == ClarifyingQuestion(Topic.price, "How much?")


def test_users_answer_as_they_are_and_say_what_is_wrong(business: Business, users: TalkingUsers) -> None:
    shops, moment = business.world.advertisers, business.users.moment
    for user in range(USERS):
        kind, level = int(users.need_U[user]), int(moment.price_U[user])
        assert users.answer(user, Topic.product) == f"I mean {KINDS[kind].name}."
        goal = int(users.goal_U[user])
        assert users.reply(user, [goal]) == (True, f"Yes, {shops[goal].name} is what I want. Thank you.")
        others = [number for number, shop in enumerate(shops) if kind not in shop.kinds and number != goal][:3]
        assert users.reply(user, others)[1].startswith("None of these sells")
        wrong = [n for n, shop in enumerate(shops) if kind in shop.kinds and shop.price != level and n != goal]
        if wrong:
            assert users.reply(user, wrong)[1].endswith(("too expensive for me.", "too cheap for me.")[level])
