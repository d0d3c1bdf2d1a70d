"""`megatron-ads regress`: what a checkpoint could do before fine-tuning, can it still do it? Public benchmarks, paired.

    megatron-ads regress --base DeepSeek-R1 --tuned runs/ads/export --out runs/regress
    megatron-ads regress --base R1 --tuned http://localhost:8000/v1 --served-model ads --out runs/regress
    megatron-ads regress --base runs/r1/base.json --tuned runs/ads/export --out runs/regress
    megatron-ads regress --base HF --tuned ROUND_TRIP --same --benchmark gsm8k --limit 100 --out runs/conversion
    megatron-ads regress --base A --tuned B --data /data/benchmarks --benchmark gsm8k humaneval mmlu_stem --out runs/r
    megatron-ads regress --base A --tuned B --history benchmarks/baselines/regress.jsonl --out runs/regress

Both models answer the questions of AdNanny's table 8, by lm-eval's tasks, greedily. Writes regress.html, regress.json
and, for each model, a score and an answer for every question: base.json can be the --base of later releases. What was
answered before an interruption is not asked again. Programs that a model writes run in a sandbox without network. With
--history the page has the scores of all releases in that file as curves.

A server must continue token ids, return token ids and tell log-probabilities of prompts, as vLLM does; its context must
hold a prompt and --max-new-tokens. Once its scores are written its answers are forgotten: the next run asks again, as
other weights may be at the same address by then.

Questions come from the hub, or from DIR/NAME/test.jsonl with --data DIR (default: MEGATRON_ADS_DATA).

Exit status: 0 no benchmark fell by more than the margin beyond noise, 1 one did, or --same found another answer, 2 the
request could not be carried out.
"""

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from conversion.cli import positive
from megatron_ads.config.generation import EndpointConfig, load_endpoint
from megatron_ads.disk import make_writable_folder
from megatron_ads.errors import ConfigError
from megatron_ads.observability.log import start_logging
from megatron_ads.regress.suite import SUITE, Kind, chosen

if TYPE_CHECKING:
    from megatron_ads.regress.ask_model import BenchmarkRequest
    from megatron_ads.regress.model_scores import ModelScores

_SERVER = ("http://", "https://")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--base", required=True, metavar="DIR", help="checkpoint before, or the scores of an earlier run"
    )
    parser.add_argument("--tuned", required=True, metavar="DIR", help="checkpoint after, or the address of a server")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write into")
    parser.add_argument(
        "--benchmark", nargs="+", default=[], metavar="NAME",
        help=f"these alone, of {', '.join(benchmark.name for benchmark in SUITE)}",
    )  # fmt: skip
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder of local files (default: MEGATRON_ADS_DATA)")
    parser.add_argument("--limit", type=positive, metavar="N", help="the first N questions of each task alone")
    parser.add_argument(
        "--margin", type=float, default=1.0, metavar="POINTS", help="how far a benchmark may fall (default 1)"
    )
    parser.add_argument("--same", action="store_true", help="every answer must be the same, as after a conversion")
    parser.add_argument(
        "--chat", action=argparse.BooleanOptionalAction,
        help="ask for written answers by the chat template (default: if there is one)",
    )  # fmt: skip
    parser.add_argument(
        "--max-new-tokens", type=positive, metavar="N", help="longest answer (default 16384 in chat, else 1024)"
    )
    parser.add_argument("--batch-size", type=positive, default=16, help="questions at once (default 16)")
    parser.add_argument(
        "--history", type=Path, metavar="FILE", help="add this comparison to a file of all releases, and show them"
    )
    parser.add_argument("--json", action="store_true", help="print regress.json instead of the table")
    server = parser.add_argument_group("server (--tuned http://...)")
    server.add_argument("--served-model", metavar="NAME", help="name the server knows the model by")
    server.add_argument("--api-key-env", metavar="VAR", help="environment variable that holds the API key")
    server.add_argument("--tokenizer", type=Path, metavar="DIR", help="the model's (default: that of --base)")
    parser.add_argument("overrides", nargs="*", metavar="server.KEY=VALUE", help="such as server.concurrency=32")


def run(args: argparse.Namespace) -> int:
    """Ask both models, compare them, and write what was found."""
    from megatron_ads.regress.ask_model import require_server
    from megatron_ads.regress.harness_tasks import require_lm_eval
    from megatron_ads.regress.history import add_release, read_history
    from megatron_ads.regress.report import report_of, summary, write
    from megatron_ads.regress.sandbox import require_sandbox

    start_logging()
    benchmarks = chosen(args.benchmark)
    server = _server(args)
    require_lm_eval()
    if any(benchmark.kind is Kind.program for benchmark in benchmarks):
        require_sandbox()
    for source in (args.base, args.tokenizer or args.tuned):
        _require_known(str(source))
    make_writable_folder(args.out)
    releases = read_history(args.history) if args.history else []
    request = _request(args)
    if server:
        require_server(server, request)
    base = _scores_of(args.base, request, args.out / "base.json")
    tuned = _scores_of(server or args.tuned, request, args.out / "tuned.json")
    report = report_of(base, tuned, margin=args.margin, same=args.same)
    if args.history:
        releases = add_release(args.history, report, releases)
    write(args.out, report, releases)
    print(json.dumps(report) if args.json else summary(report, args.out))
    return 0 if report["passed"] else 1


def _require_known(source: str) -> None:
    """Refuse what is no checkpoint before the other one is asked for hours."""
    from megatron_ads.data.chat import load_tokenizer
    from megatron_ads.inference.model_folder import tokenizer_folder

    if not source.startswith(_SERVER) and not Path(source).is_file():
        load_tokenizer(tokenizer_folder(Path(source)))


def _request(args: argparse.Namespace) -> "BenchmarkRequest":
    from megatron_ads.regress.ask_model import BenchmarkRequest

    data = args.data or (Path(os.environ["MEGATRON_ADS_DATA"]) if os.environ.get("MEGATRON_ADS_DATA") else None)
    if data is not None and not data.is_dir():
        raise ConfigError(f"--data: there is no folder {data}. Name one with a folder for each benchmark.")
    return BenchmarkRequest(
        benchmarks=chosen(args.benchmark),
        data=data,
        limit=args.limit,
        chat=args.chat,
        max_new_tokens=args.max_new_tokens,
        batch_size=args.batch_size,
        tokenizer_folder=args.tokenizer or Path(args.base),
    )


def _server(args: argparse.Namespace) -> EndpointConfig | None:
    """Return the server that --tuned names; None: it names a folder or a file."""
    options = {"--served-model": args.served_model, "--api-key-env": args.api_key_env, "--tokenizer": args.tokenizer}
    if not args.tuned.startswith(_SERVER):
        if useless := [*(name for name, value in options.items() if value), *args.overrides]:
            raise ConfigError(f"{useless[0]} has no effect without a server; leave it out, or give --tuned http://...")
        return None
    if not args.served_model:
        raise ConfigError("--tuned is a server and needs --served-model NAME: the name that it knows the model by.")
    if args.tokenizer is None and not Path(args.base).is_dir():
        raise ConfigError(
            "--tuned is a server and needs --tokenizer DIR: --base is no checkpoint, whose it could take."
        )
    given = {"url": args.tuned, "model": args.served_model, "api_key_env": args.api_key_env}
    return load_endpoint("server", {name: value for name, value in given.items() if value}, args.overrides)


def _scores_of(source: "str | EndpointConfig", request: "BenchmarkRequest", file: Path) -> "ModelScores":
    from megatron_ads.regress.ask_model import ask_model
    from megatron_ads.regress.model_scores import ModelScores

    if isinstance(source, str) and Path(source).is_file():
        return ModelScores.read(Path(source))
    return ask_model(Path(source) if isinstance(source, str) else source, request, file)
