"""Measure how fast everything is next to a reference, and compare the ratios with those of a baseline.

    python -m benchmarks.run --list
    python -m benchmarks.run --out DIR [--quick] [--case NAME ...]
    python -m benchmarks.run --out DIR [--quick] --save-baseline

A case is a process with a time limit. In it, the work and its reference (a copy of the same bytes, the tokenizer alone,
transformers, the matrix products alone) are done in turn, and what counts is the ratio of their speeds: a busy machine
slows down both. ``benchmarks/speed/judge.py`` says when a ratio is slower than the baseline's. What is found slower is
measured a second time, and is slower only if it is so again.

The same command continues where it was interrupted: a case that is finished is not run again, unless the code, a
version or the machine has changed. ``DIR/journal.jsonl`` has a JSON line for each, ``DIR/speed.json`` everything with
hardware, versions and commit, ``DIR/speed.html`` the page with the curves, ``DIR/log.txt`` what was printed.

Exit status: 0 nothing is slower, 1 something is, or a case failed, 2 the command cannot be carried out.
"""

import argparse
import json
import shutil
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.bounded_process import ROOT, run_bounded
from benchmarks.speed.baselines import baseline_file, machine_class, read_baselines, save_baselines
from benchmarks.speed.cases import CASES, Case
from benchmarks.speed.judge import Verdict, judge
from benchmarks.speed.measure import Effort
from benchmarks.speed.report import page, table
from megatron_ads.cli import exit_status
from megatron_ads.errors import ConfigError
from megatron_ads.journal import Journal, digest_of
from megatron_ads.observability.provenance import code_digest, own_code_digest, provenance
from megatron_ads.progress import readable_duration


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what is not finished yet, judge all, and print the table."""
    return exit_status("benchmarks.run", partial(_run, _parse(argv)))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the results, on the disk to be measured")
    parser.add_argument("--case", action="append", metavar="NAME", help="only this one; may be repeated (default: all)")
    parser.add_argument("--quick", action="store_true", help="small sizes: each case ends within a minute or two")
    parser.add_argument("--list", action="store_true", help="print the cases")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--baseline", type=Path, metavar="FILE", help="default: that of machines like this one")
    which.add_argument("--save-baseline", action="store_true", help="keep the ratios in place of earlier ones")
    parser.add_argument("--run", nargs=2, metavar=("FUNCTION", "FILE"), help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def _run(arguments: argparse.Namespace) -> int:
    if arguments.list:
        print("\n".join(f"{case.name:<14} {case.about}" for case in CASES))
        return 0
    if arguments.run:
        _measure(arguments.run[0], Path(arguments.run[1]), quick=arguments.quick)
        return 0
    if arguments.out is None:
        raise ConfigError("--out is missing: name a folder for the results, on the disk that is to be measured.")
    names = arguments.case or [case.name for case in CASES]
    if unknown := sorted(set(names) - {case.name for case in CASES}):
        known = ", ".join(case.name for case in CASES)
        raise ConfigError(f"There is no case {', '.join(unknown)}; there are {known}.")
    about, size = provenance(), "quick" if arguments.quick else "full"
    file = arguments.baseline or baseline_file(about["host"])
    if arguments.baseline and not file.exists():
        raise ConfigError(f"--baseline {file} does not exist. Write it with --save-baseline, or leave it out.")
    baselines = {} if arguments.save_baseline else read_baselines(file, size)
    cases = [case for case in CASES if case.name in names]
    report = run_cases(cases, arguments.out, quick=arguments.quick, baselines=baselines, about=about)
    if arguments.save_baseline:
        found = [one for record in report["cases"].values() for one in record["found"]]
        save_baselines(file, size, found, {name: about[name] for name in ("revision", "versions")})
        print(f"kept as the baseline of {machine_class(about['host'])}: {file}")
    return int(report["failed"])


def run_cases(
    cases: Sequence[Case], out: Path, *, quick: bool, baselines: Mapping[str, Any], about: Mapping[str, Any]
) -> dict[str, Any]:
    """Measure what ``out`` does not have yet, judge all by ``baselines``, and write the page; return the report."""
    from conversion.atomic_file import write_small

    out.mkdir(parents=True, exist_ok=True)
    records: dict[str, dict[str, Any]] = {}
    verdicts: dict[str, Verdict] = {}
    with Journal(out / "journal.jsonl") as journal:
        for number, case in enumerate(cases, 1):
            records[case.name] = record = _finished(journal, case, out, quick=quick, about=about)
            judged = _judged(record, baselines)
            if any(verdict.failed for verdict in judged) and "first" not in record:
                print(f"[{number}/{len(cases)}] {case.name}: is measured again", flush=True)
                again = {**_run_case(case, out, quick=quick, about=about), "first": record["found"]}
                if not again["error"]:
                    journal.add(case.name, again)
                    records[case.name] = record = again
                    judged = _judged(record, baselines)
            verdicts |= {verdict.name: verdict for verdict in judged}
            said = record["error"] or ", ".join(f"{verdict.now:.3f}" for verdict in judged)
            spent = readable_duration(record["seconds"])
            print(f"[{number}/{len(cases)}] {case.name}: {said} ({spent})", flush=True)
    failed = any(record["error"] for record in records.values()) or any(one.failed for one in verdicts.values())
    report = {**about, "size": "quick" if quick else "full", "failed": failed, "cases": records}
    report["verdicts"] = {name: {"outcome": one.outcome, "baseline": one.baseline, "limit": one.limit}
                          for name, one in verdicts.items()}  # fmt: skip
    write_small(out / "speed.json", json.dumps(report, indent=1) + "\n")
    write_small(out / "speed.html", page(report))
    print("\n" + table(report))
    for verdict in verdicts.values():
        if verdict.failed:
            print(f"! {verdict}")
    return report


def _judged(record: Mapping[str, Any], baselines: Mapping[str, Any]) -> list[Verdict]:
    return [judge(one, baselines.get(one["name"])) for one in record["found"]]


def _finished(journal: Journal, case: Case, out: Path, *, quick: bool, about: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the journal has of a case, if it is of the same code, versions and machine; else measure it."""
    kept = journal.records.get(case.name)
    if kept is not None and kept.get("fingerprint") == _fingerprint(case, quick=quick, about=about):
        return kept
    record = _run_case(case, out, quick=quick, about=about)
    if not record["error"]:
        journal.add(case.name, record)
    return record


def _fingerprint(case: Case, *, quick: bool, about: Mapping[str, Any]) -> str:
    code = [own_code_digest(), code_digest(ROOT / "benchmarks")]
    return digest_of([case.function, quick, code, about["host"], about["versions"]])


def _run_case(case: Case, out: Path, *, quick: bool, about: Mapping[str, Any]) -> dict[str, Any]:
    """Measure one case in a process of its own and return its record; ``error`` says why nothing was found."""
    out = out.resolve()
    folder = Path(tempfile.mkdtemp(prefix="case-", dir=out))
    try:
        file = folder / "found.json"
        command = [sys.executable, "-m", "benchmarks.run", "--run", case.function, str(file)]
        command += ["--quick"] if quick else []
        limit = case.quick_limit_seconds if quick else case.limit_seconds
        how = run_bounded(command, out / "log.txt", name=case.name, seconds=limit, environment=_ENVIRONMENT)
        found = json.loads(file.read_text(encoding="utf-8")) if file.exists() and not how.error else []
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    record = {"fingerprint": _fingerprint(case, quick=quick, about=about), "seconds": round(how.seconds, 1)}
    return {**record, **about, "about": case.about, "error": how.error, "found": found}


_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONWARNINGS": "ignore", "PYTHONUNBUFFERED": "1"}


def _measure(function: str, file: Path, *, quick: bool) -> None:
    """Run a case in this process and write what it found into ``file``, in whose folder it works."""
    # So that what is to be done at the end is done: temporary folders go, and so do processes.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    scratch = file.with_name("scratch")
    scratch.mkdir()
    found = [one.as_json() for one in Case("", "", function).run(Effort(scratch, quick))]
    file.write_text(json.dumps(found, allow_nan=False), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
