"""Whether the reports of all ranks of a rehearsal make up one job: nothing missing, nothing twice.

The comparison is with the model (its layers and experts) and with the conversion's list of files, not with another
computation of the same coordinates.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from megatron_ads.launching.rank_report import RankReport
from megatron_ads.layout import Coordinates
from megatron_ads.planning.job import Job


def read_reports(file: Path) -> tuple[list[RankReport], list[str]]:
    """Return the reports in a file of JSON lines, and the problems that they and broken lines tell of."""
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


def tiling_problems(reports: Sequence[RankReport], job: Job, nodes: int) -> list[str]:
    """Return a line for everything that is missing, twice, or in the wrong place."""
    counts = Counter(report.rank for report in reports)
    problems = _difference("rank", counts, range(job.layout.world))
    if len({(report.node, report.local_rank) for report in reports}) != len(reports):
        problems.append("two tasks of one node have the same local number")
    if len({report.node for report in reports}) != nodes:
        problems.append(f"tasks of {len({report.node for report in reports})} nodes reported, not of {nodes}")
    stages = defaultdict(list)
    for report in reports:
        stages[report.at.pp].append(report)
    for stage, members in sorted(stages.items()):
        if len({(report.layers, report.mtp_layers, report.has_embedding, report.has_loss) for report in members}) > 1:
            problems.append(f"the ranks of stage {stage} disagree about its layers")
    firsts = [members[0] for members in stages.values()]
    layers = Counter(layer for report in firsts for layer in report.layers)
    problems += _difference("decoder layer", layers, range(job.shape.num_layers))
    mtp = Counter(layer for report in firsts for layer in report.mtp_layers)
    problems += _difference("MTP layer", mtp, range(job.shape.mtp_layers))
    for what, count in (
        ("the embedding", sum(report.has_embedding for report in firsts)),
        ("the loss", sum(report.has_loss for report in firsts)),
    ):
        if count != 1:
            problems.append(f"{count} stages have {what}, instead of one")
    problems += _expert_problems(reports, job)
    files = Counter(report.file for report in reports)
    wanted = {file.name for file in job.shards.rank_files()}
    if set(files) != wanted:
        odd = sorted(set(files) ^ wanted)
        problems.append(f"{len(odd)} shard files are named by no rank, or are none of the layout: {', '.join(odd[:4])}")
    return problems


def _expert_problems(reports: Iterable[RankReport], job: Job) -> list[str]:
    replicas: dict[tuple[int, int, int], Counter[int]] = defaultdict(Counter)
    for report in reports:
        replicas[report.at.pp, report.at.edp, report.at.etp].update(report.experts)
    problems = []
    for (stage, edp, _), held in sorted(replicas.items()):
        if held:
            name = f"expert of stage {stage}, replica {edp},"
            problems += _difference(name, held, range(job.shape.num_experts))
    return problems


def _difference(what: str, found: Counter[int], wanted: range) -> list[str]:
    lines = []
    if missing := [number for number in wanted if number not in found]:
        lines.append(f"{len(missing)} missing: {what} {_some(missing)}")
    if twice := sorted(number for number, count in found.items() if count > 1):
        lines.append(f"more than once: {what} {_some(twice)}")
    if strange := sorted(number for number in found if number not in wanted):
        lines.append(f"none of the job: {what} {_some(strange)}")
    return lines


def _some(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:6])) + (" ..." if len(numbers) > 6 else "")


def summary(reports: Sequence[RankReport], job: Job) -> list[str]:
    """Return a line for the job and one for each stage."""
    without = [report.at.pp for report in reports if not report.experts and job.shape.num_experts]
    lines = [
        f"{len(reports)} of {job.layout.world} tasks reported from {len({report.node for report in reports})} nodes: "
        f"{job.layout.pp} stages, {job.shape.num_layers} decoder layers + {job.shape.mtp_layers} MTP, "
        f"{len({report.file for report in reports})} shard files, {len(without)} ranks without routed experts"
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
