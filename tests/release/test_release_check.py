"""The release check: parts that pass, fail, hang or leave nothing, what is not run again, page and exit status."""

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import pytest

from conversion.published_models import published_file
from parity_tests import release_check
from parity_tests.release import parts, results
from parity_tests.release.part import Figure, Findings, Outcome, Part, PartResult, Step, run_part
from parity_tests.release.run_parts import run_parts

JUNIT = """<testsuites><testsuite>
<testcase classname="tests.optim.test_stub" name="test_a" time="1.5"/>
<testcase classname="tests.optim.test_stub" name="test_b" time="0.5">
<failure message="assert 1 == 2&#10;more"/></testcase>
<testcase classname="tests.losses.test_grpo" name="test_c" time="0.25"><skipped message="no GPU"/></testcase>
<testcase classname="tests.losses.test_grpo" name="test_d" time="0.75"/>
<testcase classname="" name="tests.losses.test_upstream" time="0"><skipped message="collection skipped"/></testcase>
</testsuite></testsuites>"""


def part(name: str, code: str, *, seconds: float = 60.0, after: Sequence[str] = ()) -> Part:
    """Return a part that is a line of Python; FOLDER is where it works."""
    command = (sys.executable, "-c", code)
    return Part(name=name, title=f"part {name}", steps=(Step("work", command, seconds),), after=tuple(after))


def run(parts: Sequence[Part], out: Path) -> list[PartResult]:
    out.mkdir(exist_ok=True)
    return run_parts(parts, out, "circumstances", lambda _: None)


def test_a_part_that_fails_or_hangs_stops_no_other_and_what_needs_it_is_not_run(tmp_path: Path) -> None:
    parts = [
        part("good", "pass"),
        part("bad", "import sys; print('the reason'); sys.exit(3)"),
        part("hangs", "import time; time.sleep(60)", seconds=0.5),
        part("needs-bad", "pass", after=["bad"]),
        part("last", "pass", after=["good"]),
    ]
    found = {one.name: one for one in run(parts, tmp_path)}
    assert [one.outcome for one in found.values()] == [
        Outcome.passed, Outcome.failed, Outcome.failed, Outcome.not_run, Outcome.passed,
    ]  # fmt: skip
    assert found["bad"].why == "work: exit status 3: the reason"
    assert "was not done after" in found["hangs"].why
    assert found["needs-bad"].why == "it needs what bad makes, which has not passed"


def test_what_passed_is_not_run_again_and_what_failed_is(tmp_path: Path) -> None:
    counts = tmp_path / "counts"
    count = f"open({str(counts)!r}, 'a').write"
    parts = [part("good", f"{count}('g')"), part("bad", f"{count}('b'); raise SystemExit(1)")]
    run(parts, tmp_path / "out")
    run(parts, tmp_path / "out")
    assert counts.read_text() == "gbb"
    (tmp_path / "out" / "changed").mkdir()
    run_parts(parts[:1], tmp_path / "out", "other code", lambda _: None)
    assert counts.read_text() == "gbbg"


def test_a_part_without_results_or_beyond_a_limit_fails(tmp_path: Path) -> None:
    def missing(_: Path) -> Findings:
        raise FileNotFoundError("report.xml")

    def beyond(_: Path) -> Findings:
        return Findings([Figure(name="ratio", value="0.5", limit="at least 0.9", passed=False)])

    step = (Step("work", (sys.executable, "-c", "pass"), 60.0),)
    for read, why in ((missing, "its results cannot be read"), (beyond, "not within its limit: ratio")):
        result = run_part(Part(name="p", title="p", steps=step, read=read), tmp_path / "p", "digest")
        assert result.outcome is Outcome.failed
        assert why in result.why


def test_a_report_of_pytest_has_a_figure_for_each_folder(tmp_path: Path) -> None:
    file = tmp_path / "report.xml"
    file.write_text(JUNIT)
    found = results.of_junit(file)
    assert [(one.name, one.value, one.passed) for one in found.figures] == [
        ("tests/losses", "1 passed, 2 skipped", True),
        ("tests/optim", "1 passed, 1 failed", False),
    ]
    assert "test_b: assert 1 == 2" in found.figures[1].note
    assert sorted(found.left_out) == ["tests/losses, 1 skipped: collection skipped", "tests/losses, 1 skipped: no GPU"]
    figures = results.of_junit(file, results.rung_of).figures  # another way to group them
    assert [one.name for one in figures] == ["losses", "optim"]


def test_rungs_are_named_by_their_number() -> None:
    assert results.rung_of("parity_tests.test_rung_03_logits") == "rung 3 logits"
    assert results.rung_of("parity_tests.test_tolerances") == "tolerances"


def test_answers_of_other_rows_are_not_compared(tmp_path: Path) -> None:
    for name, row in (("before", "a"), ("after", "b")):
        (tmp_path / name).write_text(json.dumps({"id": row, "task": "t", "text": "x"}) + "\n")
    with pytest.raises(ValueError, match="do not have the same rows"):
        results.of_equal_answers(tmp_path / "before", tmp_path / "after")


@pytest.mark.parametrize(("code", "status", "verdict"), [("pass", 0, "passed"), ("raise SystemExit(1)", 1, "failed")])
def test_the_page_has_the_verdict_and_a_line_to_sign(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, status: int, verdict: str
) -> None:
    monkeypatch.setattr(release_check, "all_parts", lambda _: [part("one", code), part("two", "pass", after=["one"])])
    assert release_check.main(["--quick", "--out", str(tmp_path)]) == status
    report = json.loads((tmp_path / "release.json").read_text())
    assert report["verdict"] == verdict
    assert report["parts"][0]["outcome"] == verdict
    page = (tmp_path / "release.html").read_text()
    assert f"Release check: {verdict}" in page
    assert "signature" in page


def test_every_part_says_what_it_runs_or_why_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MEGATRON_ADS_DATA", raising=False)
    for quick in (True, False):
        request = release_check.read_request(None, quick=quick, out=tmp_path)
        parts = release_check.all_parts(request)
        assert len({one.name for one in parts}) == len(parts) >= 13
        assert all(bool(one.steps) != bool(one.why_not) for one in parts)


@pytest.mark.parametrize(("name", "divided"), [("deepseek_v2_lite", "--ep"), ("deepseek_r1_distill_qwen_7b", "--tp")])
def test_a_checkpoint_is_converted_to_layouts_that_its_kind_has(tmp_path: Path, name: str, divided: str) -> None:
    shutil.copy(published_file(name), tmp_path / "config.json")
    request = release_check.read_request(tmp_path, quick=True, out=tmp_path / "out")
    conversion, dense = parts.conversion(request), parts.dense_conversion(request)
    to_first = conversion.steps[0].command
    assert to_first[to_first.index("--pp") + 2] == divided and str(tmp_path) in to_first
    assert dense.why_not == "--hf names the checkpoint that is converted"


def test_a_result_is_read_as_it_was_written() -> None:
    result = PartResult(
        name="p", title="t", outcome=Outcome.passed, figures=(Figure(name="f", value="1", passed=True),), seconds=2.0
    )
    assert PartResult.read(json.loads(json.dumps(asdict(result)))) == PartResult(
        **{**asdict(result), "outcome": Outcome.passed, "figures": result.figures, "left_out": [], "commands": []}
    )


def test_a_folder_that_is_no_checkpoint_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert release_check.main(["--hf", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "has no readable config.json" in capsys.readouterr().err
