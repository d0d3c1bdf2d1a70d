"""Users played by a model: the same people, in words; an interrupted simulation continues and asks nothing twice."""

from pathlib import Path

import pytest

from megatron_ads.config.user_simulation import BrowseConfig, load_users_recipe
from megatron_ads.data.simulator.vocabulary import KINDS, PLACES
from megatron_ads.errors import ConfigError
from megatron_ads.user_simulation.browse_run import run_browse
from megatron_ads.user_simulation.browsing import PageAnswer, Visit
from megatron_ads.user_simulation.business import open_business
from megatron_ads.user_simulation.language_users import page_prompt, personas
from megatron_ads.user_simulation.scripted_users import ScriptedUsers
from tests.inference.scripted_server import Reply, scripted_server
from tests.inference.tiny_model import write_tiny_model
from tests.user_simulation.players import browsing_user

USERS = 20


def recipe(given: list[str], out: Path, *overrides: str) -> BrowseConfig:
    chosen = [f"simulated={USERS}", "pages=2", "recommenders=[random,popular,two_towers]", "model.attempts=1"]
    return load_users_recipe(BrowseConfig, "users/browse", [*chosen, *given, *overrides], out=str(out))


def test_a_sensible_model_orders_recommenders_and_an_interrupted_simulation_asks_nothing_twice(
    given: list[str], tmp_path: Path
) -> None:
    count = 0

    def leaving(body: dict[str, object], times: int) -> Reply:
        nonlocal count
        count += 1
        return browsing_user(body, times) if count <= 50 else Reply(status=401, content="no")

    with scripted_server(leaving) as server:
        config = recipe(given, tmp_path, "model.model=scripted", f"model.url='{server.url}'", "model.concurrency=1")
        with pytest.raises(ConfigError, match="401"):
            run_browse(config)
    with scripted_server(browsing_user) as server:
        config.model.url = server.url
        report = run_browse(config)
        left = len(server.bodies)
        assert run_browse(config) == report and len(server.bodies) == left
    with scripted_server(browsing_user) as server:
        alone = recipe(given, tmp_path / "alone", "model.model=scripted", f"model.url='{server.url}'")
        Path(alone.out).mkdir()
        assert run_browse(alone) == report
        assert len(server.bodies) == left + 50
    assert report["agreement"]["utility"]["clicks"]["tau"] == 1.0
    assert not any(report["unreadable"].values())
    assert report["recommenders"]["popular"]["view_ratio"]["value"] == 1.0
    # Equal pages of one user are one request, whoever recommends.
    assert report["usage"]["asked"] == USERS * 4 * 2 >= left + 50 > USERS * 4
    assert report["played_by"] == "scripted"


def test_answers_that_cannot_be_read_end_the_visit_and_are_counted(given: list[str], tmp_path: Path) -> None:
    with scripted_server(lambda *_: Reply(content="I like the second ad.")) as server:
        report = run_browse(recipe(given, tmp_path, "model.model=scripted", f"model.url='{server.url}'"))
    assert list(report["unreadable"].values()) == [{"no_json": USERS}] * 4
    assert report["recommenders"]["random"]["clicks"] == {"value": None, "interval": None, "users": 0}
    assert report["agreement"]["utility"]["clicks"]["tau"] is None


def test_a_checkpoint_in_this_process_plays_through_its_own_journal(given: list[str], tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model")
    local = ["model.kind=local", f"model.model='{model}'", "model.max_tokens=8", "simulated=3"]
    config = recipe(given, tmp_path, *local, "recommenders=[popular]")
    report = run_browse(config)
    assert [sum(reasons.values()) for reasons in report["unreadable"].values()] == [
        3,
        3,
    ]  # its weights are random; two recommenders, of which one is the best
    (journal,) = tmp_path.glob("journal-*.jsonl")
    lines = journal.read_text().splitlines()
    assert run_browse(config) == report
    assert journal.read_text().splitlines() == lines


def test_a_model_that_can_read_no_prompt_is_refused_before_anything_is_simulated(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model")
    local = ["model.kind=local", f"model.model='{model}'", "model.max_tokens=100000"]
    with pytest.raises(ConfigError, match=r"model\.max_tokens is 100000, and .* reads \d+ tokens"):
        run_browse(load_users_recipe(BrowseConfig, "users/browse", local, out=str(tmp_path)))


def test_a_model_is_told_who_it_is_and_what_it_did(given: list[str], tmp_path: Path) -> None:
    config = recipe(given, tmp_path)
    business = open_business(config.world, tmp_path, simulated=USERS)
    needs = ScriptedUsers(business.world, business.users, config).need_U.tolist()
    told = personas(business.world, business.users, needs)
    for user, text in enumerate(told):
        assert f"Needs today: {KINDS[needs[user]].name}." in text
        assert PLACES[int(business.users.place_U[user])] in text
    visit = Visit("popular", 0, [(0, 1), (2, 3)], [PageAnswer(looked=(0, 1), clicked=(1,), leaves=False)])
    prompt = page_prompt(told[0], visit, business.world, 6)
    ads = business.world.ads
    assert f"Page 2 of 6. Clicked on before: {ads[1].title}." in prompt
    assert f"1. {ads[2].title}, " in prompt and f"2. {ads[3].title}, " in prompt
    assert ads[0].description not in prompt
