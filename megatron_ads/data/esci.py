"""Real query-product pairs as query-ad pairs: Amazon's ESCI judgments (arXiv:2206.06588) joined with product records.

A product stands in for an ad, and product search for an ads log. Exact is good; substitute and complement are fair
(our mapping); irrelevant is bad. The reasoning is derived from the record: which words of the query its title and
brand cover, and what kind of product its category says it is. The judges' own reasons are not known.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_ads.data.public_data import locate, read_rows
from megatron_ads.data.rows import ChatRow
from megatron_ads.errors import DataError
from megatron_ads.tasks.prompts import Ad
from megatron_ads.tasks.relevance import Label, chat_row

FILE = Path("esci_us") / "pairs.jsonl"
LABELS = {"E": Label.good, "S": Label.fair, "C": Label.fair, "I": Label.bad}

_MAX_TITLE_CHARACTERS = 100
_MAX_WORDS_LISTED = 4


def esci_file(path: str | None) -> Path:
    """Return the file of pairs: ``path``, or where ``MEGATRON_ADS_DATA`` says.

    Raises:
        DataError: If neither names anything.
    """
    return locate(path, FILE, kind="esci")


def esci_rows(file: Path, *, limit: int | None = None) -> list[ChatRow]:
    """Return the pairs of a file, the first ``limit`` of them.

    Raises:
        DataError: With the row number, for the first record that cannot be used.
    """
    return read_rows(file, lambda _, record: _read_record(record), limit=limit)


def _read_record(record: Mapping[str, Any]) -> ChatRow:
    query, title, judgment = (_text(record, name) for name in ("query", "title", "esci"))
    if judgment not in LABELS:
        raise DataError(f"esci is {judgment!r}; known: {', '.join(LABELS)}.")
    brand, category = record.get("brand") or "", record.get("category") or []
    if not isinstance(brand, str) or not isinstance(category, list):
        raise DataError(f"brand is {brand!r} and category {category!r}; text and a list are expected.")
    kind = str(category[-1]) if category else ""
    ad = Ad(title=_shorten(title), seller=brand, description=kind)
    reasoning = reason(query, ad, LABELS[judgment])
    return chat_row(f"{query}/{record.get('asin')}", query, ad, LABELS[judgment], reasoning)


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
    shown = stems(f"{ad.title} {ad.seller} {ad.description}")
    words = list(dict.fromkeys(re.findall(r"\w+", query.lower())))
    found = [word for word in words if stems(word) <= shown]
    missing = [word for word in words if word not in found]
    parts = [f"Found: {_listed(found)}.", f"Missing: {_listed(missing)}."]
    if ad.description:
        parts.append(f"Kind: {ad.description}.")
    return " ".join([*parts, _VERDICTS[label]])


def stems(text: str) -> set[str]:
    """Return the words of a text in lower case, without a plural s."""
    return {word.removesuffix("s") if len(word) > 3 else word for word in re.findall(r"\w+", text.lower())}


def _listed(words: list[str]) -> str:
    return ", ".join(words[:_MAX_WORDS_LISTED]) or "none"
