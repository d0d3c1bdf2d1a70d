"""Held-out rows of general domains: no ads task reads their answers, so what counts is how probable their targets are.

A domain is what such rows have in place of a task: ``gsm8k``, ``chat`` or any other name. Its perplexity is that of the
tokens of all its targets, with their end tokens.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace

from megatron_ads.data.chat import ChatTokenizer, tokenize_row
from megatron_ads.data.rows import ChatRow
from megatron_ads.inference.engine import Engine
from megatron_ads.metrics.perplexity import perplexity
from megatron_ads.progress import Progress


def general_scores(
    engine: Engine, tokenizer: ChatTokenizer, rows: Sequence[ChatRow], *, batch_size: int
) -> dict[str, dict[str, float]]:
    """Return number of rows and perplexity by domain. Shows a progress bar.

    Raises:
        UnsupportedError: If the engine does not say how probable a text is.
    """
    # A row of weight 0 is not trained on; its target counts here all the same.
    weighed = [replace(row, weight=1.0) for row in rows]
    tokenized = sorted((tokenize_row(row, tokenizer) for row in weighed), key=lambda row: len(row.tokens))
    said: dict[str, list[float]] = defaultdict(list)
    with Progress(len(rows), description="reading general rows", unit="row") as progress:
        for start in range(0, len(rows), batch_size):  # rows of like length together: little is padded
            batch = tokenized[start : start + batch_size]
            prompts = [row.tokens[: -row.target_count].tolist() for row in batch]
            targets = [row.tokens[-row.target_count :].tolist() for row in batch]
            for row, of_row in zip(batch, engine.log_probabilities(prompts, targets), strict=True):
                said[row.task] += of_row
            progress.update(len(batch))
    counts = Counter(row.task for row in rows)
    return {
        domain: {"rows": counts[domain], "perplexity": perplexity(-sum(values), len(values))}
        for domain, values in sorted(said.items())
    }
