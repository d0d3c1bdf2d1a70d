"""Which rank every Slurm task would be, and whether all of them make up the job: the check of a placement. No torch.

    srun python -m megatron_ads.launching.placement --recipe sft/deepseek_r1_671b_248gpu [key=value ...]

Each task prints what its rank would hold as a line of JSON; the batch step compares the lines with the job.
"""

import argparse
import json
import os
import socket
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from conversion.rank_files import wrong_copies
from megatron_ads.errors import MegatronAdsError
from megatron_ads.layout import Coordinates
from megatron_ads.planning.job import PlannedJob, load_job


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
    parser = argparse.ArgumentParser(prog="megatron_ads.launching.placement")
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


def report_of(job: PlannedJob, environment: Mapping[str, str], shards: Path | None = None) -> RankReport:
    """Return what the task that ``environment`` describes would be in ``job``."""
    rank, node = int(environment["SLURM_PROCID"]), int(environment["SLURM_NODEID"])
    local, per_node = int(environment["SLURM_LOCALID"]), job.layout.world // int(environment["SLURM_NNODES"])
    host = environment.get("SLURMD_NODENAME", socket.gethostname())
    report = _report(job, rank, host=host, node=node, local_rank=local)
    problems = []
    if (node, local) != divmod(rank, per_node):
        problems.append(
            f"rank {rank} is task {local} of node {node}; with {per_node} ranks a node it should be task "
            f"{rank % per_node} of node {rank // per_node}. Let Slurm distribute tasks by blocks (no --distribution)."
        )
    if shards is not None and not (shards / report.file).is_file():
        problems.append(f"rank {rank} needs {shards / report.file}, which does not exist. Convert for this layout.")
    return replace(report, problems=tuple(problems))


def _report(job: PlannedJob, rank: int, *, host: str, node: int, local_rank: int) -> RankReport:
    at = job.layout.coordinates(rank)
    chunks = job.placement.stage_chunks(at.pp)
    mtp = tuple(layer for chunk in chunks for layer in chunk.mtp_layers)
    layers = tuple(layer for chunk in chunks for layer in chunk.layers)
    has_experts = bool(mtp) or any(job.shape.is_moe_layer(layer) for layer in layers)
    return RankReport(
        rank=rank,
        host=host,
        node=node,
        local_rank=local_rank,
        at=at,
        layers=layers,
        mtp_layers=mtp,
        has_embedding=any(chunk.has_embedding for chunk in chunks),
        has_loss=any(chunk.has_loss for chunk in chunks),
        experts=tuple(job.layout.local_experts(job.shape.num_experts, at.ep)) if has_experts else (),
        file=job.shards.file_of(rank).name,
    )


def read_reports(file: Path) -> tuple[list[RankReport], list[str]]:
    """Return the reports in a file of JSON lines, and the problems that they contain; a broken line is one too."""
    reports, problems = [], []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            values = json.loads(line)
            problems += [f"{values['host']}: {problem}" for problem in values["problems"]]
            if "rank" in values:
                lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
                reports.append(RankReport(**values | lists | {"at": Coordinates(**values["at"])}))
        except (ValueError, KeyError, TypeError):
            problems.append(f"a task wrote {line[:200]!r} instead of its report")
    return reports, problems


def placement_problems(reports: Sequence[RankReport], job: PlannedJob, nodes: int) -> list[str]:
    """Return a line for everything that is missing, duplicated, or in the wrong place."""
    world, found, problems = job.layout.world, Counter(report.rank for report in reports), []
    if missing := [rank for rank in range(world) if rank not in found]:
        problems.append(f"{len(missing)} ranks are missing: {_some(missing)}")
    if twice := sorted(rank for rank, count in found.items() if count > 1):
        problems.append(f"reported more than once: rank {_some(twice)}")
    if strange := sorted(rank for rank in found if not 0 <= rank < world):
        problems.append(f"not a rank of the job: {_some(strange)}")
    if len({(report.node, report.local_rank) for report in reports}) != len(reports):
        problems.append("two tasks of one node have the same local number")
    if (reported := len({report.node for report in reports})) != nodes:
        problems.append(f"tasks of {reported} nodes reported, not of {nodes}")
    for report in reports:
        problems += _differences(report, job)
    return problems + _coverage_problems(reports, job)


def _differences(report: RankReport, job: PlannedJob) -> list[str]:
    """Compare what a task found on its node with what this node makes of the recipe."""
    if not 0 <= report.rank < job.layout.world:
        return []
    here = _report(job, report.rank, host=report.host, node=report.node, local_rank=report.local_rank)
    wanted = asdict(replace(here, problems=report.problems))
    return [
        f"{report.host}: rank {report.rank} has {name} {value}, but the recipe says {wanted[name]} on this node; all "
        "nodes must have the same recipe and code"
        for name, value in asdict(report).items()
        if value != wanted[name]
    ]


def _coverage_problems(reports: Iterable[RankReport], job: PlannedJob) -> list[str]:
    """Check that the files which the ranks name hold every weight in as many copies as there are replicas."""
    files = {file.name: file for file in job.shards.rank_files()}
    contents = {name: job.shards.elements(file) for name, file in files.items()}
    problems = [
        f"rank {report.rank} names {report.file}, which is not a file of this layout"
        for report in reports
        if report.file not in files
    ]
    if wrong := wrong_copies(job.shards, (contents[report.file] for report in reports if report.file in files)):
        shown = ", ".join(f"{one.parameter} ({one.held:g} of {one.expected})" for one in wrong[:3])
        problems.append(f"{len(wrong)} weights are not held by as many ranks as they should be: {shown}")
    return problems


def _some(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:6])) + (" ..." if len(numbers) > 6 else "")


def summary(reports: Sequence[RankReport], job: PlannedJob) -> list[str]:
    without = sum(not report.experts for report in reports) if job.shape.num_experts else 0
    lines = [
        f"{len(reports)} of {job.layout.world} tasks reported from {len({report.node for report in reports})} nodes: "
        f"{job.layout.pp} stages, {job.shape.num_layers} decoder layers + {job.shape.mtp_layers} MTP, "
        f"{len({report.file for report in reports})} shard files, {without} ranks without routed experts"
    ]
    for stage in range(job.layout.pp):
        members = sorted((report for report in reports if report.at.pp == stage), key=lambda report: report.rank)
        if not members:
            continue
        one = members[0]
        words = ["E"] * one.has_embedding + [f"layer {layer}" for layer in one.layers]
        words += [f"MTP {layer}" for layer in one.mtp_layers] + ["L"] * one.has_loss
        hosts = list(dict.fromkeys(report.host for report in members))
        lines.append(
            f"stage {stage}: ranks {one.rank}-{members[-1].rank} on {', '.join(hosts[:4])}: {', '.join(words)}; "
            f"{len(one.experts)} experts a rank; {one.file} to {members[-1].file}"
        )
    return lines


if __name__ == "__main__":
    sys.exit(main())
