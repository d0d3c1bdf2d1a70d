"""Run the ladder on this machine and record what it measured as a page of Markdown, with hardware and versions.

    python -m parity_tests.record cpu        # the rungs on the CPU, rung 10 too: parity_tests/results/cpu.md
    python -m parity_tests.record cuda       # on a machine with a GPU: parity_tests/results/cuda.md

Exit status: 0 every rung passed, 1 one failed (the page says so), 2 there is no such device.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from conversion.atomic_file import write_small
from megatron_ads.observability.provenance import provenance

_RESULTS = Path(__file__).parent / "results"
_ROOT = Path(__file__).resolve().parent.parent
_LADDER_SECONDS = 3 * 3600
_PIPELINE_SECONDS = 1800


def record(device: str, page: Path) -> int:
    """Run the rungs of ``device`` and write ``page``; return the exit status."""
    with tempfile.TemporaryDirectory(prefix="parity-record-") as folder:
        files = Path(folder)
        words = ["pytest", "parity_tests", "-m", "gpu" if device == "cuda" else "not gpu"]
        environment = os.environ | {"PARITY_FIGURES": str(files / "figures")}
        report = f"--junitxml={files / 'report.xml'}"
        status = _run([*words, report], environment, _LADDER_SECONDS)
        commands, pipeline = [words], {}
        if device == "cpu":
            commands.append(["parity_tests.rung_10_pipeline"])
            status |= _run(
                [*commands[-1], "--record", str(files / "rung-10.json")], dict(os.environ), _PIPELINE_SECONDS
            )
            pipeline = json.loads((files / "rung-10.json").read_text())["figures"]
        figures = [json.loads(line) for line in (files / "figures").read_text().splitlines()]
        text = render(figures, pipeline, outcome(files / "report.xml"), commands, provenance())
    write_small(page, text)
    print(f"{page} written")
    return int(status != 0)


def _run(words: Sequence[str], environment: dict[str, str], seconds: float) -> int:
    return subprocess.run(
        [sys.executable, "-m", *words], env=environment, cwd=_ROOT, timeout=seconds, check=False
    ).returncode


def outcome(report: Path) -> list[str]:
    """Return how many tests of a JUnit report passed, and what each of the others says, once."""
    suite = next(ElementTree.parse(report).iter("testsuite"))
    total, failed, skipped = (int(suite.get(name, 0)) for name in ("tests", "failures", "skipped"))
    failed += int(suite.get("errors", 0))
    lines = [
        f"{total - failed - skipped} passed, {failed} failed, {skipped} skipped in {float(suite.get('time', 0)):.0f} s"
    ]
    lines += [f"failed: {case.get('name')}" for case in suite.iter("testcase") if _has(case, ("failure", "error"))]
    return lines + sorted({f"skipped: {skip.get('message')}" for skip in suite.iter("skipped")})


def _has(case: ElementTree.Element, tags: Sequence[str]) -> bool:
    return any(case.find(tag) is not None for tag in tags)


def render(
    figures: Sequence[dict[str, Any]],
    pipeline: dict[str, Any],
    outcome: Sequence[str],
    commands: Sequence[Sequence[str]],
    measured: dict[str, Any],
) -> str:
    """Return the page: the circumstances, then a row for each figure."""
    host = measured["host"]
    versions = ", ".join(f"{name} {version}" for name, version in measured["versions"].items() if version)
    lines = [
        f"# Parity on {', '.join(host['gpus']) or 'CPU'}",
        "",
        f"- machine: {host['cpu']}, {host['cores']} cores, {host['memory_bytes'] / 2**30:.0f} GiB",
        f"- versions: {versions}",
        f"- revision: {measured['revision']}",
        f"- commands: {'; '.join(f'`python -m {_quoted(words)}`' for words in commands)}",
        *(f"- {line}" for line in outcome),
        "",
        "| rung | on | figure | value | limit |",
        "| ---: | --- | --- | ---: | ---: |",
        *(_row(one["rung"], one["machine"], one["what"], one["value"], one["limit"]) for one in _ordered(figures)),
        *(_row(10, "cpu-fp32", f"61 layers, pp 31: {what}", value, None) for what, value in pipeline.items()),
    ]
    return "\n".join(lines) + "\n"


def _quoted(words: Sequence[str]) -> str:
    return " ".join(f'"{word}"' if " " in word else word for word in words)


def _ordered(figures: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one row for each figure, the last recorded, by rung and machine."""
    latest = {(one["rung"], one["machine"], one["what"]): one for one in figures}
    return sorted(latest.values(), key=lambda one: (one["rung"], one["machine"]))


def _row(rung: int, machine: str, what: str, value: Any, limit: float | None) -> str:
    shown = (
        f"{value:.2g}" if isinstance(value, float) else ", ".join(map(str, value)) if isinstance(value, list) else value
    )
    return f"| {rung} | {machine} | {what} | {shown} | {'exact' if limit is None and value == 0 else limit or ''} |"


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the arguments and record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("device", choices=("cpu", "cuda"), help="the device whose rungs are run")
    parser.add_argument("--page", type=Path, help="where to write (default: parity_tests/results/DEVICE.md)")
    args = parser.parse_args(argv)
    if args.device == "cuda":
        from parity_tests.machines import why_no_gpu

        if reason := why_no_gpu():
            print(f"record: {reason}", file=sys.stderr)
            return 2
    return record(args.device, args.page or _RESULTS / f"{args.device}.md")


if __name__ == "__main__":
    sys.exit(main())
