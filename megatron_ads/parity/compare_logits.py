"""`megatron-ads compare-logits`: do transformers and Megatron-Core compute the same from two forms of one model?

    megatron-ads compare-logits RUN/export RUN/hf
    megatron-ads compare-logits RUN/export RUN/hf --tokens 512 --json

One process on this machine, in FP32. Exit status 1 if any logit differs by the limit or more.
"""

import argparse
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conversion.cli import positive
from megatron_ads.errors import ConversionError
from megatron_ads.parity.command import require_memory, require_same_model

if TYPE_CHECKING:
    from torch import Tensor

LIMIT = 1e-5
"""Largest difference of any logit: two orders of summation in FP32 differ by about 1e-6 on logits of size 1 to 10."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `megatron-ads compare-logits`."""
    parser.add_argument("megatron", type=Path, metavar="MEGATRON", help="weights to run in Megatron-Core, any format")
    parser.add_argument("hf", type=Path, metavar="HF", help="Hugging Face folder to run in transformers")
    parser.add_argument("--tokens", type=positive, default=256, help="length of the random sequence (default 256)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random sequence")
    parser.add_argument("--json", action="store_true", help="print the result as one line of JSON")


def run(args: argparse.Namespace) -> int:
    """Print the comparison; return 0 if it is within ``LIMIT``, else 1."""
    result = compare_logits(args.megatron, args.hf, tokens=args.tokens, seed=args.seed)
    if args.json:
        print(json.dumps(result))
    else:
        verdict = "the same" if result["passed"] else "NOT the same"
        print(
            f"{verdict}: largest difference {result['max_abs_difference']:.2e} (limit {LIMIT:.0e}) over "
            f"{result['tokens']} tokens; largest logit {result['max_abs_logit']:.2f}; the same best token "
            f"{result['same_argmax']:.1%} of the time"
        )
    return 0 if result["passed"] else 1


def compare_logits(megatron: Path, hf: Path, *, tokens: int, seed: int) -> dict[str, Any]:
    """Run one random sequence through both and return the differences.

    Raises:
        ConversionError: If ``hf`` is no Hugging Face folder or is FP8, which transformers does not run on a CPU, or if
            the two are not one model.
        ConfigError: If the memory does not suffice.
    """
    import torch

    from conversion.hf_folder import open_hf_folder
    from conversion.names import parameters
    from conversion.sources import open_source
    from megatron_ads.parity.reference import load_model

    reference, shape = open_hf_folder(hf), open_source(megatron).shape
    require_same_model(reference.shape, shape, hf=hf, megatron=megatron)
    if "quantization_config" in reference.config:
        raise ConversionError(
            f"{hf} is stored in FP8, which transformers runs on a GPU only. Export it once more with --dtype bf16 and "
            "compare that; `megatron-ads verify` checks that the two hold the same weights."
        )
    weights = sum(math.prod(parameter.shape) for parameter in parameters(shape).values())
    require_memory(shape, tokens, weights=4 * weights)
    tokens_BS = torch.randint(0, shape.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        theirs = load_model(hf, torch.float32)(tokens_BS).logits  # of transformers, (B, S, vocabulary)
    ours = megatron_logits(megatron, tokens_BS)
    difference = (ours - theirs).abs().max().item()
    return {
        "tokens": tokens,
        "max_abs_difference": difference,
        "max_abs_logit": theirs.abs().max().item(),
        "same_argmax": (ours.argmax(-1) == theirs.argmax(-1)).float().mean().item(),
        "passed": difference < LIMIT,
    }


def megatron_logits(folder: Path, tokens_BS: "Tensor") -> "Tensor":
    """Return Megatron-Core's logits ``(B, S, vocabulary)`` in FP32, the whole model in this process."""
    import torch

    from conversion.layer_specs import LayerSpec
    from conversion.sources import open_source
    from megatron_ads.config.model import Precision
    from megatron_ads.layout import ParallelLayout, place_layers
    from megatron_ads.runtime import process_groups

    layout, source = ParallelLayout(world=1), open_source(folder)
    process_groups.start(layout, create_gloo_process_groups=False)
    try:
        from megatron_ads.models.build import build_chunks
        from megatron_ads.models.settings import ModelSettings
        from megatron_ads.models.weights import load_weights
        from megatron_ads.runtime.device import seed_everything

        seed_everything(0)
        settings = ModelSettings(spec=LayerSpec.GROUPED, precision=Precision.fp32)
        (model,) = build_chunks(source.shape, layout, place_layers(source.shape, layout), settings)
        load_weights([model], source, settings.spec)
        positions_BS = torch.arange(tokens_BS.size(1)).expand(tokens_BS.shape)
        with torch.no_grad():
            logits: Tensor = model.eval()(tokens_BS, positions_BS, None)
            return logits
    finally:
        process_groups.stop()
