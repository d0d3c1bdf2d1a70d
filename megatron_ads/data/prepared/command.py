"""`megatron-ads data prepare`: read, check and tokenize the rows of a recipe before a job needs them."""

import argparse
import json
import time
from pathlib import Path
from typing import Any

from megatron_ads.config.recipes import load_recipe
from megatron_ads.errors import ConfigError

_PREPARE = """Read, check and tokenize the rows of a recipe once, in parallel, into memory-mapped files that jobs with
the same rows start from in seconds. A job does it by itself; large corpora are better prepared before.

    megatron-ads data prepare --recipe sft/deepseek_r1_671b_248gpu model.load=R1-shards \\
      'data.sources=[{kind: jsonl, path: rows}]' data.prepared_dir=prepared

Interrupted, the same command continues. Changed files, settings, tokenizers and versions make another corpus; what a
job does not use any more can be deleted."""


def add_prepare(commands: Any) -> None:
    """Declare the subcommand."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "prepare",
        help="read, check and tokenize rows once, for jobs of any size",
        description=_PREPARE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--recipe", required=True, metavar="R", help="a name under recipes/, or a YAML file")
    parser.add_argument("--tokenizer", type=Path, metavar="HF", help="folder with tokenizer.json (default: model.load)")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: data.prepare_workers, or cores)")
    parser.add_argument("--json", action="store_true", help="print the result as one line of JSON")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace the recipe's")
    parser.set_defaults(run_data=_prepare)


def _prepare(args: argparse.Namespace) -> int:
    from megatron_ads.data.prepared.corpus_record import CorpusRecord
    from megatron_ads.data.prepared.prepare import LoggedAdvance, prepare, prepared_directory

    if args.workers is not None and args.workers < 1:
        raise ConfigError(f"--workers is {args.workers}; it must be at least 1.")
    config = load_recipe(
        args.recipe, args.overrides, sections=["data", "log", *(["model"] if args.tokenizer is None else [])]
    )
    started = time.monotonic()
    folder = prepare(
        config.data,
        args.tokenizer or _tokenizer_of(Path(config.model.load)),
        prepared_directory(config.data, Path(config.log.dir)),
        workers=args.workers or config.data.prepare_workers,
        timeout_seconds=config.data.prepare_timeout_seconds,
        on_advance=LoggedAdvance().show,
    )
    record, seconds = CorpusRecord.read(folder), time.monotonic() - started
    record.tell(config.data.sources)
    if args.json:
        print(json.dumps({"folder": str(folder), "rows": record.rows, "tokens": record.tokens, "seconds": seconds}))
    else:
        print(f"{record.rows:,} rows, {record.tokens:,} tokens in {folder} ({seconds:.0f} s)")
    return 0


def _tokenizer_of(load: Path) -> Path:
    from conversion.sources import open_source

    return open_source(load).side_folder
