"""The best answers to simulated rows: what somebody would say who knows the simulation, though not its dice."""

from collections.abc import Mapping

from megatron_ads.config.data import DataConfig, SourceKind
from megatron_ads.data.sources import simulated_source

BestAnswers = Mapping[str, tuple[str, ...]]
"""By row id: answers as labels are written, the likeliest first."""


def best_answers(config: DataConfig) -> dict[str, tuple[str, ...]]:
    """Return the best answers to the simulated rows of a recipe that are asked as their task has it."""
    best: dict[str, tuple[str, ...]] = {}
    for source in config.sources:
        if source.kind is SourceKind.simulator and source.variant is None:
            best |= {example.row.id: example.best for example in simulated_source(source, seed=config.seed)}
    return best
