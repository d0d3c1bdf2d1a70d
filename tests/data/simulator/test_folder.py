"""The written logs: complete or not there, the same for a seed, and more users change no earlier one."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from megatron_ads.config.data import AdsTask
from megatron_ads.data.jsonl import jsonl_rows
from megatron_ads.data.simulator import folder
from megatron_ads.data.simulator.folder import Scale, write_simulation
from megatron_ads.data.simulator.histories import PIECE
from megatron_ads.data.simulator.logs import SCHEMAS, TableFormat
from megatron_ads.data.simulator.simulated_rows import simulated_examples
from megatron_ads.data.simulator.world import draw_world
from megatron_ads.errors import ConfigError


def write(out: Path, *, users: int = 50, days: int = 5, seed: int = 0, form: TableFormat = TableFormat.parquet) -> Path:
    write_simulation(out, Scale(users=users, days=days, seed=seed), form=form)
    return out


def test_every_table_is_written_and_counted(tmp_path: Path) -> None:
    out = write(tmp_path / "logs")
    manifest = json.loads((out / "manifest.json").read_text())
    files = {file.stem: pq.read_table(file).num_rows for file in out.glob("*.parquet")}
    assert files == manifest["rows_of_tables"]
    assert {"users", "advertisers", "ads", "queries", "kinds", "items", *SCHEMAS} == files.keys()
    assert files["users"] == manifest["users"] == 50
    assert not list(tmp_path.glob("*.partial"))


def test_events_name_what_exists_and_lie_within_the_days(tmp_path: Path) -> None:
    out = write(tmp_path / "logs")
    tables = {file.stem: pq.read_table(file).to_pylist() for file in out.glob("*.parquet")}
    ads = {ad["ad"]: ad for ad in tables["ads"]}
    assert len(tables["impressions"]) > 100
    for shown in tables["impressions"]:
        assert shown["ad"] in ads
        assert 0 <= shown["conversion_chance"] <= shown["click_chance"] <= 1
        assert shown["clicked"] or not shown["converted"]
    for bought in tables["conversions"]:
        assert not bought["attributed"] or ads[bought["ad"]]["advertiser"] == bought["advertiser"]
        assert 6 <= bought["time"].day <= 10  # five days from 6 January
    attributed = sum(bought["attributed"] for bought in tables["conversions"])
    assert attributed == sum(shown["converted"] for shown in tables["impressions"]) > 0


def test_json_lines_hold_the_same_rows(tmp_path: Path) -> None:
    parquet, lines = write(tmp_path / "a"), write(tmp_path / "b", form=TableFormat.jsonl)
    for name in ("users", "sessions", "impressions", "ads"):
        rows = [json.loads(line) for line in (lines / f"{name}.jsonl").read_text().splitlines()]
        wanted = pq.read_table(parquet / f"{name}.parquet").to_pylist()
        for row in wanted:
            if "time" in row:
                row["time"] = row["time"].isoformat()
        assert rows == wanted


def test_a_seed_decides_everything_and_another_seed_something_else(tmp_path: Path) -> None:
    first, again, other = (write(tmp_path / name, seed=seed) for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    for name in ("sessions", "impressions", "ads"):
        file = f"{name}.parquet"
        assert pq.read_table(first / file).equals(pq.read_table(again / file))
        assert not pq.read_table(first / file).equals(pq.read_table(other / file))


def test_more_users_and_days_change_nothing_earlier(tmp_path: Path) -> None:
    few, many = write(tmp_path / "a", users=70, days=3), write(tmp_path / "b", users=PIECE + 10, days=4)
    before = pq.read_table(few / "sessions.parquet")
    after = pq.read_table(many / "sessions.parquet")
    last = max(before["time"].to_pylist())
    kept = [row for row in after.to_pylist() if row["user"] < 70 and row["time"] <= last]
    assert kept == before.to_pylist()


def test_an_interrupted_run_leaves_no_folder_under_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(folder, "tables_of", broken)
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path / "logs")
    assert not (tmp_path / "logs").exists()
    assert (write(tmp_path / "logs") / "manifest.json").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [({"users": 0}, "users is 0"), ({"days": -1}, "days is -1"), ({"advertisers": 3}, "advertisers is 3; the 40")],
)
def test_impossible_sizes_are_refused(tmp_path: Path, change: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        write_simulation(tmp_path / "logs", Scale(**{"users": 10, "days": 2} | change))
    assert not (tmp_path / "logs").exists()


def test_a_folder_that_holds_something_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not an empty folder"):
        write(tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_rows_are_those_of_the_simulator_source_and_can_be_read_as_jsonl(tmp_path: Path) -> None:
    manifest = write_simulation(tmp_path / "s", Scale(users=200, days=35), tasks=tuple(AdsTask), rows=20)
    for task in AdsTask:
        (best,) = (tmp_path / "s" / "rows").glob(f"{task}.best.jsonl")
        assert jsonl_rows(tmp_path / "s" / "rows" / f"{task}.jsonl") == [
            example.row for example in simulated_examples(task, 20)
        ]
        assert len(best.read_text().splitlines()) == manifest["tasks"][task]["rows"] == 20
    assert manifest["tasks"]["query_ad_relevance"]["best_reachable"] == {"accuracy": pytest.approx(0.96)}
    assert set(manifest["tasks"]["next_advertiser"]["best_reachable"]) == {"recall@1", "recall@5", "recall@20"}
    assert manifest["anchor_day"] == 28


def test_rows_about_users_need_days_for_the_answers(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="days is 7; rows about users need at least 8"):
        write_simulation(tmp_path / "s", Scale(users=5, days=7), tasks=(AdsTask.user_profile,), rows=1)
    write_simulation(tmp_path / "s", Scale(users=5, days=7), tasks=(AdsTask.query_generation,), rows=1)


def test_names_are_different_and_every_kind_is_sold() -> None:
    world = draw_world(3, advertisers=900)
    assert len({shop.name for shop in world.advertisers}) == 900
    assert len({shop.domain for shop in world.advertisers}) == 900
    assert {kind for shop in world.advertisers for kind in shop.kinds} == set(range(40))
    assert len(set(world.queries)) == len(world.queries) == 2880
