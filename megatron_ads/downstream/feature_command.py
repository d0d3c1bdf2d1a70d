"""`megatron-ads downstream rows` and `features`, and `evaluate --features`: a model's answers in the pipeline."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_ads.downstream.logs import Logs
    from megatron_ads.downstream.pipeline import Pipeline

_SEEDS = 3

ROWS = """Write the rows that a model answers so that the pipeline can have its answers as features.

    megatron-ads downstream rows --pipeline runs/downstream --logs simulated --out rows.jsonl
    megatron-ads downstream rows --pipeline runs/downstream --logs simulated --out rows.jsonl --labelled train.jsonl \\
      --apart 0.3 history.max_entries=3

A row is about a user at an anchor of the pipeline's examples: training users at the earlier anchors, users held out at
the last one; nothing later is in its prompt. It has no true answer. --labelled writes rows with one, to fine-tune on:
of a share of the training users (--apart), who then have no row in --out, because what a model has been told of a user
is no prediction. Settings say how much of a history a prompt shows: history.max_entries, history.max_tokens,
history.window_days and history.without."""

FEATURES = """Turn a model's answers to the rows of `downstream rows` into features of a ranking model: a Parquet file.

    megatron-ads downstream features --pipeline runs/downstream --logs simulated --rows rows.jsonl \\
      --answers answers.jsonl --out features.parquet
    megatron-ads downstream features ... parts=16 bits=8 encoder=Qwen/Qwen3-Embedding-0.6B

--answers are JSON lines with id and text, as `megatron-ads evaluate --answers FILE` writes them (several beams of a row
are a ranking), or a folder of Parquet files with these columns. The columns written:

    user, anchor      whom it is of, and when the history ends that was answered about
    advertisers       predicted ones, the likeliest first; interests: predicted ones
    codes             product-quantised codes (faiss) of the answer's embedding, which are sparse features
    similar_user      of whom the most similar answer was given, by the cosine
    similar_events    what that user did before the anchor, the newest first

Settings, such as parts, bits and encoder, are described in megatron_ads/config/downstream.py (FeatureConfig)."""


def add_rows_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what `downstream rows` takes."""
    _add_pipeline(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="rows to answer, as JSON lines")
    parser.add_argument(
        "--task", choices=["next_advertiser", "next_advertiser_ranking"], default="next_advertiser",
        help="what is asked: one name (default), or 20 names and 5 interests in XML",
    )  # fmt: skip
    parser.add_argument("--labelled", type=Path, metavar="FILE", help="also write rows to fine-tune on; needs --apart")
    parser.add_argument(
        "--apart", type=float, default=0.0, metavar="SHARE", help="share of the training users to fine-tune on"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings, such as history.max_entries=3")
    parser.set_defaults(run_downstream=_rows)


def add_features_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what `downstream features` takes."""
    _add_pipeline(parser)
    parser.add_argument("--rows", type=Path, required=True, metavar="FILE", help="what `downstream rows` wrote")
    parser.add_argument("--answers", type=Path, required=True, metavar="PATH", help="file, or folder of Parquet files")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="Parquet file to write")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings, such as parts=16")
    parser.set_defaults(run_downstream=_features)


def _add_pipeline(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pipeline", type=Path, required=True, metavar="DIR", help="folder that train wrote")


def opened(args: argparse.Namespace) -> "tuple[Pipeline, Logs]":
    """Return the pipeline and the logs that a command line names.

    Raises:
        DataError: If one cannot be read, or they have other items.
    """
    from megatron_ads.downstream.evaluate import require_items
    from megatron_ads.downstream.pipeline_folder import load_pipeline
    from megatron_ads.downstream.simulated_logs import read_logs

    pipeline, logs = load_pipeline(args.pipeline), read_logs(args.logs)
    require_items(pipeline, logs)
    return pipeline, logs


def _rows(args: argparse.Namespace) -> int:
    from megatron_ads.config.data import AdsTask
    from megatron_ads.config.downstream import load_rows
    from megatron_ads.data.user_features import view_chooser
    from megatron_ads.disk import require_writable
    from megatron_ads.downstream.anchored_rows import labelled_rows, question_rows
    from megatron_ads.errors import require, require_between

    view_of = view_chooser(load_rows(args.overrides, "downstream rows").history)
    require_between("downstream rows", args, 0, 0.9, "apart")
    require(
        (args.labelled is not None) == (args.apart > 0),
        "--labelled FILE and --apart SHARE go together: the users set apart are those of the file. Give both or none.",
    )
    require_writable(args.out, args.labelled)
    pipeline, logs = opened(args)
    asked = question_rows(logs, pipeline.config, AdsTask(args.task), view_of, apart=args.apart)
    result = {"out": str(args.out), "rows": _write_lines(args.out, asked)}
    if args.labelled is not None:
        labelled = labelled_rows(logs, pipeline.config, view_of, apart=args.apart)
        result |= {"labelled": str(args.labelled), "labelled_rows": _write_lines(args.labelled, labelled)}
    if args.json:
        print(json.dumps(result))
        return 0
    print(f"{result['rows']:,} rows to answer in {args.out}")
    if args.labelled is not None:
        print(f"{result['labelled_rows']:,} rows to fine-tune on in {args.labelled}")
    return 0


def _write_lines(file: Path, rows: Any) -> int:
    from conversion.atomic_file import write_small

    lines = [json.dumps(row.as_dict(), ensure_ascii=False) for row in rows]
    write_small(file, "".join(f"{line}\n" for line in lines))
    return len(lines)


def _features(args: argparse.Namespace) -> int:
    from megatron_ads.config.downstream import load_features
    from megatron_ads.disk import require_writable
    from megatron_ads.downstream.features import make_features, write_features
    from megatron_ads.downstream.product_codes import faiss_module
    from megatron_ads.downstream.user_answers import read_user_answers

    config = load_features(args.overrides, "downstream features")
    require_writable(args.out)
    faiss_module()  # before the work that it is needed for
    read = read_user_answers(args.rows, args.answers)
    pipeline, logs = opened(args)
    features = make_features(read.answers, logs, pipeline.config, config)
    write_features(args.out, features)
    result = {
        "out": str(args.out),
        "rows": len(features),
        "unanswered": read.unanswered,
        "unreadable": dict(read.unreadable.most_common()),
        "with_advertisers": sum(bool(one.advertisers) for one in features),
        "with_interests": sum(bool(one.interests) for one in features),
        "different_codes": len({one.codes for one in features}),
        "with_similar_user": sum(one.similar_user is not None for one in features),
    }
    if args.json:
        print(json.dumps(result))
        return 0
    for name in ("rows", "unanswered", "with_advertisers", "with_interests", "different_codes", "with_similar_user"):
        print(f"{name.replace('_', ' '):<20}{result[name]:>10,}")
    for reason, count in read.unreadable.most_common():
        print(f"{'unreadable, ' + reason:<20}{count:>10,}")
    print(f"written to {args.out}")
    return 0


def run_feature_evaluation(args: argparse.Namespace) -> int:
    """Carry out `evaluate --features`."""
    from megatron_ads.downstream.candidate_scores import candidate_scores
    from megatron_ads.downstream.feature_scores import feature_scores
    from megatron_ads.downstream.feature_tables import feature_tables
    from megatron_ads.downstream.features import read_features
    from megatron_ads.errors import require_at_least

    require_at_least("downstream evaluate", args, 1, "seeds")
    seeds = _SEEDS if args.seeds is None else args.seeds
    features = read_features(args.features)
    pipeline, logs = opened(args)
    scores = {
        "digest": pipeline.digest,
        "ranking": feature_scores(pipeline, logs, features, seeds=seeds),
        "retrieval": candidate_scores(pipeline, logs, features, objectives=args.objectives),
    }
    print(json.dumps(scores) if args.json else "\n".join(feature_tables(scores)))
    return 0
