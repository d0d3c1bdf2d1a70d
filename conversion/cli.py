"""The ``convert`` and ``verify`` subcommands of ``megatron-ads``.

Exit status: 0 done, 1 ``verify`` found a difference, 2 the request could not be carried out.
"""

import argparse
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_ads.cli import Subparsers
from megatron_ads.errors import ConversionError

if TYPE_CHECKING:
    from conversion.convert import ConversionReport, Target
    from conversion.verify import Verification

_TO_MEGATRON_EXAMPLES = """\
examples:
  megatron-ads convert to-megatron DeepSeek-R1 r1-shards --pp 31 --ep 8 --last-stage-layers 1 --workers 8
  megatron-ads convert to-megatron DeepSeek-R1 r1-shards --recipe sft/deepseek_r1_671b_248gpu --dry-run
  megatron-ads convert to-megatron DeepSeek-R1 r1-dist --format torch_dist

DeepSeek-R1 takes 0.69 TB as published (FP8), and 1.62 TB as BF16 shards for pp 31 x ep 8: 1.37 TB of weights, of which
the dense ones once per expert-parallel rank. A worker takes under 1 GB of memory. --dry-run estimates the time.
"""
_TO_HF_EXAMPLES = """\
examples:
  megatron-ads convert to-hf r1-tuned R1-ads --dtype fp8 --reference DeepSeek-R1 --workers 8
  megatron-ads convert to-hf r1-tuned R1-ads-bf16 --dtype bf16 --max-shard-size 10GB

DeepSeek-R1 takes 1.37 TB in BF16 and 0.69 TB in FP8. With --reference, tensors that training did not change keep the
published codes and scales, byte for byte.
"""
_GROW_EXAMPLES = """\
examples:
  megatron-ads convert grow-vocabulary DeepSeek-R1 R1-sid --sid runs/sid
  megatron-ads convert grow-vocabulary DeepSeek-R1 R1-more --tokens tokens.txt --pad-to-multiple-of 256

Files without embedding and output layer are copied byte for byte, FP8 included. Logits of the old tokens do not change.
model.train_only=new_tokens then trains the new rows alone. Memory does not grow with the model.
"""
_VERIFY_EXAMPLES = """\
examples:
  megatron-ads verify DeepSeek-R1 r1-shards --workers 8
  megatron-ads verify r1-tuned R1-ads --tolerance 0.07 --json
"""
_LAYOUT_OPTIONS = (
    ("tp", "tensor-parallel ranks"),
    ("pp", "pipeline stages"),
    ("vpp", "virtual chunks per stage"),
    ("ep", "expert-parallel ranks"),
    ("etp", "tensor-parallel ranks inside one expert"),
)
_LAYOUT_SETTINGS = (*(axis for axis, _ in _LAYOUT_OPTIONS), "pipeline", "first_stage_layers", "last_stage_layers")


def add_convert_commands(subparsers: Subparsers) -> None:
    """Mount ``convert to-megatron``, ``to-hf`` and ``grow-vocabulary``."""
    summary = "Convert checkpoints between Hugging Face and Megatron-Core, or add tokens to one."
    convert = subparsers.add_parser("convert", help=summary, description=summary)
    directions = convert.add_subparsers(required=True, metavar="DIRECTION")
    to_megatron = _add_command(
        directions,
        "to-megatron",
        _to_megatron,
        summary="Convert a Hugging Face (or any other) checkpoint for a Megatron-Core job.",
        examples=_TO_MEGATRON_EXAMPLES,
    )
    _add_folders(to_megatron, "Hugging Face folder or hub id; shards and torch_dist folders are read too")
    to_megatron.add_argument(
        "--format", choices=("shards", "torch_dist"), default="shards", help="what to write (default shards)"
    )
    to_megatron.add_argument("--layer-spec", choices=("local", "te"), help="whose keys torch_dist has (default local)")
    to_megatron.add_argument("--recipe", help="take the layout from this recipe")
    for axis, meaning in _LAYOUT_OPTIONS:
        to_megatron.add_argument(f"--{axis}", type=positive, help=f"{meaning} (default 1)")
    to_megatron.add_argument("--pipeline", help='layers of every chunk, such as "Et|(tt|)*29tmL"')
    to_megatron.add_argument("--first-stage-layers", type=int, help="decoder layers of the first stage")
    to_megatron.add_argument("--last-stage-layers", type=int, help="decoder layers of the last stage")
    to_hf = _add_command(
        directions,
        "to-hf",
        _to_hf,
        summary="Export a Megatron-Core checkpoint to a Hugging Face folder.",
        examples=_TO_HF_EXAMPLES,
    )
    _add_folders(to_hf, "shards or torch_dist folder, or a training checkpoint; Hugging Face folders are read too")
    to_hf.add_argument("--dtype", choices=("stored", "fp32", "bf16", "fp8"), default="stored", help="default: stored")
    to_hf.add_argument("--reference", metavar="HF_DIR", help="keep this checkpoint's bytes where values are unchanged")
    to_hf.add_argument("--max-shard-size", type=parse_bytes, help="largest file (default 5GB)")
    grow = _add_command(
        directions,
        "grow-vocabulary",
        _grow_vocabulary,
        summary="Add tokens to a Hugging Face checkpoint: tokenizer, embedding and output layer.",
        examples=_GROW_EXAMPLES,
    )
    _add_folders(grow, "Hugging Face folder or hub id")
    tokens = grow.add_mutually_exclusive_group(required=True)
    tokens.add_argument("--tokens", type=Path, metavar="FILE", help="a token a line")
    tokens.add_argument("--sid", type=Path, metavar="DIR", help="a token for each code of what `sid fit` wrote")
    grow.add_argument(
        "--pad-to-multiple-of", type=positive, default=128, metavar="N", help="rows of the vocabulary (default 128)"
    )
    grow.add_argument(
        "--noise", type=_tolerance, default=0.1, metavar="X", help="on new rows, in standard deviations (default 0.1)"
    )
    grow.add_argument("--seed", type=int, default=0, help="of the noise (default 0)")


def add_verify_command(subparsers: Subparsers) -> None:
    """Mount ``verify``."""
    summary = "Compare every weight of two checkpoints of any formats, exactly."
    verify = _add_command(subparsers, "verify", _verify, summary=summary, examples=_VERIFY_EXAMPLES)
    verify.add_argument("a", metavar="A", help="Hugging Face, shards or torch_dist folder")
    verify.add_argument("b", metavar="B", help="another of any format")
    verify.add_argument(
        "--tolerance", type=_tolerance, default=0.0, help="largest |a - b| that is allowed (default 0: bit for bit)"
    )


def _add_command(
    subparsers: Subparsers, name: str, run: Callable[[argparse.Namespace], int], *, summary: str, examples: str
) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = subparsers.add_parser(
        name, help=summary, description=summary, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    command.set_defaults(run=run)
    command.add_argument("--json", action="store_true", help="print the result as JSON")
    command.add_argument("--workers", type=positive, default=1, help="parallel processes (default 1)")
    return command


def _add_folders(command: argparse.ArgumentParser, source: str) -> None:
    command.add_argument("source", help=source)
    command.add_argument("target", type=Path, help="folder to write; empty or absent")
    command.add_argument("--resume", action="store_true", help="continue an interrupted conversion into this folder")
    command.add_argument("--dry-run", action="store_true", help="print what it would take and write nothing")


def positive(text: str) -> int:
    """Read an argument that counts something: a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _tolerance(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 0")
    return value


def parse_bytes(text: str) -> int:
    """Return the bytes that ``500MB``, ``5GB`` or ``5GiB`` mean."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(k|M|G|T)?(i)?B?", text, re.IGNORECASE)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 500MB, 5GB or 5GiB")
    exponent = " kmgt".index((match[2] or " ").lower())
    return int(float(match[1]) * (1024 if match[3] else 1000) ** exponent)


def _to_megatron(args: argparse.Namespace) -> int:
    from conversion.convert import lay_out  # imports torch, so not at the top: --help stays instant
    from conversion.layer_specs import LayerSpec
    from conversion.sources import local_folder, open_source
    from conversion.to_shards import ShardsTarget
    from conversion.to_torch_dist import TorchDistTarget
    from megatron_ads.config.model import LayoutConfig
    from megatron_ads.config.recipes import load_layout

    if args.format == "torch_dist":
        _refuse(args, ("recipe", *_LAYOUT_SETTINGS), "torch_dist is the same for every layout")
        source = open_source(local_folder(args.source))
        return _carry_out(args, TorchDistTarget(source, args.target, LayerSpec(args.layer_spec or "local")))
    _refuse(args, ("layer_spec",), "shards have the same names for every layer spec")
    source = open_source(local_folder(args.source))
    # The layout of the recipe, overridden by the other options.
    sizes = load_layout(args.recipe) if args.recipe else LayoutConfig()
    for name in _LAYOUT_SETTINGS:
        if getattr(args, name) is not None:
            setattr(sizes, name, getattr(args, name))
    return _carry_out(args, ShardsTarget(source, args.target, lay_out(source.shape, sizes)))


def _to_hf(args: argparse.Namespace) -> int:
    from conversion.sources import local_folder, open_source
    from conversion.to_hf import DEFAULT_SHARD_BYTES, ExportDtype, HfTarget
    from conversion.to_reference import reference_target

    dtype = ExportDtype(args.dtype)
    if args.reference is None:
        size = DEFAULT_SHARD_BYTES if args.max_shard_size is None else args.max_shard_size
        return _carry_out(args, HfTarget(open_source(local_folder(args.source)), args.target, dtype, size))
    _refuse(args, ("max_shard_size",), "the files are those of --reference")
    source = open_source(local_folder(args.source))
    return _carry_out(args, reference_target(source, args.target, local_folder(args.reference), dtype))


def _grow_vocabulary(args: argparse.Namespace) -> int:
    from conversion.grow_vocabulary import GrownTarget, Growth, read_tokens
    from conversion.sources import local_folder, open_source

    tokens = read_tokens(args.tokens or args.sid / "tokens.txt")
    growth = Growth(tokens=tokens, pad_to_multiple_of=args.pad_to_multiple_of, noise=args.noise, seed=args.seed)
    return _carry_out(args, GrownTarget(open_source(local_folder(args.source)), args.target, growth))


def _refuse(args: argparse.Namespace, settings: Sequence[str], reason: str) -> None:
    """Refuse options that were given and cannot take effect."""
    if given := [f"--{name.replace('_', '-')}" for name in settings if getattr(args, name) is not None]:
        raise ConversionError(f"{', '.join(given)} cannot take effect: {reason}. Leave it out.")


def _carry_out(args: argparse.Namespace, target: "Target") -> int:
    import torch

    from conversion.convert import Execution, convert
    from conversion.plan import dry_run

    if args.dry_run:
        expected = dry_run(target.plan(), workers=args.workers)
        print(json.dumps(asdict(expected)) if args.json else expected)
        return 0 if expected.fits else 2
    torch.set_num_threads(1)  # --workers is the parallelism; threads in each would compete
    how = Execution(workers=args.workers, resume=args.resume, progress=not args.json)
    report = convert(target, how)
    print(json.dumps(asdict(report)) if args.json else _describe(report, args.target))
    return 0


def _describe(report: "ConversionReport", target: Path) -> str:
    rate = report.written_bytes / max(report.seconds, 1e-9) / 1e9
    lines = [
        f"{report.files} files in {target}: {report.written_bytes / 1e9:.2f} GB written in {report.seconds:.1f} s "
        f"({rate:.2f} GB/s){f', {report.files_kept} kept from the earlier run' if report.files_kept else ''}"
    ]
    if report.requantized:
        worst = max(report.requantized, key=lambda name: report.requantized[name])
        lines.append(
            f"{len(report.requantized)} weights changed and were quantised again, largest relative error "
            f"{report.requantized[worst]:.3g} in {worst}"
        )
    if report.left_behind:
        lines.append(f"not carried over: {', '.join(report.left_behind)}")
    return "\n".join(lines)


def _verify(args: argparse.Namespace) -> int:
    import torch

    from conversion.sources import local_folder
    from conversion.verify import verify

    torch.set_num_threads(1)
    a, b = local_folder(args.a), local_folder(args.b)
    result = verify(a, b, tolerance=args.tolerance, workers=args.workers, progress=not args.json)
    print(json.dumps(asdict(result) | {"equal": result.equal}) if args.json else _table(result))
    return 0 if result.equal else 1


_ROWS_SHOWN = 50


def _table(result: "Verification") -> str:
    what = f"{result.compared:,} tensors, {result.compared_bytes / 1e9:.2f} GB compared in {result.seconds:.1f} s"
    if result.equal:
        return f"equal: {what}"
    rows = [("what", "name", "first at", "largest", "detail")]
    for difference in result.differences[:_ROWS_SHOWN]:
        index = "" if difference.first_index is None else str(list(difference.first_index))
        largest = "" if difference.largest is None else f"{difference.largest:.3g}"
        rows.append((str(difference.kind), difference.name, index, largest, difference.detail))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[4]]) for row in rows
    ]
    hidden = len(result.differences) - _ROWS_SHOWN
    if hidden > 0:
        lines.append(f"and {hidden} more; --json lists them all")
    return "\n".join([*lines, f"{len(result.differences)} differences: {what}"])
