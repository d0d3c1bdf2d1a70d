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
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from megatron_ads.data.jsonl import read_records
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
    if root := os.environ.get(DATA_ROOT):
        return Path(root) / file
    raise DataError(
        f"The source kind {kind} reads {file} below the folder that the environment variable {DATA_ROOT} names, "
        f"and it names none. Set {DATA_ROOT}, or the source's path, or choose data=simulator."
    )


def esci_rows(file: Path, *, limit: int | None = None) -> list[ChatRow]:
    """Return the pairs of a file, the first ``limit`` of them.

    Raises:
        DataError: With the row number, for the first record that cannot be used; if there is none.
    """
    return some_rows(file, read_records(file, _read_pair), limit)


def some_rows(file: Path, rows: Iterable[ChatRow], limit: int | None, *, what: str = "rows") -> list[ChatRow]:
    """Return the first ``limit`` of the rows of a file.

    Raises:
        DataError: If there is none.
    """
    if not (read := list(islice(rows, limit))):
        raise DataError(f"{file} holds no {what}.")
    return read


def _read_pair(_: int, record: Mapping[str, Any]) -> ChatRow:
    query, title, judgment = (_text(record, name) for name in ("query", "title", "esci"))
    if judgment not in ESCI_LABELS:
        raise DataError(f"esci is {judgment!r}; known: {', '.join(ESCI_LABELS)}.")
    brand, category = record.get("brand") or "", record.get("category") or []
    if not isinstance(brand, str) or not isinstance(category, list):
        raise DataError(f"brand is {brand!r} and category {category!r}; text and a list are expected.")
    # Sellers fill the end of a long title with search words.
    ad = Ad(cut_at_word(title, _MAX_TITLE_CHARACTERS), str(category[-1]) if category else "", seller=brand)
    label = ESCI_LABELS[judgment]
    return chat_row(f"{query}/{record.get('asin')}", query, ad, label, reason(query, ad, label))


def _text(record: Mapping[str, Any], name: str) -> str:
    value = record.get(name)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{name} is {value!r}; it must be text that is not empty.")
    return value.strip()


def cut_at_word(text: str, length: int) -> str:
    """Return a text of at most ``length`` characters, cut between words."""
    return text if len(text) <= length else text[:length].rsplit(" ", 1)[0]


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
    found_listed, missing_listed = (", ".join(listed[:_MAX_WORDS_LISTED]) or "none" for listed in (found, missing))
    parts = [f"Found: {found_listed}.", f"Missing: {missing_listed}."]
    if ad.description:
        parts.append(f"Kind: {ad.description}.")
    return " ".join([*parts, _VERDICTS[label]])


def gsm8k_rows(file: Path, *, limit: int | None = None) -> list[ChatRow]:
    """Return the questions of a file, the first ``limit`` of them.

    Raises:
        DataError: With the row number, for the first record that cannot be used; if there is none.
    """

    def read(number: int, record: Mapping[str, Any]) -> ChatRow:
        question, answer = _text(record, "question"), _text(record, "answer")
        solution, mark, last = (part.strip() for part in answer.rpartition(_ANSWER))
        if not mark or not last or not solution:
            raise DataError(f"answer is {answer!r:.80}; a solution, then {_ANSWER} and the result are expected.")
        result, reasoning = last.replace(",", ""), _CALCULATOR.sub("", solution).strip()
        target = Message(Role.assistant, f"<think>{reasoning}</think>{_ANSWER} {result}")
        facts: dict[str, JsonValue] = {Fact.question: question, Fact.ground_truth: result, Fact.reasoning: reasoning}
        return ChatRow(
            id=f"{GSM8K}-{file.stem}-{number}",
            task=GSM8K,
            messages=(Message(Role.user, question), target),
            group=question,
            label=result,
            facts=facts,
        )

    return some_rows(file, read_records(file, read), limit)
