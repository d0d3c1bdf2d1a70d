"""`megatron-ads evaluate`: let a model answer the held-out rows of a recipe, and score the answers.

    megatron-ads evaluate --model runs/tuned --recipe sft/quickstart
    megatron-ads evaluate --model runs/tuned --recipe sft/quickstart data=esci --answers answers.jsonl --json
    megatron-ads evaluate --model runs/tuned --recipe sft/quickstart data=next_brand --decode constrained-beam
    megatron-ads evaluate --url http://localhost:8000/v1 --served-model NAME --tokenizer DIR --recipe sft/quickstart
    megatron-ads evaluate --url https://HOST/v1 --served-model NAME --api-key-env KEY --recipe sft/quickstart \\
      --max-new-tokens 300 server.concurrency=16 server.input_price=0.5 server.output_price=2 server.max_cost=5

The held-out rows are those the recipe's training leaves out: same data section, same seed. With --answers, the same
command continues where it was interrupted. A Megatron checkpoint (shards, torch_dist, a training checkpoint) is
exported to a temporary folder first.

With --url a server that speaks the OpenAI protocol answers, greedily or sampled. It gets conversations, which its own
chat template renders. With --tokenizer it gets the tokens that training would render, and the perplexity of general
rows is measured too: that needs a server such as vLLM. Settings of the server, such as server.concurrency, are
described in megatron_ads/config/generation.py.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ads.config.generation import EndpointConfig, GenerationConfig, LengthRule, Method, load_endpoint
from megatron_ads.disk import require_writable
from megatron_ads.errors import ConfigError, DataError
from megatron_ads.evaluation.score_tables import text_tables
from megatron_ads.observability.log import start_logging

if TYPE_CHECKING:
    from megatron_ads.data.chat import ChatTokenizer
    from megatron_ads.rows import ChatRow

MARGIN = 1.25
"""How much longer than the longest training target an answer may become."""
DEFAULT_BATCH_SIZE = 64
_SERVER = "server."
"""Begins settings of the server among the overrides of the recipe."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", type=Path, metavar="DIR", help="Hugging Face folder, or Megatron checkpoint")
    model.add_argument("--url", help="OpenAI-compatible server to evaluate instead, such as http://localhost:8000/v1")
    parser.add_argument("--recipe", required=True, metavar="R", help="whose held-out rows: a shipped name or a file")
    parser.add_argument("--answers", type=Path, metavar="FILE", help="write every answer there, as JSON lines")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write scores and failed answers there, as a page")
    parser.add_argument(
        "--batch-size", type=int, help=f"sequences at once (default {DEFAULT_BATCH_SIZE}); --url has server.concurrency"
    )
    parser.add_argument(
        "--max-new-tokens", type=int, help="longest answer (default: a quarter longer than the longest training target)"
    )
    parser.add_argument("--json", action="store_true", help="print the scores as one line of JSON")
    server = parser.add_argument_group("server (--url)")
    server.add_argument("--served-model", metavar="NAME", help="name the server knows the model by")
    server.add_argument("--api-key-env", metavar="VAR", help="environment variable that holds the API key")
    server.add_argument(
        "--tokenizer", type=Path, metavar="DIR", help="the model's: prompts are sent as the tokens of training"
    )
    _add_decoding_arguments(parser.add_argument_group("decoding"))
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings that replace the recipe's, or server.NAME=VALUE"
    )


def _add_decoding_arguments(group: "argparse._ArgumentGroup") -> None:
    group.add_argument(
        "--decode", type=Method, choices=list(Method), default=Method.greedy, metavar="METHOD",
        help="greedy (default), sampled, beam, or constrained-beam: rank valid names, in tasks answered with a name",
    )  # fmt: skip
    group.add_argument("--temperature", type=float, metavar="T", help="sampled: divides the logits (default 1)")
    group.add_argument("--top-p", type=float, metavar="P", help="sampled: fewest tokens that hold this probability")
    group.add_argument("--seed", type=int, help="sampled: decides the draws (default 0)")
    group.add_argument("--beams", type=int, metavar="N", help="beams of a row (default 20)")
    group.add_argument(
        "--length", type=LengthRule, choices=list(LengthRule), metavar="RULE",
        help="compare beams by the sum of their log-probabilities (default), their mean, or mean-of-choices, "
        "where tokens without an alternative do not count",
    )  # fmt: skip
    group.add_argument(
        "--collaborative", type=float, metavar="A",
        help="constrained-beam: share of the score, from 0 to 1, by who buys from whom in training rows (default 0)",
    )  # fmt: skip
    group.add_argument("--names", type=Path, metavar="FILE", help="valid names, one a line (default: training rows')")
    group.add_argument(
        "--ground", action="store_true", help="also judge the valid names that are nearest to what the model named"
    )


def run(args: argparse.Namespace) -> int:
    start_logging()
    names = ("temperature", "top_p", "seed", "beams", "length", "collaborative")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    how = GenerationConfig(method=args.decode, **given)
    how.check_as(lambda name: "--decode" if name == "method" else f"--{name.replace('_', '-')}", given)
    if args.ground and args.decode is Method.constrained_beam:
        raise ConfigError("--ground has no effect with --decode constrained-beam, whose names are valid; leave it out.")
    of_server = [item for item in args.overrides if item.startswith(_SERVER)]
    if args.model is not None:
        options = [name for name in ("served_model", "api_key_env", "tokenizer") if vars(args)[name]]
        if useless := [*(f"--{name.replace('_', '-')}" for name in options), *of_server]:
            raise ConfigError(
                f"{useless[0]} has no effect with --model; leave it out, or evaluate a server with --url."
            )
    scores = evaluate(
        args.model or _server(args, how, of_server),
        recipe=args.recipe,
        overrides=[item for item in args.overrides if item not in of_server],
        batch_size=DEFAULT_BATCH_SIZE if args.batch_size is None else args.batch_size,
        max_new_tokens=args.max_new_tokens,
        answers_file=args.answers,
        how=how,
        names_file=args.names,
        ground=args.ground,
        html_file=args.html,
        tokenizer_folder=args.tokenizer,
    )
    print(json.dumps(scores) if args.json else text_tables(scores))
    return 0


def _server(args: argparse.Namespace, how: GenerationConfig, overrides: Sequence[str]) -> EndpointConfig:
    from megatron_ads.inference.openai_engine import require_supported

    require_supported(how)
    if args.batch_size is not None:
        raise ConfigError("--batch-size has no effect with --url; take server.concurrency=N.")
    given = {"url": args.url, "model": args.served_model, "api_key_env": args.api_key_env}
    server = load_endpoint("server", {name: value for name, value in given.items() if value is not None}, overrides)
    if server.model is None:
        raise ConfigError("--url needs --served-model NAME: the name that the server knows the model by.")
    return server


def evaluate(
    model: Path | EndpointConfig,
    *,
    recipe: str,
    overrides: Sequence[str],
    batch_size: int,
    max_new_tokens: int | None = None,
    answers_file: Path | None = None,
    how: GenerationConfig | None = None,
    names_file: Path | None = None,
    ground: bool = False,
    html_file: Path | None = None,
    tokenizer_folder: Path | None = None,
) -> dict[str, Any]:
    """Return ``task_scores`` of ``model`` on the rows that ``recipe`` holds out, with the seconds it took.

    Rows of no ads task, such as general conversations, are not answered; their perplexity is under ``general``. An
    answer must reason where the row's own target does.

    Raises:
        ConfigError: If a number is impossible, the recipe does not compose, or no request to a server can succeed.
        DataError: If a file cannot be written, the recipe holds no rows out, the names cannot be used, or a server
            stopped answering.
        ConversionError: If transformers cannot load the model.
    """
    from megatron_ads.config.recipes import load_recipe
    from megatron_ads.data.corpus import read_corpus
    from megatron_ads.evaluation.evaluated_model import open_model
    from megatron_ads.evaluation.generate import Asking
    from megatron_ads.evaluation.name_answers import names_trained_on, read_names, valid_names
    from megatron_ads.evaluation.task_scores import task_scores
    from megatron_ads.tasks.registry import TASKS

    for option, value in (("--batch-size", batch_size), ("--max-new-tokens", max_new_tokens)):
        if value is not None and value < 1:
            raise ConfigError(f"{option} is {value}; it must be at least 1.")
    for file in filter(None, (answers_file, html_file)):  # before hours are spent on what they are to hold
        if not file.parent.is_dir():
            raise DataError(f"{file} cannot be written: there is no folder {file.parent}. Create it.")
        if file.is_dir():
            raise DataError(f"{file} cannot be written: it is a folder. Name a file.")
    require_writable(answers_file, html_file)
    how = how or GenerationConfig()
    data = load_recipe(recipe, overrides, sections=["data"]).data
    corpus = read_corpus(data)
    if not corpus.validation:
        raise DataError("the recipe holds no rows out; raise data.validation_rows.")
    training = [row for rows in corpus.training for row in rows]
    advertisers = read_names(names_file) if names_file else names_trained_on(training)
    general = [row for row in corpus.validation if row.task not in TASKS]
    rows = [row for row in corpus.validation if row.task in TASKS]
    if how.method is Method.constrained_beam and all(valid_names(row, advertisers) is None for row in rows):
        tasks = ", ".join(sorted({row.task for row in corpus.validation}))
        raise ConfigError(
            f"--decode constrained-beam has no effect: none of the {len(corpus.validation)} held-out rows, of {tasks}, "
            "is answered with a name; leave it out."
        )
    with open_model(model, tokenizer_folder, data.template_arguments) as opened:
        asking = Asking(
            how=how,
            max_new_tokens=_longest_answers(opened.tokenizer, corpus.validation, training, max_new_tokens),
            batch_size=batch_size,
            advertisers=advertisers,
            training=training,
        )
        answers, seconds = opened.answer(rows, asking, answers_file)
        perplexities = opened.general(general, batch_size) if general else {}
    scores = {
        "rows": len(answers),
        "seconds": seconds,
        "decoding": str(how.method),
        "reasoning": data.reasoning,
        "tasks": task_scores(answers, training, advertisers, ground=ground),
        "general": perplexities,
    }
    if html_file is not None:
        from conversion.atomic_file import write_small
        from megatron_ads.evaluation.page import evaluation_page

        about = f"{len(answers)} answers to held-out rows of {' '.join([recipe, *overrides])}, decoded {how.method}."
        title = f"Evaluation of {model if isinstance(model, Path) else model.model}"
        write_small(html_file, evaluation_page(scores, answers, title=title, about=about))
    return scores


def _longest_answers(
    tokenizer: "ChatTokenizer | None", asked: "Sequence[ChatRow]", training: "Sequence[ChatRow]", given: int | None
) -> dict[str, int]:
    """Return the limit of each task in tokens: ``given``, or what the model was taught to say there and ``MARGIN``."""
    tasks = {row.task for row in asked}
    if given:
        return dict.fromkeys(tasks, given)
    if tokenizer is None:
        raise ConfigError(
            "--url needs --max-new-tokens N, or --tokenizer DIR, by which the length of training targets is counted."
        )
    taught = dict.fromkeys(tasks, 0)
    for row in training:
        taught[row.task] = max(taught.get(row.task, 0), len(tokenizer.encode(row.target)))
    # A task that is held out only may say as much as any other.
    return {task: round(MARGIN * (taught[task] or max(taught.values()))) + 1 for task in tasks}
