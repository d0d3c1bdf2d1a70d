"""What a Hugging Face checkpoint answers to held-out rows, of any task, in its own words."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_ads.data.chat import THINK, render_prompt
from megatron_ads.data.rows import ChatRow
from megatron_ads.data.tokenizer import load_tokenizer
from megatron_ads.errors import DataError
from megatron_ads.evaluation.greedy import GreedyGenerator


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model said to one held-out row."""

    row: ChatRow
    text: str
    """Special tokens are left out."""
    ended: bool
    """The model ended the answer itself; False: it was cut off at the limit."""


def answer_rows(
    folder: Path, rows: Sequence[ChatRow], *, max_new_tokens: int, batch_size: int, description: str = "answering"
) -> list[Answer]:
    """Let the checkpoint in ``folder`` answer ``rows``; return one answer per row, in order.

    Args:
        folder: Hugging Face checkpoint with tokenizer.
        rows: Their targets are not shown to the model.
        max_new_tokens: Longest answer, reasoning included.
        batch_size: Rows generated at once.
        description: What the progress bar says.

    Raises:
        DataError: If there are no rows.
        ConversionError: If transformers cannot load the folder.
    """
    if not rows:
        raise DataError("there are no held-out rows to answer; raise data.validation_rows.")
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
    for row, prompt, completion in zip(rows, prompts, completions, strict=True):
        opened = THINK if prompt.rstrip().endswith(THINK) else ""  # some chat templates open the reasoning themselves
        answers.append(Answer(row, opened + tokenizer.decode(completion.tokens), completion.ended))
    return answers
