import contextlib
import fcntl
import io
import json
import re
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from megatron_ads.errors import ConfigError
from megatron_ads.quickstart import stages
from megatron_ads.quickstart.stages import Stage, StageRecord, run_stages


def _stage(folder: Path, name: str, *, after: tuple[str, ...] = (), resumable: bool = False, **settings: Any) -> Stage:
    """A stage that appends a line to its output; settings["fail"] makes it stop halfway."""
    output = folder / name / "out.txt"

    def run() -> Mapping[str, Any]:
        output.parent.mkdir(exist_ok=True)
        with output.open("a") as lines:
            lines.write("line\n")
        if failing:
            raise KeyboardInterrupt
        return {"lines": len(output.read_text().splitlines())}

    failing = settings.pop("fail", False)
    return Stage(
        name=name, title=name, settings=settings, after=after, outputs=[folder / name], run=run, resumable=resumable
    )


def _run(folder: Path, *stages: Stage) -> tuple[list[str], dict[str, StageRecord]]:
    """Return what was printed of the stages, such as ``run NAME 1/2``, and the records."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        records = run_stages(stages, folder, {})
    how = {"": "run", " (continuing where it was interrupted)": "resume"}
    lines = re.findall(r"^\[(\d+/\d+)\] ([\w-]+)(.*)$", printed.getvalue(), re.MULTILINE)
    assert all(record.seconds >= 0 for record in records.values())
    return [f"{'reuse' if ': complete' in end else how[end]} {name} {count}" for count, name, end in lines], records


def test_complete_stages_are_not_done_again(tmp_path: Path) -> None:
    both = [_stage(tmp_path, "a"), _stage(tmp_path, "b", after=("a",))]
    assert _run(tmp_path, *both)[0] == ["run a 1/2", "run b 2/2"]
    seen, records = _run(tmp_path, *both)
    assert seen == ["reuse a 1/2", "reuse b 2/2"]
    assert records["b"].result == {"lines": 1}


def test_a_changed_setting_redoes_what_depends_on_it_and_nothing_else(tmp_path: Path) -> None:
    def four(steps: int) -> list[Stage]:
        return [
            _stage(tmp_path, "model"),
            _stage(tmp_path, "before", after=("model",)),
            _stage(tmp_path, "train", after=("model",), steps=steps),
            _stage(tmp_path, "after", after=("train",)),
        ]

    _run(tmp_path, *four(10))
    seen, records = _run(tmp_path, *four(20))
    assert seen == ["reuse model 1/4", "reuse before 2/4", "run train 3/4", "run after 4/4"]
    assert records["train"].result == {"lines": 1}  # the old output was removed first


def test_an_interrupted_stage_starts_from_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        _run(tmp_path, _stage(tmp_path, "a"), _stage(tmp_path, "b", fail=True))
    seen, records = _run(tmp_path, _stage(tmp_path, "a"), _stage(tmp_path, "b"))
    assert seen == ["reuse a 1/2", "run b 2/2"]
    assert records["b"].result == {"lines": 1}


def test_an_interrupted_stage_that_can_goes_on_from_what_it_left(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        _run(tmp_path, _stage(tmp_path, "a", resumable=True, fail=True))
    seen, records = _run(tmp_path, _stage(tmp_path, "a", resumable=True))
    assert seen == ["resume a 1/1"]
    assert records["a"].resumed
    assert records["a"].result == {"lines": 2}


def test_a_stage_does_not_go_on_from_what_other_settings_left(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        _run(tmp_path, _stage(tmp_path, "a", resumable=True, steps=10, fail=True))
    seen, records = _run(tmp_path, _stage(tmp_path, "a", resumable=True, steps=20))
    assert seen == ["run a 1/1"]
    assert records["a"].result == {"lines": 1}


def test_a_complete_stage_that_can_go_on_starts_anew_when_its_settings_changed(tmp_path: Path) -> None:
    _run(tmp_path, _stage(tmp_path, "a", resumable=True, steps=10))
    assert _run(tmp_path, _stage(tmp_path, "a", resumable=True, steps=20))[1]["a"].result == {"lines": 1}


def test_an_output_that_is_gone_is_made_again(tmp_path: Path) -> None:
    _run(tmp_path, _stage(tmp_path, "a"))
    (tmp_path / "a" / "out.txt").unlink()
    (tmp_path / "a").rmdir()
    assert _run(tmp_path, _stage(tmp_path, "a"))[0] == ["run a 1/1"]


@pytest.mark.parametrize("damage", ["", "{", "[]", json.dumps({"fingerprint": "x"})])
def test_a_damaged_record_means_not_done(tmp_path: Path, damage: str) -> None:
    _run(tmp_path, _stage(tmp_path, "a"))
    (tmp_path / "stages" / "a.json").write_text(damage)
    assert _run(tmp_path, _stage(tmp_path, "a"))[0] == ["run a 1/1"]


def test_the_opening_is_printed_in_a_folder_of_its_own_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_stages([_stage(tmp_path, "a")], tmp_path, {}, opening="we begin")
    assert capsys.readouterr().out.startswith("we begin\n[1/1] a\n")
    (tmp_path / "other" / "thing").mkdir(parents=True)
    with pytest.raises(ConfigError, match="holds something else"):
        run_stages([], tmp_path / "other", {}, opening="we begin")
    assert capsys.readouterr().out == ""


def test_a_folder_with_other_things_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="holds something else"):
        _run(tmp_path, _stage(tmp_path, "a"))


def test_two_processes_do_not_work_in_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "WAIT_SECONDS", 0.1)
    (tmp_path / "stages").mkdir()
    with (tmp_path / "stages" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="another process is at work"):
            _run(tmp_path, _stage(tmp_path, "a"))


def test_a_process_that_is_about_to_leave_is_waited_for(tmp_path: Path) -> None:
    (tmp_path / "stages").mkdir()
    with (tmp_path / "stages" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        leaving = threading.Timer(0.3, fcntl.flock, (lock, fcntl.LOCK_UN))
        leaving.start()
        assert _run(tmp_path, _stage(tmp_path, "a"))[0] == ["run a 1/1"]
        leaving.join()


def test_a_folder_that_cannot_be_made_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        _run(tmp_path / "file" / "out", _stage(tmp_path, "a"))
