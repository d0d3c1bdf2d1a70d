"""`megatron-ads downstream`: a small ads pipeline, trained once, and what a model's answers are worth to it.

    megatron-ads data simulate --out simulated --users 10000 --rows 0
    megatron-ads downstream train --logs simulated --out runs/downstream
    megatron-ads downstream evaluate --pipeline runs/downstream --logs simulated
    megatron-ads downstream rows --pipeline runs/downstream --logs simulated --out rows.jsonl
    megatron-ads downstream features --pipeline runs/downstream --logs simulated --rows rows.jsonl \\
      --answers answers.jsonl --out features.parquet
    megatron-ads downstream evaluate --pipeline runs/downstream --logs simulated --features features.parquet

A two-tower retriever finds the items a user will buy, from the history and, where there is one, a query; a ranker
(DCN-v2) says how likely a user clicks on an item and converts after it. Rewards put answers into it, frozen; features
made of answers are learned from by a ranker of their own.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

from megatron_ads.downstream.feature_command import (
    FEATURES,
    ROWS,
    add_features_arguments,
    add_rows_arguments,
    run_feature_evaluation,
)
from megatron_ads.errors import require

Subparsers = Any  # argparse names its type argparse._SubParsersAction

_TRAIN = """Train a retriever and a ranker on logs and write them into a new folder: model.safetensors, pipeline.json.

    megatron-ads downstream train --logs simulated --out runs/downstream
    megatron-ads downstream train --logs simulated --out runs/other seed=1 held_out=0.3 retriever.epochs=20
    megatron-ads downstream train --logs our_logs --out runs/ours answer_days=14 anchors=6

--logs is a folder of `megatron-ads data simulate`, or one with three tables (Parquet, JSONL, CSV or TSV):

    items        item, text
    events       user, time, event, text; optional: advertiser, category, brand, age, gender, state
    impressions  user, time, item, clicked, converted; optional: query, seconds

item is what an answer names; event is onsite_search, offsite_search, click, page_view, offsite_url,
attributed_conversion or matched_conversion, and a conversion is with the item that advertiser names. seconds is how
long who clicked stayed there; retriever.objective=clicks counts clicks by it.

Nothing is learned from a share of the users (held_out), nor from the last answer_days. The same logs and settings give
the same weights, bit by bit. Settings are described in megatron_ads/config/downstream.py."""

_EVALUATE = """Score a frozen pipeline on the users and days that it did not learn from, next to simple baselines.

    megatron-ads downstream evaluate --pipeline runs/downstream --logs simulated
    megatron-ads downstream evaluate --pipeline runs/downstream --logs simulated --json
    megatron-ads downstream evaluate --pipeline runs/downstream --logs simulated --features features.parquet --seeds 5

Retrieval: recall@k and NDCG@k of the first purchase. Ranking: AUC, area under the precision-recall curve and log-loss
of clicks, and of clicks followed by a conversion (ctcvr). Brackets hold bootstrap 95 % intervals over users.

With --features, what `downstream features` wrote, it says instead what these are worth: to the ranker, trained with and
without them from the same seeds (the advertiser paper's table 5; Taiji's features within and across users, for all and
for users with short histories; and the features of other users, which must change nothing), and to retrieval, where
predicted advertisers are a filter before the two towers; --objectives adds towers trained for conversions, for clicks
weighted by the duration of the visit, and for impressions. Brackets hold paired intervals."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommands."""
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    train = _command(commands, "train", "train a pipeline on logs, once", _TRAIN)
    train.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write; empty or absent")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="settings, such as retriever.epochs=20")
    train.set_defaults(run_downstream=_train)
    evaluate = _command(commands, "evaluate", "score a pipeline on held-out users", _EVALUATE)
    evaluate.add_argument("--pipeline", type=Path, required=True, metavar="DIR", help="folder that train wrote")
    evaluate.add_argument("--features", type=Path, metavar="FILE", help="say what these features are worth")
    evaluate.add_argument("--seeds", type=int, metavar="N", help="rankers of a line (default 3); --features")
    evaluate.add_argument(
        "--objectives", action="store_true", help="--features: train the channel's towers for each objective, too"
    )
    evaluate.set_defaults(run_downstream=_evaluate)
    add_rows_arguments(_command(commands, "rows", "write rows whose answers become features", ROWS))
    add_features_arguments(_command(commands, "features", "turn answers into features", FEATURES))


def run(args: argparse.Namespace) -> int:
    """Carry out the subcommand that was chosen."""
    status: int = args.run_downstream(args)
    return status


def _command(commands: Subparsers, name: str, summary: str, description: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=summary, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--logs", type=Path, required=True, metavar="DIR", help="folder of logs")
    parser.add_argument("--json", action="store_true", help="print the result as one line of JSON")
    return parser


def _train(args: argparse.Namespace) -> int:
    from megatron_ads.config.downstream import load_downstream
    from megatron_ads.data.new_folder import require_new
    from megatron_ads.downstream.pipeline import train_pipeline  # imports torch: keep --help instant
    from megatron_ads.downstream.pipeline_folder import save_pipeline
    from megatron_ads.downstream.simulated_logs import read_logs

    started, config = time.monotonic(), load_downstream(args.overrides, "downstream train")
    require_new(args.out)
    logs = read_logs(args.logs)
    pipeline = train_pipeline(logs, config)
    trained_on = {
        "logs": str(args.logs),
        "users": len(logs.events),
        "purchases": sum(pipeline.counts.bought),
        "impressions": sum(pipeline.counts.shown),
        "clicks": sum(pipeline.counts.clicked),
        "conversions": sum(pipeline.counts.converted),
    }
    digest = save_pipeline(pipeline, args.out, trained_on=trained_on)
    result = {"out": str(args.out), "digest": digest, **trained_on, "items": len(pipeline.items)}
    result["seconds"] = round(time.monotonic() - started, 1)
    if args.json:
        print(json.dumps(result))
        return 0
    for name in ("users", "items", "purchases", "impressions", "clicks", "conversions"):
        print(f"{name:<14}{result[name]:>12,}")
    print(f"written to {args.out} in {result['seconds']} s, digest {digest[:16]}")
    return 0


def _evaluate(args: argparse.Namespace) -> int:
    if args.features is not None:
        return run_feature_evaluation(args)
    require(
        args.seeds is None and not args.objectives,
        f"{'--seeds' if args.seeds is not None else '--objectives'} has no effect without --features FILE. Leave it "
        "out, or name the features.",
    )
    from megatron_ads.downstream.evaluate import evaluate_pipeline  # imports torch: keep --help instant
    from megatron_ads.downstream.pipeline_folder import load_pipeline
    from megatron_ads.downstream.simulated_logs import read_logs

    scores = evaluate_pipeline(load_pipeline(args.pipeline), read_logs(args.logs))
    if args.json:
        print(json.dumps(scores))
        return 0
    print(f"{scores['users']} users, {scores['impressions']} impressions, pipeline {scores['digest'][:16]}")
    for title in ("retrieval", "ranking"):
        print("\n".join(["", *_table(title, scores[title])]))
    return 0


def _table(title: str, scores: dict[str, dict[str, Any]]) -> list[str]:
    from megatron_ads.reporting.page import fixed, text_table

    def cell(score: dict[str, Any]) -> str:
        low, high = score["interval"] or (None, None)
        return f"{fixed(score['value'])} [{fixed(low)}, {fixed(high)}]"

    names = list(next(iter(scores.values())))
    rows = [[line, *(cell(of_line[name]) for name in names)] for line, of_line in scores.items()]
    return text_table(rows, [title, *names], left=[title])
