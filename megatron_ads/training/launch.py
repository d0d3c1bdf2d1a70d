"""`megatron-ads train`: check the recipe here, then run it under torchrun on this machine.

    megatron-ads train --recipe sft/quickstart model.load=SHARDS checkpoint.dir=RUN/checkpoints log.dir=RUN/logs
    megatron-ads train --recipe sft/quickstart --ranks 4 train.steps=100 ...

Under Slurm, or on several machines, run ``python -m megatron_ads.training.sft --recipe R [overrides]`` in every task.
"""

import argparse
import os
import subprocess
import sys

from megatron_ads.config import SftConfig
from megatron_ads.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `megatron-ads train`."""
    parser.add_argument("--recipe", required=True, metavar="R", help="a name under recipes/, or a YAML file")
    parser.add_argument(
        "--ranks", type=int, help="processes to start here (default: the fewest the recipe's layout needs)"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings that replace the recipe's, as train.steps=100"
    )


def run(args: argparse.Namespace) -> int:
    """Start the ranks and wait; return the job's exit status."""
    from megatron_ads.config import load_recipe

    config = load_recipe(args.recipe, args.overrides)
    ranks = args.ranks or fewest_ranks(config)
    _check(config, ranks)
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"),
        *("--module", "megatron_ads.training.sft", "--recipe", args.recipe, *args.overrides),
    ]
    with subprocess.Popen(command, env=_environment(config, ranks)) as job:
        return _wait(job)


def fewest_ranks(config: SftConfig) -> int:
    """Return the smallest world the recipe's layout fits: one replica of every weight."""
    import math

    layout = config.layout
    return layout.pp * math.lcm(layout.tp * layout.cp, layout.ep * layout.etp)


def _check(config: SftConfig, ranks: int) -> None:
    """Refuse what cannot run before any process is started."""
    from pathlib import Path

    from conversion.sources import open_source
    from megatron_ads.config import validate

    if ranks < 1:
        raise ConfigError(f"--ranks is {ranks}; it must be at least 1.")
    validate(config, ranks, open_source(Path(config.model.load)).shape)


def _environment(config: SftConfig, ranks: int) -> dict[str, str]:
    threads = config.runtime.threads or max(1, (os.cpu_count() or 1) // ranks)
    return {**os.environ, "OMP_NUM_THREADS": str(threads)}


def _wait(job: "subprocess.Popen[bytes]") -> int:
    try:
        return job.wait()
    except KeyboardInterrupt:
        job.terminate()
        return job.wait()
