"""Users that browse: they order recommenders as the truth does, which recommenders cannot know."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_ads.cli import main
from megatron_ads.config.user_simulation import (
    AnswersConfig,
    BrowseConfig,
    RecommenderKind,
    SimulatedWorldConfig,
    load_users_recipe,
)
from megatron_ads.data.simulator.population import next_advertiser
from megatron_ads.downstream.examples import held_out
from megatron_ads.errors import DataError
from megatron_ads.user_simulation.browse_run import BEST
from megatron_ads.user_simulation.browsing import AdServer, PageAnswer, Visit, browse
from megatron_ads.user_simulation.business import Business, open_business
from megatron_ads.user_simulation.figures import FIGURES, agreement, expected_ndcg, measure, rank_biased_weights
from megatron_ads.user_simulation.recommenders import RankerSettings, rankings
from megatron_ads.user_simulation.scripted_users import ScriptedUsers, draw_needs, expected_wants, wants

USERS = 200


@pytest.fixture(scope="module")
def business(world: SimulatedWorldConfig) -> Business:
    return open_business(world, Path("unused"), simulated=USERS)


@pytest.fixture(scope="module")
def config() -> BrowseConfig:
    return load_users_recipe(BrowseConfig, "users/browse", [f"simulated={USERS}"])


def test_scripted_users_order_recommenders_as_the_truth_does(
    given: list[str], out: str, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = "recommenders=[random,popular,two_towers]"
    command = ["users", "browse", "--recipe", "users/browse", "--out", out, f"simulated={USERS}", chosen, *given]
    assert main([*command, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    of_each = report["recommenders"]
    assert list(of_each) == ["random", "popular", "two_towers", BEST]
    for truth in ("utility", "next_conversion"):
        assert report["agreement"][truth]["clicks"]["tau"] == 1.0
        assert report["agreement"][truth]["satisfaction"]["tau"] == 1.0
    low, high = report["agreement"]["utility"]["clicks"]["interval"]
    assert 0.3 < low <= high == 1.0
    for figure in FIGURES:
        assert of_each["random"][figure]["value"] < of_each[BEST][figure]["value"]
    assert all(of_each[BEST]["utility"]["value"] > of_each[name]["utility"]["value"] for name in list(of_each)[:-1])
    assert (report["played_by"], report["usage"]) == ("scripted rules", None)
    assert sorted(file.name for file in Path(out).iterdir()) == [
        "recipe.yaml",
        "report.html",
        "report.json",
        "report.md",
    ]
    assert "| two_towers |" in (Path(out) / "report.md").read_text()


def test_users_are_held_out_and_recommenders_read_nothing_from_after_the_anchor(business: Business) -> None:
    pipeline = business.pipeline.config
    assert all(held_out(name, pipeline) for name in business.users.names)
    assert not set(business.learned_from) & set(business.users.names)
    assert all(event.time < business.anchor for log in business.past.events.values() for event in log)
    assert all(shown.time < business.anchor for shown in business.past.impressions)


def test_the_people_drawn_once_more_are_those_of_the_logs(business: Business) -> None:
    moment, numbers = business.users.moment, {item.name: number for number, item in enumerate(business.past.items)}
    for row, name in enumerate(business.users.names):
        bought = [event.advertiser for event in business.past.events[name] if event.kind.endswith("conversion")]
        recent = [number for number in moment.recent_UM[row].tolist() if number >= 0]
        assert recent == [numbers[advertiser] for advertiser in reversed(bought)][:8]
        assert business.users.latest_advertisers(row, 3) == list(dict.fromkeys(recent))[:3]


def test_recommenders_give_different_lists_of_everything_once(business: Business, config: BrowseConfig) -> None:
    ranked = rankings(business, config.recommenders, RankerSettings(seed=0))
    assert set(ranked) == {str(kind) for kind in RecommenderKind} - {"answers"}
    for name, ranking in ranked.items():
        assert all(sorted(own) == list(range(120)) for own in ranking.tolist()), name
    again = rankings(business, config.recommenders, RankerSettings(seed=0))
    assert all((ranked[name] == again[name]).all() for name in ranked)
    assert (ranked["diluted"][:, 0] == ranked["two_towers"][:, 0]).all()


def test_expected_wants_are_the_mean_over_drawn_needs(business: Business) -> None:
    users = business.users.moment
    expected = expected_wants(business.world, users)
    draw, times = np.random.default_rng(0), 60
    seen = sum(wants(business.world, users, draw_needs(users, draw)) for _ in range(times)) / times
    assert np.abs(seen.mean(axis=0) - expected.mean(axis=0)).max() < 0.01
    assert abs(seen.mean() / expected.mean() - 1) < 0.02


def test_what_is_true_is_as_written() -> None:
    chance_UA = np.array([[0.5, 0.3, 0.2]])
    assert expected_ndcg(np.array([[1, 0]]), chance_UA)[0] == pytest.approx(0.3 + 0.5 / np.log2(3))
    config = BrowseConfig(page_size=2)
    config.user.attention, config.user.patience = 0.5, 1.0
    weights = np.array([1, 0.5, np.exp(-1), 0.5 * np.exp(-1)])
    assert rank_biased_weights(config, 4) == pytest.approx(weights / weights.sum())


def test_a_user_does_not_depend_on_who_recommends_and_impatient_ones_leave_early(
    business: Business, config: BrowseConfig
) -> None:
    server, settings = AdServer(business.world, 0), RankerSettings(seed=0)
    ranked = rankings(business, [RecommenderKind.two_towers], settings)
    ads = server.ads(business.users.names, ranked["two_towers"][:, :30])

    def pages_of(settings: BrowseConfig) -> list[list[PageAnswer]]:
        users = ScriptedUsers(business.world, business.users, settings)
        visits = browse({"a": ads, "b": ads}, users, pages=6, page_size=5)
        assert [visit.answers for visit in visits[:USERS]] == [visit.answers for visit in visits[USERS:]]
        return [visit.answers for visit in visits[:USERS]]

    impatient = replace(config, user=replace(config.user, patience=0.3))
    many, few = (sum(map(len, pages_of(each))) for each in (config, impatient))
    assert few < 1.3 * USERS < 2 * USERS < many <= 6 * USERS
    assert all(set(page.clicked) <= set(page.looked) for pages in pages_of(config) for page in pages)


def test_only_noise_clicks_without_wanting(business: Business, config: BrowseConfig) -> None:
    chance = next_advertiser(business.users.moment, business.world, window_days=7)
    worst = np.argsort(chance, axis=1)[:, :30]
    ads = {"worst": AdServer(business.world, 0).ads(business.users.names, worst)}
    clicks = {}
    for noise in (0.0, 0.5):
        settings = replace(config, user=replace(config.user, noise=noise))
        users = ScriptedUsers(business.world, business.users, settings)
        visits = browse(ads, users, pages=6, page_size=5)
        clicks[noise] = sum(len(page.clicked) for visit in visits for page in visit.answers)
    assert 5 * clicks[0.0] < clicks[0.5]


def test_figures_of_a_visit_and_of_one_that_cannot_be_read() -> None:
    first = PageAnswer(looked=(0, 2), clicked=(2,), leaves=False, satisfaction=4)
    lost = PageAnswer(leaves=True, unreadable="no_json")
    visits = [
        Visit("r", 0, [(7, 8, 9)], [replace(first, leaves=True)]),
        Visit("r", 1, [(7, 8, 9), (1, 2)], [first, lost]),
    ]
    visits.append(Visit("r", 2, [(7, 8, 9)], [lost]))
    measured = measure(visits, {"r": {"utility": np.zeros(3), "next_conversion": np.zeros(3)}})
    assert measured.unreadable == {"r": {"no_json": 2}}
    found = {figure: measured.by_recommender["r"][figure].tolist() for figure in FIGURES}
    for figure, value in (
        ("view_ratio", 2 / 3),
        ("clicks", 1),
        ("click_ratio", 1 / 3),
        ("exit_page", 1),
        ("satisfaction", 4),
    ):
        assert found[figure][:2] == [value, value] and np.isnan(found[figure][2])
    tau = agreement(measured, ["r"], "utility")["clicks"]
    assert tau == {"tau": None, "interval": None, "p_value": None}


def test_what_does_not_belong_together_is_refused(
    world: SimulatedWorldConfig, given: list[str], tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"simulated is 5000, and \d+ users are held out"):
        open_business(world, tmp_path, simulated=5000)
    small = SimulatedWorldConfig(users=60, days=15)
    (tmp_path / "logs").symlink_to(str(world.logs))
    with pytest.raises(DataError, match=r"users=500.*users=60.*Choose another --out"):
        open_business(small, tmp_path, simulated=10)
    with pytest.raises(DataError, match="is no simulation"):
        open_business(replace(world, logs=str(world.pipeline)), tmp_path, simulated=10)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"users": 40}, "'user-.*' is none of the 40 users of its manifest. Simulate again"),
        ({"users": "500"}, "is no simulation"),
        ({"seed": -1}, "is no simulation"),
        ({"days": 20}, "its manifest has 20 days, and users act after 23"),
        ({"advertisers": 10**12}, "its advertisers are not those that its manifest's seed draws"),
        ({"seed": 1}, "its advertisers are not those that its manifest's seed draws"),
    ],
)
def test_a_manifest_that_is_not_that_of_its_logs_is_refused(
    changed: dict[str, object], message: str, world: SimulatedWorldConfig, tmp_path: Path
) -> None:
    folder = tmp_path / "logs"
    folder.mkdir()
    for file in Path(str(world.logs)).iterdir():
        (folder / file.name).symlink_to(file)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").write_text(json.dumps(manifest | changed))
    with pytest.raises(DataError, match=message):
        open_business(replace(world, logs=str(folder)), tmp_path, simulated=10)


def test_answers_of_a_model_are_a_recommender(business: Business, world: SimulatedWorldConfig, tmp_path: Path) -> None:
    rows, answers = tmp_path / "rows.jsonl", tmp_path / "answers.jsonl"
    wrote = ["downstream", "rows", "--logs", str(world.logs), "--pipeline", str(world.pipeline), "--out", str(rows)]
    assert main(wrote) == 0
    asked = [json.loads(line) for line in rows.read_text().splitlines()]
    best = {
        name: business.past.items[int(number)].name
        for name, number in zip(business.users.names, business.users.chance_UA.argmax(axis=1), strict=True)
    }
    said = [{"id": row["id"], "text": best.get(row["facts"]["user"], "nobody")} for row in asked]
    answers.write_text("".join(json.dumps(one) + "\n" for one in said))
    settings = RankerSettings(seed=0, answers=AnswersConfig(rows=str(rows), file=str(answers)))
    ranking = rankings(business, [RecommenderKind.answers], settings)["answers"]
    assert ranking.shape == (USERS, 120)
    with_row = [name in {row["facts"]["user"] for row in asked} for name in business.users.names]
    assert (ranking[with_row, 0] == business.users.chance_UA[with_row].argmax(axis=1)).all() and sum(with_row) > 60
    answers.write_text("".join(json.dumps({"id": row["id"], "text": "nobody"}) + "\n" for row in asked))
    with pytest.raises(DataError, match="names no known advertiser for any of the"):
        rankings(business, [RecommenderKind.answers], settings)
