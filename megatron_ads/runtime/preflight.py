"""Compare, before the first step, what every rank is about to do, and name the rank that would make the others wait.

A rank without an optimizer member that its peers have never joins that member's collectives: the job hangs, or dies
later and elsewhere. Here it ends in one message, within seconds, because nothing is exchanged by collectives.
"""

import json
import zlib
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from torch._C._distributed_c10d import Store

from megatron_ads.errors import TopologyError
from megatron_ads.layout import Coordinates, describe_ranks
from megatron_ads.runtime.process_groups import job_store
from megatron_ads.runtime.records import from_bytes, to_bytes

Groups = tuple[tuple[str, int], ...]
"""Name of each parameter group, and how many parameters of this rank's model are in it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """What one rank is about to do."""

    rank: int
    coordinates: Coordinates
    members: Mapping[str, Groups]
    """The optimizer chain, in order, by kind."""
    versions: dict[str, str]
    """Version of each package that takes part in numbers or messages."""
    config_digest: str
    """Digest of the resolved recipe and the model's shape."""
    code_revision: str


def gather_records(record: Record, timeout_seconds: float = 60.0) -> list[Record]:
    """Exchange records through the job's store and return those of all ranks, by rank.

    Call it right after something that all ranks wait for: the time that one rank takes longer to get here counts.

    Raises:
        TopologyError: If a rank has not come after ``timeout_seconds``; rank 0 tells the others which.
    """
    store = job_store("preflight")
    store.set(f"record/{record.rank}", to_bytes(record))  # type: ignore[arg-type]  # it takes bytes as well
    world = dist.get_world_size()
    if record.rank == 0:
        _publish(store, world, timeout_seconds)
    missing = _wait_for_answer(store, world, timeout_seconds)
    if missing:
        raise TopologyError(
            f"{describe_ranks(missing)} of {world} did not come to the preflight within {timeout_seconds:g} s. "
            "Look at the log of the first of them: it failed earlier, or is much slower to load than the rest."
        )
    return [from_bytes(each) for each in from_bytes(zlib.decompress(store.get("all records")))]


def _publish(store: Store, world: int, timeout_seconds: float) -> None:
    """As rank 0, wait for all records and give all of them, or the ranks of those missing, to everyone."""
    keys = [f"record/{rank}" for rank in range(world)]
    missing = []
    try:
        store.wait(keys, timedelta(seconds=timeout_seconds))
    except dist.DistStoreError:
        missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
    else:
        everything = to_bytes([store.get(key) for key in keys])
        store.set("all records", zlib.compress(everything))  # type: ignore[arg-type]
    store.set("missing ranks", json.dumps(missing))


def _wait_for_answer(store: Store, world: int, timeout_seconds: float) -> list[int]:
    """Return the ranks that rank 0 missed; if rank 0 does not come itself, those missing by then, it among them."""
    try:
        for key in ("record/0", "missing ranks"):  # rank 0 may come last, and takes its time from there
            store.wait([key], timedelta(seconds=timeout_seconds + 1))
        return list(json.loads(store.get("missing ranks")))
    except dist.DistStoreError:
        return [rank for rank in range(world) if not store.check([f"record/{rank}"])] or [0]
    except dist.DistNetworkError:
        return [0]  # it holds the store


def check_records(records: Sequence[Record]) -> None:
    """Refuse a job whose ranks would not do the same.

    Raises:
        TopologyError: Naming the odd ranks, their stages, and what they lack or have instead, one line each.
    """
    problems = _missing_members(records)
    complete = max(len(record.members) for record in records)
    comparable = [record for record in records if len(record.members) == complete]
    problems += _differences(comparable, "order of optimizer members", [tuple(one.members) for one in comparable])
    for kind, owners in _owners(records).items():
        names = [tuple(name for name, _ in record.members[kind]) for record in owners]
        problems += _differences(owners, f"parameter groups of optimizer member {kind!r}", names)
    for stage in sorted({record.coordinates.pp for record in records}):  # whose ranks hold equal shares of every kind
        of_stage = [record for record in records if record.coordinates.pp == stage]
        for kind, owners in _owners(of_stage).items():
            counts = [record.members[kind] for record in owners]
            problems += _differences(owners, f"parameters of optimizer member {kind!r} on stage {stage}", counts)
    for package in sorted({package for record in records for package in record.versions}):
        versions = [record.versions.get(package, "absent") for record in records]
        problems += _differences(records, f"{package} version", versions)
    problems += _differences(records, "configuration digest", [record.config_digest for record in records])
    problems += _differences(records, "code revision", [record.code_revision for record in records])
    if problems:
        raise TopologyError("The ranks of this job would not do the same:\n  " + "\n  ".join(problems))


def _missing_members(records: Sequence[Record]) -> list[str]:
    """Name the ranks without a kind that any rank has: who lacks one is odd, however many they are."""
    problems = []
    for kind, owners in _owners(records).items():
        if not (lacking := [record for record in records if kind not in record.members]):
            continue
        having = [record.rank for record in owners]
        owned = ", ".join(dict.fromkeys(f"[{', '.join(record.members)}]" for record in lacking))
        problems.append(
            f"{_located(lacking)}: optimizer members {owned}, without {kind!r}, which {describe_ranks(having)} "
            f"{'has' if len(having) == 1 else 'have'}; they would wait for each other in its first collective"
        )
    return problems


def _differences(records: Sequence[Record], what: str, values: Sequence[Hashable]) -> list[str]:
    """Say who has another value (one for each record) than most; values that the fewest have come first."""
    common = Counter(values).most_common()
    if len(common) <= 1:
        return []
    usual, usual_count = common[0]
    return [
        f"{_located([record for record, own in zip(records, values, strict=True) if own == odd])}: {what} {odd!r}, "
        f"but {usual!r} on {usual_count} other rank{'s' if usual_count > 1 else ''}"
        for odd, _ in reversed(common[1:])
    ]


def _owners(records: Sequence[Record]) -> dict[str, list[Record]]:
    kinds = dict.fromkeys(kind for record in records for kind in record.members)
    return {kind: [record for record in records if kind in record.members] for kind in kinds}


def _located(records: Sequence[Record]) -> str:
    """``rank 1 (stage 0, ep 1)``, or ``ranks 0-7 (stage 0)``."""
    ranks = describe_ranks([record.rank for record in records])
    stages = sorted({record.coordinates.pp for record in records})
    place = f"stage{'s' if len(stages) > 1 else ''} {', '.join(map(str, stages))}"
    if len(records) == 1:
        place += f", ep {records[0].coordinates.ep}"
    return f"{ranks} ({place})"
