"""What job a folder is of: the settings that decide its labels, and the earlier jobs whose rows it spares.

DIR/job.json holds both. A job goes on in its folder; another one is refused, unless nothing was answered there yet.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from conversion.atomic_file import write_small
from megatron_ads.config.labelling import LabelConfig
from megatron_ads.data.sources import files_of
from megatron_ads.errors import ConfigError, DataError
from megatron_ads.labelling.parquet_files import epoch_files
from megatron_ads.observability.log import get_logger

logger = get_logger(__name__)
_JOB = "job.json"
_MAY_CHANGE = frozenset(
    [
        "out", "draws", "gpus", "gpu_price_per_second", "baseline_cost", "runner", "ray", "previous", "priorities",
    ]
)  # fmt: skip
"""Settings that change nothing about the labels that are there."""
_OF_MODEL = ("model", "temperature", "top_p", "max_tokens", "template_arguments")
"""Of the model's settings, those that decide what it says; where it is, and how patiently it is asked, may change."""
_HOW = ("model", "reasoning")
"""Settings that decide what the label of a row is."""


def require_same_job(out: Path, config: LabelConfig, *, has_answers: bool) -> bool:
    """Write down what job a folder is of, or refuse to mix the labels of two.

    Args:
        out: The folder.
        config: The job.
        has_answers: Whether something was answered there.

    Returns:
        Whether what the folder holds is of this job; of another one without answers, only what was read is there.

    Raises:
        ConfigError: If ``previous`` names the folder itself.
        DataError: If it is of another job.
    """
    settings, previous = _settings(config), [str(Path(folder).absolute()) for folder in config.previous]
    if any(Path(folder).resolve() == out.resolve() for folder in previous):
        raise ConfigError(f"previous names {out}, this job's own folder. Leave it out: the job goes on there anyway.")
    before = _job_of(out)
    if before is None and has_answers:
        raise DataError(f"{out} holds labels, but not their job ({_JOB}). Restore it, or choose another --out.")
    changed = [] if before is None else _changed(settings, before["settings"])
    if changed and has_answers:
        raise DataError(
            f"{out} holds the labels of another job: {', '.join(changed)} changed. Choose another --out; with "
            f"'previous=[{out}]' rows that have a label are spared."
        )
    known = [] if before is None else before["previous"]
    is_same = not changed and (has_answers or known == previous)
    if is_same:  # rows were spared because of those, too
        previous = list(dict.fromkeys([*known, *previous]))
    if before != (job := {"settings": settings, "previous": previous}):
        write_small(out / _JOB, json.dumps(job, indent=2) + "\n")
    return is_same


def with_their_previous(folders: Sequence[str]) -> list[Path]:
    """Return folders of earlier jobs, and those of the jobs whose rows they have spared in turn.

    Raises:
        DataError: If one is not there, or of no job.
    """
    found: dict[Path, None] = {}
    left = [(Path(folder), "Correct previous, which names folders of earlier jobs.") for folder in reversed(folders)]
    while left:
        folder, advice = left.pop()
        if folder.resolve() in found:
            continue
        job = _job_of(folder)
        if job is None and not epoch_files(folder / "labels"):
            raise DataError(f"{folder} holds no labels. {advice}")
        found[folder.resolve()] = None
        advice = f"Restore it: rows that it labelled are not among those of {folder}, which names it in previous."
        left += [(Path(each), advice) for each in reversed([] if job is None else job["previous"])]
    return list(found)


def tell_of_previous(config: LabelConfig) -> None:
    """Say which earlier jobs are unfinished, or labelled in another way."""
    for folder in map(Path, config.previous):
        if (job := _job_of(folder)) is None:
            continue
        differs = [name for name in _changed(_settings(config), job["settings"]) if name in _HOW]
        if differs:
            names = " and ".join(differs)
            logger.warning("%s labelled in another way (%s); its rows are spared all the same.", folder, names)
        if not (folder / "questions" / "complete.json").exists() or epoch_files(folder / "questions"):
            logger.warning("%s is not finished; rows that it has not labelled yet are labelled here.", folder)


def _settings(config: LabelConfig) -> dict[str, Any]:
    settings = {name: value for name, value in asdict(config).items() if name not in _MAY_CHANGE}
    settings["model"] = {name: settings["model"][name] for name in _OF_MODEL}
    if not settings["first_draw"]:  # jobs of all draws need not name it
        del settings["first_draw"]
    settings["files"] = [
        [part.name, part.file.stat().st_size, part.file.stat().st_mtime_ns]
        for source in config.sources
        for part in (files_of(source) if source.path is not None else [])
    ]
    plain: dict[str, Any] = json.loads(json.dumps(settings))
    return plain


def _job_of(folder: Path) -> dict[str, Any] | None:
    file = folder / _JOB
    if not file.is_file():
        return None
    try:
        job = json.loads(file.read_bytes())
        if isinstance(job["settings"], dict) and isinstance(job["previous"], list):
            return {"settings": job["settings"], "previous": list(map(str, job["previous"]))}
    except (ValueError, TypeError, LookupError):
        pass
    raise DataError(f"{file} is not what `label` wrote there. Restore it, or choose another folder.")


def _changed(now: dict[str, Any], before: dict[str, Any]) -> list[str]:
    return sorted(name for name in {**now, **before} if now.get(name) != before.get(name))
