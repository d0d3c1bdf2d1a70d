"""The figures of a part's results: JUnit reports of pytest, and the JSON files that the other commands write."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from parity_tests.release.part import Figure, Findings

_NAMES_SHOWN = 5


@dataclass(frozen=True, slots=True)
class TestCase:
    """One test of a JUnit report."""

    module: str
    """With dots: ``tests.conversion.test_names``."""
    name: str
    outcome: str
    """``passed``, ``failed`` or ``skipped``."""
    seconds: float
    message: str
    """Why it failed or was skipped."""


def read_junit(file: Path) -> list[TestCase]:
    """Return the tests of a report that pytest wrote with ``--junitxml``."""
    return [_case(element) for element in ElementTree.parse(file).iter("testcase")]


def _case(element: ElementTree.Element) -> TestCase:
    outcome, message = "passed", ""
    for tag, meaning in (("skipped", "skipped"), ("failure", "failed"), ("error", "failed")):
        if (child := element.find(tag)) is not None:
            outcome, message = meaning, (child.get("message") or "").partition("\n")[0]
    name = element.get("name", "")
    # A module that skips itself is a test of its own name, without a module.
    return TestCase(element.get("classname") or name, name, outcome, float(element.get("time", 0)), message)


def suite_of(module: str) -> str:
    """Return the folder of tests that a module is in: ``tests/conversion``; of a module directly in tests: its name."""
    return "/".join(module.split(".")[:2])


def rung_of(module: str) -> str:
    """Return the rung of the ladder: ``rung 3 logits``; of another module of ``parity_tests``: its name."""
    name = module.split(".")[1] if "." in module else module
    if not name.startswith("test_rung_"):
        return name.removeprefix("test_").replace("_", " ")
    number, _, words = name.removeprefix("test_rung_").partition("_")
    return f"rung {int(number)} {words.replace('_', ' ')}"


def of_junit(file: Path, group: Callable[[str], str] = suite_of) -> Findings:
    """Return a figure for each group of tests; none may fail. What was skipped is told with its reason."""
    groups: dict[str, list[TestCase]] = {}
    for case in read_junit(file):
        groups.setdefault(group(case.module), []).append(case)
    figures = [_of_group(name, cases) for name, cases in sorted(groups.items(), key=lambda item: _order(item[0]))]
    skipped = Counter(
        (name, case.message) for name, cases in groups.items() for case in cases if case.outcome == "skipped"
    )
    ran = [figure for figure in figures if figure.passed is not None]
    return Findings(ran, [f"{name}, {count} skipped: {reason}" for (name, reason), count in skipped.items()])


def _order(name: str) -> tuple[int, str]:
    words = name.split()
    return (int(words[1]) if words[0] == "rung" else 0, name)


def _of_group(name: str, cases: Iterable[TestCase]) -> Figure:
    cases = list(cases)
    count = Counter(case.outcome for case in cases)
    failed = [f"{case.name}: {case.message}" for case in cases if case.outcome == "failed"]
    more = [f"and {len(failed) - _NAMES_SHOWN} more"] if len(failed) > _NAMES_SHOWN else []
    return Figure(
        name=name,
        value=", ".join(f"{count[outcome]} {outcome}" for outcome in ("passed", "failed", "skipped") if count[outcome]),
        limit="0 failed",
        passed=not failed if count["passed"] or failed else None,
        note="\n".join([f"{sum(case.seconds for case in cases):.0f} s of tests", *failed[:_NAMES_SHOWN], *more]),
    )


def of_recorded_figures(file: Path) -> list[Figure]:
    """Return what the rungs measured next to their limits, as ``PARITY_FIGURES`` has it."""
    found = map(json.loads, file.read_text(encoding="utf-8").splitlines())
    latest = {(one["rung"], one["machine"], one["what"]): one for one in found}
    return [_of_record(one) for _, one in sorted(latest.items(), key=lambda item: item[0][:2])]


def _of_record(one: Mapping[str, Any]) -> Figure:
    value, limit = one["value"], one["limit"]
    return Figure(
        name=f"rung {one['rung']}, {one['machine']}: {one['what']}",
        value=f"{value:.2g}" if isinstance(value, float) else str(value),
        limit="" if limit is None else f"below {limit:g}",
        passed=None if limit is None else value < limit,
    )


def of_pipeline(file: Path) -> Findings:
    """Return what rung 10 recorded: what must hold, and its figures."""
    report = json.loads(file.read_text(encoding="utf-8"))
    must = [
        Figure(name=name, value="yes" if holds else "no", limit="yes", passed=holds)
        for name, holds in report["verdict"].items()
    ]
    return Findings([*must, *(Figure(name=name, value=str(value)) for name, value in report["figures"].items())])


def of_checkpoint_parity(file: Path) -> Findings:
    """Return the rungs of ``parity.json`` and the differences of the layers next to their limits."""
    report = json.loads(file.read_text(encoding="utf-8"))
    ran = [one for one in report["rungs"] if one["passed"] is not None]
    figures = [
        Figure(
            name=f"rung {one['rung']} {one['name']}",
            value="equal" if one["passed"] else "not equal",
            limit="equal",
            passed=one["passed"],
            note=one["detail"],
        )
        for one in ran
    ]
    limits = [
        Figure(name=f"limit: {name.replace('_', ' ')}", value=f"{limit:g}") for name, limit in report["limits"].items()
    ]
    others = [f"rung {one['rung']} {one['name']}: {one['detail']}" for one in report["rungs"] if one["passed"] is None]
    return Findings([*figures, *limits], others)


def of_regress(file: Path) -> Findings:
    """Return the benchmarks of ``regress.json``: with ``--same`` no answer may be another."""
    report = json.loads(file.read_text(encoding="utf-8"))
    return Findings(
        [
            Figure(
                name=one["name"],
                value=f"{one['other_answers']} of {one['questions']} answers differ",
                limit="0",
                passed=one["passed"],
                note=f"score {one['base']:.3f} before, {one['tuned']:.3f} after",
            )
            for one in report["benchmarks"]
        ]
    )


def of_speed(file: Path) -> Findings:
    """Return the ratios of ``speed.json`` next to those of the baseline."""
    report = json.loads(file.read_text(encoding="utf-8"))
    found = {one["name"]: one for record in report["cases"].values() for one in record["found"]}
    failed = [
        Figure(name=name, value="failed", passed=False, note=record["error"])
        for name, record in report["cases"].items()
        if record["error"]
    ]
    figures = [_of_ratio(name, found[name], verdict) for name, verdict in report["verdicts"].items()]
    without = sum(verdict["outcome"] == "no baseline" for verdict in report["verdicts"].values())
    said = f"{without} ratios are not judged: there is no baseline of this class of machine (benchmarks/baselines)"
    return Findings([*failed, *figures], [said] if without else [])


def _of_ratio(name: str, found: Mapping[str, Any], verdict: Mapping[str, Any]) -> Figure:
    outcome, limit = verdict["outcome"], verdict["limit"]
    judged = outcome not in ("no baseline", "too noisy")
    return Figure(
        name=name,
        value=f"{found['value']:.4f}" if "value" in found else f"{found['ratio']:.3f}",
        limit="" if limit is None else f"at least {limit:.3f}",
        passed=outcome not in ("slower", "missed") if judged else None,
        note="" if judged and outcome in ("same", "met") else outcome,
    )


def of_equal_answers(before: Path, after: Path) -> list[Figure]:
    """Return how many answers of two files are not the same, by task; none may differ.

    Raises:
        ValueError: If the two are not of the same rows.
    """
    answers = [
        {(row.get("source"), row["id"]): row for row in map(json.loads, file.read_text(encoding="utf-8").splitlines())}
        for file in (before, after)
    ]
    if not answers[0] or answers[0].keys() != answers[1].keys():
        raise ValueError(f"{before.name} and {after.name} do not have the same rows")
    tasks: dict[str, list[bool]] = {}
    for key, row in answers[0].items():
        tasks.setdefault(row["task"], []).append(row["text"] == answers[1][key]["text"])
    return [
        Figure(
            name=task.replace("_", " "),
            value=f"{equal.count(False)} of {len(equal)} answers differ",
            limit="0",
            passed=all(equal),
        )
        for task, equal in tasks.items()
    ]


def of_deltas(log: Path) -> list[Figure]:
    """Return what ``evaluate --compare --json`` says: how far every score is from the other's; it may not be."""
    return [
        Figure(
            name=f"{dataset.replace('_', ' ')}, {name}",
            value=f"Delta {of['delta']:+.4f}",
            limit="0",
            passed=of["delta"] == 0,
            note=f"{of['compared']:.4f} before, {of['model']:.4f} after",
        )
        for dataset, scores in last_json(log)["tasks"].items()
        for name, of in scores["comparison"]["metrics"].items()
        if of["delta"] is not None
    ]


def last_json(log: Path) -> dict[str, Any]:
    """Return the last JSON object that a command printed with ``--json``.

    Raises:
        ValueError: If there is none.
    """
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.startswith("{")]
    if not lines:
        raise ValueError(f"{log.name} holds no result")
    value: dict[str, Any] = json.loads(lines[-1])
    return value


def of_verify(log: Path, name: str) -> Figure:
    """Return how many tensors ``verify --json`` found to differ."""
    said = last_json(log)
    return Figure(
        name=name,
        value=f"{len(said['differences'])} of {said['compared']} tensors differ",
        limit="0, bit for bit",
        passed=said["equal"],
        note=f"{said['compared_bytes'] / 1e6:.1f} MB compared",
    )
