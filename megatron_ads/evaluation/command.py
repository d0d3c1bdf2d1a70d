"""`megatron-ads evaluate`: let a Hugging Face checkpoint answer the held-out rows of a recipe, and score the answers.

    megatron-ads evaluate --model runs/tuned --recipe sft/quickstart
    megatron-ads evaluate --model runs/tuned --recipe sft/quickstart data=esci --answers answers.jsonl --json
    megatron-ads evaluate --model runs/tuned --recipe sft/quickstart data=next_brand --decode constrained-beam

The held-out rows are those the recipe's training leaves out: same data section, same seed. With --answers, the same
command goes on where it was interrupted. A Megatron checkpoint (shards, torch_dist, a training checkpoint) is exported
to a temporary folder first.
"""

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ads.errors import ConfigError, DataError
from megatron_ads.evaluation.decoding import GREEDY, Decoding, LengthRule, Method, choose_decoding
from megatron_ads.evaluation.score_tables import text_tables
from megatron_ads.observability.log import start_logging

if TYPE_CHECKING:
    from megatron_ads.data.rows import ChatRow
    from megatron_ads.evaluation.answer import Answer
    from megatron_ads.evaluation.asking import Asking

MARGIN = 1.25
"""How much longer than the longest training target an answer may become."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `megatron-ads evaluate`."""
    parser.add_argument(
        "--model", type=Path, required=True, metavar="DIR", help="Hugging Face folder, or Megatron checkpoint"
    )
    parser.add_argument("--recipe", required=True, metavar="R", help="whose held-out rows: a shipped name or a file")
    parser.add_argument("--answers", type=Path, metavar="FILE", help="write every answer there, as JSON lines")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write scores and failed answers there, as a page")
    parser.add_argument("--batch-size", type=int, default=64, help="sequences generated at once (default 64)")
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        help="longest answer (default: a quarter longer than the task's longest training target)",
    )
    parser.add_argument("--json", action="store_true", help="print the scores as one line of JSON")
    _add_decoding_arguments(parser.add_argument_group("decoding"))
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace the recipe's")


def _add_decoding_arguments(group: "argparse._ArgumentGroup") -> None:
    group.add_argument(
        "--decode",
        type=Method,
        choices=list(Method),
        default=Method.greedy,
        metavar="METHOD",
        help="greedy (default), sampled, beam, or constrained-beam: rank valid names, in tasks answered with a name",
    )
    group.add_argument("--temperature", type=float, metavar="T", help="sampled: divides the logits (default 1)")
    group.add_argument("--top-p", type=float, metavar="P", help="sampled: fewest tokens that hold this probability")
    group.add_argument("--seed", type=int, help="sampled: decides the draws (default 0)")
    group.add_argument("--beams", type=int, metavar="N", help="beams of a row (default 20)")
    group.add_argument(
        "--length",
        type=LengthRule,
        choices=list(LengthRule),
        metavar="RULE",
        help="compare beams by the sum of their log-probabilities (default), their mean, or mean-of-choices, "
        "where tokens without an alternative do not count",
    )
    group.add_argument(
        "--collaborative",
        type=float,
        metavar="A",
        help="constrained-beam: share of the score, from 0 to 1, by who buys from whom in training rows (default 0)",
    )
    group.add_argument("--names", type=Path, metavar="FILE", help="valid names, one a line (default: training rows')")
    group.add_argument(
        "--ground", action="store_true", help="also judge the valid names that are nearest to what the model named"
    )


def run(args: argparse.Namespace) -> int:
    """Evaluate and print; return 0."""
    start_logging()
    how = choose_decoding(
        args.decode,
        **{name: getattr(args, name) for name in ("temperature", "top_p", "seed", "beams", "length", "collaborative")},
    )
    if args.ground and args.decode is Method.constrained_beam:
        raise ConfigError("--ground has no effect with --decode constrained-beam, whose names are valid; leave it out.")
    scores = evaluate(
        args.model,
        recipe=args.recipe,
        overrides=args.overrides,
        batch_size=args.batch_size,
        max_new_tokens=args.max_new_tokens,
        answers_file=args.answers,
        how=how,
        names_file=args.names,
        ground=args.ground,
        html_file=args.html,
    )
    print(json.dumps(scores) if args.json else text_tables(scores))
    return 0


def evaluate(
    model: Path,
    *,
    recipe: str,
    overrides: Sequence[str],
    batch_size: int,
    max_new_tokens: int | None = None,
    answers_file: Path | None = None,
    how: Decoding = GREEDY,
    names_file: Path | None = None,
    ground: bool = False,
    html_file: Path | None = None,
) -> dict[str, Any]:
    """Return ``task_scores`` of ``model`` on the rows that ``recipe`` holds out, with the seconds it took.

    Rows of no ads task, such as general conversations, are not answered; their perplexity is under ``general``. With
    ``data.reasoning`` false, as in the training that it was for, answers need no reasoning.

    Raises:
        ConfigError: If a number is impossible, or the recipe does not compose.
        DataError: If a file cannot be written, the recipe holds no rows out, or the names cannot be used.
        ConversionError: If transformers cannot load the model.
    """
    from megatron_ads.config.recipes import load_recipe
    from megatron_ads.data.corpus import read_corpus
    from megatron_ads.evaluation.asking import Asking
    from megatron_ads.evaluation.general_rows import general_scores
    from megatron_ads.evaluation.model_folder import hugging_face_folder
    from megatron_ads.evaluation.name_answers import names_trained_on, read_names
    from megatron_ads.evaluation.task_scores import task_scores
    from megatron_ads.tasks.registry import TASKS

    _require_positive({"--batch-size": batch_size, "--max-new-tokens": max_new_tokens})
    _require_folders(answers_file, html_file)
    data = load_recipe(recipe, [*_UNUSED, *overrides]).data
    corpus = read_corpus(data)
    if not corpus.validation:
        raise DataError("the recipe holds no rows out; raise data.validation_rows.")
    training = [row for rows in corpus.training for row in rows]
    advertisers = read_names(names_file) if names_file else names_trained_on(training)
    with hugging_face_folder(model) as folder:
        asking = Asking(
            how=how,
            max_new_tokens=_longest_answers(folder, corpus.validation, training, max_new_tokens),
            batch_size=batch_size,
            advertisers=advertisers,
            training=training,
        )
        general = [row for row in corpus.validation if row.task not in TASKS]
        rows = [row for row in corpus.validation if row.task in TASKS]
        answers, seconds = _answer(model, folder, rows, asking, answers_file)
        perplexities = general_scores(folder, general, batch_size=batch_size)
    scores = {
        "rows": len(answers),
        "seconds": seconds,
        "decoding": str(how.method),
        "reasoning": data.reasoning,
        "tasks": task_scores(answers, training, advertisers, ground=ground, reasons=data.reasoning),
        "general": perplexities,
    }
    if html_file is not None:
        from conversion.atomic_file import write_small
        from megatron_ads.evaluation.page import evaluation_page

        about = f"{len(answers)} answers to held-out rows of {' '.join([recipe, *overrides])}, decoded {how.method}."
        write_small(html_file, evaluation_page(scores, answers, title=f"Evaluation of {model}", about=about))
    return scores


def _require_positive(numbers: Mapping[str, int | None]) -> None:
    for option, value in numbers.items():
        if value is not None and value < 1:
            raise ConfigError(f"{option} is {value}; it must be at least 1.")


def _require_folders(*files: Path | None) -> None:
    """Refuse files that could not be written, before hours are spent on what they are to hold."""
    for file in files:
        if file is not None and not file.parent.is_dir():
            raise DataError(f"{file} cannot be written: there is no folder {file.parent}. Create it.")


def _answer(
    model: Path, folder: Path, rows: "Sequence[ChatRow]", asking: "Asking", file: Path | None
) -> "tuple[list[Answer], float]":
    """Return the answers and the seconds they took; with a file, go on where an earlier run of the same stopped."""
    from megatron_ads.evaluation.answer_journal import fingerprint, open_journal
    from megatron_ads.evaluation.answers import answer_rows
    from megatron_ads.evaluation.answers_file import write_answers

    start = time.monotonic()
    if file is None:
        return answer_rows(folder, rows, asking), time.monotonic() - start
    with open_journal(file, fingerprint(model, rows, asking.settings())) as journal:
        answers = answer_rows(folder, rows, asking, journal=journal)
        write_answers(file, answers)
        journal.close_for_good()
        return answers, journal.seconds + time.monotonic() - start


_UNUSED = ("model.load=unused",)
"""Settings that a recipe demands and that play no part here."""


def _longest_answers(
    model: Path, asked: "Sequence[ChatRow]", training: "Sequence[ChatRow]", given: int | None
) -> dict[str, int]:
    """Return the limit of each task in tokens: ``given``, or what the model was taught to say there and ``MARGIN``."""
    from megatron_ads.data.tokenizer import load_tokenizer

    tasks = {row.task for row in asked}
    if given:
        return dict.fromkeys(tasks, given)
    tokenizer = load_tokenizer(model)
    taught = dict.fromkeys(tasks, 0)
    for row in training:
        taught[row.task] = max(taught.get(row.task, 0), len(tokenizer.encode(row.target)))
    # A task that is held out only may say as much as any other.
    return {task: round(MARGIN * (taught[task] or max(taught.values()))) + 1 for task in tasks}
