"""A journal whose writer is killed, whose disk is full, or that two processes want."""

import resource
from pathlib import Path

import pytest

from megatron_ads.errors import DataError
from megatron_ads.journal import Journal, digest_of


def test_what_was_recorded_is_found_by_the_next_run_and_the_last_record_of_a_key_counts(tmp_path: Path) -> None:
    file = tmp_path / "journal"
    with Journal(file) as journal:
        journal.add("a", {"n": 1})
        journal.add("b", {"text": "line\nbreak, \u2028, ünï"})
        journal.add("a", {"n": 2})
    with Journal(file) as journal:
        assert journal.records == {"a": {"n": 2}, "b": {"text": "line\nbreak, \u2028, ünï"}}
        journal.clear()
        journal.add("c", {})
    with Journal(file) as journal:
        assert journal.records == {"c": {}}
        journal.delete()
    assert not file.exists()


@pytest.mark.parametrize("lost_bytes", [1, 9, 30])
def test_a_line_that_was_torn_by_a_crash_is_cut_off(tmp_path: Path, lost_bytes: int) -> None:
    file = tmp_path / "journal"
    with Journal(file) as journal:
        journal.add("a", {"text": "one"})
        journal.add("b", {"text": "two, which is longer than thirty bytes"})
    whole = file.read_bytes()
    file.write_bytes(whole[:-lost_bytes])
    with Journal(file) as journal:
        assert journal.records == {"a": {"text": "one"}}
        journal.add("b", {"text": "two, which is longer than thirty bytes"})
    assert file.read_bytes() == whole


def test_a_line_that_is_damaged_in_the_middle_is_named(tmp_path: Path) -> None:
    file = tmp_path / "journal.jsonl"
    file.write_text('{"key": "a", "text": "x"}\n{"text": "without key"}\n')
    with pytest.raises(DataError, match=r"journal\.jsonl, line 2 is not a record"):
        Journal(file)


def test_a_record_of_another_form_is_named(tmp_path: Path) -> None:
    with Journal(tmp_path / "journal.jsonl") as journal:
        journal.add("a", {"n": 1})
        assert journal.read("a", lambda record: record["n"] + 1) == 2
        assert journal.read("b", lambda record: record["n"]) is None
        with pytest.raises(DataError, match=r"journal\.jsonl, the line of a is not a record of this journal\. Remove"):
            journal.read("a", lambda record: record["text"])


def test_a_disk_that_becomes_full_is_named_and_loses_no_record(tmp_path: Path) -> None:
    file = tmp_path / "journal"
    with Journal(file) as journal:
        journal.add("a", {"text": "one"})
        size, limits = file.stat().st_size, resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, limits[1]))  # the next line fits in part
        try:
            with pytest.raises(DataError, match=r"journal cannot be written \(File too large\)\. Free some space"):
                journal.add("b", {"text": "two"})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert file.stat().st_size == size
        journal.add("c", {"text": "three"})
    with Journal(file) as journal:
        assert journal.records == {"a": {"text": "one"}, "c": {"text": "three"}}


def test_two_processes_do_not_share_a_journal(tmp_path: Path) -> None:
    with Journal(tmp_path / "journal"), pytest.raises(DataError, match="another process is writing"):
        Journal(tmp_path / "journal")


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent/journal cannot be written \(No such file"):
        Journal(tmp_path / "absent" / "journal")


def test_a_digest_depends_on_every_value_and_not_on_the_order_of_fields() -> None:
    assert digest_of({"a": 1, "b": 2}) == digest_of({"b": 2, "a": 1})
    assert len({digest_of(value) for value in ({"a": 1}, {"a": 2}, {"b": 1}, {"a": "1"})}) == 4
