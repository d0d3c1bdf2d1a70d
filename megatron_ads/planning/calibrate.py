"""A card's efficiency from a run that was measured on it.

The run's recipe is planned on the same card; its efficiency is then set so that the planned model FLOP/s are those
that were measured. Communication and bubble are planned as they are, so the result holds for other layouts as far as
those are right.
"""

import json
from dataclasses import replace
from pathlib import Path
from statistics import median

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
        ConfigError: If ``run.json`` or ``metrics.jsonl`` cannot be read or holds no measurement, or the run was faster
            than any efficiency up to 1 allows: the card is another one.
    """
    try:
        described = json.loads((run / "run.json").read_text(encoding="utf-8"))
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    except (OSError, json.JSONDecodeError) as error:
        raise ConfigError(f"--calibrate {run} cannot be read ({error}); give the log folder of a run.") from None
    ranks = int(described["ranks"])
    # The first step warms up. Older runs recorded the FLOP/s of the whole job.
    speeds = [row["tflops_per_gpu"] * 1e12 * ranks for row in rows if "tflops_per_gpu" in row][1:]
    speeds = speeds or [row["model_flops_per_second"] for row in rows if "model_flops_per_second" in row][1:]
    if not speeds:
        raise ConfigError(f"--calibrate {run / 'metrics.jsonl'} has fewer than two steps with tflops_per_gpu.")
    measured = float(median(speeds))
    config = OmegaConf.to_object(
        OmegaConf.merge(OmegaConf.structured(SftConfig), current_settings(described["recipe"]))
    )
    assert isinstance(config, SftConfig)  # to_object instantiates the schema
    job = job_of(config, planned_shape(model, config), ranks)

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
