"""Items that share the codes of all levels get one code more, so that every semantic ID is one item's.

The first item of such a group, by its id as text, keeps the plain codes; the others have 1, 2, ... behind them, in that
order. The files' order does not count, and an item that has its ID already keeps it.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence

from megatron_ads.errors import DataError

Codes = tuple[int, ...]


def disambiguated(
    ids: Sequence[str], codes: Sequence[Codes], *, most: int, levels: int, known: Mapping[str, Codes] | None = None
) -> list[Codes]:
    """Return the codes of each item, those of ``levels`` levels and one more where they are shared.

    Args:
        ids: Each once.
        codes: Of all levels.
        most: Items that may share them.
        levels: Of the codebook.
        known: IDs that were given before, of these items and of others.

    Raises:
        DataError: If more items share their codes.
    """
    known = known or {}
    taken: dict[Codes, set[int]] = defaultdict(set)
    for earlier in known.values():
        taken[earlier[:levels]].add(_extra(earlier, levels))
    given = dict(known)
    for name, own in sorted(zip(ids, codes, strict=True)):
        if name in given:
            continue
        extra = next(number for number in range(len(taken[own]) + 1) if number not in taken[own])
        taken[own].add(extra)
        given[name] = (*own, extra) if extra else own
    largest = max((max(extras) + 1 for extras in taken.values()), default=0)
    if largest > most:
        raise DataError(
            f"{largest} items share the codes of all {levels} levels, and disambiguation_codes = {most} tells {most} "
            "apart. Fit again with more levels or codes, or raise it."
        )
    return [given[name] for name in ids]


def _extra(codes: Codes, levels: int) -> int:
    return codes[levels] if len(codes) > levels else 0
