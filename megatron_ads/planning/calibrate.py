"""A card's efficiency from a run that was measured on it.

The run's recipe is planned on the same card; its efficiency is then set so that the planned model FLOP/s are those
that were measured. Communication and bubble are planned as they are, so the result holds for other layouts as far as
those are right.
"""

import json
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from omegaconf import OmegaConf

from megatron_ads.config.recipe_errors import current_settings
from megatron_ads.config.run import SftConfig
from megatron_ads.errors import ConfigError
from megatron_ads.planning.hardware import Card
from megatron_ads.planning.job import job_of, planned_shape
from megatron_ads.planning.plan import make_plan

_LOWEST, _HIGHEST = 1e-6, 1.0


def calibrated(card: Card, run: Path, model: str | None = None) -> Card:
    """Return the card with the efficiency that the run in log folder ``run`` reached.

    Raises:
        ConfigError: If the folder lacks ``run.json`` or ``metrics.jsonl``, or the run was faster than any efficiency
            up to 1 allows: the card is another one.
    """
    described = _described(run / "run.json")
    measured = _measured_flops_per_second(run / "metrics.jsonl", int(described["ranks"]))
    config = OmegaConf.to_object(
        OmegaConf.merge(OmegaConf.structured(SftConfig), current_settings(described["recipe"]))
    )
    assert isinstance(config, SftConfig)  # to_object instantiates the schema
    job = job_of(config, planned_shape(model, config), int(described["ranks"]))

    def planned(efficiency: float) -> float:
        return make_plan(job, replace(card, efficiency=efficiency)).model_flops_per_second

    if planned(_HIGHEST) < measured:
        raise ConfigError(
            f"--calibrate: the run did {measured:.3g} model FLOP/s, more than {job.layout.world} cards of kind "
            f"{card.name} can ({planned(_HIGHEST):.3g}). Name the card it ran on with --gpu."
        )
    low, high = _LOWEST, _HIGHEST
    while high / low > 1.001:  # planned speed rises with efficiency
        middle = (low * high) ** 0.5
        low, high = (middle, high) if planned(middle) < measured else (low, middle)
    return replace(card, efficiency=high)


def _described(file: Path) -> dict[str, Any]:
    try:
        described: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ConfigError(f"--calibrate {file} cannot be read ({error}); give the log folder of a run.") from None
    return described


def _measured_flops_per_second(metrics: Path, ranks: int) -> float:
    """Return the typical model FLOP/s of all ``ranks`` of a run, from its ``metrics.jsonl``, without the first step.

    Raises:
        ConfigError: If the file holds no such measurement.
    """
    try:
        rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    except (OSError, json.JSONDecodeError) as error:
        raise ConfigError(f"--calibrate {metrics} cannot be read ({error}); give a run's metrics.jsonl.") from None
    # Older runs recorded those of the whole job.
    measured = [row["tflops_per_gpu"] * 1e12 * ranks for row in rows if "tflops_per_gpu" in row][1:] or [
        row["model_flops_per_second"] for row in rows if "model_flops_per_second" in row
    ][1:]
    if not measured:
        raise ConfigError(f"--calibrate {metrics} has fewer than two steps with tflops_per_gpu.")
    return float(median(measured))
