"""Say what a recipe takes before a machine is rented: memory of every rank, pipeline, traffic, speed.

    megatron-ads plan --recipe sft/deepseek_r1_671b_248gpu
    megatron-ads plan --recipe sft/deepseek_r1_671b_248gpu --gpu h20 --gpu-memory 96GB layout=pp31_tp2_vpp2_ep8
    megatron-ads plan --recipe my.yaml --model DeepSeek-R1 --search
    megatron-ads plan --recipe sft/deepseek_r1_671b_248gpu --build-ranks --shards R1-shards

Neither weights nor a GPU are needed. Exit status 1: it does not fit, or the ranks that were built have a
fault.
"""

import argparse
import json
import math
import sys
from dataclasses import asdict, replace
from pathlib import Path

from conversion.cli import parse_bytes
from megatron_ads.disk import require_writable
from megatron_ads.errors import ConfigError
from megatron_ads.planning.hardware import CARDS, DEFAULT_CARD, card_named
from megatron_ads.planning.job import ROUTING_IMBALANCE, load_job
from megatron_ads.planning.plan import calibrated, make_plan
from megatron_ads.planning.search import search
from megatron_ads.planning.switches import switches
from megatron_ads.planning.table import (
    plan_lines,
    plan_page,
    plan_values,
    search_lines,
    search_values,
    switch_lines,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recipe", required=True, metavar="R", help="a name under recipes/, or a YAML file")
    parser.add_argument("--model", metavar="M", help="a folder with a config.json, or a published model: DeepSeek-R1")
    parser.add_argument("--gpus", type=int, metavar="N", help="ranks (default: the fewest the recipe's layout needs)")
    parser.add_argument("--gpu", default=DEFAULT_CARD, help=f"the card: {', '.join(CARDS)} (default {DEFAULT_CARD})")
    parser.add_argument("--gpu-memory", type=parse_bytes, metavar="SIZE", help="memory of a card (default: its own)")
    parser.add_argument(
        "--routing-imbalance",
        type=float,
        default=ROUTING_IMBALANCE,
        metavar="F",
        help="tokens of the busiest rank of an expert-parallel group over the mean, to set memory aside for "
        f"(default {ROUTING_IMBALANCE:g})",
    )
    parser.add_argument("--calibrate", type=Path, metavar="RUN", help="log folder of a run on such cards, for speeds")
    parser.add_argument("--search", action="store_true", help="try other layouts on as many cards, and rank what fits")
    parser.add_argument(
        "--build-ranks", action="store_true", help="build the model of one rank of every stage, without its weights"
    )
    parser.add_argument("--rehearse", action="store_true", help=argparse.SUPPRESS)  # the former name
    parser.add_argument("--every-rank", action="store_true", help="with --build-ranks: of every rank of every stage")
    parser.add_argument(
        "--shards", type=Path, metavar="DIR", help="with --build-ranks: check this converted checkpoint too"
    )
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the plan as a page with pictures")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings that replace the recipe's, as layout.vpp=2"
    )


def run(args: argparse.Namespace) -> int:
    """Print the plan; return 0 if it fits and every check holds, else 1."""
    if args.rehearse:
        print("megatron-ads: --rehearse is now called --build-ranks; the old name will be removed", file=sys.stderr)
    build = args.build_ranks or args.rehearse
    if (args.shards is not None or args.every_rank) and not build:
        raise ConfigError("--shards and --every-rank are for the ranks that are built; add --build-ranks.")
    require_writable(args.html)
    card = card_named(args.gpu, args.gpu_memory)
    if args.calibrate is not None:
        card = calibrated(card, args.calibrate, args.model)
    if not 1 <= args.routing_imbalance < math.inf:
        raise ConfigError(
            f"--routing-imbalance is {args.routing_imbalance:g}; it must be at least 1, balanced routing."
        )
    job = load_job(args.recipe, args.overrides, model=args.model, ranks=args.gpus)
    job = replace(job, routing_imbalance=args.routing_imbalance)
    plan = make_plan(job, card)
    found = search(job, card) if args.search else None
    changed = switches(plan) if args.search else []
    if args.html is not None:
        args.html.write_text(plan_page(args.recipe, plan), encoding="utf-8")
    built = None
    if build:
        from megatron_ads.planning.build_ranks import build_ranks  # imports Megatron-Core: plans do without

        built = build_ranks(job, every_rank=args.every_rank, shards=args.shards)
    if args.json:
        values = plan_values(plan) | ({} if found is None else {"search": search_values(found, changed)})
        if built is not None:
            values["rehearsal" if args.rehearse else "built_ranks"] = asdict(built)
        print(json.dumps(values, indent=1))
    else:
        lines = plan_lines(plan)
        if found is not None:
            lines += ["", *search_lines(found, card), "", *switch_lines(plan, changed)]
        print("\n".join([*lines, *([] if built is None else ["", *built.lines()])]))
    return 0 if plan.fits and (built is None or not built.faults) else 1
