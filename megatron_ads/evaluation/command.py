"""`megatron-ads evaluate`: let a model answer the held-out rows of a recipe, and score the answers.

    megatron-ads evaluate --model runs/tuned --recipe sft/quickstart
    megatron-ads evaluate --model runs/tuned --recipe sft/quickstart data=esci --answers answers.jsonl --json
    megatron-ads evaluate --model runs/tuned --recipe sft/quickstart data=next_brand --decode constrained-beam
    megatron-ads evaluate --model runs/tuned --recipe sft/quickstart data=next_brand --decode sampled --samples 20
    megatron-ads evaluate --model runs/tuned --recipe sft/quickstart data=next_brand --ablate-history
    megatron-ads evaluate --answers tuned.jsonl --compare baseline.jsonl --recipe sft/quickstart --html page.html
    megatron-ads evaluate --url http://localhost:8000/v1 --served-model NAME --tokenizer DIR --recipe sft/quickstart
    megatron-ads evaluate --url https://HOST/v1 --served-model NAME --api-key-env KEY --recipe sft/quickstart \\
      --max-new-tokens 300 server.concurrency=16 server.input_price=0.5 server.output_price=2 server.max_cost=5

The held-out rows are those the recipe's training leaves out: same data section, same seed. Sources have their names in
the results, and two of one task are not added up without --merge-sources. With --model or --url, --answers FILE is
written, and the same command continues where it was interrupted. A Megatron checkpoint (shards, torch_dist, a training
checkpoint) is exported to a temporary folder first.

--answers FILE alone scores what was answered elsewhere: a JSON object a line with the id of a held-out row and the text
of its answer; no model is loaded, and the file is only read. --compare FILE is of the same form, another model's: the
tables then have its line, and Delta, what the evaluated model has more, with the interval of a paired bootstrap.

With --url a server that speaks the OpenAI protocol answers, greedily or sampled. It gets conversations, which its own
chat template renders. With --tokenizer it gets the tokens that training would render, and the perplexity of general
rows is measured too: that needs a server such as vLLM. Settings of the server, such as server.concurrency, are
described in megatron_ads/config/generation.py.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_ads.config.generation import EndpointConfig, GenerationConfig, LengthRule, Method, load_endpoint
from megatron_ads.errors import ConfigError
from megatron_ads.observability.log import start_logging

if TYPE_CHECKING:
    from megatron_ads.evaluation.given_answers import GivenAnswers

DEFAULT_BATCH_SIZE = 64
_DECODING = ("temperature", "top_p", "seed", "samples", "beams", "length", "collaborative")
_SERVER = "server."
"""Begins settings of the server among the overrides of the recipe."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--model", type=Path, metavar="DIR", help="Hugging Face folder, or Megatron checkpoint")
    model.add_argument("--url", help="OpenAI-compatible server to evaluate instead, such as http://localhost:8000/v1")
    parser.add_argument("--recipe", required=True, metavar="R", help="whose held-out rows: a shipped name or a file")
    parser.add_argument(
        "--answers", type=Path, metavar="FILE",
        help="with --model or --url: write every answer there, as JSON lines; alone: score the answers in it",
    )  # fmt: skip
    _add_scoring_arguments(parser)
    parser.add_argument("--html", type=Path, metavar="FILE", help="write scores and answers there, as a page")
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


def _add_scoring_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--compare", type=Path, metavar="FILE", help="another model's answers to the same rows: Delta and its interval"
    )
    parser.add_argument(
        "--allow-missing", action="store_true", help="leave out rows without an answer in --answers alone, or --compare"
    )
    parser.add_argument(
        "--merge-sources", action="store_true", help="score rows of a task together, whatever sources they are of"
    )
    parser.add_argument(
        "--pipeline", type=Path, metavar="DIR", help="frozen pipeline of `downstream train`: CTCVR of what answers name"
    )
    parser.add_argument(
        "--ablate-history", action="store_true",
        help="answer again without each section of users' histories: what every section is worth",
    )  # fmt: skip


def _add_decoding_arguments(group: "argparse._ArgumentGroup") -> None:
    group.add_argument(
        "--decode", type=Method, choices=list(Method), metavar="METHOD",
        help="greedy (default), sampled, beam, or constrained-beam: rank valid names, in tasks answered with a name",
    )  # fmt: skip
    group.add_argument("--temperature", type=float, metavar="T", help="sampled: divides the logits (default 1)")
    group.add_argument("--top-p", type=float, metavar="P", help="sampled: fewest tokens that hold this probability")
    group.add_argument("--seed", type=int, help="sampled: decides the draws (default 0)")
    group.add_argument(
        "--samples", type=int, metavar="N", help="sampled: answers to a row, what most say first (default 1)"
    )
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
    # They import torch and transformers: keep --help instant.
    from megatron_ads.evaluation.dataset_tables import text_tables
    from megatron_ads.evaluation.evaluate import evaluate
    from megatron_ads.evaluation.given_answers import GivenAnswers
    from megatron_ads.evaluation.request import EvaluationRequest

    start_logging()
    how = _generation(args)
    if args.allow_missing and args.compare is None and (args.model or args.url):
        raise ConfigError("--allow-missing has no effect without --compare; leave it out.")
    of_server = [item for item in args.overrides if item.startswith(_SERVER)]
    if args.url:
        model: Path | EndpointConfig | GivenAnswers = _server(args, how, of_server)
    else:
        model = _checkpoint(args, of_server) if args.model else _given_answers(args, of_server)
    request = EvaluationRequest(
        recipe=args.recipe,
        overrides=[item for item in args.overrides if item not in of_server],
        batch_size=DEFAULT_BATCH_SIZE if args.batch_size is None else args.batch_size,
        max_new_tokens=args.max_new_tokens,
        answers_file=None if isinstance(model, GivenAnswers) else args.answers,
        how=how,
        names_file=args.names,
        ground=args.ground,
        html_file=args.html,
        tokenizer_folder=args.tokenizer,
        compare_file=args.compare,
        allow_missing=args.allow_missing,
        pipeline_folder=args.pipeline,
        ablate_history=args.ablate_history,
        merge_sources=args.merge_sources,
    )
    scores = evaluate(model, request)
    print(json.dumps(scores) if args.json else text_tables(scores))
    return 0


def _generation(args: argparse.Namespace) -> GenerationConfig:
    given = {name: getattr(args, name) for name in _DECODING if getattr(args, name) is not None}
    how = GenerationConfig(method=args.decode or Method.greedy, **given)
    how.check_as(lambda name: "--decode" if name == "method" else f"--{name.replace('_', '-')}", given)
    if args.ground and args.decode is Method.constrained_beam:
        raise ConfigError("--ground has no effect with --decode constrained-beam, whose names are valid; leave it out.")
    return how


def _checkpoint(args: argparse.Namespace, overrides: Sequence[str]) -> Path:
    options = [name for name in ("served_model", "api_key_env", "tokenizer") if vars(args)[name]]
    useless = [*(f"--{name.replace('_', '-')}" for name in options), *overrides]
    if useless:
        raise ConfigError(f"{useless[0]} has no effect with --model; leave it out, or evaluate a server with --url.")
    return Path(args.model)


def _given_answers(args: argparse.Namespace, overrides: Sequence[str]) -> "GivenAnswers":
    from megatron_ads.evaluation.given_answers import GivenAnswers

    if args.answers is None:
        raise ConfigError(
            "evaluate needs --model DIR, --url URL, or --answers FILE with answers that were made elsewhere. Take one."
        )
    options = (
        "decode",
        *_DECODING,
        "batch_size",
        "max_new_tokens",
        "served_model",
        "api_key_env",
        "tokenizer",
        "ablate_history",
    )
    given = [f"--{name.replace('_', '-')}" for name in options if vars(args)[name] not in (None, False)]
    if useless := [*given, *overrides]:
        raise ConfigError(
            f"{useless[0]} has no effect with --answers alone, which are only scored. Leave it out, or take --model or "
            "--url."
        )
    return GivenAnswers(file=args.answers)


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
