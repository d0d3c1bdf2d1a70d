"""`megatron-ads data`: make rows and look at them.

megatron-ads data simulate --out simulated --users 100000 --days 35 --seed 0
megatron-ads data preview --task ad_user_relevance
megatron-ads data cook --recipe cook/simulated --out cooked teacher.url=http://localhost:8000/v1 teacher.model=NAME
"""

import argparse
from importlib import import_module
from pathlib import Path
from typing import Any

from megatron_ads.config.data import AdsTask
from megatron_ads.data.preview_command import add_preview

Subparsers = Any  # argparse names its type argparse._SubParsersAction


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommands of `megatron-ads data`."""
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_simulate(commands)
    add_preview(commands)
    import_module("megatron_ads.synthesis.command").add_synthesize(commands)  # by name: it builds on this package


def run(args: argparse.Namespace) -> int:
    """Carry out the subcommand that was chosen."""
    status: int = args.run_data(args)
    return status


_SIMULATE = """Draw an ads business from a known latent model and write its logs, rows of every task, and the best
scores that can be reached on them.

    megatron-ads data simulate --out simulated --users 100000 --days 35 --seed 0
    megatron-ads train --recipe sft/quickstart model.load=runs/demo \\
      'data.sources=[{kind: jsonl, path: simulated/rows/next_advertiser.jsonl}]'

The same numbers and seed give the same files; more users change no earlier one. Rows about users are asked at the end
of the 8th day from the last; later logs hold the answers, and the columns named *_chance the true probabilities."""


def _add_simulate(commands: Subparsers) -> None:
    parser = commands.add_parser(
        "simulate",
        help="write logs and rows of a simulated ads business",
        description=_SIMULATE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write; empty or absent")
    parser.add_argument("--users", type=int, default=10_000, metavar="N", help="people in the logs (default 10000)")
    parser.add_argument("--days", type=int, default=35, metavar="D", help="days of logs (default 35)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="decides everything (default 0)")
    parser.add_argument("--advertisers", type=int, default=120, metavar="A", help="shops (default 120, at least 40)")
    parser.add_argument("--format", choices=("parquet", "jsonl"), default="parquet", help="of the logs (parquet)")
    parser.add_argument("--rows", type=int, default=2000, metavar="R", help="most rows of a task (2000); 0: logs only")
    parser.add_argument("--task", type=AdsTask, nargs="+", choices=list(AdsTask), help="which rows (default: all)")
    parser.add_argument("--json", action="store_true", help="print the manifest as one line of JSON")
    parser.set_defaults(run_data=_simulate)


def _simulate(args: argparse.Namespace) -> int:
    import json

    from megatron_ads.data.simulator.folder import Scale, write_simulation
    from megatron_ads.data.simulator.logs import TableFormat

    manifest = write_simulation(
        args.out,
        Scale(users=args.users, days=args.days, seed=args.seed, advertisers=args.advertisers),
        tasks=(args.task or tuple(AdsTask)) if args.rows > 0 else (),
        rows=args.rows,
        form=TableFormat(args.format),
    )
    print(json.dumps(manifest) if args.json else _summary(args.out, manifest))
    return 0


def _summary(out: Path, manifest: dict[str, Any]) -> str:
    lines = [f"{name:<28}{rows:>12,} rows" for name, rows in manifest["rows_of_tables"].items()]
    for task, written in manifest["tasks"].items():
        scores = ", ".join(f"{name} {score:.3f}" for name, score in written.get("best_reachable", {}).items())
        lines.append(f"{task:<28}{written['rows']:>12,} rows, best reachable: {scores}")
    return "\n".join([*lines, f"written to {out}"])
