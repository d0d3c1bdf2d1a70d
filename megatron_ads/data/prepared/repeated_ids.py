"""Rows whose id an earlier row of their source has: found over all portions, told with the number of the first one."""

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from megatron_ads.data.bad_rows import Rejected, RowReader, repeated_id
from megatron_ads.data.prepared.portion import Portion, PortionReport
from megatron_ads.data.prepared.store import RowFiles
from megatron_ads.data.source_files import RowOrigin
from megatron_ads.data.split import KEY, Numbers, in_utf8, key_digest


class RepeatedIds(NamedTuple):
    """The rows of one source that repeat an id."""

    usable: Numbers
    """Among the usable rows of the source."""
    faulty: set[tuple[int, int]]
    """Portion and row number of those among the faulty ones."""
    rejected: list[tuple[int, Rejected]]
    """All of them, each with its portion."""


def find_repeated_ids(
    portions: Sequence[Portion], reports: Sequence[PortionReport], files: RowFiles, reader: RowReader[object]
) -> RepeatedIds:
    """Look through the ids of one source; ``files`` holds its portions alone."""
    owners = np.repeat(np.arange(len(reports)), [report.rows for report in reports])
    numbers = files.numbers("number")
    ids = files.texts("id")
    faulty = [(place, number, row.row_id) for place, report in enumerate(reports) for number, row in report.faulty]
    count = len(ids)
    all_owners = np.concatenate([owners, np.array([place for place, _, _ in faulty], dtype=np.int64)])
    all_numbers = np.concatenate([numbers, np.array([number for _, number, _ in faulty], dtype=np.int64)])
    texts = [*ids, *(in_utf8(row_id) for _, _, row_id in faulty)]
    order = np.lexsort((all_numbers, all_owners))
    keys = np.fromiter((key_digest(texts[index]) for index in order.tolist()), dtype=KEY, count=len(texts))
    _, first, which = np.unique(keys, return_index=True, return_inverse=True)
    first_of = first[which.reshape(-1)]
    repeated = np.flatnonzero(first_of != np.arange(len(keys)))
    found: list[tuple[int, Rejected]] = []
    for index in repeated.tolist():
        place, earlier = order[index], order[first_of[index]]
        owner, part = int(all_owners[place]), portions[int(all_owners[earlier])].part
        here = portions[owner].part
        assert part is not None and here is not None, "rows that are given have been looked through"
        error = repeated_id(texts[place].decode(errors="surrogatepass"), RowOrigin(part, all_numbers[earlier]), here)
        found.append((owner, Rejected.of(int(all_numbers[place]), error, error)))
    places = order[repeated]
    rest = places[places >= count] - count
    return RepeatedIds(
        usable=np.sort(places[places < count]),
        faulty={faulty[index][:2] for index in rest.tolist()},
        rejected=_with_contents(found, portions, reader),
    )


def _with_contents(
    found: list[tuple[int, Rejected]], portions: Sequence[Portion], reader: RowReader[object]
) -> list[tuple[int, Rejected]]:
    """Read the rows again, for a glimpse of each."""
    wanted: dict[int, dict[int, Rejected]] = defaultdict(dict)
    for owner, row in found:
        wanted[owner][row.number] = row
    complete: list[tuple[int, Rejected]] = []
    for owner, rows in sorted(wanted.items()):
        part = portions[owner].part
        assert part is not None
        for number, content in reader.read(part, portions[owner].span):
            if number in rows:
                complete.append((owner, rows[number].with_content(content)))
    return complete
