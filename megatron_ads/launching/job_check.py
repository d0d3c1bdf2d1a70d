"""Say, before a job is started, everything that would stop it: on this machine and in what the recipe names.

    megatron-ads check --recipe sft/deepseek_r1_671b_248gpu --ranks 248 --ranks-here 8 model.load=R1-shards ...

Python, GPU driver and GPUs, folders, disk space for the planned checkpoints, weights, layout, data, and the checkpoint
to continue from. With NNODES above 1 the rendezvous too: that its port is free on node 0, and that the others reach it.
The launch scripts run this check on every node. Exit status 2: there is a problem; each is one line that says what to
do.
"""

import argparse
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from glob import glob
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_ads.architecture import ModelShape
from megatron_ads.config.model import LayerSpecChoice, Precision
from megatron_ads.config.recipes import load_job, validate_job
from megatron_ads.config.rl import RlConfig, RolloutMode
from megatron_ads.config.run import RunConfig, require_trainable
from megatron_ads.disk import existing, free_bytes, readable_bytes
from megatron_ads.errors import CheckpointError, ConfigError, DataError, MegatronAdsError, as_refusals, one_line
from megatron_ads.launching.environment import core_warnings
from megatron_ads.launching.network_check import rendezvous_problems
from megatron_ads.launching.node_check import (
    compiler_problems,
    folder_problems,
    gpu_problems,
    python_problems,
    wants_gpu,
)
from megatron_ads.observability.trackers import require_installed
from megatron_ads.planning.hardware import CARDS
from megatron_ads.planning.job import job_of
from megatron_ads.planning.plan import make_plan
from megatron_ads.training.checkpoint_folder import complete_checkpoints, read_manifest, starting_point, verify_sizes
from megatron_ads.training.folder_lock import folders_of, require_free

if TYPE_CHECKING:
    from conversion.sources import WeightSource

RENDEZVOUS_SECONDS = 20.0
"""How long `check` waits for node 0; `train`, which may be started on other nodes first, waits longer."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `megatron-ads check`."""
    add_job_arguments(parser)
    parser.add_argument("--ranks-here", type=int, help="of these, on this machine (default: all)")


def add_job_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments that say which job it is."""
    parser.add_argument("--recipe", required=True, metavar="R", help="a name under recipes/, or a YAML file")
    parser.add_argument("--ranks", type=int, help="processes of the whole job (default: the fewest for the layout)")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings that replace the recipe's, as train.max_steps=100"
    )


def run(args: argparse.Namespace) -> int:
    """Print what was checked, then the problems; return 2 if there are any."""
    found = check_job_and_node(
        args.recipe, args.overrides, args.ranks, args.ranks_here, rendezvous_seconds=RENDEZVOUS_SECONDS
    )
    for line in found.passed:
        print(f"ok    {line}", flush=True)
    for line in (*found.warnings, *found.problems):
        print(f"megatron-ads: {line}", file=sys.stderr)
    return 2 if found.problems else 0


def check_job_and_node(
    recipe: str,
    overrides: list[str],
    ranks: int | None,
    ranks_here: int | None,
    *,
    rendezvous_seconds: float = 300.0,
) -> "JobCheck":
    """Check the job and this node, which waits ``rendezvous_seconds`` for node 0."""
    found = check_job(recipe, overrides, ranks)
    here = python_problems(sys.version_info[:2]) + rendezvous_problems(os.environ, rendezvous_seconds)
    try:
        config = load_job(recipe, overrides)
    except MegatronAdsError:
        pass  # already among the problems of check_job
    else:
        for folder in dict.fromkeys((config.checkpoint.dir, config.log.dir)):
            here += folder_problems(Path(folder))
        gpus = needs_gpu(config, os.environ)
        local = ranks_here or ranks or config.layout.fewest_ranks()
        if gpus:
            here += gpu_problems(local, os.environ) + compiler_problems(os.environ)
            found.warnings += core_warnings(local, os.environ)
        found.passed.append(
            f"gpu: {'driver and GPUs are checked' if gpus else 'none wanted; the ranks run on the CPU'}"
        )
    if not here:
        found.passed.append(f"machine: Python {sys.version.split()[0]}, folders can be written")
    found.problems += here
    return found


@dataclass(slots=True)
class JobCheck:
    """A line for every check that passed, and one for every problem."""

    passed: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    """What the job runs with, but slowly."""

    @contextmanager
    def collecting_problems(self, check: str) -> Iterator[None]:
        """Turn an error of the project or the operating system into a problem of a check; only the first has it."""
        try:
            with as_refusals():
                yield
        except MegatronAdsError as error:
            if not any(problem.endswith(one_line(error)) for problem in self.problems):
                self.problems.append(f"{check}: {one_line(error)}")


def check_job(recipe: str, overrides: Sequence[str], ranks: int | None) -> JobCheck:
    """Check everything that is the same on every node; ``ranks`` are the job's, None for the fewest of the layout."""
    found = JobCheck()
    with found.collecting_problems("recipe"):
        config = load_job(recipe, overrides)
    if found.problems:
        return found
    found.passed.append(f"recipe: {recipe} composes")
    shape: ModelShape | None = None
    with found.collecting_problems("weights"):
        from conversion.grow_vocabulary import added_token_ids  # imports torch, as the next two do
        from conversion.sources import open_source
        from megatron_ads.training.streams import tokenizer_of

        source = open_source(Path(config.model.load))
        shape, size = source.shape, readable_bytes(sum(file.stat().st_size for file in source.files()))
        found.passed.append(f"weights: {config.model.load} is a {source.kind.value} of {size}")
        if config.model.train_only is not None:
            added = added_token_ids(source)
            found.passed.append(f"new tokens: {len(added)}, from {added.start} on")
        tokens = tokenizer_of(source, config.data.template_arguments).size
        found.passed.append(f"tokenizer: {tokens} tokens for an embedding of {shape.vocab_size} rows")
    checks: dict[str, Callable[[], str]] = {
        "layout": partial(_layout, config, ranks, shape),
        "settings": partial(_settings, config, ranks, shape),
        "data": partial(_data, config, None if shape is None else source.side_folder),
        "checkpoint": partial(_checkpoint, config),
        "disk": partial(_disk, config, ranks, shape),
        "trackers": partial(_trackers, config),
        "folders": partial(_folders, config),
    }
    if isinstance(config, RlConfig):
        checks["rewards"] = partial(_rewards, config)
        if config.teacher.is_there and config.rollout.mode is not RolloutMode.train_only and shape is not None:
            checks["teacher"] = partial(_teacher, config, source)
        if config.rollout.dump is not None:
            checks["rollouts"] = partial(_rollouts, config, Path(config.rollout.dump))
    for name, check in checks.items():
        with found.collecting_problems(name):
            found.passed.append(f"{name}: {check()}")
    return found


def needs_gpu(config: RunConfig, environment: Mapping[str, str]) -> bool:
    """Whether ranks will use GPUs: there are some for them, or the recipe asks for layers that run nowhere else."""
    return config.model.layer_spec is LayerSpecChoice.te or wants_gpu(environment)


def _layout(config: RunConfig, ranks: int | None, shape: ModelShape | None) -> str:
    world = _world(config, ranks)
    config.layout.check()
    layout = config.layout.runtime(world)
    require_trainable(layout, shape)
    if shape is not None:
        config.layout.placement(shape, layout)
        layout.check_model(shape)
    return f"{world} ranks: pp {layout.pp} x dp {layout.dp} x tp {layout.tp}, experts over {layout.ep}"


def _settings(config: RunConfig, ranks: int | None, shape: ModelShape | None) -> str:
    validate_job(config, _world(config, ranks), shape)
    return "they fit each other"


def _world(config: RunConfig, ranks: int | None) -> int:
    if ranks is not None and ranks < 1:
        raise ConfigError(f"The number of ranks is {ranks}; it must be at least 1.")
    return config.layout.fewest_ranks() if ranks is None else ranks


_READ_AT_ONCE_BYTES = 64 << 20
"""Files of so many are read by the check; larger ones by the job, once, or by `megatron-ads data prepare`."""


def _data(config: RunConfig, tokenizer: Path | None) -> str:
    sources = config.data.sources
    paths = [path for source in sources for path in (source.path, source.events) if path is not None]
    if absent := [path for path in paths if not Path(path).exists() and not glob(path, recursive=True)]:
        raise DataError(f"{', '.join(absent)} (data.sources) does not exist. Give the path as every node sees it.")
    where = f"{len(sources)} sources, in {len(paths)} files or folders that exist"
    from megatron_ads.data.corpus import read_corpus  # imports pyarrow
    from megatron_ads.data.prepared.corpus_record import CorpusRecord
    from megatron_ads.data.prepared.prepare import find_prepared, prepared_directory
    from megatron_ads.data.sources import files_of

    config.data.check()
    size = sum(part.file.stat().st_size for source in sources for part in files_of(source))
    if size <= _READ_AT_ONCE_BYTES:
        return f"{where}; {read_corpus(config.data)}"
    directory = prepared_directory(config.data, Path(config.log.dir))
    found = None if tokenizer is None else find_prepared(config.data, tokenizer, directory)
    if found is None:
        return f"{where}, {readable_bytes(size)}, not read here; `megatron-ads data prepare` checks every row"
    record = CorpusRecord.read(found)
    record.tell(config.data.sources)
    return f"{where}; {record.rows:,} rows, {record.tokens:,} tokens are prepared in {found}"


def _rewards(config: RlConfig) -> str:
    from megatron_ads.rewards.registry import open_rewards  # imports numpy

    open_rewards(config.rewards).close()
    return ", ".join(reward.name for reward in config.rewards.use) or "none; the teacher judges"


def _teacher(config: RlConfig, source: "WeightSource") -> str:
    from megatron_ads.training.rollout.teacher import require_same_tokens  # imports torch
    from megatron_ads.training.streams import tokenizer_of

    require_same_tokens(config.teacher, tokenizer_of(source, config.data.template_arguments))
    return f"{config.teacher.model} has the tokens of the policy"


def _rollouts(config: RlConfig, folder: Path) -> str:
    from megatron_ads.training.rollout.dump import recorded_file, require_settings, step_settings  # imports numpy

    require_settings(recorded_file(folder, config.train.max_steps), step_settings(config))
    return f"{folder} has those of {config.train.max_steps} steps"


def _checkpoint(config: RunConfig) -> str:
    folder = starting_point(
        Path(config.checkpoint.dir), resume=config.checkpoint.resume, last_step=config.train.max_steps
    )
    if folder is None:
        return "none yet; the job begins at step 0"
    verify_sizes(folder)
    return f"{folder} is complete; the job continues from step {read_manifest(folder)['step']}"


def _folders(config: RunConfig) -> str:
    require_free(folders_of(config), os.environ)
    return "no other job holds log.dir and checkpoint.dir"


def _trackers(config: RunConfig) -> str:
    require_installed(config.log.trackers)
    return ", ".join(config.log.trackers) or "none wanted"


def _disk(config: RunConfig, ranks: int | None, shape: ModelShape | None) -> str:
    if shape is None:
        return "not checked without weights"
    job = job_of(config, shape, _world(config, ranks))
    plan = make_plan(job, CARDS["cpu"])
    kept = len(complete_checkpoints(Path(config.checkpoint.dir)))
    # A checkpoint is written before the oldest is deleted.
    checkpoints = plan.checkpoint.bytes * max(1, config.checkpoint.save_total_limit + 1 - kept)
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
                f"{there} has {readable_bytes(free)} free, but {readable_bytes(size)} are needed: a checkpoint is "
                f"{readable_bytes(plan.checkpoint.bytes)} (checkpoint.save_total_limit = "
                f"{config.checkpoint.save_total_limit}, {kept} there, one more while it is "
                f"written) and the export {readable_bytes(export)}. Free some, lower "
                "checkpoint.save_total_limit, or choose other folders with checkpoint.dir and log.dir."
            )
    return f"room for the checkpoints ({readable_bytes(checkpoints)} still) and the export ({readable_bytes(export)})"
