"""Held-out rows of general domains: no ads task reads their answers, so what counts is how probable their targets are.

A domain is what such rows have in place of a task: ``gsm8k``, ``chat`` or any other name.

PPL = exp(-(1/T) sum_t log P(y_t | prompt, y_<t)), over the T tokens of all targets of a domain, with their end tokens.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megatron_ads.data.chat import tokenize_row
from megatron_ads.data.rows import ChatRow
from megatron_ads.data.tokenizer import load_tokenizer
from megatron_ads.evaluation.language_model import load_model, log_probabilities
from megatron_ads.progress import Progress


def general_scores(folder: Path, rows: Sequence[ChatRow], *, batch_size: int) -> dict[str, dict[str, float]]:
    """Return number of rows and perplexity by domain; empty without rows. Shows a progress bar.

    Raises:
        ConversionError: If transformers cannot load the checkpoint in ``folder``.
    """
    if not rows:
        return {}
    tokenizer, model = load_tokenizer(folder), load_model(folder)
    # A row of weight 0 is not trained on; its target counts here all the same.
    weighed = [replace(row, weight=1.0) for row in rows]
    tokenized = sorted((tokenize_row(row, tokenizer) for row in weighed), key=lambda row: len(row.tokens))
    said: dict[str, list[float]] = defaultdict(list)
    with Progress(len(rows), description="reading general rows", unit="row") as progress:
        for start in range(0, len(rows), batch_size):  # rows of like length together: little is padded
            batch = tokenized[start : start + batch_size]
            parts = [
                (row.tokens[: -row.target_count].tolist(), row.tokens[-row.target_count :].tolist()) for row in batch
            ]
            found = log_probabilities(model, *zip(*parts, strict=True), pad_token=tokenizer.end_token_id)
            for row, of_row in zip(batch, found, strict=True):
                said[row.task] += of_row
            progress.update(len(batch))
    counts = Counter(row.task for row in rows)
    return {
        domain: {"rows": counts[domain], "perplexity": math.exp(-sum(values) / len(values))}
        for domain, values in sorted(said.items())
    }
