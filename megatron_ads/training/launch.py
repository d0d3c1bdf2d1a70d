"""`megatron-ads train`: check the recipe here, then run it under torchrun on this machine.

    megatron-ads train --recipe sft/quickstart model.load=SHARDS checkpoint.dir=RUN/checkpoints log.dir=RUN/logs
    megatron-ads train --recipe sft/quickstart --ranks 4 train.steps=100 ...

Under Slurm, or on several machines, run ``python -m megatron_ads.training --recipe R [overrides]`` in every task.
"""

import argparse
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType

from megatron_ads.config import SftConfig, load_recipe, validate
from megatron_ads.errors import ConfigError
from megatron_ads.runtime.exit_status import ExitStatus
from megatron_ads.training.outcome import Outcome, clear_outcome, read_outcome
from megatron_ads.training.signals import STOP_SIGNALS


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
    """Start the ranks and wait for them.

    Returns 0 when every step is done, 75 when a signal stopped the job after a saved step (the same command goes on
    from there), 1 when it failed.
    """
    config = load_recipe(args.recipe, args.overrides)
    ranks = config.layout.fewest_ranks() if args.ranks is None else args.ranks
    _check(config, ranks)
    log_directory = Path(config.log.dir)
    clear_outcome(log_directory)
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"),
        *("--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1", "--module", "megatron_ads.training"),
        *("--recipe", args.recipe, *args.overrides),
    ]
    with subprocess.Popen(command, env=_environment(config, ranks)) as job:
        failed = _wait(job) != 0
    outcome = read_outcome(log_directory)
    if outcome is Outcome.STOPPED:
        return ExitStatus.STOPPED
    return ExitStatus.DONE if outcome is Outcome.FINISHED and not failed else ExitStatus.CRASHED


def _check(config: SftConfig, ranks: int) -> None:
    """Refuse what cannot run before any process is started."""
    from conversion.sources import open_source  # imports torch: keep --help instant

    if ranks < 1:
        raise ConfigError(f"--ranks is {ranks}; it must be at least 1.")
    validate(config, ranks, open_source(Path(config.model.load)).shape)


def _environment(config: SftConfig, ranks: int) -> dict[str, str]:
    threads = config.runtime.threads or max(1, len(os.sched_getaffinity(0)) // ranks)
    return {**os.environ, "OMP_NUM_THREADS": str(threads)}


def _wait(job: "subprocess.Popen[bytes]") -> int:
    """Wait for torchrun, passing on the signals that ask for a stop; Ctrl-C reaches it without help."""

    def pass_on(number: int, _: FrameType | None) -> None:
        if number != signal.SIGINT:
            job.send_signal(number)

    previous = {number: signal.signal(number, pass_on) for number in STOP_SIGNALS}
    try:
        return job.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
