"""Check that Megatron-Core computes what transformers computes, on a checkpoint of any supported model.

The weights of one layer at a time are in memory, and the activations of all prompts: a model larger than memory is
checked on one machine. Writes parity.json and parity.html.

  megatron-ads parity --hf DeepSeek-R1 --layout sft/deepseek_r1_671b_248gpu --precision bf16
  megatron-ads parity --hf R1-ads --megatron r1-shards --prompts prompts.txt

Exit status: 0 every rung that was run passed, 1 one failed, 2 the request could not be carried out.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conversion.cli import positive
from megatron_ads.disk import make_writable_folder, require_writable

if TYPE_CHECKING:
    from torch import Tensor

    from conversion.rank_files import ShardsLayout
    from megatron_ads.architecture import ModelShape
    from megatron_ads.parity.verdict import RungResult, StreamResult

_SIZES = ("tp", "pp", "vpp", "ep", "etp")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--hf", required=True, metavar="DIR", help="Hugging Face folder or hub id; the reference")
    parser.add_argument("--megatron", metavar="DIR", help="what our side loads: any checkpoint (default: --hf itself)")
    parser.add_argument(
        "--layout", default="", help="recipe name, or sizes such as tp=2,ep=8,pp=4: whose slices are cut and joined"
    )
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="one prompt per line (default: random tokens)")
    parser.add_argument("--tokens", type=positive, default=256, help="maximum tokens of a prompt (default 256)")
    parser.add_argument("--rows", type=positive, default=2, help="random prompts (default 2)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of both sides (default fp32)")
    parser.add_argument("--out", type=Path, default=Path("parity"), help="folder to write into (default ./parity)")
    parser.add_argument("--json", action="store_true", help="print parity.json instead of a summary")


def run(args: argparse.Namespace) -> int:
    """Carry out the check."""
    from conversion.hf_folder import open_hf_folder
    from conversion.sources import local_folder, open_source
    from megatron_ads.config.model import Precision
    from megatron_ads.parity.verdict import LIMITS, names_rung, rungs

    started = time.monotonic()
    reference = open_hf_folder(local_folder(args.hf))
    source = open_source(Path(args.megatron) if args.megatron else reference.path)
    require_same_model(reference.shape, source.shape, hf=f"--hf {args.hf}", megatron=f"--megatron {args.megatron}")
    layout = _layout(source.shape, args.layout)
    limits, prompts = LIMITS[Precision(args.precision)], _prompts(args, reference)
    make_writable_folder(args.out)
    require_writable(args.out / "parity.json", args.out / "parity.html")
    names = names_rung(source, layout)
    comparison, outside = _stream(args.precision, prompts, source, reference, layout, limits)
    results = rungs(names, comparison, outside, limits)
    facts = _facts(args, layout, time.monotonic() - started)
    report = _write(args.out, results, comparison, limits, facts)
    print(json.dumps(report) if args.json else summary(results, args.out))
    return 1 if any(one.passed is False for one in results) else 0


def require_same_model(reference: "ModelShape", ours: "ModelShape", *, hf: object, megatron: object) -> None:
    """Refuse two checkpoints whose models differ, with a ConversionError that names the first setting that does."""
    from megatron_ads.errors import ConversionError

    if reference != ours:
        name, (expected, found) = next(iter(reference.differences(ours).items()))
        raise ConversionError(
            f"{megatron} is another model than {hf}: {name} is {found} instead of {expected}. Give checkpoints of one "
            "model."
        )


def require_memory(shape: "ModelShape", tokens: int, *, weights: int = 0) -> None:
    """Refuse a row of so many tokens that its attention scores or its logits do not fit with ``weights`` bytes.

    Raises:
        ConfigError: If the estimate is above what is free: three copies of the scores of every head, as attention
            without a fused kernel keeps them in FP32, or two logits and their probabilities in FP64.
    """
    from megatron_ads.errors import ConfigError
    from megatron_ads.runtime.device import free_memory_bytes

    needed = weights + max(12 * shape.num_heads * tokens**2, 40 * tokens * shape.vocab_size)
    if needed > (free := free_memory_bytes()):
        raise ConfigError(
            f"--tokens {tokens} needs about {needed / 1e9:.1f} GB of memory ({shape.num_heads} heads, a vocabulary of "
            f"{shape.vocab_size}); {free / 1e9:.1f} GB are free. Give a smaller --tokens, or use a larger machine."
        )


def _layout(shape: "ModelShape", text: str) -> "ShardsLayout":
    from conversion.convert import lay_out
    from megatron_ads.config.model import LayoutConfig
    from megatron_ads.config.recipes import load_layout
    from megatron_ads.errors import ConfigError

    if text and "=" not in text:
        return lay_out(shape, load_layout(text))
    sizes = LayoutConfig()
    for word in filter(None, text.split(",")):
        name, _, value = word.strip().partition("=")
        if name not in _SIZES or not value.isdecimal():
            raise ConfigError(
                f"--layout has {word!r}; write sizes of {', '.join(_SIZES)} such as tp=2,ep=8, or a recipe's name."
            )
        setattr(sizes, name, int(value))
    return lay_out(shape, sizes)


def _stream(
    number_format: str, prompts: "list[Tensor]", source: Any, reference: Any, layout: "ShardsLayout", limits: Any
) -> "tuple[StreamResult, list[str]]":
    """Return the comparison of the layers, and the parameters outside of them that are not the stored bits."""
    import torch

    from conversion.names import outside_parameters
    from megatron_ads.config.model import LayerSpecChoice, Precision
    from megatron_ads.layout import ParallelLayout
    from megatron_ads.progress import Progress
    from megatron_ads.runtime import process_groups
    from megatron_ads.runtime.device import seed_everything

    process_groups.start(ParallelLayout(world=1))
    try:
        from megatron_ads.models.settings import ModelSettings, resolve_layer_spec
        from megatron_ads.parity.stream import Stream, changed_parameters

        seed_everything(1)
        precision = Precision(number_format)
        settings = ModelSettings(spec=resolve_layer_spec(LayerSpecChoice.auto), precision=precision)
        dtype = torch.bfloat16 if precision is Precision.bf16 else torch.float32
        stream = Stream(source, reference, settings, dtype=dtype, limits=limits)
        count = source.shape.num_layers + source.shape.mtp_layers
        with Progress(count, description="comparing", unit="layer") as progress:
            comparison = stream.compare(
                prompts, layout.layout, lambda result: progress.update(difference=result.difference)
            )
        outside = changed_parameters(outside_parameters(source.shape), source, reference, layout.layout)
        return comparison, list(outside)
    finally:
        process_groups.stop()


def _prompts(args: argparse.Namespace, reference: Any) -> "list[Tensor]":
    if args.prompts is None:
        require_memory(reference.shape, args.tokens)
        return random_prompts(reference.shape.vocab_size, count=args.rows, tokens=args.tokens)
    prompts = read_prompts(args.prompts, reference.path, max_tokens=args.tokens)
    require_memory(reference.shape, max(map(len, prompts)))
    return prompts


def read_prompts(file: Path, folder: Path, *, max_tokens: int) -> "list[Tensor]":
    """Return a row of tokens for each line of ``file``, cut at ``max_tokens``; ``folder`` has the tokenizer.

    Raises:
        DataError: If the file is missing or empty, or there is no tokenizer.
    """
    import torch

    from megatron_ads.data.chat import load_tokenizer
    from megatron_ads.errors import DataError

    try:
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError as error:
        raise DataError(f"--prompts {file} cannot be read: {error.strerror}.") from None
    if not lines:
        raise DataError(f"--prompts {file} holds no line of text; write one prompt per line.")
    tokenizer = load_tokenizer(folder)
    return [torch.tensor(tokenizer.encode(line)[:max_tokens], dtype=torch.long) for line in lines]


def random_prompts(vocabulary: int, *, count: int, tokens: int, seed: int = 1) -> "list[Tensor]":
    """Return ``count`` rows of random tokens: every embedding and expert has a chance to be used."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocabulary, (tokens,), generator=generator) for _ in range(count)]


def _facts(args: argparse.Namespace, layout: "ShardsLayout", seconds: float) -> dict[str, Any]:
    from megatron_ads.observability.provenance import provenance
    from megatron_ads.runtime.device import peak_memory_bytes

    measured = provenance()
    host = measured["host"]
    return {
        "command": " ".join(["megatron-ads", *sys.argv[1:]]),
        "Hugging Face": str(args.hf),
        "Megatron": str(args.megatron or args.hf),
        "layout": ", ".join(f"{name} {getattr(layout.layout, name)}" for name in ("world", *_SIZES)),
        "precision": args.precision,
        "seconds": round(seconds, 1),
        "peak memory, GiB": round(peak_memory_bytes() / 2**30, 2),
        "processor": f"{host['cpu']}, {host['cores']} cores",
        "accelerators": ", ".join(host["gpus"]) or "none",
        "versions": ", ".join(f"{name} {version}" for name, version in measured["versions"].items() if version),
        "revision": measured["revision"] or "unknown: not a git checkout",
    }


def _write(
    folder: Path, results: "list[RungResult]", comparison: "StreamResult", limits: Any, facts: dict[str, Any]
) -> dict[str, Any]:
    from megatron_ads.parity.verdict import render

    report = {
        "passed": all(one.passed is not False for one in results),
        "rungs": [asdict(one) for one in results],
        "limits": asdict(limits),
        "logits": asdict(comparison.logits),
        "layers": [asdict(one) for one in comparison.layers],
        **facts,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "parity.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    page = render(f"Parity of {Path(facts['Hugging Face']).name}", results, comparison, limits, facts)
    (folder / "parity.html").write_text(page, encoding="utf-8")
    return report


def summary(results: "list[RungResult]", folder: Path) -> str:
    """Return a line for every rung, and what to look at."""
    words = {True: "passed", False: "FAILED", None: "not run"}
    lines = [f"  {one.rung:2d}  {one.name:<10}  {words[one.passed]:<7}  {one.detail}" for one in results]
    if failed := [f"{one.rung} ({one.name})" for one in results if one.passed is False]:
        lines.append(f"FAILED: rung {', '.join(failed)}; the first is where to look")
    return "\n".join([*lines, f"written to {folder / 'parity.json'} and {folder / 'parity.html'}"])
