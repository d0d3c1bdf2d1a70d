"""`megatron-ads data preview`: see rows as the model sees them before anything is trained on them."""

import argparse
import json
import os
import sys
import tempfile
from dataclasses import asdict
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_ads.config.data import DataConfig, RowVariant, SourceConfig
    from megatron_ads.data.chat import ChatTokenizer
    from megatron_ads.data.preview import RowPreview
    from megatron_ads.data.rows import ChatRow

Subparsers = Any  # argparse names its type argparse._SubParsersAction

_DESCRIPTION = """Show rows as the model sees them: chat template rendered, tokens counted, and what carries loss in
green, or between [[ and ]] where there are no colours. Then how long rows are, and which would be left out and why.

    megatron-ads data preview --task ad_user_relevance
    megatron-ads data preview --task next_advertiser --rows 1 --tokenizer DeepSeek-V2-Lite --seq-length 2048
    megatron-ads data preview --task next_advertiser --variant choose_one
    megatron-ads data preview --source esci --rows 5
    megatron-ads data preview --source rows.jsonl --json
    megatron-ads data preview --recipe sft/quickstart data=esci

Without --tokenizer, tokens are those of the small checkpoint that `megatron-ads demo-model` writes."""

_REHEARSAL_VOCABULARY = 1536
_READABLE_KINDS = ("builtin", "esci", "gsm8k", "next_brand")
"""Source kinds that need no settings."""


def add_preview(commands: Subparsers) -> None:
    """Declare the subcommand."""
    parser = commands.add_parser(
        "preview",
        help="show rows as the model sees them",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--task", metavar="T", help="rows of this task; needed by the simulator")
    parser.add_argument(
        "--variant", metavar="V", help="ask the rows another way: yes_no, choose_one, list_ranking or several_forms"
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--source",
        metavar="S",
        help=f"{', '.join(_READABLE_KINDS)}, or a .jsonl file of chat rows (default: the simulator)",
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
    parser.set_defaults(run_data=run_preview)


def run_preview(args: argparse.Namespace) -> int:
    """Print the rows and the summary; return 0.

    Raises:
        ConfigError: If a setting is impossible.
        DataError: If there are no rows of the task.
    """
    from megatron_ads.data.preview import preview_row, render_preview, render_summary, summarise
    from megatron_ads.tasks.row_checks import check_rows

    _check(args)
    data = _data(args)
    name, rows = _read_rows(args, data)
    tokenizer = _tokenizer(args.tokenizer)
    checked = check_rows(rows)
    previews = [preview_row(row, tokenizer) for row in checked.rows[: args.rows]]
    summary = summarise(checked, tokenizer, seq_length=args.seq_length or data.seq_length)
    if args.json:
        shown_rows = [_as_json(preview) for preview in previews]
        print(json.dumps({"source": name, "shown": shown_rows, **asdict(summary)}, ensure_ascii=False))
        return 0
    coloured = sys.stdout.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
    texts = [render_preview(preview, coloured=coloured, whole=args.whole) for preview in previews]
    print("\n\n".join([f"Rows of: {name}", *texts, render_summary(summary)]))
    return 0


def _check(args: argparse.Namespace) -> None:
    from megatron_ads.errors import ConfigError

    for option, least in (("rows", 0), ("sample", 1), ("seq_length", 2), ("seed", 0)):
        given = getattr(args, option)
        if given is not None and given < least:
            raise ConfigError(f"--{option.replace('_', '-')} is {given}; it must be at least {least}.")
    if args.overrides and args.recipe is None:
        raise ConfigError(f"{args.overrides[0]!r} has no effect without --recipe. Name the recipe that it changes.")


def _read_rows(args: argparse.Namespace, data: "DataConfig") -> "tuple[str, list[ChatRow]]":
    """Return what the rows are, and up to ``--sample`` of them from all sources in turn, of ``--task`` if given."""
    from megatron_ads.data.sources import describe_source, read_source
    from megatron_ads.errors import DataError
    from megatron_ads.tasks.variants import ask_as

    sources = [read_source(source, seed=data.seed) for source in data.sources]
    rows = [row for turn in zip_longest(*sources) for row in turn if row is not None]
    name = ", ".join(map(describe_source, data.sources))
    if args.task is not None and (args.recipe or args.source):
        tasks = sorted({row.task for row in rows})
        rows = [row for row in rows if row.task == args.task]
        if not rows:
            raise DataError(f"no row of {name} is of task {args.task!r}; they are of {', '.join(tasks)}.")
    if args.variant is not None:
        rows, name = ask_as(rows, _variant(args.variant)), f"{name}, asked as {args.variant}"
    return name, rows[: args.sample]


def _data(args: argparse.Namespace) -> "DataConfig":
    """Return the recipe's data section, or one that stands for the options."""
    from megatron_ads.config.data import DataConfig
    from megatron_ads.config.recipes import load_recipe

    if args.recipe is not None:
        data = load_recipe(args.recipe, args.overrides, sections=["data"]).data
        data.check()
        return data
    return DataConfig(sources=[_source(args)], seed=args.seed)


def _source(args: argparse.Namespace) -> "SourceConfig":
    """Return the source that the options name."""
    from megatron_ads.config.data import AdsTask, SourceConfig, SourceKind
    from megatron_ads.errors import ConfigError

    if args.source is None:
        if args.task not in set(AdsTask):
            raise ConfigError(f"--task is {args.task}; the simulator draws {', '.join(AdsTask)}.")
        return SourceConfig(kind=SourceKind.simulator, task=AdsTask(args.task), rows=args.sample)
    if args.source.endswith(".jsonl"):
        return SourceConfig(kind=SourceKind.jsonl, path=args.source)
    if args.source not in _READABLE_KINDS:
        raise ConfigError(
            f"--source is {args.source!r}; it is one of {', '.join(_READABLE_KINDS)}, or a .jsonl file of chat rows. "
            "Other sources take settings: put them into a recipe and preview that with --recipe."
        )
    return SourceConfig(kind=SourceKind(args.source))


def _variant(name: str) -> "RowVariant":
    from megatron_ads.config.data import RowVariant
    from megatron_ads.errors import ConfigError

    if name not in set(RowVariant):
        raise ConfigError(f"--variant is {name}; known: {', '.join(RowVariant)}.")
    return RowVariant(name)


def _tokenizer(folder: Path | None) -> "ChatTokenizer":
    from megatron_ads.data.chat import load_tokenizer
    from megatron_ads.data.demo_tokenizer import write_tokenizer

    if folder is not None:
        return load_tokenizer(folder)
    with tempfile.TemporaryDirectory() as temporary:
        write_tokenizer(Path(temporary), _REHEARSAL_VOCABULARY)
        return load_tokenizer(Path(temporary))


def _as_json(preview: "RowPreview") -> dict[str, Any]:
    row = preview.row
    return {
        "id": row.id,
        "task": row.task,
        "group": row.group,
        "label": row.label,
        "weight": row.weight,
        "tokens_without_loss": preview.tokens(in_loss=False),
        "tokens_with_loss": preview.tokens(in_loss=True),
        "spans": [asdict(span) for span in preview.spans],
    }
