"""`megatron-ads train`: check the recipe and the machine, then run under torchrun, here or on several machines.

    megatron-ads train --recipe sft/quickstart model.load=SHARDS checkpoint.dir=RUN/checkpoints log.dir=RUN/logs
    megatron-ads train --recipe sft/quickstart --ranks 4 train.max_steps=100 ...
    NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 megatron-ads train --recipe ...      # and NODE_RANK=1 on the other one

With MEGATRON_ADS_MAX_RESTARTS=3, up to three failures are followed by a restart of all ranks from the last checkpoint.
Under Slurm, submit launch/slurm.sbatch instead.
"""

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from megatron_ads.config.recipes import load_job
from megatron_ads.config.run import RunConfig
from megatron_ads.errors import ConfigError
from megatron_ads.launching.attempts import describe_failure, judge
from megatron_ads.launching.environment import NodePart, rank_variables
from megatron_ads.launching.job_check import add_job_arguments, check_job_and_node
from megatron_ads.launching.processes import start_torchrun, wait_passing_signals_on
from megatron_ads.runtime.health.rank_record import FOLDER_VARIABLE, ExitStatus, read_records
from megatron_ads.training.folder_lock import folders_of, hold
from megatron_ads.training.stopping import clear_outcome, read_outcome

_RENDEZVOUS_SECONDS = 600


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `megatron-ads train`."""
    add_job_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Start this machine's ranks and wait for them.

    Returns 0 when every step is done, 75 when a signal stopped the job after a saved step (the same command continues
    from there), 2 when the user has to fix something first, 77 when it has diverged, 1 when it failed.
    """
    config = load_job(args.recipe, args.overrides)
    part = NodePart.of(os.environ, args.ranks, config.layout.fewest_ranks())
    found = check_job_and_node(args.recipe, args.overrides, part.ranks, part.ranks_here)
    for line in (*found.warnings, *found.problems[:-1]):
        print(f"megatron-ads: {line}", file=sys.stderr)
    if found.problems:
        raise ConfigError(found.problems[-1])
    command = torchrun_command(part, "megatron_ads.training", ["--recipe", args.recipe, *args.overrides])
    with hold(folders_of(config), os.environ) if part.node == 0 else nullcontext():
        records = Path(config.log.dir) / "torchrun" / f"node-{part.node}"
        shutil.rmtree(records, ignore_errors=True)  # how the ranks of an earlier job ended
        records.mkdir(parents=True)
        if part.node == 0:
            clear_outcome(Path(config.log.dir))
        with start_torchrun(command, _environment(config, part, records)) as job:
            failed = wait_passing_signals_on(job) != 0
        return _report(config, part, records, failed)


def torchrun_command(part: NodePart, module: str, arguments: Sequence[str]) -> list[str]:
    """Return the command line of torchrun that runs a Python module on every rank of a node."""
    if part.nodes == 1:
        meeting = ["--standalone"]
    else:
        is_host = "true" if part.node == 0 else "false"
        meeting = [
            *(f"--nnodes={part.nodes}", "--rdzv-backend=c10d", f"--rdzv-endpoint={part.host}:{part.port}"),
            *("--rdzv-id=megatron-ads", f"--rdzv-conf=is_host={is_host},join_timeout={_RENDEZVOUS_SECONDS}"),
        ]
    return [
        *(sys.executable, "-m", "megatron_ads.launching.torchrun", *meeting, f"--nproc-per-node={part.ranks_here}"),
        *(f"--max-restarts={part.max_restarts}", "--signals-to-handle=SIGTERM,SIGHUP,SIGQUIT,SIGUSR1"),
        *("--module", module, *arguments),
    ]


def _environment(config: RunConfig, part: NodePart, records: Path) -> dict[str, str]:
    threads = config.runtime.threads or max(1, len(os.sched_getaffinity(0)) // part.ranks_here)
    return {
        **os.environ,
        **rank_variables(config, os.environ),
        "OMP_NUM_THREADS": str(threads),
        FOLDER_VARIABLE: str(records),
        # A new meeting place at each restart. In torch 2.13 the ranks otherwise share torchrun's own, where those that
        # start again find the addresses of those that have gone.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }


def _report(config: RunConfig, part: NodePart, records: Path, failed: bool) -> ExitStatus:
    """Print what went wrong on this node, the first failure first, and return the exit status."""
    starts = sorted(records.glob("restart-*"))
    ended = read_records(starts[-1]) if starts else []
    verdict = judge(ended, part.ranks_here, read_outcome(Path(config.log.dir)))
    if failed and not verdict.is_final:
        verdict = ExitStatus.CRASHED
    if verdict not in (ExitStatus.DONE, ExitStatus.STOPPED):
        # torchrun numbers the ranks of a node consecutively, in an order of nodes of its own.
        first = ended[0].rank // part.ranks_here * part.ranks_here if ended else 0
        here = range(first, first + part.ranks_here) if ended or part.nodes == 1 else range(0)
        lines = describe_failure(ended, here, None)
        if part.nodes > 1 and not ended:
            lines = [
                f"no rank of this node says how it ended: the {part.nodes} nodes did not meet at {part.host}:"
                f"{part.port} (MASTER_ADDR, MASTER_PORT), or it was killed. Look at node 0; if another program has its "
                "port, set another MASTER_PORT on every node."
            ]
        for line in lines:
            print(f"megatron-ads: {line}", file=sys.stderr)
    return verdict
