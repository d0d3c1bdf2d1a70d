"""Query-ad relevance by generation: the model judges held-out pairs in its own words, and its answers are parsed."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_ads.data.chat import THINK, render_prompt
from megatron_ads.data.rows import ChatRow
from megatron_ads.data.tokenizer import load_tokenizer
from megatron_ads.errors import DataError
from megatron_ads.evaluation.greedy import GreedyGenerator
from megatron_ads.tasks.relevance import TASK, Failure, Judgement, Label, parse


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What the model said about one held-out pair."""

    id: str
    query: str
    prompt: str
    """What it was asked, without the chat template."""
    expected: Label
    text: str
    """What it said; special tokens are left out."""
    outcome: Judgement | Failure
    ended: bool
    """The model ended the answer itself; False: it was cut off at the limit."""

    @property
    def label(self) -> Label | None:
        """The label given; None if the answer could not be parsed."""
        return self.outcome.label if isinstance(self.outcome, Judgement) else None


def answer_rows(
    folder: Path, rows: Sequence[ChatRow], *, max_new_tokens: int, batch_size: int, description: str = "judging"
) -> list[Answer]:
    """Let the checkpoint in ``folder`` judge ``rows``; return one answer per row, in order.

    Args:
        folder: Hugging Face checkpoint with tokenizer.
        rows: Relevance rows with their true label.
        max_new_tokens: Longest answer, reasoning included.
        batch_size: Rows generated at once.
        description: What the progress bar says.

    Raises:
        DataError: If there are no rows, or one is of another task or without label.
        ConversionError: If transformers cannot load the folder.
    """
    expected = [_true_label(row) for row in rows]
    if not rows:
        raise DataError("there are no held-out rows to judge; raise data.validation_rows.")
    tokenizer = load_tokenizer(folder)
    prompts = [render_prompt(row.prompt, tokenizer) for row in rows]
    generator = GreedyGenerator(folder, end_token=tokenizer.end_token_id, pad_token=tokenizer.end_token_id)
    completions = generator.complete(
        [tokenizer.encode(prompt) for prompt in prompts],
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        description=description,
    )
    answers = []
    for row, label, prompt, completion in zip(rows, expected, prompts, completions, strict=True):
        opened = THINK if prompt.rstrip().endswith(THINK) else ""  # some chat templates open the reasoning themselves
        text = opened + tokenizer.decode(completion.tokens)
        answers.append(
            Answer(
                id=row.id,
                query=row.group,
                prompt=row.prompt[-1].content,
                expected=label,
                text=text,
                outcome=parse(text),
                ended=completion.ended,
            )
        )
    return answers


def _true_label(row: ChatRow) -> Label:
    if row.task != TASK or row.label not in set(Label):
        raise DataError(
            f"row {row.id!r} is of task {row.task!r} with label {row.label!r}; "
            f"this evaluation takes {TASK} rows labelled {', '.join(Label)}."
        )
    return Label(row.label)
