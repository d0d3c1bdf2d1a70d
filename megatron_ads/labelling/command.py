"""`megatron-ads label`: a model labels millions of rows, epoch by epoch, into Parquet files.

    megatron-ads label --recipe label/relevance --out runs/labels model.url=http://localhost:8000/v1 model.model=NAME \
      'sources=[{kind: table, path: pairs, task: query_ad_relevance, columns: {query: query, title: title}}]'
    megatron-ads label --recipe label/relevance --out runs/labels reasoning=false model.tokenizer=DIR ...
    megatron-ads label --recipe label/next_advertiser --out runs/monday 'previous=[runs/sunday]' ...
    megatron-ads label --recipe label/relevance --out runs/labels model.kind=local model.url=null model.model=EXPORT

Rows need no answer: tables no columns for it, logs of events no conversion after the anchor. Every row to be labelled
is one row of DIR/labels/*.parquet, with its label, the whole answer and the reasoning, or the reason why it has none.
Answers that cannot be read are drawn again (draws). Interrupted, or killed, the same command continues: finished epochs
and answers are kept, and no row is labelled twice. With previous, rows are spared that an earlier job has labelled and
that have not changed since. DIR/report.html has throughput, tokens and cost, labels and their drift, and failures with
samples. All settings: megatron_ads/config/labelling.py.

Ctrl-C and SIGTERM end the job within seconds; a second one at once.

Exit status: 0 done, 2 the request could not be carried out, 130 interrupted."""

import argparse
import json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--recipe", required=True, metavar="R", help="a shipped recipe, such as label/relevance, or a file"
    )
    parser.add_argument("--out", metavar="DIR", help="folder of labels and report (default: the recipe's out)")
    parser.add_argument("--json", action="store_true", help="print the report as one line of JSON")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace the recipe's")


def run(args: argparse.Namespace) -> int:
    """Label, and print what came out."""
    from megatron_ads.config.labelling import load_label_recipe
    from megatron_ads.observability.log import start_logging

    start_logging()
    config = load_label_recipe(args.recipe, args.overrides, out=args.out)

    from megatron_ads.labelling.interruption import ending_soon
    from megatron_ads.labelling.job import run_job  # imports pyarrow: keep --help instant
    from megatron_ads.labelling.report import report_of, summary, write

    with ending_soon():
        run_job(config)
    report = report_of(config)
    write(report)
    print(json.dumps(report, ensure_ascii=False) if args.json else summary(report))
    return 0
