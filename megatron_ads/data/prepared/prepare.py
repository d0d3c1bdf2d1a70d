"""Prepare a corpus: read, check and tokenize every row of its sources once, in several processes, into one folder.

The folder is named by a digest of everything that decides what is in it: the content of the files, the settings that
change rows, the tokenizer, and the code that reads and words them. Portions are files of their own, each complete or
absent; ``prepared.json``, written last, makes the corpus complete. A preparation that was killed is continued by the
next one, which makes the portions that are missing.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from itertools import accumulate, count, takewhile
from pathlib import Path
from typing import NamedTuple

from megatron_ads.config.data import DataConfig, SourceKind
from megatron_ads.data.prepared.corpus_record import COMPLETE
from megatron_ads.data.prepared.exclusive import exclusive, refused_writes_named
from megatron_ads.data.prepared.file_content import BLOCK_BYTES, FileContent, contents_of
from megatron_ads.data.prepared.merge import merge, merge_source
from megatron_ads.data.prepared.portion import (
    REPORT_SUFFIX,
    Manner,
    Portion,
    PortionReport,
    collected_warnings,
    make_portion,
)
from megatron_ads.data.source_files import JSON_LINES, Part, Span, is_plain_text
from megatron_ads.data.sources import divided, files_of, read_source
from megatron_ads.observability.log import get_logger

logger = get_logger(__name__)

_MEMORY = "files.json"
_ROWS_OF_A_PORTION = 4096
_MOST_PORTIONS = 4096
"""Of one file; of a larger one, each portion is several blocks."""
_WORTH_A_POOL = 4
"""Portions; a process takes as long to start as one of them."""
_SECONDS_BETWEEN_LINES = 30.0
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip
_CODE = ("data", "tasks", "rows.py", "metrics/ranking.py")
"""What decides how a row is read, checked, worded and told apart."""


class Advance(NamedTuple):
    """How far a preparation is."""

    rows: int
    portions: int
    of_portions: int


class LoggedAdvance:
    """Logs how far a preparation is, now and then; nothing for one that is over at once."""

    def __init__(self) -> None:
        self._started = self._told = time.monotonic()

    def show(self, advance: Advance) -> None:
        """Take in that a portion is done."""
        now = time.monotonic()
        is_last = advance.portions == advance.of_portions and self._told > self._started
        if is_last or now - self._told >= _SECONDS_BETWEEN_LINES:
            self._told = now
            logger.info(
                "preparing rows: %d of %d portions, %d rows, %.0f s",
                advance.portions,
                advance.of_portions,
                advance.rows,
                now - self._started,
            )


def prepare(
    data: DataConfig,
    tokenizer: Path,
    directory: Path,
    *,
    workers: int | None = None,
    timeout_seconds: float = 3600.0,
    on_advance: Callable[[Advance], None] = lambda advance: None,
    on_wait: Callable[[int], None] = lambda portions: None,
) -> Path:
    """Return the folder of the prepared corpus below ``directory``; make it, or what is missing of it.

    Args:
        data: Its sources, seed, reasoning and template arguments decide what the rows are.
        tokenizer: Folder with ``tokenizer.json``.
        directory: Created if absent; a folder of several corpora.
        workers: Processes; None: as many as there are cores for this one.
        timeout_seconds: How long to wait for another process that prepares the same corpus and makes no progress.
        on_wait: Called while that process makes progress, with the number of portions that it has finished.

    Raises:
        DataError: If a source cannot be read, has no usable row, or a bad row and no file for it.
    """
    data.check()
    with refused_writes_named(directory):
        return _prepare(data, tokenizer, directory, workers, timeout_seconds, on_advance, on_wait)


def _prepare(
    data: DataConfig,
    tokenizer: Path,
    directory: Path,
    workers: int | None,
    timeout_seconds: float,
    on_advance: Callable[[Advance], None],
    on_wait: Callable[[int], None],
) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    contents = _contents(data, directory)
    folder = directory / _key(data, tokenizer, contents)
    if is_complete(folder):
        return folder
    folder.mkdir(exist_ok=True)
    manner = Manner(
        folder=folder, tokenizer=tokenizer, template_arguments=data.template_arguments, reasoning=data.reasoning
    )
    with exclusive(
        folder,
        until=lambda: is_complete(folder),
        timeout_seconds=timeout_seconds,
        on_change=lambda: on_wait(sum(1 for _ in folder.glob(f"rows-*{REPORT_SUFFIX}"))),
    ) as held:
        if not is_complete(folder):
            for leftover in folder.glob("rows-*.partial") if held else ():  # of one that was killed
                leftover.unlink()
            _make(data, manner, contents, workers or len(os.sched_getaffinity(0)), on_advance)
    return folder


def prepared_directory(data: DataConfig, log_directory: Path) -> Path:
    """Return where the corpora of a job are."""
    return log_directory / "prepared" if data.prepared_dir is None else Path(data.prepared_dir)


def find_prepared(data: DataConfig, tokenizer: Path, directory: Path) -> Path | None:
    """Return the folder of a corpus that is complete below ``directory``; None if there is none."""
    if next(directory.glob(f"*/{COMPLETE}"), None) is None:  # else the files need not be read
        return None
    folder = directory / _key(data, tokenizer, _contents(data, directory))
    return folder if is_complete(folder) else None


def _contents(data: DataConfig, directory: Path) -> dict[Path, FileContent]:
    return contents_of([part.file for source in data.sources for part in files_of(source)], directory / _MEMORY)


def is_complete(folder: Path) -> bool:
    """Return whether a folder holds a whole corpus."""
    return (folder / COMPLETE).is_file()


def _key(data: DataConfig, tokenizer: Path, contents: Mapping[Path, FileContent]) -> str:
    sources = []
    for source in data.sources:
        own = asdict(source) | {"name": None, "path": None, "events": None, "weight": None, "keep_share": None}
        if divided(source) is not None:  # what is rejected is written at every start
            own["rejected"] = source.rejected is not None
        sources.append([own, [[part.name, contents[part.file].sha256] for part in files_of(source)]])
    generated = any(source.kind in (SourceKind.builtin, SourceKind.simulator) for source in data.sources)
    files = {name: tokenizer / name for name in _TOKENIZER_FILES}
    parts = {
        "sources": sources,
        "seed": data.seed if generated else None,
        "reasoning": data.reasoning,
        "template_arguments": data.template_arguments,
        "tokenizer": {name: _sha256(file) for name, file in files.items() if file.is_file()},
        "code": _code_digest(),
        "versions": [version(name) for name in ("tokenizers", "transformers", "jinja2")],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _code_digest() -> str:
    root = Path(__file__).parents[2]  # megatron_ads
    places = [root / name for name in _CODE]
    files = [file for place in places for file in ([place] if place.is_file() else sorted(place.rglob("*.py")))]
    return hashlib.sha256("".join(_sha256(file) for file in files).encode()).hexdigest()


def _make(
    data: DataConfig,
    manner: Manner,
    contents: Mapping[Path, FileContent],
    workers: int,
    on_advance: Callable[[Advance], None],
) -> None:
    from conversion.workers import run_all

    warnings: list[str] = []
    with collected_warnings(warnings):  # those of sources that are read here
        portions = [portion for index, each in enumerate(data.sources) for portion in _portions(data, index, contents)]
    made: dict[str, PortionReport] = {}
    for report in run_all(
        partial(make_portion, manner=manner),
        portions,
        workers=workers if len(portions) > _WORTH_A_POOL else 1,
        advance=lambda rows: None,
    ):
        made[report.name] = report
        on_advance(Advance(sum(each.rows for each in made.values()), len(made), len(portions)))
        if report.rejected and data.sources[report.source].rejected is None:
            _refuse_first(portions, made, manner.folder, report.source)
    of_portions = list(zip(portions, [made[portion.name] for portion in portions], strict=True))
    merge(data.sources, of_portions, manner.folder, warnings)


def _refuse_first(portions: Sequence[Portion], made: Mapping[str, PortionReport], folder: Path, source: int) -> None:
    """Raise the error for the first bad row of a source, unless a portion before it is still to come."""
    before = takewhile(lambda each: each.name in made, (each for each in portions if each.source == source))
    known = [(portion, made[portion.name]) for portion in before]
    if any(report.rejected for _, report in known):
        merge_source(known, folder)


def _portions(data: DataConfig, index: int, contents: Mapping[Path, FileContent]) -> Iterator[Portion]:
    """Yield the portions of a source, in the order of its rows."""
    source = data.sources[index]
    reader = divided(source)
    names = (f"rows-{index}-{number:05}.arrow" for number in count())
    if reader is None:
        rows = read_source(source, seed=data.seed)
        for start in range(0, max(len(rows), 1), _ROWS_OF_A_PORTION):
            yield Portion(name=next(names), source=index, config=source, rows=rows[start : start + _ROWS_OF_A_PORTION])
        return
    for part in reader.parts:
        for span in _spans(part, contents[part.file]):
            yield Portion(name=next(names), source=index, config=source, part=part, span=span)


def _spans(part: Part, content: FileContent) -> Iterator[Span | None]:
    """Yield the stretches of a file that are read apart; None is all of it."""
    blocks = len(content.newlines)
    if not blocks or part.form not in JSON_LINES or not is_plain_text(part.file):
        yield None
        return
    together = -(-blocks // _MOST_PORTIONS)
    before = [0, *accumulate(content.newlines)]
    for block in range(0, blocks, together):
        yield Span(block * BLOCK_BYTES, (block + together) * BLOCK_BYTES, before[block])
