"""`megatron-ads data`: make rows and look at them.

megatron-ads data simulate --out simulated --users 100000 --days 35 --seed 0
megatron-ads data preview --task ad_user_relevance
megatron-ads data prepare --recipe sft/quickstart model.load=SHARDS
megatron-ads data cook --recipe cook/simulated --out cooked teacher.url=http://localhost:8000/v1 teacher.model=NAME
"""

import argparse
import json
import os
import sys
import tempfile
from dataclasses import asdict
from glob import has_magic
from importlib import import_module
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ads.config.data import AdsTask, DataConfig, RowVariant, SourceConfig, SourceKind
from megatron_ads.data.prepared.command import add_prepare
from megatron_ads.errors import ConfigError, DataError, MegatronAdsError

if TYPE_CHECKING:
    from megatron_ads.data.chat import ChatTokenizer
    from megatron_ads.data.preview import RowPreview
    from megatron_ads.data.table_proposal import Proposal
    from megatron_ads.rows import ChatRow

Subparsers = Any  # argparse names its type argparse._SubParsersAction


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommands of `megatron-ads data`."""
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_simulate(commands)
    _add_preview(commands)
    add_prepare(commands)
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


def _command(commands: Subparsers, name: str, summary: str, description: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=summary, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    return parser


def _add_simulate(commands: Subparsers) -> None:
    parser = _command(commands, "simulate", "write logs and rows of a simulated ads business", _SIMULATE)
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
    from megatron_ads.data.simulator.folder import Scale, write_simulation
    from megatron_ads.data.simulator.logs import TableFormat

    manifest = write_simulation(
        args.out,
        Scale(users=args.users, days=args.days, seed=args.seed, advertisers=args.advertisers),
        tasks=(args.task or tuple(AdsTask)) if args.rows > 0 else (),
        rows=args.rows,
        form=TableFormat(args.format),
    )
    if args.json:
        print(json.dumps(manifest))
        return 0
    for name, count in manifest["rows_of_tables"].items():
        print(f"{name:<28}{count:>12,} rows")
    for task, written in manifest["tasks"].items():
        scores = ", ".join(f"{name} {score:.3f}" for name, score in written.get("best_reachable", {}).items())
        print(f"{task:<28}{written['rows']:>12,} rows, best reachable: {scores}")
    print(f"written to {args.out}")
    return 0


_PREVIEW = """Show rows as the model sees them: chat template rendered, tokens counted, and what carries loss in
green, or between [[ and ]] where there are no colours. Then how long rows are, and which would be left out and why.

    megatron-ads data preview --task ad_user_relevance
    megatron-ads data preview --task next_advertiser --rows 1 --tokenizer DeepSeek-V2-Lite --seq-length 2048
    megatron-ads data preview --task next_advertiser --variant choose_one
    megatron-ads data preview --source esci --rows 5
    megatron-ads data preview --source rows.jsonl --json
    megatron-ads data preview --source pairs.csv        # a table: its columns, and a mapping to paste into a recipe
    megatron-ads data preview --recipe sft/quickstart data=esci

Without --tokenizer, tokens are those of the small checkpoint that `megatron-ads demo-model` writes."""

_DEMO_VOCABULARY = 1536
_READABLE_KINDS = ("builtin", "esci", "gsm8k", "next_brand")
"""Source kinds that need no settings."""


def _add_preview(commands: Subparsers) -> None:
    parser = _command(commands, "preview", "show rows as the model sees them", _PREVIEW)
    parser.add_argument("--task", metavar="T", help="rows of this task; needed by the simulator")
    parser.add_argument(
        "--variant", metavar="V", help="ask the rows another way: yes_no, choose_one, list_ranking or several_forms"
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--source",
        metavar="S",
        help=f"{', '.join(_READABLE_KINDS)}, a .jsonl file of chat rows, or a table: a .csv, .tsv, .jsonl or .parquet "
        "file, a folder or a glob (default: the simulator)",
    )
    where.add_argument("--recipe", metavar="R", help="the sources of a recipe: a shipped name or a file")
    parser.add_argument("--rows", type=int, default=3, metavar="N", help="how many to show (default 3)")
    parser.add_argument("--sample", type=int, default=500, metavar="N", help="how many to read and count (default 500)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of generated rows (default 0)")
    parser.add_argument("--tokenizer", type=Path, metavar="HF", help="Hugging Face folder with tokenizer.json")
    parser.add_argument(
        "--seq-length", type=int, metavar="L", help="longest row in tokens (default: the recipe's, or 4096 without one)"
    )
    parser.add_argument("--whole", action="store_true", help="show long texts in full")
    parser.add_argument("--json", action="store_true", help="print everything as one line of JSON")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace the recipe's")
    parser.set_defaults(run_data=_preview)


def _preview(args: argparse.Namespace) -> int:
    from megatron_ads.data.preview import preview_row, render_preview, render_summary, summarise
    from megatron_ads.tasks.row_checks import check_rows

    _check(args)
    proposal = _proposal(args)
    data = _data(args) if proposal is None else DataConfig(sources=[proposal.source], seed=args.seed)
    try:
        name, rows = _read_rows(args, data)
    except MegatronAdsError as error:
        if proposal is None:
            raise
        print(json.dumps(_table_report(proposal)) if args.json else f"{proposal.render()}\nWith this mapping: {error}")
        return 0
    tokenizer = _tokenizer(args.tokenizer, data)
    checked = check_rows(rows)
    previews = [preview_row(row, tokenizer) for row in checked.rows[: args.rows]]
    summary = summarise(checked, tokenizer, seq_length=args.seq_length or data.seq_length)
    if args.json:
        report = {"source": name, "shown": [_as_json(preview) for preview in previews], **asdict(summary)}
        report |= {} if proposal is None else _table_report(proposal)
        print(json.dumps(report, ensure_ascii=False))
        return 0
    coloured = sys.stdout.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
    texts = [render_preview(preview, coloured=coloured, whole=args.whole) for preview in previews]
    columns = [] if proposal is None else [proposal.render()]
    print("\n\n".join([*columns, f"Rows of: {name}", *texts, render_summary(summary)]))
    return 0


def _check(args: argparse.Namespace) -> None:
    for option, least in (("rows", 0), ("sample", 1), ("seq_length", 2), ("seed", 0)):
        given = getattr(args, option)
        if given is not None and given < least:
            raise ConfigError(f"--{option.replace('_', '-')} is {given}; it must be at least {least}.")
    if args.overrides and args.recipe is None:
        given = args.overrides[0]
        hint = "Name the recipe that it changes." if "=" in given else f"Did you mean --source {given}?"
        raise ConfigError(f"{given!r} has no effect without --recipe. {hint}")


def _proposal(args: argparse.Namespace) -> "Proposal | None":
    """Return what the table that ``--source`` names may be; None if it names none."""
    from megatron_ads.data.source_files import TABLES, form_of
    from megatron_ads.data.table_proposal import holds_chat_rows, propose

    if args.source is None or args.source in _READABLE_KINDS:
        return None
    path = Path(args.source)
    if not (path.exists() or has_magic(args.source) or form_of(path) in TABLES) or holds_chat_rows(path):
        return None
    if args.task is not None and args.task not in set(AdsTask):
        raise ConfigError(f"--task is {args.task}; a table can be read as {', '.join(AdsTask)}.")
    return propose(path, None if args.task is None else AdsTask(args.task), rows=args.sample)


def _table_report(proposal: "Proposal") -> dict[str, Any]:
    columns = [{"name": name, "type": kind, "samples": seen} for name, (kind, seen) in proposal.columns.items()]
    return {"columns": columns, "proposal": proposal.settings(), "missing": proposal.missing}


def _read_rows(args: argparse.Namespace, data: DataConfig) -> "tuple[str, list[ChatRow]]":
    """Return what the rows are, and up to ``--sample`` of them from all sources in turn, of ``--task`` if given."""
    from megatron_ads.data.sources import describe_source, read_source
    from megatron_ads.tasks.variants import ask_as

    sources = [read_source(source, seed=data.seed) for source in data.sources]
    rows = [row for turn in zip_longest(*sources) for row in turn if row is not None]
    name = ", ".join(map(describe_source, data.sources))
    if args.task is not None and (args.recipe or data.sources[0].kind not in (SourceKind.simulator, SourceKind.table)):
        tasks = sorted({row.task for row in rows})
        rows = [row for row in rows if row.task == args.task]
        if not rows:
            raise DataError(f"no row of {name} is of task {args.task!r}; they are of {', '.join(tasks)}.")
    if args.variant is not None:
        if args.variant not in set(RowVariant):
            raise ConfigError(f"--variant is {args.variant}; known: {', '.join(RowVariant)}.")
        rows, name = ask_as(rows, RowVariant(args.variant)), f"{name}, asked as {args.variant}"
    return name, rows[: args.sample]


def _data(args: argparse.Namespace) -> DataConfig:
    """Return the recipe's data section, or one with the source that the options name."""
    from megatron_ads.config.recipes import load_job

    if args.recipe is not None:
        data = load_job(args.recipe, args.overrides, sections=["data"]).data
        data.check()
        return data
    if args.source is None:
        if args.task not in set(AdsTask):
            raise ConfigError(f"--task is {args.task}; the simulator draws {', '.join(AdsTask)}.")
        source = SourceConfig(kind=SourceKind.simulator, task=AdsTask(args.task), rows=args.sample)
    elif args.source in _READABLE_KINDS:
        source = SourceConfig(kind=SourceKind(args.source))
    elif Path(args.source).exists() or has_magic(args.source):
        source = SourceConfig(kind=SourceKind.jsonl, path=args.source)
    else:
        raise ConfigError(
            f"--source is {args.source!r}; it is one of {', '.join(_READABLE_KINDS)}, or a .jsonl file of chat rows, "
            "or a table. Other sources take settings: put them into a recipe and preview that with --recipe."
        )
    return DataConfig(sources=[source], seed=args.seed)


def _tokenizer(folder: Path | None, data: DataConfig) -> "ChatTokenizer":
    from megatron_ads.data.chat import load_tokenizer
    from megatron_ads.data.demo_tokenizer import write_tokenizer

    if folder is not None:
        return load_tokenizer(folder, data.template_arguments)
    with tempfile.TemporaryDirectory() as temporary:
        write_tokenizer(Path(temporary), _DEMO_VOCABULARY)
        return load_tokenizer(Path(temporary))


def _as_json(preview: "RowPreview") -> dict[str, Any]:
    shown = {name: getattr(preview.row, name) for name in ("id", "task", "group", "label", "weight")}
    return shown | {
        "tokens_without_loss": preview.tokens(in_loss=False),
        "tokens_with_loss": preview.tokens(in_loss=True),
        "spans": [asdict(span) for span in preview.spans],
    }
