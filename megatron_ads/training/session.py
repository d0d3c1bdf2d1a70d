"""What this rank is about to do, for the comparison of all ranks before the first step."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import torch.distributed as dist

from conversion.rank_files import ShardsLayout
from megatron_ads.config.sft import SftConfig
from megatron_ads.observability.provenance import git_revision, package_versions
from megatron_ads.optim.chain import OptimizerChain
from megatron_ads.runtime.preflight import Member, Record, check_records, gather_records


def preflight(config: SftConfig, optimizer: OptimizerChain, shards: ShardsLayout) -> None:
    """Compare optimizer members, parameter groups, recipe and software over all ranks; every rank must call it.

    Raises:
        TopologyError: Naming the ranks that differ or did not come, in under 10 s.
    """
    check_records(gather_records(describe_rank(config, optimizer, shards)))


def describe_rank(config: SftConfig, optimizer: OptimizerChain, shards: ShardsLayout) -> Record:
    """Return this rank's record."""
    described = json.dumps([asdict(config), asdict(shards.shape), shards.placement.string], sort_keys=True)
    return Record(
        rank=dist.get_rank(),
        coordinates=shards.layout.coordinates(dist.get_rank()),
        members=tuple(Member(member.kind, member.group_keys()) for member in optimizer.members),
        versions={name: found or "absent" for name, found in package_versions().items()},
        config_digest=hashlib.sha256(described.encode()).hexdigest()[:12],
        code_revision=git_revision(Path(__file__).parent) or "unknown",
    )
