"""`megatron-ads distill`: a smaller model learns from a teacher's answers, with and without data quality control.

    megatron-ads distill --recipe distill/simulated --out runs/distilled teacher.url=http://localhost:8000/v1 \
      teacher.model=NAME teacher.tokenizer=DIR student.load=SMALL
    megatron-ads distill --recipe distill/simulated --out runs/distilled teacher.kind=local teacher.url=null \
      teacher.model=EXPORT student.load=SMALL 'students=[checked]' 'student.settings=["train.max_steps=400"]'
    megatron-ads distill --recipe distill/simulated --out runs/distilled 'sources=[]' \
      'answered=[{kind: jsonl, path: runs/cooked/train.jsonl}]' draws=1 quality.min_agreement=0 \
      quality.min_similarity=0 ...
    megatron-ads distill --recipe distill/simulated ... on_policy.steps=100   # then from its own answers

The teacher answers the rows of `sources`, several times where `draws` is above 1; or rows that have its answer already
are taken as they are (`answered`). Quality control removes answers whose reasoning says little about its row, whose
label is improbable or differs from that of further draws, queries against the rules, and rows that repeat another;
DIR/rows/checked.md has what each rule removed, with samples. The students `checked` and `unchecked` are fine-tuned from
the same checkpoint with the same settings. Teacher and students answer the rows that the recipe `judged` holds out;
those are never among what the teacher is asked. With on_policy.steps the first student then answers prompts itself and
learns from how probable its answers are to the teacher, by the reverse KL; it is judged again. DIR/report.md has how
often students agree with the teacher, true scores, and AdNanny's table 6. All settings:
megatron_ads/config/distillation.py.

Interrupted, the same command continues; a changed setting redoes what depends on it, but never the teacher's answers.

Exit status: 0 done, 2 the request could not be carried out, 130 interrupted."""

import argparse
import json
import sys
from contextlib import nullcontext, redirect_stdout


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--recipe", required=True, metavar="R", help="a shipped recipe, distill/simulated, or a file")
    parser.add_argument("--out", metavar="DIR", help="folder of everything it writes (default: the recipe's out)")
    parser.add_argument("--json", action="store_true", help="print the report as one line of JSON")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace the recipe's")


def run(args: argparse.Namespace) -> int:
    """Bring every stage to completion, and print how near the students come."""
    from megatron_ads.config.distillation import load_distill_recipe
    from megatron_ads.observability.log import start_logging

    start_logging()
    config = load_distill_recipe(args.recipe, args.overrides, out=args.out)

    # They import torch and transformers: keep --help instant.
    from pathlib import Path

    from megatron_ads.distillation.report import report_on, text_of
    from megatron_ads.distillation.workflow import stages, write_report
    from megatron_ads.launching.processes import termination_as_interrupt
    from megatron_ads.quickstart.stages import run_stages

    out = Path(config.out).resolve()
    progress = redirect_stdout(sys.stderr) if args.json else nullcontext()
    with termination_as_interrupt(), progress:
        records = run_stages(list(stages(config)), out, {})
    report = report_on(config, records)
    write_report(out, text_of(report), json.dumps(report, ensure_ascii=False, indent=1) + "\n")
    print(json.dumps(report, ensure_ascii=False) if args.json else f"\n{text_of(report)}\nreport: {out}/report.md")
    return 0
