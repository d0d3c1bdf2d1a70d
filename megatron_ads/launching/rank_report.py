"""One task of a rehearsal under Slurm: work out which rank it would be, check that, and print it. No torch, no GPU.

srun python -m megatron_ads.launching.rank_report --recipe sft/deepseek_r1_671b_248gpu [key=value ...]
"""

import argparse
import json
import os
import socket
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from conversion.rank_files import RankFile
from megatron_ads.errors import MegatronAdsError
from megatron_ads.layout import Coordinates
from megatron_ads.planning.job import Job, load_job


@dataclass(frozen=True, kw_only=True, slots=True)
class RankReport:
    """What one rank would be."""

    rank: int
    host: str
    node: int
    local_rank: int
    at: Coordinates
    layers: tuple[int, ...]
    """Decoder layers of its stage, by global number."""
    mtp_layers: tuple[int, ...]
    has_embedding: bool
    has_loss: bool
    experts: tuple[int, ...]
    """Routed experts of each of its MoE layers, by global number; none on a stage without such a layer."""
    file: str
    """Its file in a shards folder."""
    problems: tuple[str, ...] = ()


def main() -> int:
    """Print one JSON object on a line; return 2 if something is wrong with this task."""
    parser = argparse.ArgumentParser(prog="megatron_ads.launching.rank_report")
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--shards", type=Path, help="a shards folder that must hold this rank's file")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    try:
        job = load_job(args.recipe, args.overrides, ranks=int(os.environ["SLURM_NTASKS"]))
        report = report_of(job, os.environ, args.shards)
    except MegatronAdsError as error:
        print(json.dumps({"host": socket.gethostname(), "problems": [" ".join(str(error).split())]}), flush=True)
        return 2
    print(json.dumps(asdict(report)), flush=True)
    return 2 if report.problems else 0


def report_of(job: Job, environment: Mapping[str, str], shards: Path | None = None) -> RankReport:
    """Return what the task that ``environment`` describes would be in ``job``."""
    rank, node = int(environment["SLURM_PROCID"]), int(environment["SLURM_NODEID"])
    local, nodes = int(environment["SLURM_LOCALID"]), int(environment["SLURM_NNODES"])
    at = job.layout.coordinates(rank)
    chunks = job.placement.stage_chunks(at.pp)
    mtp = tuple(layer for chunk in chunks for layer in chunk.mtp_layers)
    layers = tuple(layer for chunk in chunks for layer in chunk.layers)
    has_experts = bool(mtp) or any(job.shape.is_moe_layer(layer) for layer in layers)
    file = RankFile(pp=at.pp, tp=at.tp, ep=at.ep, etp=at.etp, etp_size=job.layout.etp).name
    problems = []
    if (node, local) != divmod(rank, job.layout.world // nodes):
        problems.append(
            f"rank {rank} is task {local} of node {node}; with {job.layout.world // nodes} ranks a node it should be "
            f"task {rank % (job.layout.world // nodes)} of node {rank // (job.layout.world // nodes)}. Let Slurm "
            "distribute tasks by blocks (no --distribution)."
        )
    if shards is not None and not (shards / file).is_file():
        problems.append(f"rank {rank} needs {shards / file}, which is not there. Convert for this layout.")
    return RankReport(
        rank=rank,
        host=environment.get("SLURMD_NODENAME", socket.gethostname()),
        node=node,
        local_rank=local,
        at=at,
        layers=layers,
        mtp_layers=mtp,
        has_embedding=any(chunk.has_embedding for chunk in chunks),
        has_loss=any(chunk.has_loss for chunk in chunks),
        experts=tuple(job.layout.local_experts(job.shape.num_experts, at.ep)) if has_experts else (),
        file=file,
        problems=tuple(problems),
    )


if __name__ == "__main__":
    sys.exit(main())
