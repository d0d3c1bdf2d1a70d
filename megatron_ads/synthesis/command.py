"""`megatron-ads data cook`: reasoning from a teacher model for rows that have a label already."""

import argparse
import json
from typing import Any

Subparsers = Any  # argparse names its type argparse._SubParsersAction

_DESCRIPTION = """Let a teacher model write reasoning for rows whose answer is known, keep what is good, and write a
corpus that `kind: jsonl` reads.

    megatron-ads data cook --recipe cook/simulated --out cooked teacher.url=http://localhost:8000/v1 teacher.model=NAME
    megatron-ads train --recipe sft/quickstart model.load=MODEL data.seq_length=512 \\
      'data.sources=[{kind: jsonl, path: cooked/train.jsonl}]'

First every prompt is tried on a golden set; then the teacher is asked for several candidates of each row, and filters
remove those that are badly formed, contradict the label, say little, disagree with the others, are rejected by a
verifier, or from which the answer does not follow. DIR/report.md says what each filter removed, with samples;
DIR/report.json has the numbers. Every answer is in DIR/journal.jsonl as soon as it is there: started again with the
same settings, an interrupted run asks only what it has no answer to.

Exit status: 0 done, 1 nothing passed (the report says why), 2 the request could not be carried out."""


def add_synthesize(commands: Subparsers) -> None:
    """Declare the subcommand."""
    parser = commands.add_parser(
        "cook",
        aliases=["synthesize"],
        help="let a teacher write reasoning for labelled rows, and keep what is good",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--recipe", required=True, metavar="R", help="a shipped recipe, such as cook/simulated, or a file"
    )
    parser.add_argument("--out", metavar="DIR", help="folder of journal, corpus and report (default: the recipe's out)")
    parser.add_argument("--json", action="store_true", help="print the report as one line of JSON")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace the recipe's")
    parser.set_defaults(run_data=run_synthesize)


def run_synthesize(args: argparse.Namespace) -> int:
    """Synthesize and print the summary; return 0, or 1 if nothing passed."""
    from megatron_ads.config.synthesis import load_synthesis_recipe
    from megatron_ads.observability.log import start_logging

    start_logging()
    config = load_synthesis_recipe(args.recipe, args.overrides, out=args.out)

    from megatron_ads.synthesis.pipeline import open_models, synthesize
    from megatron_ads.synthesis.report import summary_lines, write_report

    with open_models(config) as models:
        report = write_report(synthesize(config, models), models, config)
    if args.json:
        print(json.dumps(report, ensure_ascii=False))
    else:
        print("\n".join([*summary_lines(report), f"Report: {config.out}/report.md"]))
    return 0 if report["kept"] else 1
