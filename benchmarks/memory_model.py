"""Hold the planner's memory model against processes that train: predicted and measured peak of every stage.

    python -m benchmarks.memory_model [--case NAME ...] [--out memory_model.json]

Each case is a layout of a small model, trained for two steps by real processes over gloo on this machine's CPU. What
is measured is the highest resident memory of each process above what it had before the model was built; the imports
and the process groups are in neither number. glibc is told to return freed memory at once.

What came out is in ``benchmarks/README.md``. BF16 on a CPU is far off: about 450 MB stay with the process after the
first backward pass, which FP32 does not show; the cause is not known. On a GPU: not measured.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_ads.architecture import shape_from_config
from megatron_ads.config.model import LayerSpecChoice, ModelConfig, Precision, Recompute
from megatron_ads.demo_model import CONFIGS, Preset
from megatron_ads.layout import ParallelLayout, place_layers
from megatron_ads.observability.provenance import provenance
from megatron_ads.planning.job import PlannedJob
from megatron_ads.runtime.device import process_memory_bytes

CONFIG: dict[str, Any] = CONFIGS[Preset.tiny] | {
    "vocab_size": 4096,
    "hidden_size": 384,
    "intermediate_size": 1536,
    "moe_intermediate_size": 384,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "q_lora_rank": 192,
    "kv_lora_rank": 96,
    "qk_nope_head_dim": 48,
    "v_head_dim": 48,
    "max_position_embeddings": 4096,
    "rope_scaling": None,
}
"""50 M parameters: two dense layers, four with 16 experts, an MTP layer."""
SEQ_LENGTH = 512
ROWS = 2
"""Rows of one microbatch."""
STEPS = 2
_RANK_ENVIRONMENT = {
    "GLOO_SOCKET_IFNAME": "lo",
    "OMP_NUM_THREADS": "1",
    "PYTHONWARNINGS": "ignore",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_ARENA_MAX": "1",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasuredLayout:
    """One layout to train and to plan."""

    world: int = 1
    layout: dict[str, int] = field(default_factory=dict)
    pipeline: str | None = None
    precision: Precision = Precision.fp32
    recompute: Recompute = Recompute.none
    microbatches: int = 4


CASES = {
    "pp1": MeasuredLayout(),
    "pp1 full": MeasuredLayout(recompute=Recompute.full),
    "pp1 bf16 selective": MeasuredLayout(precision=Precision.bf16, recompute=Recompute.selective),
    "dp2 ep2": MeasuredLayout(world=2, layout={"ep": 2}),
    "pp2 ep2": MeasuredLayout(world=4, layout={"pp": 2, "ep": 2}, pipeline="Ettt|tttmL"),
    "pp4": MeasuredLayout(world=4, layout={"pp": 4}, pipeline="Ett|tt|tt|mL"),
    "pp2 vpp2": MeasuredLayout(world=2, layout={"pp": 2, "vpp": 2}, pipeline="Ett|tt|t|tmL"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the cases and print what was predicted, what was measured and the difference."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--case", action="append", choices=tuple(CASES), help="only this one; may be repeated")
    parser.add_argument("--out", type=Path, help="file to write the figures to, as JSON")
    parser.add_argument("--ranks-of", nargs=2, metavar=("CASE", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.ranks_of:
        name, folder = arguments.ranks_of
        (Path(folder) / f"rank{os.environ['RANK']}").write_text(str(_train(CASES[name])), encoding="utf-8")
        return 0
    rows = []
    for name in arguments.case or CASES:
        for row in run_case(name):
            rows.append(row)
            print(
                f"{row['case']:20} stage {row['stage']}  predicted {row['predicted_bytes'] / 1e6:8.1f} MB  "
                f"measured {row['measured_bytes'] / 1e6:8.1f} MB  {row['error']:+.1%}",
                flush=True,
            )
    if arguments.out:
        cases = {name: asdict(case) for name, case in CASES.items()}
        workload = {"config": CONFIG, "tokens_per_microbatch": SEQ_LENGTH * ROWS, "cases": cases}
        report = {"workload": workload, "rows": rows, **provenance()}
        arguments.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


def run_case(name: str) -> list[dict[str, Any]]:
    """Train one case and return a row for each stage, of its fullest rank."""
    from megatron_ads.launching.environment import NodePart
    from megatron_ads.launching.processes import run_job
    from megatron_ads.launching.train import torchrun_command
    from megatron_ads.planning.memory import stage_memory

    job, world = planned_job(CASES[name]), CASES[name].world
    with tempfile.TemporaryDirectory() as folder:  # every rank is a process of its own and writes its peak there
        part = NodePart.of({}, world, world)
        command = torchrun_command(part, "benchmarks.memory_model", ["--ranks-of", name, folder])
        run_job(command, Path(folder) / "log", environment=_RANK_ENVIRONMENT)
        measured = [int((Path(folder) / f"rank{rank}").read_text(encoding="utf-8")) for rank in range(world)]
    rows = []
    for stage in range(job.layout.pp):
        memory = stage_memory(job, stage, gpu=False)
        peak = max(measured[rank] for rank in job.layout.stage_ranks(stage))
        figures = {"predicted_bytes": memory.peak, "measured_bytes": peak, "error": memory.peak / peak - 1}
        rows.append({"case": name, "stage": stage, **figures, "parts": asdict(memory)})
    return rows


def planned_job(case: MeasuredLayout) -> PlannedJob:
    """Return the case as the planner sees it."""
    shape = shape_from_config(CONFIG)
    layout = ParallelLayout(world=case.world, **case.layout)
    return PlannedJob(
        shape=shape,
        layout=layout,
        placement=place_layers(shape, layout, pipeline=case.pipeline),
        model=ModelConfig(
            precision=case.precision, recompute=case.recompute, mtp_loss_weight=0.1, layer_spec=LayerSpecChoice.grouped
        ),
        seq_length=SEQ_LENGTH,
        micro_batch_size=ROWS,
        microbatches=case.microbatches,
        routing_imbalance=1.0,  # that of random weights; what a plan sets aside for more is not used
    )


def _train(case: MeasuredLayout) -> int:
    """As one rank: build, train two steps, and return the peak above the resident memory at the start."""
    job = planned_job(case)
    from megatron_ads.runtime import device, process_groups

    process_groups.start(job.layout)
    device.seed_everything(0)
    step = build_step(job)  # imports everything; builds when called
    _warm_up()
    before = process_memory_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # restarts VmHWM
    run = step()
    for _ in range(STEPS):
        run()
    peak = process_memory_bytes("VmHWM") - before
    process_groups.stop()
    return peak


def build_step(job: PlannedJob) -> Any:
    import torch

    from megatron_ads.config.training import OptimConfig
    from megatron_ads.data.packed_batch import PackedBatch
    from megatron_ads.models.build import build_chunks
    from megatron_ads.models.settings import ModelSettings
    from megatron_ads.optim.build import build_optimizer
    from megatron_ads.training.build import wrap_chunks
    from megatron_ads.training.step import run_step

    settings = ModelSettings.of(job.model)
    rows, length = job.micro_batch_size, job.seq_length

    def batch() -> PackedBatch:
        tokens_BS = torch.randint(0, job.shape.vocab_size, (rows, length))
        return PackedBatch.unpadded(
            tokens_BS=tokens_BS,
            labels_BS=tokens_BS.roll(-1, dims=1),
            mask_BS=torch.ones(rows, length),
            cu_seqlens=torch.arange(0, rows * length + 1, length, dtype=torch.int32),
        )

    batches = [batch() for _ in range(job.microbatches)]

    def build() -> Any:
        models = build_chunks(job.shape, job.layout, job.placement, settings)
        for model in models:
            for parameter in model.parameters():
                torch.nn.init.normal_(parameter, std=0.02)
        chunks = wrap_chunks(models, overlap=False)
        optimizer = build_optimizer(
            chunks, OptimConfig(learning_rate=1e-4), job.model.precision, has_expert_member=job.trains_experts
        )
        return lambda: run_step(batches, chunks, optimizer, learning_rate=1e-4)

    return build


def _warm_up() -> None:
    """Use each kind of kernel once: libraries loaded and work space taken on first use are not the model's."""
    import torch
    from torch.nn.functional import grouped_mm, silu

    weight = torch.nn.Parameter(torch.randn(2, 512, 512) / 512)
    ends = torch.tensor([512, 1024], dtype=torch.int32)
    optimizer = torch.optim.AdamW([weight], fused=True)
    for _ in range(2):
        tokens = torch.randn(1024, 512, requires_grad=True)
        inner = silu(grouped_mm(tokens, weight, offs=ends)) @ weight[0]
        scores = torch.bmm(inner.view(8, 128, 512), inner.view(8, 128, 512).transpose(1, 2)).softmax(-1)
        (scores.sum() + inner.square().mean()).backward()
        torch.distributed.all_reduce(weight.grad)
        optimizer.step()


if __name__ == "__main__":
    sys.exit(main())
