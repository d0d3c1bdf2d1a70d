import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from megatron_ads.errors import DataError
from megatron_ads.evaluation.answer_records import Answer, AnswerBeam, AnswerJournal, fingerprint, write_answers
from megatron_ads.evaluation.answer_records import open_journal as open_file
from tests.evaluation.advertiser_rows import name_row

ROWS = [name_row(str(number), "Acme") for number in range(3)]
OF = {"the model": "m", "the settings": "s"}
SAID = [
    [Answer(ROWS[0], "a\nb", True), Answer(ROWS[1], "ünï", False, (AnswerBeam("ünï", -1.5, -0.5),))],
    [Answer(ROWS[2], "", True)],
]


@contextmanager
def open_journal(file: Path, of: Mapping[str, str]) -> Iterator[AnswerJournal]:
    with open_file(file, of) as journal:
        yield AnswerJournal(journal)


def _journal(file: Path) -> Path:
    return file.with_name(file.name + ".journal")


def _fill(file: Path, batches: int) -> None:
    with open_journal(file, OF) as journal:
        for number in range(batches):
            journal.add(number, SAID[number], 2.0)


def test_other_answers_are_kept_aside_and_the_same_are_not(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "answers.jsonl"
    file.write_text("made by hand\n")
    for said in SAID[:2]:
        write_answers(file, said)
    write_answers(file, SAID[1])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers.jsonl", "answers.jsonl.1", "answers.jsonl.2"]
    assert (tmp_path / "answers.jsonl.1").read_text() == "made by hand\n"
    assert caplog.text.count("held other answers; they are kept as") == 2


def test_what_was_answered_is_found_again(tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    _fill(file, 2)
    with open_journal(file, OF) as journal:
        assert [journal.answered(0, ROWS[:2]), journal.answered(1, ROWS[2:])] == SAID
        assert journal.answered(2, []) is None
        assert (journal.rows, journal.seconds) == (3, 4.0)


def test_a_line_that_a_killed_run_did_not_finish_is_answered_again(tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    _fill(file, 2)
    os.truncate(_journal(file), _journal(file).stat().st_size - 10)
    with open_journal(file, OF) as journal:
        assert journal.answered(0, ROWS[:2]) == SAID[0]
        assert journal.answered(1, ROWS[2:]) is None
        journal.add(1, SAID[1], 1.0)
    with open_journal(file, OF) as journal:
        assert journal.answered(1, ROWS[2:]) == SAID[1]


def test_a_changed_evaluation_begins_anew_and_says_what_changed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("megatron_ads"), "propagate", True)
    caplog.set_level(logging.INFO, logger="megatron_ads")
    file = tmp_path / "answers.jsonl"
    _fill(file, 1)
    with open_journal(file, OF | {"the settings": "others"}) as journal:
        assert journal.answered(0, ROWS[:2]) is None
    assert "is of another evaluation: the settings changed. It begins anew." in caplog.text
    assert "the model" not in caplog.text


@pytest.mark.parametrize(("kept", "now"), [('"answers"', '"answer"'), ('"text"', '"words"')])
def test_a_record_that_somebody_edited_is_named(tmp_path: Path, kept: str, now: str) -> None:
    file = tmp_path / "answers.jsonl"
    _fill(file, 2)
    journal_file = _journal(file)
    journal_file.write_text(journal_file.read_text(encoding="utf-8").replace(kept, now), encoding="utf-8")
    with (
        pytest.raises(DataError, match=r"answers\.jsonl\.journal, the line of 0 is not a record of this journal"),
        open_journal(file, OF) as journal,
    ):
        journal.answered(0, ROWS[:2])


def test_a_journal_without_answers_is_not_left_behind(tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    with pytest.raises(KeyboardInterrupt), open_journal(file, OF):
        raise KeyboardInterrupt
    assert not _journal(file).exists()
    with pytest.raises(KeyboardInterrupt), open_journal(file, OF) as journal:
        journal.add(0, SAID[0], 1.0)
        raise KeyboardInterrupt
    assert _journal(file).exists()


def test_two_processes_do_not_write_the_same_answers(tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    with open_journal(file, OF), pytest.raises(DataError, match="another process is writing"), open_journal(file, OF):
        pass


def test_a_place_that_cannot_be_written_is_named_before_anything_is_asked(tmp_path: Path) -> None:
    with (
        pytest.raises(DataError, match=r"absent/answers\.jsonl\.journal cannot be written \(No such file"),
        open_journal(tmp_path / "absent" / "answers.jsonl", OF),
    ):
        pass


def test_the_fingerprint_tells_models_rows_and_settings_apart(tmp_path: Path) -> None:
    weights = tmp_path / "rank" / "model.safetensors"
    weights.parent.mkdir()
    weights.write_bytes(b"1")
    (tmp_path / "answers.jsonl").write_text("{}")
    first = fingerprint(tmp_path, ROWS, {"beams": 2})
    (tmp_path / "answers.jsonl").write_text("{}{}")  # not of the model
    assert fingerprint(tmp_path, ROWS, {"beams": 2}) == first
    os.utime(weights, ns=(1, 1))
    others = [fingerprint(tmp_path, ROWS, {"beams": 2}), fingerprint(tmp_path, ROWS[:2], {"beams": 3})]
    assert [[name for name in first if first[name] != other[name]] for other in others] == [
        ["the model"],
        ["the model", "the held-out rows", "the settings"],
    ]
