"""Agents: they learn from mistakes alone, by rules and by a model, and rank the next purchase better for it."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_ads.cli import main
from megatron_ads.config.user_simulation import AgentsConfig, SimulatedWorldConfig, load_users_recipe
from megatron_ads.inference.engine import Completion
from megatron_ads.user_simulation.agents import Exam, Lesson, exams_of, learn, rounds_of, without_shared_advertisers
from megatron_ads.user_simulation.agents_run import AFTER, BEFORE, BEST, run_agents
from megatron_ads.user_simulation.business import Business, open_business
from megatron_ads.user_simulation.language_agents import LanguageAgents
from megatron_ads.user_simulation.rule_agents import RuleAgents
from tests.inference.scripted_server import Reply, scripted_server

USERS = 50


@pytest.fixture(scope="module")
def config() -> AgentsConfig:
    return load_users_recipe(AgentsConfig, "users/agents", [f"simulated={USERS}"])


@pytest.fixture(scope="module")
def business(world: SimulatedWorldConfig) -> Business:
    return open_business(world, Path("unused"), simulated=USERS, buying=True)


def test_agents_by_rules_learn_and_stay_below_what_is_reachable(
    given: list[str], out: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["users", "agents", "--recipe", "users/agents", "--out", out, f"simulated={USERS}", *given, "--json"]
    assert main(command) == 0
    report = json.loads(capsys.readouterr().out)
    of_each = {name: line["ndcg@10"]["value"] for name, line in report["lines"].items()}
    assert of_each[BEFORE] < of_each[AFTER] < of_each[BEST]
    assert report["change"]["interval"][0] > 0.1
    assert report["rounds"][0]["right"]["value"] < report["rounds"][-1]["right"]["value"]
    assert report["played_by"] == "fixed rules"
    assert all(each["mistakes"] + each["unreadable"] <= each["lessons"] for each in report["rounds"])


def test_lessons_are_purchases_before_the_anchor_and_exams_hold_the_next_one(
    business: Business, config: AgentsConfig
) -> None:
    names = [item.name for item in business.past.items]
    for lesson in (lesson for lessons in rounds_of(business, config) for lesson in lessons):
        known = {event.advertiser for event in business.past.events[business.users.names[lesson.user]]}
        assert names[lesson.bought] in known and names[lesson.other] not in known
    exams = exams_of(business, config)
    places = [exam.candidates.index(exam.bought) for exam in exams]
    assert all(len(set(exam.candidates)) == 10 for exam in exams) and len(set(places)) > 5
    assert [exam.bought for exam in exams] == list(business.next_bought)


def test_only_mistakes_change_memories(business: Business) -> None:
    agents = RuleAgents(business)
    lesson = Lesson(user=0, bought=3, other=8, bought_first=False)
    assert agents.choose([lesson]) == [8]  # nothing is known: the first one shown
    seen = learn(agents, [[lesson], [lesson]])
    assert [each.right for each in seen] == [[False], [True]]
    assert agents.rank([Exam(0, (8, 3), 3)]) == [(3, 8)]
    right = RuleAgents(business)
    learn(right, [[Lesson(user=0, bought=3, other=8, bought_first=True)]])
    assert right.rank([Exam(0, (8, 3), 3)]) == [(8, 3)]


def test_an_advertiser_learns_from_one_user_after_another() -> None:
    pairs = [(0, 1), (2, 3), (1, 4), (4, 5), (2, 6)]
    lessons = [Lesson(user=user, bought=a, other=b, bought_first=True) for user, (a, b) in enumerate(pairs)]
    groups = [[lesson.user for lesson in group] for group in without_shared_advertisers(lessons)]
    assert groups == [[0, 1], [2, 4], [3]]


class _Spoken:
    """A player with a script of texts."""

    def __init__(self, script: Callable[[str], str]) -> None:
        self.script, self.prompts = script, list[str]()

    def say(self, conversations: list[list[Any]]) -> list[Completion]:
        self.prompts += [messages[0].content for messages in conversations]
        return [Completion(text=self.script(messages[0].content)) for messages in conversations]


def test_memories_that_a_model_writes_are_bounded_and_shown_and_unreadable_ones_change_nothing(
    business: Business, config: AgentsConfig
) -> None:
    def script(prompt: str) -> str:
        if "Write your memory anew" in prompt:
            return json.dumps({"memory": "I like boats. " * 100})
        return json.dumps({"first": "We sell boats."})  # a field is missing

    player = _Spoken(script)
    agents = LanguageAgents(player, business, config)  # type: ignore[arg-type]
    items = list(agents.items)
    agents.reflect([Lesson(user=2, bought=3, other=8, bought_first=True)])
    assert agents.users[2].startswith("I like boats.") and len(agents.users[2]) == config.memory_characters
    assert (agents.items, agents.unreadable_reflections) == (items, 1)
    agents.rank([Exam(2, (8, 3), 3)])
    assert (
        "Your memory: I like boats." in player.prompts[-1]
        and f"1. {business.past.items[8].name}: " in player.prompts[-1]
    )


@pytest.mark.parametrize(
    ("said", "order"),
    [("[2, 1, 3]", (9, 4, 5)), ("[2, 1]", None), ("[2, 1, 1]", None), ("[2, 1, 4]", None), ('["2", 1, 3]', None)],
)
def test_a_ranking_holds_every_candidate_once(
    said: str, order: tuple[int, ...] | None, business: Business, config: AgentsConfig
) -> None:
    agents = LanguageAgents(_Spoken(lambda _: f'{{"order": {said}}}'), business, config)  # type: ignore[arg-type]
    assert agents.rank([Exam(0, (4, 9, 5), 9)]) == [order]


def _reader(body: dict[str, Any], _: int) -> Reply:
    """Remember the names bought from; choose and rank by them."""
    prompt = body["messages"][0]["content"]
    memory = prompt.partition("\n")[0]
    names = re.findall(r"^(\d+)\. (.*?): ", prompt, re.MULTILINE)
    said: dict[str, Any]
    if "Which of these" in prompt:
        chosen = [int(number) for number, name in names if name in memory]
        said = {"choice": (chosen or [1])[0], "why": "as I remember"}
    elif "Write your memory" in prompt:
        said = {"memory": f"{memory.partition('memory: ')[2]} I buy from {names[0][1]}."}
    elif "Order these" in prompt:
        said = {"order": sorted(range(1, len(names) + 1), key=lambda place: names[place - 1][1] not in memory)}
    else:
        said = {"first": "Bought from.", "second": "Not bought from."}
    return Reply(content=json.dumps(said))


def test_agents_of_a_model_learn_through_a_server_that_is_asked_once(given: list[str], tmp_path: Path) -> None:
    with scripted_server(_reader) as server:
        settings = ["simulated=25", "purchases=3", "model.model=m", f"model.url='{server.url}'", *given]
        config = load_users_recipe(AgentsConfig, "users/agents", settings, out=str(tmp_path))
        report = run_agents(config)
        asked = len(server.bodies)
        assert run_agents(config) == report and len(server.bodies) == asked
    assert report["change"]["value"] > 0.1
    assert report["unreadable_reflections"] == 0 == report["lines"][AFTER]["unreadable"]
    mistakes = sum(each["mistakes"] for each in report["rounds"])
    lessons = sum(each["lessons"] for each in report["rounds"])
    assert report["usage"]["asked"] == 2 * 25 + lessons + 2 * mistakes
