"""Say, before a job is started, everything that would stop it: on this machine and in what the recipe names.

    megatron-ads check --recipe sft/deepseek_r1_671b_248gpu --ranks 248 --ranks-here 8 model.load=R1-shards ...

Python, GPU driver and GPUs, folders, disk space for the planned checkpoints, weights, layout, data, and the checkpoint
to go on from. With MASTER_ADDR set and NODE_RANK above 0, the rendezvous too. The launch scripts do this by themselves,
on every node. Exit status 2: there is a problem; each is one line that says what to do.
"""

import argparse
import os
import sys
from pathlib import Path

from megatron_ads.config.recipes import load_recipe
from megatron_ads.errors import MegatronAdsError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `megatron-ads check`."""
    parser.add_argument("--recipe", required=True, metavar="R", help="a name under recipes/, or a YAML file")
    parser.add_argument("--ranks", type=int, help="processes of the whole job (default: the fewest for the layout)")
    parser.add_argument("--ranks-here", type=int, help="of these, on this machine (default: all)")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings that replace the recipe's, as train.max_steps=100"
    )


def run(args: argparse.Namespace) -> int:
    """Print what is as it should be, then what is not; return 2 if anything is not."""
    passed, problems = surroundings(args.recipe, args.overrides, args.ranks, args.ranks_here)
    for line in passed:
        print(f"ok    {line}")
    sys.stdout.flush()
    for problem in problems:
        print(f"megatron-ads: {problem}", file=sys.stderr)
    return 2 if problems else 0


def surroundings(
    recipe: str, overrides: list[str], ranks: int | None, ranks_here: int | None
) -> tuple[list[str], list[str]]:
    """Return a line for everything that is as it should be, and one for every problem, of the job and of this node."""
    from megatron_ads.launching.job_check import check_job, needs_gpu
    from megatron_ads.launching.node_check import folder_problems, gpu_problems, python_problems
    from megatron_ads.launching.torchrun import rendezvous_problems

    found = check_job(recipe, overrides, ranks)
    passed, problems = list(found.passed), list(found.problems)
    here = python_problems(sys.version_info[:2]) + rendezvous_problems(os.environ)
    try:
        config = load_recipe(recipe, overrides)
    except MegatronAdsError:
        pass  # check_job has said it
    else:
        for folder in dict.fromkeys((config.checkpoint.dir, config.log.dir)):
            here += folder_problems(Path(folder))
        gpus = needs_gpu(config, os.environ)
        local = ranks_here or ranks or config.layout.fewest_ranks()
        here += gpu_problems(local, os.environ) if gpus else []
        passed.append(f"gpu: {'driver and GPUs are looked at' if gpus else 'none wanted; the ranks run on the CPU'}")
    if not here:
        passed.append(f"machine: Python {sys.version.split()[0]}, folders can be written")
    return passed, problems + here
