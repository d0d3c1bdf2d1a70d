"""Run the parts of a release check in order, except those that have passed in the same circumstances."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.bounded_process import ROOT
from megatron_ads.inference.model_folder import model_state
from megatron_ads.journal import Journal
from megatron_ads.progress import readable_duration
from parity_tests.release.part import Outcome, Part, PartResult, not_run, run_part
from parity_tests.release.request import Request

_CODE = (
    "megatron_ads", "conversion", "recipes", "tests", "parity_tests", "benchmarks", "launch", "README.md",
    "constraints.txt", "pyproject.toml", "setup.py",
)  # fmt: skip
_BUILT = {".pyc", ".so"}


def circumstances(request: Request, about: Mapping[str, Any]) -> list[Any]:
    """Return what decides all results besides the command lines: code, versions, machine, checkpoint and data."""
    state = model_state(request.hf) if request.hf else None
    return [project_digest(ROOT), about["versions"], about["host"], state, str(request.data)]


def project_digest(root: Path) -> str:
    """Return a digest of every file that a part can read: code, templates, recipes, scripts and what tests compare."""
    digest = hashlib.sha256()
    for name in _CODE:
        files = sorted((root / name).rglob("*")) if (root / name).is_dir() else [root / name]
        for file in files:
            if file.is_file() and file.suffix not in _BUILT and "__pycache__" not in file.parts:
                data = file.read_bytes()
                digest.update(f"{file.relative_to(root)}\0{len(data)}\0".encode())
                digest.update(data)
    return digest.hexdigest()


def run_parts(
    parts: Sequence[Part], out: Path, circumstances: object, write: Callable[[Sequence[PartResult]], None]
) -> list[PartResult]:
    """Run every part that has not passed in these ``circumstances``; return the results in the order of the parts.

    ``write`` gets all results after every part, those not reached yet included.

    Raises:
        DataError: If another release check works in ``out``, or its journal is damaged.
    """
    found = {part.name: not_run(part, part.why_not or "not reached yet") for part in parts}
    with Journal(out / "journal.jsonl") as journal:
        write(list(found.values()))
        for number, part in enumerate(parts, 1):
            heading = f"[{number}/{len(parts)}] {part.name}"
            result = _result(part, out, circumstances, journal, found, heading)
            print(f"{heading}: {result.outcome}{_said(result)}", flush=True)
            found[part.name] = result
            write(list(found.values()))
    return list(found.values())


def _result(
    part: Part,
    out: Path,
    circumstances: object,
    journal: Journal,
    found: Mapping[str, PartResult],
    heading: str,
) -> PartResult:
    """Return why a part is not run, or its result of now or of before."""
    if part.why_not:
        return not_run(part, part.why_not)
    if missing := [name for name in part.after if found[name].outcome is not Outcome.passed]:
        return not_run(part, f"it needs what {', '.join(missing)} makes, which has not passed")
    fingerprint = part.fingerprint([circumstances, [found[name].fingerprint for name in part.after]])
    kept = journal.read(part.name, PartResult.read)
    if kept and kept.fingerprint == fingerprint and kept.outcome is not Outcome.failed and (out / part.name).is_dir():
        return kept
    limit = readable_duration(sum(step.limit_seconds for step in part.steps))
    print(f"{heading}: {part.title} (at most {limit}; {out / part.name})", flush=True)
    result = run_part(part, out / part.name, fingerprint)
    journal.add(part.name, asdict(result))
    return result


def _said(result: PartResult) -> str:
    took = f" ({readable_duration(result.seconds)})" if result.seconds else ""
    return f"{took}{f': {result.why}' if result.why else ''}"
