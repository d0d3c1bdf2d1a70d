"""A pipeline learns what held-out users do, comes out the same every time, and is refused where it is damaged."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ads import cli
from megatron_ads.downstream.evaluate import evaluate_pipeline
from megatron_ads.downstream.examples import held_out, held_out_examples, last_anchor, training_examples
from megatron_ads.downstream.logs import Logs
from megatron_ads.downstream.pipeline import train_pipeline
from megatron_ads.downstream.pipeline_folder import RECORD, WEIGHTS, load_pipeline, save_pipeline
from megatron_ads.downstream.simulated_logs import read_logs
from megatron_ads.errors import ConfigError, DataError
from tests.downstream.logs import settings, write_simulated

USERS = 1800


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Logs:
    return read_logs(write_simulated(tmp_path_factory.mktemp("logs") / "simulated", users=USERS))


@pytest.fixture(scope="module")
def saved(logs: Logs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pipelines") / "first"
    save_pipeline(train_pipeline(logs, settings()), out, trained_on={})
    return out


def test_nothing_is_learned_from_held_out_users_nor_from_the_last_days(logs: Logs) -> None:
    config = settings()
    learned, judged = training_examples(logs, config), held_out_examples(logs, config)
    of_learned, of_judged = ({history.user_id for history in each.histories} for each in (learned, judged))
    assert not of_learned & of_judged
    assert 0.2 < sum(held_out(user, config) for user in logs.events) / len(logs.events) < 0.3
    anchor = last_anchor(logs, config)
    assert (
        max(each.time for _, each in learned.impressions) < anchor <= min(each.time for _, each in judged.impressions)
    )
    assert all(event.days_ago > 0 for history in judged.histories for event in history.events)


def test_held_out_purchases_are_found_better_than_by_popularity_and_clicks_are_told_from_chance(
    saved: Path, logs: Logs
) -> None:
    scores = evaluate_pipeline(load_pipeline(saved), logs)
    assert scores["users"] > 100
    towers, popular = scores["retrieval"]["two towers"], scores["retrieval"]["most popular"]
    for name in ("recall@5", "recall@20", "ndcg@20"):
        assert towers[name]["interval"][0] > popular[name]["interval"][1], (name, towers, popular)
    asked = scores["retrieval"]["two towers, with the search before"]
    assert asked["recall@20"]["value"] > towers["recall@20"]["value"]
    ranked, best = scores["ranking"]["DCN-v2, with the query"], scores["ranking"]["best reachable"]
    for name in ("click_auc", "ctcvr_auc"):
        assert 0.5 < ranked[name]["interval"][0] < ranked[name]["value"] < best[name]["value"], (name, ranked, best)
    assert ranked["click_log_loss"]["value"] > best["click_log_loss"]["value"]


def test_the_same_logs_and_settings_give_the_same_bytes_on_any_number_of_threads(
    saved: Path, logs: Logs, tmp_path: Path
) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2 if threads == 1 else 1)
    torch.manual_seed(5)
    try:
        digest = save_pipeline(train_pipeline(logs, settings()), tmp_path / "again", trained_on={"other": "facts"})
    finally:
        torch.set_num_threads(threads)
    assert digest == load_pipeline(saved).digest
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (saved / WEIGHTS).read_bytes()


def test_a_loaded_pipeline_scores_as_the_trained_one(saved: Path, logs: Logs) -> None:
    histories = held_out_examples(logs, settings()).histories[:3]
    one, other = load_pipeline(saved), load_pipeline(saved)
    users = one.users(histories, ["hotels", "", "shoes"])
    assert torch.equal(users, other.users(histories, ["hotels", "", "shoes"]))
    assert one.retrieve(users, 5).shape == (3, 5)
    assert (one.chances(users, [0, 1, 2]).shape, one.chances(users[:0], []).shape) == ((3, 2), (0, 2))
    low, high = one.ctcvr_range
    assert 0 <= low < high <= 1
    assert [one.normalized_ctcvr(each) for each in (low, (low + high) / 2, high, 1.0)] == pytest.approx([0, 0.5, 1, 1])


def test_nothing_is_written_over_a_folder_that_holds_something(saved: Path) -> None:
    with pytest.raises(ConfigError, match="exists and is not an empty folder"):
        save_pipeline(load_pipeline(saved), saved, trained_on={})


def cut_weights(folder: Path) -> None:
    file = folder / WEIGHTS
    file.write_bytes(file.read_bytes()[:-8])


def flip_weight(folder: Path) -> None:
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[-5] ^= 1
    (folder / WEIGHTS).write_bytes(data)


def change(name: str, value: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        record = json.loads((folder / RECORD).read_text())
        (folder / RECORD).write_text(json.dumps({**record, name: value}))

    damage.__name__ = name
    return damage


class MakesFolder:
    """Unpickled, it makes the folder ``unpickled``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.mkdir, (self._folder / "unpickled",)


def pickled(folder: Path) -> None:
    torch.save({"retriever.history": MakesFolder(folder)}, folder / WEIGHTS)
    record = json.loads((folder / RECORD).read_text())
    record["weights_sha256"] = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    (folder / RECORD).write_text(json.dumps({**record, "digest": digest_of(record)}))


def digest_of(record: dict[str, Any]) -> str:
    content = {name: value for name, value in record.items() if name not in ("digest", "trained_on")}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def no_object(folder: Path) -> None:
    (folder / RECORD).write_text("[]")


def no_json(folder: Path) -> None:
    (folder / RECORD).write_text("{")


DAMAGES: list[Callable[[Path], None]] = [
    cut_weights,
    flip_weight,
    pickled,
    change("items", []),
    change("settings", {"seed": 1}),
    change("ctcvr_range", None),
    no_object,
    no_json,
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_folder_is_named_and_never_unpickled(
    damage: Callable[[Path], None], saved: Path, tmp_path: Path
) -> None:
    shutil.copytree(saved, tmp_path / "copy")
    damage(tmp_path / "copy")
    with pytest.raises(DataError, match=r"copy is damaged \(.*\)\. Copy it again, or train it again\."):
        load_pipeline(tmp_path / "copy")
    assert not (tmp_path / "copy" / "unpickled").exists()


def test_a_record_that_vouches_for_other_sizes_allocates_nothing_and_is_refused(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "copy")
    record = json.loads((saved / RECORD).read_text())
    record["settings"]["buckets"] = 1 << 40
    (tmp_path / "copy" / RECORD).write_text(json.dumps({**record, "digest": digest_of(record)}))
    with pytest.raises(DataError, match="is damaged"):
        load_pipeline(tmp_path / "copy")


def test_another_version_is_refused_by_its_number(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "copy")
    change("version", 7)(tmp_path / "copy")
    with pytest.raises(DataError, match="has version 7; 1 is read"):
        load_pipeline(tmp_path / "copy")


def test_the_command_trains_and_evaluates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_simulated(tmp_path / "simulated", users=200)
    quick = ["retriever.epochs=1", "ranker.epochs=1", "buckets=512", "retriever.dimensions=8"]
    train = ["downstream", "train", "--logs", str(folder), "--out", str(tmp_path / "out")]
    assert cli.main([*train, "--json", *quick]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["digest"] == load_pipeline(tmp_path / "out").digest
    assert printed["items"] == 120
    evaluate = ["downstream", "evaluate", "--logs", str(folder), "--pipeline", str(tmp_path / "out")]
    assert cli.main(evaluate) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in ("recall@20", "most popular", "click_auc", "best reachable"))
    assert cli.main([*train, *quick]) == 2
    assert "exists and is not an empty folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("retriever.epoch=2", "did you mean retriever.epochs"),
        ("held_out=1", "downstream.held_out is 1"),
        ("ranker.epochs=0", "ranker.epochs is 0"),
    ],
)
def test_settings_are_checked(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        settings(override)
