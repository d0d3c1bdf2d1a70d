"""What a Hugging Face checkpoint answers to held-out rows, of any task, in its own words or with a valid name."""

import time
from collections.abc import Sequence
from pathlib import Path

from megatron_ads.data.rows import ChatRow
from megatron_ads.evaluation.answer import Answer
from megatron_ads.evaluation.answer_journal import AnswerJournal
from megatron_ads.evaluation.asking import Asking, RowAsker
from megatron_ads.progress import Progress


def answer_rows(
    folder: Path,
    rows: Sequence[ChatRow],
    asking: Asking,
    *,
    journal: AnswerJournal | None = None,
    description: str = "answering",
) -> list[Answer]:
    """Let the checkpoint in ``folder`` answer ``rows``; return one answer per row, in order. Shows a progress bar.

    Args:
        folder: Hugging Face checkpoint with tokenizer.
        rows: Their targets are not shown to the model.
        asking: How.
        journal: What was answered before, and where further answers are noted; None notes nothing.
        description: What the progress bar says.

    Raises:
        DataError: If there are names that cannot be told apart.
        ConversionError: If transformers cannot load the folder.
    """
    asker = RowAsker(folder, rows, asking)
    answers: dict[int, Answer] = {}
    before = journal.rows if journal else 0
    with Progress(len(rows), before, description=description, unit="row") as progress:
        for number, batch in enumerate(asker.batches()):
            said = journal.answered(number, [rows[row] for row in batch]) if journal else None
            if said is None:
                started = time.monotonic()
                said = asker.answer(batch, draw=number)
                if journal:
                    journal.add(number, said, time.monotonic() - started)
                progress.update(len(batch))
            answers.update(zip(batch, said, strict=True))
    return [answers[index] for index in range(len(rows))]
