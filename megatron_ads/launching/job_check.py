"""What a whole job must have before its ranks are started: a recipe that composes, weights, room, a checkpoint to read.

Everything is looked at, so that one look finds every problem.
"""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megatron_ads.architecture import ModelShape
from megatron_ads.config.model import LayerSpecChoice, Precision
from megatron_ads.config.recipes import load_recipe
from megatron_ads.config.sft import SftConfig, validate
from megatron_ads.disk import existing, free_bytes
from megatron_ads.errors import CheckpointError, ConfigError, DataError, MegatronAdsError
from megatron_ads.launching.node_check import wants_gpu
from megatron_ads.planning.hardware import CARDS
from megatron_ads.planning.job import job_of
from megatron_ads.planning.plan import make_plan
from megatron_ads.training.checkpoint_folder import complete_checkpoints, require_resumable, verify_sizes


@dataclass(frozen=True, kw_only=True, slots=True)
class JobCheck:
    """What was found: a line for everything that is as it should be, and one for every problem."""

    passed: tuple[str, ...]
    problems: tuple[str, ...]


def check_job(recipe: str, overrides: Sequence[str], ranks: int | None) -> JobCheck:
    """Look at everything that is the same on every node.

    Args:
        recipe: Name or file.
        overrides: Hydra overrides.
        ranks: Processes of the whole job; None for the fewest that the layout needs.
    """
    try:
        config = load_recipe(recipe, overrides)
    except MegatronAdsError as error:
        return JobCheck(passed=(), problems=(one_line(error),))
    passed, problems = [f"recipe: {recipe} composes"], []
    shape: ModelShape | None = None
    try:
        shape, text = _weights(Path(config.model.load))
        passed.append(f"weights: {text}")
    except MegatronAdsError as error:
        problems.append(one_line(error))
    checks: tuple[tuple[str, Callable[[], str]], ...] = (
        ("layout", partial(_layout, config, ranks, shape)),
        ("data", partial(_data, config)),
        ("checkpoint", partial(_checkpoint, config)),
        ("disk", partial(_disk, config, ranks, shape)),
    )
    for name, check in checks:
        try:
            passed.append(f"{name}: {check()}")
        except MegatronAdsError as error:
            problems.append(one_line(error))
    return JobCheck(passed=tuple(passed), problems=tuple(dict.fromkeys(problems)))


def needs_gpu(config: SftConfig, environment: Mapping[str, str]) -> bool:
    """Whether ranks will use GPUs: there are some for them, or the recipe asks for layers that run nowhere else."""
    return config.model.layer_spec is LayerSpecChoice.te or wants_gpu(environment)


def one_line(error: BaseException) -> str:
    """Return an error's message on one line."""
    return " ".join(str(error).split())


def _weights(path: Path) -> tuple[ModelShape, str]:
    from conversion.sources import open_source  # imports torch

    source = open_source(path)
    size = sum(file.stat().st_size for file in source.files())
    return source.shape, f"{path} is a {source.kind.value} of {size / 1e9:.2f} GB"


def _layout(config: SftConfig, ranks: int | None, shape: ModelShape | None) -> str:
    world = _world(config, ranks)
    validate(config, world, shape)
    layout = config.layout.runtime(world)
    return f"{world} ranks: pp {layout.pp} x dp {layout.dp} x tp {layout.tp}, experts over {layout.ep}"


def _world(config: SftConfig, ranks: int | None) -> int:
    if ranks is not None and ranks < 1:
        raise ConfigError(f"The number of ranks is {ranks}; it must be at least 1.")
    return config.layout.fewest_ranks() if ranks is None else ranks


def _data(config: SftConfig) -> str:
    paths = [source.path for source in config.data.sources if source.path is not None]
    if absent := [path for path in paths if not Path(path).exists()]:
        raise DataError(f"{', '.join(absent)} (data.sources) does not exist. Give the path as every node sees it.")
    return f"{len(config.data.sources)} sources, {len(paths)} of them in files that are there"


def _checkpoint(config: SftConfig) -> str:
    complete = complete_checkpoints(Path(config.checkpoint.dir))
    if not complete:
        return "none yet; the job begins at step 0"
    step, folder = complete[-1]
    require_resumable(folder, resume=config.checkpoint.resume, last_step=config.train.max_steps)
    verify_sizes(folder)
    return f"{folder} is complete; the job goes on from step {step}"


def _disk(config: SftConfig, ranks: int | None, shape: ModelShape | None) -> str:
    if shape is None:
        return "not looked at without weights"
    job = job_of(config, shape, _world(config, ranks))
    plan = make_plan(job, CARDS["cpu"])
    kept = len(complete_checkpoints(Path(config.checkpoint.dir)))
    # A checkpoint is written before the oldest is deleted.
    checkpoints = plan.checkpoint_bytes * max(1, config.checkpoint.save_total_limit + 1 - kept)
    files = math.lcm(job.layout.tp, job.layout.ep * job.layout.etp)
    element = 2 if config.model.precision is Precision.bf16 else 4
    export = sum(stage.parameters for stage in plan.stages) * files * element
    needs: dict[int, tuple[Path, int]] = {}
    for folder, size in ((Path(config.checkpoint.dir), checkpoints), (Path(config.log.dir), export)):
        there = existing(folder)
        device = os.stat(there).st_dev
        needs[device] = (there, needs.get(device, (there, 0))[1] + size)
    for there, size in needs.values():
        free = free_bytes(there)
        if free < size:
            raise CheckpointError(
                f"{there} has {free / 1e9:.1f} GB free, but {size / 1e9:.1f} GB are needed: a checkpoint is "
                f"{plan.checkpoint_bytes / 1e9:.1f} GB (checkpoint.save_total_limit = "
                f"{config.checkpoint.save_total_limit}, {kept} there, one more "
                f"while it is written) and the export {export / 1e9:.1f} GB. Free some, lower "
                "checkpoint.save_total_limit, or choose other folders with checkpoint.dir and log.dir."
            )
    return f"room for the checkpoints ({checkpoints / 1e9:.1f} GB still) and the export ({export / 1e9:.1f} GB)"
