"""Answers become features that know nothing of the future, and that help a ranker only where they say something."""

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_ads import cli
from megatron_ads.config.data import AdsTask
from megatron_ads.config.downstream import FeatureConfig
from megatron_ads.data.jsonl import jsonl_rows
from megatron_ads.data.table_fields import describe_time
from megatron_ads.data.user_features import SECONDS_PER_DAY, LoggedEvent
from megatron_ads.downstream.anchored_rows import labelled_rows, question_rows, set_apart
from megatron_ads.downstream.examples import held_out, held_out_examples, last_anchor, training_examples
from megatron_ads.downstream.features import UserFeatures, make_features, read_features, write_features
from megatron_ads.downstream.logs import Logs
from megatron_ads.downstream.pipeline import Pipeline, train_pipeline
from megatron_ads.downstream.pipeline_folder import save_pipeline
from megatron_ads.downstream.product_codes import embed_answers, product_codes
from megatron_ads.downstream.similar_users import most_similar, recent_events
from megatron_ads.downstream.simulated_logs import read_logs
from megatron_ads.downstream.user_answers import UserAnswer, read_user_answers
from megatron_ads.errors import DataError
from megatron_ads.tasks.user_history import FULL_VIEW, EventKind
from tests.downstream.logs import settings, write_simulated
from tests.inference.scripted_server import Reply, scripted_server


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_simulated(tmp_path_factory.mktemp("logs") / "simulated", users=300)


@pytest.fixture(scope="module")
def logs(folder: Path) -> Logs:
    return read_logs(folder)


def test_rows_end_at_the_anchors_of_the_examples_and_leave_out_users_set_apart(logs: Logs) -> None:
    config = settings()
    rows = list(question_rows(logs, config, AdsTask.next_advertiser, lambda history: FULL_VIEW, apart=0.4))
    users = {str(row.facts["user"]) for row in rows}
    apart = {user for user in logs.events if not held_out(user, config) and set_apart(user, config, 0.4)}
    assert apart and not users & apart
    learned, judged = training_examples(logs, config), held_out_examples(logs, config)
    wanted = {
        (shown.user, describe_time(examples.anchors[number]))
        for examples in (learned, judged)
        for number, shown in examples.impressions
        if shown.user not in apart
    }
    assert wanted <= {(str(row.facts["user"]), str(row.facts["anchor"])) for row in rows}
    assert len(rows) < len(learned.histories) + len(judged.histories)  # of histories that nothing follows
    last = describe_time(last_anchor(logs, config))
    assert {row.facts["anchor"] == last for row in rows if held_out(str(row.facts["user"]), config)} == {True}
    assert all(row.label is None and "ground_truth" not in row.facts and "events" not in row.facts for row in rows)
    labelled = list(labelled_rows(logs, config, lambda history: FULL_VIEW, apart=0.4))
    assert {str(row.facts["user"]) for row in labelled} <= apart
    assert all(row.label and row.target.endswith(row.label) for row in labelled)


def test_a_prompt_shows_nothing_from_after_its_anchor(logs: Logs) -> None:
    config = settings()

    def prompts(of: Logs) -> dict[str, str]:
        rows = question_rows(of, config, AdsTask.next_advertiser, lambda history: FULL_VIEW)
        return {row.id: row.prompt[-1].content for row in rows}

    written = prompts(logs)
    for anchor in sorted({*training_examples(logs, config).anchors, last_anchor(logs, config)}, reverse=True):
        events = {
            user: [replace(one, text="LATER", category="LATER") if one.time >= anchor else one for one in log]
            for user, log in logs.events.items()
        }
        changed = prompts(replace(logs, events=events))
        here = [name for name in written if name.endswith(describe_time(anchor))]
        assert len(here) > 50 and {name: changed[name] for name in here} == {name: written[name] for name in here}
    assert changed != written  # later anchors see the change


ANSWER = (
    "<prediction><advertisers><advertiser>Acme</advertiser><advertiser>Blue</advertiser><advertiser>acme</advertiser>"
    "</advertisers><interests><interest>shoes</interest></interests></prediction>"
)


def row_line(name: str, task: str, *, user: str = "u1", anchor: str = "2025-01-27T00:00:00+00:00") -> str:
    messages = [{"role": "user", "content": f"{name}?"}, {"role": "assistant", "content": "none"}]
    facts = {"user": user, "anchor": anchor, "history": {}}
    return json.dumps({"id": name, "task": task, "messages": messages, "facts": facts}) + "\n"


def test_answers_of_two_tasks_about_one_user_and_anchor_are_one(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        row_line("a", "next_advertiser")
        + row_line("b", "next_advertiser_ranking")
        + row_line("c", "next_advertiser", user="u2")
        + row_line("d", "next_advertiser_ranking", user="u3")
    )
    beams = [{"text": name, "log_probability": -1.0, "score": -1.0} for name in ("Cook", "Blue")]
    said = [{"id": "a", "text": "Cook", "beams": beams}, {"id": "b", "text": ANSWER}, {"id": "d", "text": "Acme?"}]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(one) + "\n" for one in said))
    found = read_user_answers(rows, tmp_path / "answers.jsonl")
    first, unreadable = found.answers
    assert first.user == "u1" and first.anchor == 1737936000
    assert first.advertisers == ("Cook", "Blue", "Acme") and first.interests == ("shoes",)
    assert unreadable == UserAnswer(user="u3", anchor=1737936000)
    assert (found.unanswered, dict(found.unreadable)) == (1, {"not_xml": 1})


def test_labels_in_parquet_files_are_read_as_answers(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(row_line("a", "next_advertiser_ranking") + row_line("b", "next_advertiser"))
    (tmp_path / "labels").mkdir()
    table = {"id": ["a", "b"], "task": ["next_advertiser_ranking", "next_advertiser"], "text": [ANSWER, None]}
    pq.write_table(pa.table({**table, "failure": [None, "refused"]}), tmp_path / "labels" / "part-0.parquet")
    found = read_user_answers(tmp_path / "rows.jsonl", tmp_path / "labels")
    assert found.answers[0].advertisers == ("Acme", "Blue") and found.answers[0].interests == ("shoes",)
    assert dict(found.unreadable) == {"no text": 1}


@pytest.mark.parametrize(
    ("rows", "answers", "message"),
    [
        ([("a", "u1")], [{"id": "b", "text": "x"}], "answers 'b', which is no row of"),
        ([("a", "u1")], [{"id": "a", "text": "x"}] * 2, "answers 'a' once more"),
        ([("a", "u1")], [{"id": "a", "text": 3}], "text is 3; it must be the answer, a text"),
        ([("a", "u1")], [{"id": "a", "text": "x", "beams": [3]}], "beams has 3; it must be an object with text"),
        ([("a", "")], [{"id": "a", "text": "x"}], "does not say its user and its anchor"),
        ([("a", "u1")], [], "answers none of the 1 rows"),
    ],
)
def test_answers_that_fit_no_row_are_refused(
    rows: Sequence[tuple[str, str]], answers: Sequence[dict[str, Any]], message: str, tmp_path: Path
) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(row_line(name, "next_advertiser", user=user) for name, user in rows))
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(one) + "\n" for one in answers))
    with pytest.raises(DataError, match=message):
        read_user_answers(tmp_path / "rows.jsonl", tmp_path / "answers.jsonl")


def test_an_answers_vector_weighs_its_lines_by_place() -> None:
    # "left right" is 1 left + 1 / log2(3) right, scaled to length 1: 0.846 and 0.533, if the words are independent.
    vectors = embed_answers([["left"], ["right"], ["left", "right"], []], [True] * 4, encoder=None, dimensions=2)
    left, right, both, nothing = vectors
    assert abs(float(left @ right)) < 1e-6
    assert float(both @ left) == pytest.approx(1 / np.hypot(1, 1 / np.log2(3)), abs=1e-6)
    assert float(both @ right) == pytest.approx(1 / np.hypot(1, np.log2(3)), abs=1e-6)
    assert np.linalg.norm(nothing) == 0


def test_codes_are_of_the_nearest_centroid_of_each_part_and_the_same_every_time() -> None:
    draw = np.random.default_rng(0)
    # Two parts with two clusters each, far apart: one bit tells them.
    which = draw.integers(2, size=(200, 2))
    vectors = (np.repeat(which, 3, axis=1) * 10.0 + draw.normal(size=(200, 6)) * 0.1 + 1).astype(np.float32)
    vectors[0] = 0
    codes = product_codes(vectors, [True] * 200, parts=2, bits=1, seed=0)
    assert codes[0] == ()
    for part in range(2):
        pairs = {(int(which[row, part]), codes[row][part]) for row in range(1, 200)}
        assert len(pairs) == 2 and {code for _, code in pairs} == {0, 1}
    assert product_codes(vectors, [True] * 200, parts=2, bits=1, seed=0) == codes
    with pytest.raises(DataError, match=r"fewer than the 256 centroids of features\.bits = 8"):
        product_codes(vectors, [True] * 200, parts=2, bits=8, seed=0)


def test_the_most_similar_user_is_another_one_as_seen_up_to_the_anchor() -> None:
    vectors = np.array([[1, 0], [0.6, 0.8], [0, 1], [1, 0], [0.8, 0.6], [0, 0]], dtype=np.float32)
    users, anchors = ["a", "b", "c", "a", "d", "e"], [1, 1, 1, 2, 2, 2]
    # At 1: a is nearest to b (0.6), b and c to each other (0.8). At 2: d is new; a, seen again, is nearest to d (0.8),
    # d to b as seen at 1 (0.96). Of e nothing was said.
    assert most_similar(vectors, users, anchors) == [1, 2, 1, 4, 1, None]


def test_recent_events_are_the_latest_before_the_anchor_newest_first() -> None:
    def event(day: int, kind: EventKind, **what: str) -> LoggedEvent:
        return LoggedEvent(time=day * SECONDS_PER_DAY, kind=kind, **{"text": "t", **what})

    log = [
        event(1, EventKind.onsite_search, category="shoes"),
        event(2, EventKind.matched_conversion, advertiser="Acme"),
        event(3, EventKind.click, advertiser="Blue", category="shoes"),
        event(4, EventKind.page_view),
        event(5, EventKind.matched_conversion, advertiser="Later"),
    ]
    found = recent_events(log, before=5 * SECONDS_PER_DAY, most=3)
    assert found == ("wanted=t", "saw=Blue", "bought=Acme")


def test_features_are_written_and_read_as_they_are(tmp_path: Path) -> None:
    one = UserFeatures(
        user="u1", anchor=1737936000, advertisers=("Acme", "Blue"), interests=("shoes",), codes=(3, 0),
        similar_user="u2", similar_events=("bought=Acme",),
    )  # fmt: skip
    none = UserFeatures(user="u2", anchor=1737936000)
    write_features(tmp_path / "features.parquet", [one, none])
    assert read_features(tmp_path / "features.parquet") == {("u1", 1737936000): one, ("u2", 1737936000): none}
    write_features(tmp_path / "twice.parquet", [one, one])
    with pytest.raises(DataError, match=r"has features of 'u1' at .* twice"):
        read_features(tmp_path / "twice.parquet")
    pq.write_table(pa.table({"user": ["u1"]}), tmp_path / "other.parquet")
    with pytest.raises(DataError, match="holds no features"):
        read_features(tmp_path / "other.parquet")


def test_nothing_is_fitted_to_answers_about_users_held_out(logs: Logs) -> None:
    config = settings()
    names = [item.name for item in logs.items]

    def made(said_of_held_out: str) -> list[UserFeatures]:
        draw = random.Random(0)
        answers = [
            UserAnswer(user=user, anchor=10**9, lines=(said_of_held_out,) if held_out(user, config) else (name,))
            for user in logs.events
            for name in [draw.choice(names)]
        ]
        return make_features(answers, logs, config, FeatureConfig(parts=4, bits=3, dimensions=16))

    learned = [not held_out(user, config) for user in logs.events]
    one, other = made(names[0]), made(names[1])
    assert [a.codes for a, counts in zip(one, learned, strict=True) if counts] == [
        b.codes for b, counts in zip(other, learned, strict=True) if counts
    ]
    assert {a.codes for a, counts in zip(one, learned, strict=True) if not counts} != {
        b.codes for b, counts in zip(other, learned, strict=True) if not counts
    }


def test_the_commands_lead_from_logs_to_tables(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = ["retriever.epochs=1", "ranker.epochs=1", "buckets=512", "retriever.dimensions=8"]
    save_pipeline(quickly_trained(folder, quick), tmp_path / "pipeline", trained_on={})
    given = ["--pipeline", str(tmp_path / "pipeline"), "--logs", str(folder)]
    files = {name: str(tmp_path / name) for name in ("rows.jsonl", "train.jsonl", "answers.jsonl", "features.parquet")}
    rows = ["--out", files["rows.jsonl"], "--labelled", files["train.jsonl"], "--apart", "0.3"]
    assert cli.main(["downstream", "rows", *given, *rows, "history.max_entries=3"]) == 0
    asked = jsonl_rows(Path(files["rows.jsonl"]))
    names, draw = [item.name for item in read_logs(folder).items], random.Random(0)
    said = [json.dumps({"id": row.id, "text": draw.choice(names)}) + "\n" for row in asked]
    Path(files["answers.jsonl"]).write_text("".join(said))
    make = ["--rows", files["rows.jsonl"], "--answers", files["answers.jsonl"], "--out", files["features.parquet"]]
    assert cli.main(["downstream", "features", *given, *make, "--json", "bits=4"]) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed["rows"] == printed["with_advertisers"] == len(asked) > 200
    with scripted_server(lambda body, times: Reply(content=draw.choice(names))) as server:
        source = f"sources=[{{kind: jsonl, path: {files['rows.jsonl']}}}]"
        ask = ["select.active_days=null", "select.conversion_days=null", f"model.url={server.url}", "model.model=any"]
        label = ["label", "--recipe", "label/next_advertiser", "--out", str(tmp_path / "labels"), source, *ask]
        assert cli.main(label) == 0
    make[3] = str(tmp_path / "labels" / "labels")
    assert cli.main(["downstream", "features", *given, *make, "--json", "bits=4"]) == 0
    labelled = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert labelled["rows"] == labelled["with_advertisers"] == len(asked)
    judge = ["downstream", "evaluate", *given, "--features", files["features.parquet"], "--seeds", "1", "--objectives"]
    assert cli.main(judge) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in ("table 5", "PR-AUC", "long-tail", "across users", "quota 5", "impressions"))
    assert cli.main(["downstream", "rows", *given, "--out", files["rows.jsonl"], "--apart", "0.3"]) == 2
    assert "--labelled FILE and --apart SHARE go together" in capsys.readouterr().err
    assert cli.main(["downstream", "evaluate", *given, "--objectives"]) == 2
    assert "--objectives has no effect without --features FILE" in capsys.readouterr().err


def quickly_trained(folder: Path, overrides: Sequence[str]) -> Pipeline:
    return train_pipeline(read_logs(folder), settings(*overrides))
