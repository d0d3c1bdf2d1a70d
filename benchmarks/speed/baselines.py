"""Ratios to compare with, one file for each class of machine: equal machines have equal ratios, others need not."""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron_ads.errors import DataError

FOLDER = Path(__file__).resolve().parents[1] / "baselines"
_NOT_A_MODEL = r"\((R|TM)\)|\bCPU\b|\bProcessor\b|@.*$|\bwith\b.*$|\b\d+-Core\b"


def machine_class(host: Mapping[str, Any]) -> str:
    """Return a name for machines like this: ``intel-xeon-2-cores``, ``amd-epyc-9v84-16-cores-nvidia-h100-80gb-hbm3``.

    ``host`` is as in ``provenance``. Cores are those that the process may use.
    """
    model = re.sub(_NOT_A_MODEL, " ", host["cpu"], flags=re.IGNORECASE)
    words = f"{model} {host['cores']} cores {' '.join(sorted(set(host['gpus'])))}"
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")


def baseline_file(host: Mapping[str, Any]) -> Path:
    """Return where the baselines of machines like this are kept."""
    return FOLDER / f"{machine_class(host)}.json"


def read_baselines(file: Path, size: str) -> dict[str, Any]:
    """Return the baselines of one size, ``quick`` or ``full``, by comparison; none if there is no file.

    Raises:
        DataError: If it is no file of baselines.
    """
    return {} if not file.exists() else dict(_read(file).get(size, {}))


def save_baselines(file: Path, size: str, found: Iterable[Mapping[str, Any]], about: Mapping[str, Any]) -> None:
    """Put what was found, as ``Comparison.as_json`` gives it, in the place of earlier baselines of the same names.

    ``about`` is kept with each: revision, versions and host of the run.

    Raises:
        DataError: If the file exists and is no file of baselines.
    """
    from conversion.atomic_file import write_small

    kept = _read(file) if file.exists() else {}
    fields = ("ratio", "error", "repetitions")
    new = {one["name"]: {name: one[name] for name in fields} | dict(about) for one in found if "ratio" in one}
    kept[size] = dict(sorted((kept.get(size, {}) | new).items()))
    file.parent.mkdir(parents=True, exist_ok=True)
    write_small(file, json.dumps(kept, indent=1) + "\n")


def _read(file: Path) -> dict[str, dict[str, Any]]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        for of_size in found.values():
            for one in of_size.values():
                float(one["ratio"]), float(one["error"])
    except (ValueError, TypeError, LookupError, AttributeError):
        raise DataError(f"{file} holds no baselines. Name another file, or write it with --save-baseline.") from None
    return dict(found)
