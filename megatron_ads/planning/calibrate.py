"""A card's efficiency from a run that was measured on it.

The run's recipe is planned on the same card; its efficiency is then set so that the planned model FLOP/s are those
that were measured. Communication and bubble are planned as they are, so the result holds for other layouts as far as
those are right.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from megatron_ads.config.renamed import current_settings
from megatron_ads.config.sft import SftConfig
from megatron_ads.errors import ConfigError
from megatron_ads.planning.compute import model_flops_per_token
from megatron_ads.planning.hardware import Card, measured_flops_per_second
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
    measured = measured_flops_per_second(run / "metrics.jsonl", int(described["ranks"]))
    config = OmegaConf.to_object(
        OmegaConf.merge(OmegaConf.structured(SftConfig), current_settings(described["recipe"]))
    )
    assert isinstance(config, SftConfig)  # to_object instantiates the schema
    job = job_of(config, planned_shape(model, config), int(described["ranks"]))

    def planned(efficiency: float) -> float:
        plan = make_plan(job, replace(card, efficiency=efficiency))
        return plan.tokens_per_second * model_flops_per_token(job)

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
