"""`megatron-ads evaluate`: let a Hugging Face checkpoint answer the held-out rows of a recipe, and score the answers.

    megatron-ads evaluate --model runs/tuned --recipe sft/quickstart
    megatron-ads evaluate --model runs/tuned --recipe sft/quickstart data=esci --answers answers.jsonl --json

The held-out rows are those the recipe's training leaves out: same data section, same seed.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_ads.data.rows import ChatRow
    from megatron_ads.evaluation.answers import Answer

RELEVANCE = "query_ad_relevance"
MARGIN = 1.25
"""How much longer than the longest training target an answer may become."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `megatron-ads evaluate`."""
    parser.add_argument("--model", type=Path, required=True, metavar="HF", help="Hugging Face folder with tokenizer")
    parser.add_argument("--recipe", required=True, metavar="R", help="whose held-out rows: a shipped name or a file")
    parser.add_argument("--answers", type=Path, metavar="FILE", help="write every answer there, as JSON lines")
    parser.add_argument("--batch-size", type=int, default=64, help="rows generated at once (default 64)")
    parser.add_argument(
        "--max-new-tokens", type=int, help="longest answer (default: a quarter longer than the longest training target)"
    )
    parser.add_argument("--json", action="store_true", help="print the scores as one line of JSON")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace the recipe's")


def run(args: argparse.Namespace) -> int:
    """Evaluate and print; return 0."""
    scores = evaluate(
        args.model,
        recipe=args.recipe,
        overrides=args.overrides,
        batch_size=args.batch_size,
        max_new_tokens=args.max_new_tokens,
        answers_file=args.answers,
    )
    print(json.dumps(scores) if args.json else _table(scores))
    return 0


def evaluate(
    model: Path,
    *,
    recipe: str,
    overrides: Sequence[str],
    batch_size: int,
    max_new_tokens: int | None = None,
    answers_file: Path | None = None,
) -> dict[str, Any]:
    """Return ``task_scores`` of ``model`` on the rows that ``recipe`` holds out, with the seconds it took.

    Raises:
        ConfigError: If the recipe does not compose.
        DataError: If it holds no rows out, or one of an unknown task.
        ConversionError: If transformers cannot load the model.
    """
    from megatron_ads.config import load_recipe
    from megatron_ads.data.corpus import read_corpus
    from megatron_ads.evaluation.answers import answer_rows
    from megatron_ads.evaluation.task_scores import task_scores

    corpus = read_corpus(load_recipe(recipe, [*_UNUSED, *overrides]).data)
    training = [row for rows in corpus.training for row in rows]
    limit = max_new_tokens or _longest_answer(model, training)
    start = time.monotonic()
    answers = answer_rows(model, corpus.validation, max_new_tokens=limit, batch_size=batch_size)
    seconds = time.monotonic() - start
    if answers_file is not None:
        _write_answers(answers_file, answers)
    return {"rows": len(answers), "seconds": seconds, "tasks": task_scores(answers, training)}


_UNUSED = ("model.load=unused",)
"""Settings that a recipe demands and that play no part here."""


def _longest_answer(model: Path, training: "Sequence[ChatRow]") -> int:
    """Return the limit in tokens: what the model was taught to say, and ``MARGIN``."""
    from megatron_ads.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(model)
    return round(MARGIN * max(len(tokenizer.encode(row.target)) for row in training)) + 1


def _write_answers(file: Path, answers: "Sequence[Answer]") -> None:
    lines = [
        json.dumps({
            "id": answer.row.id, "task": answer.row.task, "prompt": answer.row.prompt[-1].content,
            "target": answer.row.target, "expected": answer.row.label, "ended": answer.ended, "text": answer.text,
        }, ensure_ascii=False)
        for answer in answers
    ]  # fmt: skip
    from conversion.atomic_file import write_small  # imports torch: keep --help instant

    write_small(file, "\n".join(lines) + "\n")


def _table(scores: dict[str, Any]) -> str:
    tables = [
        _relevance_table(of_task) if task == RELEVANCE else _task_table(of_task)
        for task, of_task in scores["tasks"].items()
    ]
    return "\n\n".join([f"{scores['rows']} held-out rows, {scores['seconds']:.0f} s", *tables])


def _relevance_table(scores: dict[str, Any]) -> str:
    lines = [
        f"{RELEVANCE}: {scores['rows']} rows of {scores['queries']} queries",
        f"{'':<36}  model  baseline (always {scores['baseline_label']})",
        f"{'accuracy over all labels':<36}  {_shown(scores['accuracy'])}  {_shown(scores['baseline_accuracy'])}",
    ]
    for name, view in scores["views"].items():
        model, baseline = view["model"]["balanced_accuracy"], view["baseline"]["balanced_accuracy"]
        between = _between(view["balanced_accuracy_95"], "queries")
        lines.append(f"{f'balanced accuracy, defect: {name}':<36}  {_shown(model)}  {_shown(baseline)}{between}")
    lines.append(f"{'answers that could be read':<36}  {_shown(scores['readable_share'])}")
    return "\n".join(lines)


def _task_table(scores: dict[str, Any]) -> str:
    lines = [f"{scores['task']}: {scores['rows']} rows of {scores['groups']} groups"]
    for name, value in {**scores["metrics"], **scores["formats"]}.items():
        between = _between(scores["headline_95"], "groups") if name == scores["headline_name"] else ""
        lines.append(f"{name:<36}  {_shown(value)}{between}")
    lines.append(f"{'answers that could be read':<36}  {_shown(scores['readable_share'])}")
    unread = ", ".join(f"{reason} {count}" for reason, count in scores["failures"].items())
    return "\n".join([*lines, f"  not read: {unread}"] if unread else lines)


def _shown(value: float | None) -> str:
    return "   –" if value is None else f"{value:.3f}"


def _between(interval: Sequence[float] | None, what: str) -> str:
    return f"  (95 % of resampled {what}: {interval[0]:.3f} to {interval[1]:.3f})" if interval else ""
