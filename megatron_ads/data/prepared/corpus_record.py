"""What is known of a prepared corpus besides its rows: its portions, and what a job tells of its sources."""

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np

from conversion.atomic_file import sync_folder, write_small
from megatron_ads.config.data import SourceConfig
from megatron_ads.data.bad_rows import Rejected, RejectedRows
from megatron_ads.data.corpus import notes, report_faulty, report_misspelt, report_notes
from megatron_ads.data.prepared.portion import PortionReport
from megatron_ads.data.source_files import Part
from megatron_ads.data.sources import describe_source
from megatron_ads.data.split import Numbers, Repeats
from megatron_ads.layout import rank
from megatron_ads.observability.log import get_logger
from megatron_ads.tasks.row_checks import FaultyRow, RowFault

logger = get_logger(__name__)

COMPLETE = "prepared.json"
_EXCLUDED = "excluded.npy"


@dataclass(kw_only=True, slots=True)
class SourceRecord:
    """What became of the rows of one source."""

    usable: int = 0
    tasks: list[str] = field(default_factory=list)
    facts: list[str] = field(default_factory=list)
    faults: dict[str, int] = field(default_factory=dict)
    first_faulty: dict[str, Any] | None = None
    rejected: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    """Each with the name of its part."""
    left_out: int = 0
    is_divided: bool = True
    """Otherwise reading it has told already of its rejected rows."""

    def tell(self, source: SourceConfig) -> None:
        """Log what is wrong with rows of the source, and write the rejected ones aside; once and not on every rank.

        Raises:
            DataError: If none of its rows can be used.
        """
        name, faulty = describe_source(source), sum(self.faults.values())
        if self.is_divided:
            assert source.path is not None, "only files are divided"
            bad = RejectedRows(Path(source.path), None if source.rejected is None else Path(source.rejected))
            for part, row in self.rejected:
                whole = part == bad.file.name and bad.file.is_file()
                bad.add(Part(bad.file if whole else Path(part), part), Rejected(**row))
            bad.left_out = self.left_out
            bad.finish(used=self.usable + faulty)
        if self.first_faulty is not None:
            first = FaultyRow(**self.first_faulty | {"fault": RowFault(self.first_faulty["fault"])})
            faults = Counter({RowFault(fault): count for fault, count in self.faults.items()})
            report_faulty(faulty, first, faults, name, usable=self.usable)
        report_misspelt(set(self.tasks), set(self.facts), name)


@dataclass(kw_only=True, slots=True)
class CorpusRecord:
    """A complete corpus."""

    portions: list[PortionReport]
    """In the order of their rows; of each, what is needed to read it."""
    sources: list[SourceRecord]
    repeats: Repeats
    reasons_wanted: int
    """Rows of tasks that reason, and those of them whose target does not."""
    without_reasoning: int
    refused: dict[int, str]
    """Rows that the chat template refuses, by number."""
    warnings: list[str]
    tokens: int

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read the record of a complete corpus."""
        stored = json.loads((folder / COMPLETE).read_text(encoding="utf-8"))
        stored["portions"] = [PortionReport(**each) for each in stored["portions"]]
        stored["sources"] = [SourceRecord(**each) for each in stored["sources"]]
        stored["repeats"] = Repeats(**stored["repeats"])
        stored["refused"] = {int(number): message for number, message in stored["refused"].items()}
        return cls(**stored)

    @property
    def rows(self) -> int:
        """Usable rows."""
        return sum(source.usable for source in self.sources)

    def write(self, folder: Path, excluded: Numbers) -> None:
        """Write the record last, which makes the corpus complete; ``excluded``: rows in the files that are not used."""
        np.save(folder / _EXCLUDED, excluded)
        with (folder / _EXCLUDED).open("rb+") as file:
            os.fsync(file.fileno())
        sync_folder(folder)
        write_small(folder / COMPLETE, json.dumps(asdict(self)))

    def usable(self, folder: Path) -> Numbers:
        """Return the numbers of the usable rows, ascending."""
        everything = np.arange(sum(portion.rows for portion in self.portions))
        found: Numbers = np.delete(everything, np.load(folder / _EXCLUDED))
        return found

    def tell(self, sources: Sequence[SourceConfig]) -> None:
        """Log what a user should know of the rows, once and not on every rank.

        Raises:
            DataError: If a source has no usable row.
        """
        for message in self.warnings if rank() == 0 else ():
            logger.warning("%s", message)
        for record, source in zip(self.sources, sources, strict=True):
            record.tell(source)
        found = notes(self.repeats, wanted=self.reasons_wanted, without=self.without_reasoning)
        report_notes(found, self.repeats)
