"""Time a training step of one process against transformers: same model, weights, batch and threads.

    python -m benchmarks.step_time [--rounds 15] [--rows 4] [--seq-length 256] [--threads 2] [--out step_time.json]

Ours is the project's own step: Megatron-Core model with grouped experts, gradient buffers, optimizer chain. The other
side is ``DeepseekV3ForCausalLM`` as transformers builds it, with ``torch.optim.AdamW``. The steps alternate, so that a
machine that speeds up or slows down does so for both. The first losses must agree, or nothing is reported.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

CONFIG: dict[str, Any] = {
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 1024,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 6,
    "first_k_dense_replace": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "q_lora_rank": 128,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "max_position_embeddings": 4096,
    "num_nextn_predict_layers": 0,
}
"""18 M parameters: six layers, the last four with 16 experts, routed as in DeepSeek-V3."""
LEARNING_RATE = 1e-4
LOSS_TOLERANCE = 1e-5
"""Relative, of the first step: the same function of the same weights."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """What one step is given."""

    rows: int
    seq_length: int
    threads: int
    rounds: int

    @property
    def tokens(self) -> int:
        """Tokens in one step."""
        return self.rows * self.seq_length


Step = Callable[[], float]
"""Runs one training step and returns its loss in nats per token."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; exit status 1 if the two sides do not compute the same."""
    arguments = _parse(argv)
    workload = Workload(
        rows=arguments.rows, seq_length=arguments.seq_length, threads=arguments.threads, rounds=arguments.rounds
    )
    os.environ["OMP_NUM_THREADS"] = str(workload.threads)  # read when torch is imported
    steps, losses, parameters = _build(workload)
    ours, theirs = losses
    if abs(ours - theirs) > LOSS_TOLERANCE * abs(theirs):
        print(f"the first losses differ: ours {ours:.7f}, transformers {theirs:.7f}; nothing was timed", file=sys.stderr)
        return 1
    seconds = _time_alternately(steps, workload.rounds)
    report = _report(workload, parameters, losses, seconds)
    _print(report)
    if arguments.out:
        arguments.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="timed steps of each side (default 15)")
    parser.add_argument("--rows", type=int, default=4, help="rows in a batch (default 4)")
    parser.add_argument("--seq-length", type=int, default=256, help="tokens in a row (default 256)")
    parser.add_argument("--threads", type=int, default=2, help="threads of each side (default 2)")
    parser.add_argument("--out", type=Path, help="file to write the figures to, as JSON")
    return parser.parse_args(argv)


def _build(workload: Workload) -> tuple[tuple[Step, Step], tuple[float, float], int]:
    """Return both sides' steps, their first losses, and the number of parameters."""
    import torch
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    torch.set_num_threads(workload.threads)
    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**CONFIG)).float().train()
    tokens_BS = torch.randint(0, CONFIG["vocab_size"], (workload.rows, workload.seq_length))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        ours = our_step(Path(folder), tokens_BS)
    theirs = transformers_step(model, tokens_BS)
    return (ours, theirs), (ours(), theirs()), sum(parameter.numel() for parameter in model.parameters())


def our_step(folder: Path, tokens_BS: Any) -> Step:
    """Build the project's training step for a checkpoint and a fixed batch."""
    from megatron_ads.layout import ParallelLayout
    from megatron_ads.runtime import process_groups, seeds

    process_groups.start(ParallelLayout(world=1))
    seeds.seed_everything(0)
    from megatron.core.distributed import finalize_model_grads

    from conversion.layer_specs import LayerSpec
    from conversion.sources import open_source
    from megatron_ads.config import OptimConfig, Precision
    from megatron_ads.layout import place_layers
    from megatron_ads.models.build import build_chunks
    from megatron_ads.models.load import load_weights
    from megatron_ads.models.settings import ModelSettings
    from megatron_ads.optim.build import build_optimizer, wrap_for_training
    from megatron_ads.training.step import run_step

    source = open_source(folder)
    layout = ParallelLayout(world=1)
    settings = ModelSettings(spec=LayerSpec.GROUPED)
    models = build_chunks(source.shape, layout, place_layers(source.shape, layout), settings)
    load_weights(models, source, settings.spec)
    models[0].config.finalize_model_grads_func = finalize_model_grads
    chunks = wrap_for_training(models, overlap=False)
    optimizer = build_optimizer(
        chunks, OptimConfig(learning_rate=LEARNING_RATE), Precision.fp32, has_expert_member=True
    )
    batch = _packed(tokens_BS)
    return lambda: run_step([batch], chunks, optimizer, learning_rate=LEARNING_RATE).loss


def _packed(tokens_BS: Any) -> Any:
    """Return the batch in our form: labels shifted, the last token of a row without one."""
    import torch

    from megatron_ads.data.batches import PackedBatch

    rows, length = tokens_BS.shape
    mask_BS = torch.ones(rows, length)
    mask_BS[:, -1] = 0
    return PackedBatch(
        tokens_BS=tokens_BS,
        labels_BS=tokens_BS.roll(-1, dims=1),
        positions_BS=torch.arange(length).repeat(rows, 1),
        mask_BS=mask_BS,
        cu_seqlens=torch.arange(0, rows * length + 1, length, dtype=torch.int32),
        sample_count=rows,
        token_count=rows * length,
        target_count=rows * (length - 1),
        normalizer=rows * (length - 1),
    )


def transformers_step(model: Any, tokens_BS: Any) -> Step:
    """Build the step that a user of transformers and torch would write."""
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1)

    def step() -> float:
        optimizer.zero_grad()
        loss = model(input_ids=tokens_BS, labels=tokens_BS).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return float(loss.detach())

    return step


def _time_alternately(steps: tuple[Step, Step], rounds: int) -> tuple[list[float], list[float]]:
    seconds: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds + 2):
        for index in (0, 1) if number % 2 else (1, 0):
            begin = time.perf_counter()
            steps[index]()
            if number >= 2:  # the first two warm caches and allocators
                seconds[index].append(time.perf_counter() - begin)
    return seconds


def _report(
    workload: Workload, parameters: int, losses: tuple[float, float], seconds: tuple[list[float], list[float]]
) -> dict[str, Any]:
    sides = {
        name: {
            "first_loss": loss,
            "median_seconds": statistics.median(values),
            "quartiles_seconds": statistics.quantiles(values, n=4),
            "tokens_per_second": workload.tokens / statistics.median(values),
        }
        for name, loss, values in zip(("megatron_ads", "transformers"), losses, seconds, strict=True)
    }
    return {
        "workload": asdict(workload) | {"parameters": parameters},
        **sides,
        "ratio": statistics.median(seconds[1]) / statistics.median(seconds[0]),
        "hardware": {"processor": _processor(), "cores": os.cpu_count()},
        "versions": {name: version(name) for name in ("torch", "megatron-core", "transformers")}
        | {"python": platform.python_version()},
    }


def _processor() -> str:
    """Return the processor's name; Linux has it in a file."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


def _print(report: dict[str, Any]) -> None:
    for name in ("megatron_ads", "transformers"):
        side = report[name]
        print(f"{name:14} {side['median_seconds'] * 1e3:8.1f} ms/step  {side['tokens_per_second']:8.0f} tokens/s")
    work = report["workload"]
    print(
        f"ratio {report['ratio']:.2f}  ({work['parameters'] / 1e6:.1f} M parameters, {work['rows']} x "
        f"{work['seq_length']} tokens, {work['threads']} threads, median of {work['rounds']})"
    )


if __name__ == "__main__":
    sys.exit(main())
