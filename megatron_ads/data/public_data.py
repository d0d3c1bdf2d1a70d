"""Find and read public data: below the folder that ``MEGATRON_ADS_DATA`` names, or at a path of one's own.

Amazon's ESCI judgments (arXiv:2206.06588), joined with product records, are read as query-ad pairs. A product stands in
for an ad, and product search for an ads log. Exact is good; substitute and complement are fair (our mapping);
irrelevant is bad. The reasoning is derived from the record: which words of the query its title and brand cover, and
what kind of product its category says it is. The judges' own reasons are not known.

School mathematics (GSM8K, arXiv:2110.14168) is read as general-domain rows: they keep abilities that ads rows do not
train. The worked solution is the reasoning; the calculator's marks, ``<<3*4=12>>``, are left out. The published
training questions are read; the test questions are for benchmarks.
"""

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron_ads.data.jsonl import read_objects
from megatron_ads.errors import DataError
from megatron_ads.metrics.text import words_of
from megatron_ads.rows import ChatRow, Fact, JsonValue, Message, Role
from megatron_ads.tasks.prompts import Ad
from megatron_ads.tasks.relevance import Label, chat_row

DATA_ROOT = "MEGATRON_ADS_DATA"
"""Environment variable: the folder of public data."""

ESCI_FILE = Path("esci_us") / "pairs.jsonl"
ESCI_LABELS = {"E": Label.good, "S": Label.fair, "C": Label.fair, "I": Label.bad}

_MAX_TITLE_CHARACTERS = 100
_MAX_WORDS_LISTED = 4

GSM8K = "gsm8k"
GSM8K_FILE = Path("gsm8k") / "train.jsonl"
_ANSWER = "####"
_CALCULATOR = re.compile(r"<<[^>]*>>")


def locate(path: str | None, file: Path, *, kind: str) -> Path:
    """Return where a file of public data is.

    Args:
        path: The file, or the folder that holds it; None: below the data root.
        file: Its place below the data root.
        kind: The source kind that reads it.

    Raises:
        DataError: If neither ``path`` nor the environment names anything.
    """
    if path is not None:
        given = Path(path)
        return given if given.suffix == file.suffix else given / file.name
    root = os.environ.get(DATA_ROOT)
    if not root:
        raise DataError(
            f"The source kind {kind} reads {file} below the folder that the environment variable {DATA_ROOT} names, "
            f"and it names none. Set {DATA_ROOT}, or the source's path, or choose data=simulator."
        )
    return Path(root) / file


def read_rows(
    file: Path, read_record: Callable[[int, Mapping[str, Any]], ChatRow], *, limit: int | None
) -> list[ChatRow]:
    """Return the rows of a JSONL file, the first ``limit`` of them.

    Args:
        file: One record a line.
        read_record: Takes the number of a line and its record; raises ``DataError`` for one that cannot be used.
        limit: None: all.

    Raises:
        DataError: With the row number, for the first record that cannot be used.
    """
    rows: list[ChatRow] = []
    for number, record in read_objects(file):
        if len(rows) == limit:
            break
        try:
            rows.append(read_record(number, record))
        except DataError as error:
            raise DataError(f"{file}, row {number}: {error}") from None
    if not rows:
        raise DataError(f"{file} holds no rows.")
    return rows


def esci_file(path: str | None) -> Path:
    """Return the file of pairs: ``path``, or where ``MEGATRON_ADS_DATA`` says.

    Raises:
        DataError: If neither names anything.
    """
    return locate(path, ESCI_FILE, kind="esci")


def esci_rows(file: Path, *, limit: int | None = None) -> list[ChatRow]:
    """Return the pairs of a file, the first ``limit`` of them.

    Raises:
        DataError: With the row number, for the first record that cannot be used.
    """
    return read_rows(file, lambda _, record: _read_pair(record), limit=limit)


def _read_pair(record: Mapping[str, Any]) -> ChatRow:
    query, title, judgment = (_text(record, name) for name in ("query", "title", "esci"))
    if judgment not in ESCI_LABELS:
        raise DataError(f"esci is {judgment!r}; known: {', '.join(ESCI_LABELS)}.")
    brand, category = record.get("brand") or "", record.get("category") or []
    if not isinstance(brand, str) or not isinstance(category, list):
        raise DataError(f"brand is {brand!r} and category {category!r}; text and a list are expected.")
    kind = str(category[-1]) if category else ""
    ad = Ad(title=_shorten(title), seller=brand, description=kind)
    reasoning = reason(query, ad, ESCI_LABELS[judgment])
    return chat_row(f"{query}/{record.get('asin')}", query, ad, ESCI_LABELS[judgment], reasoning)


def _text(record: Mapping[str, Any], name: str) -> str:
    value = record.get(name)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{name} is {value!r}; it must be text that is not empty.")
    return value.strip()


def _shorten(title: str) -> str:
    """Cut a title at a word near ``_MAX_TITLE_CHARACTERS``; sellers fill the rest with search words."""
    if len(title) <= _MAX_TITLE_CHARACTERS:
        return title
    return title[:_MAX_TITLE_CHARACTERS].rsplit(" ", 1)[0]


_VERDICTS = {
    Label.good: "It is what the query asks for.",
    Label.fair: "It could serve instead, or along with it.",
    Label.bad: "It is something else.",
}


def reason(query: str, ad: Ad, label: Label) -> str:
    """Return the evidence of a pair in words, ending in what the label means."""
    shown = set(words_of(f"{ad.title} {ad.seller} {ad.description}"))
    words = list(dict.fromkeys(re.findall(r"\w+", query.lower())))
    found = [word for word in words if shown.issuperset(words_of(word))]
    missing = [word for word in words if word not in found]
    parts = [f"Found: {_listed(found)}.", f"Missing: {_listed(missing)}."]
    if ad.description:
        parts.append(f"Kind: {ad.description}.")
    return " ".join([*parts, _VERDICTS[label]])


def _listed(words: list[str]) -> str:
    return ", ".join(words[:_MAX_WORDS_LISTED]) or "none"


def gsm8k_file(path: str | None) -> Path:
    """Return the file of questions.

    Raises:
        DataError: If neither ``path`` nor the environment names anything.
    """
    return locate(path, GSM8K_FILE, kind=GSM8K)


def gsm8k_rows(file: Path, *, limit: int | None = None) -> list[ChatRow]:
    """Return the questions of a file, the first ``limit`` of them.

    Raises:
        DataError: With the row number, for the first record that cannot be used.
    """
    return read_rows(
        file, lambda number, record: _read_question(record, row_id=f"{GSM8K}-{file.stem}-{number}"), limit=limit
    )


def _read_question(record: Mapping[str, Any], *, row_id: str) -> ChatRow:
    question, answer = _text(record, "question"), _text(record, "answer")
    solution, mark, number = answer.rpartition(_ANSWER)
    if not mark or not number.strip() or not solution.strip():
        raise DataError(f"answer is {answer!r:.80}; a solution, then {_ANSWER} and the result are expected.")
    result, reasoning = number.strip().replace(",", ""), _CALCULATOR.sub("", solution).strip()
    messages = (
        Message(Role.user, question),
        Message(Role.assistant, f"<think>{reasoning}</think>{_ANSWER} {result}"),
    )
    facts: dict[str, JsonValue] = {Fact.question: question, Fact.ground_truth: result, Fact.reasoning: reasoning}
    return ChatRow(id=row_id, task=GSM8K, messages=messages, group=question, label=result, facts=facts)
