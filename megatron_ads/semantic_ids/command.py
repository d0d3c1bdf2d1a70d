"""`megatron-ads sid`: semantic IDs of items, a few codes each that items with similar embeddings share.

    megatron-ads sid fit --items items.jsonl --id item_id --text title --text brand --out runs/sid levels=3 codes=64
    megatron-ads sid fit --items items.parquet --id item_id --vectors vectors.npy --out runs/sid quantizer=rqkmeans
    megatron-ads sid encode --codebook runs/sid --items new.jsonl --id item_id --text title --text brand \\
      --previous runs/sid --out runs/sid-tuesday
    megatron-ads convert grow-vocabulary HF_DIR OUT --sid runs/sid       # the model gets a token for each code

`fit` learns a codebook from items and encodes them; `encode` gives IDs to other items, or to more. Items are embedded
by their texts, or come with vectors. In a recipe, `history: {semantic_ids: runs/sid}` shows the IDs of recent items.
"""

import argparse
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ads.cli import Subparsers

if TYPE_CHECKING:
    from megatron_ads.semantic_ids.codebook import Codebook
    from megatron_ads.semantic_ids.item_table import KnownItems
    from megatron_ads.semantic_ids.items import Items

FIT = """Learn a codebook from the embeddings of items, and give each item its semantic ID.

    megatron-ads sid fit --items items.jsonl --id item_id --text title --text brand --out runs/sid levels=3 codes=64
    megatron-ads sid fit --items items.parquet --id item_id --text title --vectors embedding --out runs/sid

Written to --out:

    codebook.safetensors, codebook.json   the codebook; its version is a digest of its content
    tokens.txt                            a token for every code, which `convert grow-vocabulary` adds to a model
    items.parquet                         item, semantic_id (text), codes (numbers), text
    semantic_ids.txt                      every ID, for `evaluate --names`
    alignment.jsonl                       rows from ID to text and from text to ID, to train the new tokens on
    report.json                           collisions, use of the codes, perplexity, reconstruction error

Settings, such as quantizer, levels, codes and encoder, are described in megatron_ads/config/semantic_ids.py."""

ENCODE = """Give items the semantic IDs of a codebook.

    megatron-ads sid encode --codebook runs/sid --items new.jsonl --id item_id --text title --out runs/sid-tuesday
    megatron-ads sid encode ... --previous runs/sid

--out has the table, alignment rows and report of `sid fit`. Items that --previous has keep their IDs, and all of its
items stay in the table; without it, an item that shares its codes with others may get another last code."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare both subcommands."""
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    fit = _command(commands, "fit", "learn a codebook and encode its items", FIT)
    fit.add_argument("overrides", nargs="*", metavar="key=value", help="settings, such as levels=4 codes=256")
    fit.set_defaults(run_sid=_fit)
    encode = _command(commands, "encode", "encode items with a codebook", ENCODE)
    encode.add_argument("--codebook", type=Path, required=True, metavar="DIR", help="folder that fit wrote")
    encode.add_argument("--previous", type=Path, metavar="DIR", help="folder of IDs that are kept")
    encode.set_defaults(run_sid=_encode)


def run(args: argparse.Namespace) -> int:
    """Carry out the subcommand that was chosen."""
    status: int = args.run_sid(args)
    return status


def _command(commands: Subparsers, name: str, summary: str, description: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=summary, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--items", type=Path, required=True, metavar="PATH", help="JSONL, Parquet or CSV, an item a row"
    )
    parser.add_argument("--id", default="item_id", metavar="COLUMN", help="an item's id in logs (default item_id)")
    parser.add_argument(
        "--text", action="append", default=[], metavar="COLUMN", help="part of an item's text; may be repeated"
    )
    parser.add_argument("--vectors", metavar="FILE|COLUMN", help=".npy file of all vectors, or column of lists")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write; empty or absent")
    parser.add_argument("--json", action="store_true", help="print the report as one line of JSON")
    return parser


def _fit(args: argparse.Namespace) -> int:
    from megatron_ads.config.semantic_ids import load_semantic_ids
    from megatron_ads.data.new_folder import new_folder
    from megatron_ads.semantic_ids.codebook import fit_codebook  # imports torch: keep --help instant
    from megatron_ads.semantic_ids.codebook_folder import save_codebook

    started, config = time.monotonic(), load_semantic_ids(args.overrides, "sid fit")
    with new_folder(args.out) as folder:
        items = _items(args)
        codebook = fit_codebook(items, config)
        version = save_codebook(codebook, folder)
        report = _write_ids(folder, items, codebook, version=version)
    return _show(args, report, started)


def _encode(args: argparse.Namespace) -> int:
    from megatron_ads.data.new_folder import new_folder
    from megatron_ads.semantic_ids.codebook_folder import load_codebook
    from megatron_ads.semantic_ids.item_table import read_known_items

    started = time.monotonic()
    with new_folder(args.out) as folder:
        codebook, version = load_codebook(args.codebook)
        known = read_known_items(args.previous, version=version) if args.previous else None
        report = _write_ids(folder, _items(args), codebook, version=version, known=known)
    return _show(args, report, started)


def _items(args: argparse.Namespace) -> "Items":
    from megatron_ads.errors import require
    from megatron_ads.semantic_ids.items import read_items

    require(
        bool(args.text or args.vectors),
        "Neither --text nor --vectors is given: name the columns of an item's text, or its vectors.",
    )
    return read_items(args.items, id_column=args.id, text_columns=args.text, vectors=args.vectors)


def _write_ids(
    folder: Path, items: "Items", codebook: "Codebook", *, version: str, known: "KnownItems | None" = None
) -> dict[str, Any]:
    from conversion.atomic_file import write_small
    from megatron_ads.semantic_ids.disambiguation import disambiguated
    from megatron_ads.semantic_ids.item_table import write_item_table
    from megatron_ads.semantic_ids.report import measure

    config, earlier = codebook.config, {} if known is None else known.codes
    code_NL, lost = codebook.encode(codebook.vectors(items))
    plain = [tuple(codes) for codes in code_NL.tolist()]
    codes = disambiguated(items.ids, plain, most=config.disambiguation_codes, levels=config.levels, known=earlier)
    report = {"version": version, **measure(code_NL, codes, size=config.codes, lost=lost)}
    report["kept"] = sum(name in earlier for name in items.ids)
    texts = dict(zip(items.ids, items.texts, strict=True))
    table = {**earlier, **dict(zip(items.ids, codes, strict=True))}
    write_item_table(folder, table, ({} if known is None else known.texts) | texts, version=version)
    write_small(folder / "report.json", json.dumps(report, indent=1) + "\n")
    return report


def _show(args: argparse.Namespace, report: dict[str, Any], started: float) -> int:
    from megatron_ads.semantic_ids.report import report_lines

    result = {"out": str(args.out), **report, "seconds": round(time.monotonic() - started, 1)}
    if args.json:
        print(json.dumps(result))
        return 0
    print("\n".join(report_lines(report)))
    print(f"written to {args.out} in {result['seconds']} s, codebook {report['version']}")
    return 0
