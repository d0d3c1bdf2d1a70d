"""From the reports of all portions to one record of the corpus: what only all rows together can tell."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from megatron_ads.config.data import SourceConfig
from megatron_ads.data.bad_rows import RejectedRows
from megatron_ads.data.prepared.corpus_record import CorpusRecord, SourceRecord
from megatron_ads.data.prepared.portion import Portion, PortionReport
from megatron_ads.data.prepared.repeated_ids import RepeatedIds, find_repeated_ids
from megatron_ads.data.prepared.store import Reasons, RowFiles
from megatron_ads.data.sources import divided
from megatron_ads.data.split import Numbers, repeats_of

Made = tuple[Portion, PortionReport]


def merge(sources: Sequence[SourceConfig], made: Sequence[Made], folder: Path, warnings: Sequence[str]) -> None:
    """Write the record of a corpus, which makes it complete.

    Raises:
        DataError: For the first bad row of a source that has no file for such rows.
    """
    records, excluded, first = [], [], 0
    for index in range(len(sources)):
        of_source = [each for each in made if each[1].source == index]
        record, repeated = merge_source(of_source, folder)
        records.append(record)
        excluded.append(repeated + first)
        first += sum(report.rows for _, report in of_source)
    reports = [report for _, report in made]
    files, left_out = RowFiles(folder, reports), np.concatenate(excluded)
    used = np.delete(np.arange(len(files)), left_out)
    reasons = files.numbers("reasons")[used]
    starts = np.cumsum([0, *(report.rows for report in reports)]).tolist()
    CorpusRecord(
        portions=[
            PortionReport(name=report.name, source=report.source, batches=report.batches, tasks=report.tasks)
            for report in reports
        ],
        sources=records,
        repeats=repeats_of(files.keys("question")[used], files.keys("answer")[used]),
        reasons_wanted=int(np.count_nonzero(reasons != Reasons.not_asked)),
        without_reasoning=int(np.count_nonzero(reasons == Reasons.missing)),
        refused={
            start + place: message
            for start, report in zip(starts, reports, strict=False)
            for place, message in report.refused.items()
        },
        warnings=list(dict.fromkeys([*warnings, *(line for report in reports for line in report.warnings)])),
        tokens=sum(report.tokens for report in reports),
    ).write(folder, left_out)


def merge_source(made: Sequence[Made], folder: Path) -> tuple[SourceRecord, Numbers]:
    """Return the record of one source, and which of its rows in the files repeat an id.

    Raises:
        DataError: For its first bad row, if it has no file for such rows.
    """
    reports, config = [report for _, report in made], made[0][0].config
    files, reader = RowFiles(folder, reports), divided(config)
    repeated, rejected = RepeatedIds(np.arange(0), set(), []), []
    if reader is not None:
        parts = [portion.part for portion, _ in made if portion.part is not None]
        repeated = find_repeated_ids([portion for portion, _ in made], reports, files, reader)
        of_reports = [(place, row) for place, report in enumerate(reports) for row in report.rejected]
        bad = RejectedRows(reader.path, None if config.rejected is None else Path(config.rejected))
        for place, row in sorted([*of_reports, *repeated.rejected], key=lambda each: (each[0], each[1].number)):
            bad.add(parts[place], row)  # raises without a file for it
            rejected.append((parts[place].name, asdict(row)))
    faulty = [
        row
        for place, report in enumerate(reports)
        for number, row in report.faulty
        if (place, number) not in repeated.faulty
    ]
    tasks = np.delete(np.array(files.tasks(), dtype=object), repeated.usable)
    record = SourceRecord(
        usable=len(files) - len(repeated.usable),
        tasks=sorted(set(tasks.tolist())),
        facts=sorted({fact for report in reports for fact in report.facts}),
        faults=dict(Counter(str(row.fault) for row in faulty)),
        first_faulty=asdict(faulty[0]) if faulty else None,
        rejected=rejected,
        left_out=sum(report.left_out for report in reports),
        is_divided=reader is not None,
    )
    return record, repeated.usable
