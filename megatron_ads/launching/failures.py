"""The report on an attempt that failed: the first failing rank's error first, its victims counted."""

from collections.abc import Collection, Sequence
from pathlib import Path

from megatron_ads.runtime.health.rank_record import ExitStatus, RankRecord, first_failure

_LOG_LINES = 5


def describe_failure(records: Sequence[RankRecord], ranks: Collection[int], logs: Path | None) -> list[str]:
    """Return lines on what went wrong; none if nothing did.

    Args:
        records: Of the ranks that wrote down how they ended, the earliest first.
        ranks: Those that were started.
        logs: Folder of one file per rank; None if they wrote to the terminal.
    """
    lines, silent = [], sorted(set(ranks) - {record.rank for record in records})
    first = first_failure(records)
    if first is not None and first.status is ExitStatus.PEER_LOST and silent:
        first = None  # the one that was lost comes first
    if first is not None:
        *before, last = first.message.splitlines() or [""]
        lines += [f"first failure: rank {first.rank} on {first.host}, {first.status.name}: {last}"]
        lines += _indented("\n".join([*before, last])) if before else []
        lines += [] if logs is None else [f"its log: {_log(logs, first.rank)}"]
    if silent:
        lines.append(f"ended without a word (killed, out of memory, or its machine lost): {_named(silent)}")
        lines += [] if logs is None else [f"the end of {_log(logs, silent[0])}:", *_log_tail(_log(logs, silent[0]))]
    victims = [record for record in records if record.status is ExitStatus.PEER_LOST and record is not first]
    if victims:
        lines.append(f"lost a peer: {_named([record.rank for record in victims])}. {victims[0].message}")
    return lines


def _named(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, sorted(ranks)[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}"


def _log(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:04d}.log"


def _log_tail(file: Path) -> list[str]:
    return _indented("\n".join(file.read_text(errors="replace").splitlines()[-_LOG_LINES:])) if file.is_file() else []


def _indented(text: str) -> list[str]:
    return [f"    {line}" for line in text.splitlines()]
