"""Time a training step of one process against transformers: same model, weights, samples and threads.

    python -m benchmarks.step_time [--rounds 15] [--threads 2] [--out step_time.json]
    python -m benchmarks.step_time --profile [--threads 1]

Two batches of 1024 tokens: ``full`` has four samples of 256 tokens; ``mixed`` has samples of many lengths, as
fine-tuning data does, which transformers pads to the longest and this project packs. Ours is the project's own step:
Megatron-Core model with grouped experts, gradient buffers, optimizer chain. The other side is
``DeepseekV3ForCausalLM`` as transformers builds it, with ``torch.optim.AdamW``. Steps alternate, so that a machine that
speeds up or slows down does so for both. The first losses must agree, or nothing is timed. ``--profile`` says instead
where our step on full rows spends its time: in matrix products and attention kernels, in passes over the flat buffers
of all weights and gradients (the optimizer, and collectives of one rank, which gloo carries out as copies), elsewhere.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.speed.measure import clocked, in_turn
from megatron_ads.observability.provenance import provenance

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
LARGER_CONFIG = {**CONFIG, "num_hidden_layers": 18, "n_routed_experts": 32}
"""110 M parameters, where weights are moved."""
LEARNING_RATE = 1e-4
SIDES = ("megatron_ads", "transformers")
LOSS_TOLERANCE = 1e-5
"""Relative, of the first step: the same function of the same weights."""


BATCHES: dict[str, tuple[int, ...]] = {
    "full": (256, 256, 256, 256),
    "mixed": (256, 190, 141, 122, 95, 81, 60, 47, 32),
}
"""Lengths of the samples in each batch, in tokens; both have 1024."""

Step = Callable[[], float]
"""Runs one training step and returns its loss in nats per token."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; exit status 1 if the two sides do not compute the same."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="timed steps of each side (default 15)")
    parser.add_argument("--threads", type=int, default=2, help="threads of each side (default 2)")
    parser.add_argument("--out", type=Path, help="file to write the figures to, as JSON")
    parser.add_argument("--profile", action="store_true", help="say where our step spends its time, and end")
    arguments = parser.parse_args(argv)
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)  # read when torch is imported
    if arguments.profile:
        _print_profile(arguments.threads, arguments.rounds)
        return 0
    circumstances = {**provenance(), "load": os.getloadavg()[0]}
    report = {"threads": arguments.threads, "rounds": arguments.rounds, **circumstances, "batches": {}}
    for name, (steps, parameters) in _build(arguments.threads).items():
        ours, theirs = (step() for step in steps)
        if abs(ours - theirs) > LOSS_TOLERANCE * abs(theirs):
            print(f"{name}: the first losses differ, {ours:.7f} and {theirs:.7f}; not timed", file=sys.stderr)
            return 1
        sides = {side: clocked(step) for side, step in zip(SIDES, steps, strict=True)}
        seconds = in_turn(sides, seconds=0, least=arguments.rounds, warm_up=2)
        ratio = statistics.median(seconds["transformers"]) / statistics.median(seconds["megatron_ads"])
        found = {side: _figures(times, tokens=sum(BATCHES[name])) for side, times in seconds.items()}
        report["batches"][name] = {"parameters": parameters, "samples": BATCHES[name], **found, "ratio": ratio}
        for side, figures in found.items():
            milliseconds, speed = figures["median_seconds"] * 1e3, figures["tokens_per_second"]
            print(f"{name:6} {side:13} {milliseconds:8.1f} ms/step {speed:8.0f} tokens/s")
        print(f"{name:6} ratio {ratio:.2f}", flush=True)
    if arguments.out:
        arguments.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


def _build(threads: int) -> dict[str, tuple[tuple[Step, Step], int]]:
    """Return, for each batch, our step and theirs on equal models, and the number of parameters."""
    start_one_rank(threads)
    built = {}
    for name, lengths in BATCHES.items():
        model, samples = random_model(CONFIG), random_samples(lengths)
        steps = (our_step(build_ours(model), [packed(samples)]), transformers_step(model, samples))
        built[name] = (steps, sum(parameter.numel() for parameter in model.parameters()))
    return built


_PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "_grouped_mm")
_OVER_WEIGHTS = ("_fused_adamw", "linalg_vector_norm", "dot")
_FLAT = 1_000_000
"""Elements from which a tensor of one dimension is a buffer of all weights or gradients."""


def _print_profile(threads: int, rounds: int) -> None:
    """Print how many milliseconds of a step go to each kind of operation, by torch's profiler."""
    from torch.profiler import ProfilerActivity, profile

    start_one_rank(threads)
    step = our_step(build_ours(random_model(CONFIG)), [packed(random_samples(BATCHES["full"]))])
    for _ in range(2):
        step()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
        for _ in range(rounds):
            step()
    kinds: Counter[str] = Counter()
    for event in profiled.key_averages(group_by_input_shape=True):
        kinds[_kind(event.key, event.input_shapes)] += event.self_cpu_time_total / 1e3 / rounds
    total = kinds.total()
    for kind, milliseconds in [*kinds.most_common(12), ("all", total)]:
        print(f"{kind:<44}{milliseconds:9.1f} ms{milliseconds / total:8.1%}")


def _kind(name: str, shapes: Sequence[Any]) -> str:
    operation = name.removeprefix("aten::").removesuffix("_")
    flat = any(len(shape) == 1 and isinstance(shape[0], int) and shape[0] >= _FLAT for shape in shapes)
    if operation in _PRODUCTS or "scaled_dot_product" in operation:
        return "matrix products and attention kernels"
    if operation in _OVER_WEIGHTS or flat or name.startswith("c10d::"):
        return "passes over all weights and gradients"
    return name


def start_one_rank(threads: int) -> None:
    """Begin a job of this process alone, with the same random numbers each time."""
    import torch

    from megatron_ads.layout import ParallelLayout
    from megatron_ads.runtime import device, process_groups

    torch.set_num_threads(threads)
    process_groups.start(ParallelLayout(world=1))
    device.seed_everything(0)


def random_model(config: Mapping[str, Any]) -> Any:
    """Return a model of transformers with random weights, in FP32, ready to be trained."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    return DeepseekV3ForCausalLM(DeepseekV3Config(**config)).float().train()


def random_samples(lengths: Sequence[int]) -> list[Any]:
    """Return samples of random tokens of ``CONFIG``'s vocabulary."""
    import torch

    return [torch.randint(1, CONFIG["vocab_size"], (length,)) for length in lengths]


def build_ours(model: Any, layer_spec: str = "grouped") -> Any:
    """Return the project's model and optimizer with the weights of a model of transformers."""
    from megatron_ads.config.model import LayerSpecChoice, ModelConfig, Precision
    from megatron_ads.config.training import OptimConfig, TrainConfig
    from megatron_ads.training.build import build_model

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        source, shards = on_one_rank(Path(folder))
        settings = ModelConfig(load=folder, layer_spec=LayerSpecChoice(layer_spec), precision=Precision.fp32)
        optim = OptimConfig(learning_rate=LEARNING_RATE)
        return build_model(settings, optim, TrainConfig(max_steps=1), source, shards)


def on_one_rank(folder: Path) -> tuple[Any, Any]:
    """Return a checkpoint as a source of weights, and what one rank holds of it."""
    from conversion.rank_files import ShardsLayout
    from conversion.sources import open_source
    from megatron_ads.layout import ParallelLayout, place_layers

    source, layout = open_source(folder), ParallelLayout(world=1)
    return source, ShardsLayout(shape=source.shape, layout=layout, placement=place_layers(source.shape, layout))


def our_step(trained: Any, batches: Sequence[Any]) -> Step:
    """Return the project's training step on fixed microbatches."""
    from megatron_ads.training.step import run_step

    return lambda: run_step(batches, trained.chunks, trained.optimizer, learning_rate=LEARNING_RATE).loss


def packed(samples: Sequence[Any]) -> Any:
    """Return the batch in our form: samples end to end, labels shifted, the last token of a sample without one."""
    import torch

    from megatron_ads.data.packed_batch import PackedBatch

    lengths = torch.tensor([0, *(len(sample) for sample in samples)])
    targets = torch.cat([torch.arange(len(sample)) < len(sample) - 1 for sample in samples])
    return PackedBatch.unpadded(
        tokens_BS=torch.cat(list(samples))[None],
        labels_BS=torch.cat([sample.roll(-1) for sample in samples])[None],
        mask_BS=targets.float()[None],
        cu_seqlens=lengths.cumsum(0).to(torch.int32),
    )


def transformers_step(model: Any, samples: Sequence[Any]) -> Step:
    """Build the step that a user of transformers and torch would write: samples padded to the longest."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1)
    tokens_BS = pad_sequence(list(samples), batch_first=True)
    labels_BS = pad_sequence(list(samples), batch_first=True, padding_value=-100)
    mask_BS = None if labels_BS.min() >= 0 else (labels_BS >= 0).long()

    def step() -> float:
        optimizer.zero_grad()
        loss = model(input_ids=tokens_BS, labels=labels_BS, attention_mask=mask_BS).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return float(loss.detach())

    return step


def _figures(seconds: Sequence[float], *, tokens: int) -> dict[str, Any]:
    """Summarise the times of one side; tokens per second count samples only, not what pads them."""
    median = statistics.median(seconds)
    return {
        "median_seconds": median,
        "quartiles_seconds": statistics.quantiles(seconds, n=4),
        "tokens_per_second": tokens / median,
    }


if __name__ == "__main__":
    sys.exit(main())
