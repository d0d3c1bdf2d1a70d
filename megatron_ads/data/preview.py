"""Rows as the model sees them: the rendered text, which tokens carry loss, and how long rows are.

What is shown is decoded from the tokens of training, not rendered again: chat template, control tokens and all.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from itertools import pairwise

import numpy as np

from megatron_ads.data.chat import ChatTokenizer, holds_control_text, tokenize_row
from megatron_ads.data.corpus import notes_on, tokenize
from megatron_ads.data.split import Repeats, count_repeats
from megatron_ads.rows import ChatRow
from megatron_ads.tasks.row_checks import CheckedRows, RowFault

MOST_CHARACTERS = 4000

_LOSS, _NO_LOSS, _PLAIN = "\x1b[32m", "\x1b[2m", "\x1b[0m"
_LABELS_SHOWN = 5
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@dataclass(frozen=True, slots=True)
class LossSpan:
    """Successive tokens that all carry loss, or all carry none."""

    text: str
    tokens: int
    loss_weight: float
    """Largest weight of the span's tokens; 0 is no loss."""


@dataclass(frozen=True, slots=True)
class RowPreview:
    """One row and its spans, in order."""

    row: ChatRow
    spans: tuple[LossSpan, ...]

    def tokens(self, *, in_loss: bool) -> int:
        """Return how many tokens carry loss, or how many carry none."""
        return sum(span.tokens for span in self.spans if (span.loss_weight > 0) is in_loss)


@dataclass(frozen=True, kw_only=True, slots=True)
class Lengths:
    """Tokens of a part of many rows."""

    fewest: int
    median: int
    most_of_95_percent: int
    most: int

    @classmethod
    def of(cls, values: Sequence[int]) -> "Lengths":
        """Return the numbers of at least one value."""
        fewest, median, high, most = map(int, np.quantile(values, [0, 0.5, 0.95, 1], method="inverted_cdf"))
        return cls(fewest=fewest, median=median, most_of_95_percent=high, most=most)


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """What many rows are like."""

    rows: int
    """Read, whether they can be used or not."""
    seq_length: int
    lengths: dict[str, Lengths]
    """Of the rows that fit: prompt, target with its end token, both."""
    labels: dict[str, int]
    """The most frequent first."""
    left_out: dict[str, int]
    """By reason, the most frequent first."""
    first_faulty: str | None
    """Id of the first row that cannot be used."""
    with_control_text: int
    """Rows in which something is written like a control token."""
    repeats: Repeats
    notes: list[str]
    """Sentences on the rows that can be used."""


def preview_row(row: ChatRow, tokenizer: ChatTokenizer) -> RowPreview:
    """Return a row as training reads it.

    Raises:
        DataError: If the chat template refuses the conversation.
    """
    tokenized = tokenize_row(row, tokenizer)
    changes = np.flatnonzero(np.diff(tokenized.loss_weights > 0)) + 1
    spans = []
    for start, end in pairwise([0, *changes.tolist(), len(tokenized.tokens)]):
        tokens = tokenized.tokens[start:end].tolist()
        text = tokenizer.fast.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        spans.append(LossSpan(text, len(tokens), float(tokenized.loss_weights[start:end].max())))
    return RowPreview(row, tuple(spans))


def render_preview(preview: RowPreview, *, coloured: bool, whole: bool = False) -> str:
    """Return a row for people: a line of facts, then the text, where loss is green or stands between ``[[`` and ``]]``.

    The middle of a long text is left out, unless it is to be shown ``whole``.
    """
    row = preview.row
    without, with_loss = preview.tokens(in_loss=False), preview.tokens(in_loss=True)
    facts = [f"{row.id} of {row.task}", f"{without} tokens without loss", f"{with_loss} with loss"]
    if row.weight != 1:
        facts.append(f"weight {row.weight:g}")
    facts += [f"{name} {value!r:.80}" for name, value in (("group", row.group), ("label", row.label)) if value]
    texts = [_shown(span, coloured=coloured, whole=whole) for span in preview.spans]
    return f"{visible(', '.join(facts))}\n{''.join(texts)}"


def summarise(checked: CheckedRows, tokenizer: ChatTokenizer, *, seq_length: int) -> Summary:
    """Count many rows: how long they are, which labels they have, what would be left out and why.

    Raises:
        DataError: If the chat template refuses a conversation.
    """
    tokenized = tokenize(checked.rows, tokenizer, seq_length=seq_length)
    targets = [row.loss_weights > 0 for row in tokenized.rows]
    parts = {
        "prompt": [int((~target).sum()) for target in targets],
        "target": [int(target.sum()) for target in targets],
        "row": [len(target) for target in targets],
    }
    reasons: Counter[str] = Counter({str(reason): count for reason, count in tokenized.left_out.items()})
    for row in checked.faulty:
        reasons[f"{row.fault} ({row.reason})" if row.fault is RowFault.unreadable_target else str(row.fault)] += 1
    return Summary(
        rows=len(checked.rows) + len(checked.faulty),
        seq_length=seq_length,
        lengths={name: Lengths.of(values) for name, values in parts.items() if values},
        labels=dict(Counter(row.label for row in checked.rows if row.label).most_common()),
        left_out=dict(reasons.most_common()),
        first_faulty=checked.faulty[0].row_id if checked.faulty else None,
        with_control_text=sum(holds_control_text(row, tokenizer) for row in checked.rows),
        repeats=(repeats := count_repeats(checked.rows)),
        notes=notes_on(checked.rows, repeats),
    )


def render_summary(summary: Summary) -> str:
    """Return a summary for people."""
    lines = [f"{summary.rows:,} rows read. Tokens of those that fit:"]
    if summary.lengths:
        lines.append(f"  {'':8}{'fewest':>8}{'median':>8}{'95 %':>8}{'most':>8}")
    for name, found in summary.lengths.items():
        lines.append(f"  {name:8}" + "".join(f"{number:8,}" for number in astuple(found)))
    if summary.labels:
        frequent = [f"{visible(label)} {count:,}" for label, count in summary.labels.items()]
        more = f", and {len(frequent) - _LABELS_SHOWN:,} more" if len(frequent) > _LABELS_SHOWN else ""
        lines.append(f"Labels: {', '.join(frequent[:_LABELS_SHOWN])}{more}.")
    left_out = ", ".join(f"{reason} {count:,}" for reason, count in summary.left_out.items()) or "none"
    lines.append(f"Left out with data.seq_length = {summary.seq_length:,}: {left_out}.")
    if summary.with_control_text:
        lines.append(f"{summary.with_control_text:,} rows hold words like the template's control tokens, read as text.")
    lines += [f"{note}." for note in summary.notes]
    if summary.first_faulty is not None:
        lines.append(f"The first that cannot be used: {visible(summary.first_faulty)}.")
    return "\n".join(lines)


def visible(text: str) -> str:
    """Return a text whose control characters cannot act on a terminal."""
    return _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


def _shown(span: LossSpan, *, coloured: bool, whole: bool) -> str:
    text, half = span.text, MOST_CHARACTERS // 2
    if not whole and len(text) > MOST_CHARACTERS:
        text = f"{text[:half]}\n... {len(text) - 2 * half:,} characters not shown ...\n{text[-half:]}"
    text, in_loss = visible(text), span.loss_weight > 0
    if not coloured:
        return f"[[{text}]]" if in_loss else text
    # Line by line, so that a pager that is entered in the middle still knows the colour.
    return "\n".join(f"{_LOSS if in_loss else _NO_LOSS}{line}{_PLAIN}" if line else "" for line in text.split("\n"))
