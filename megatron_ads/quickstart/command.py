"""`megatron-ads quickstart`: run the whole path on this machine, from a checkpoint to a better checkpoint.

    megatron-ads quickstart [--out DIR] [--preset tiny|dense] [--steps N] [--rl N] [key=value ...]

Makes a small random checkpoint, of the DeepSeek-V3 family (tiny) or a Qwen2 without experts (dense), converts it to
shards for pp 2 x ep 2 (dense: pp 2 x tp 2), fine-tunes it on 4 processes, exports it to Hugging Face format, compares
it with the Megatron model in transformers, and writes report.html and report.json. Started again, it continues where
it was interrupted; a changed setting redoes what depends on it. With MEGATRON_ADS_DATA naming a folder with
esci_us/pairs.jsonl, the rows are real query-product pairs; otherwise they are those of a simulated ads business.
"""

import argparse
import hashlib
import os
from pathlib import Path
from typing import Any

from megatron_ads.errors import ConfigError

DATA_ROOT = "MEGATRON_ADS_DATA"
PAIRS = Path("esci_us") / "pairs.jsonl"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"), help="folder for everything it writes")
    parser.add_argument(
        "--preset", choices=["tiny", "dense"], default="tiny", help="what it begins with (default tiny)"
    )
    parser.add_argument("--steps", type=int, help="optimizer steps of the fine-tuning (default: the recipe's)")
    parser.add_argument("--rl", type=int, metavar="N", help="then N steps of reinforcement learning (default: none)")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings that replace the recipe's, as data.seed=1"
    )


def run(args: argparse.Namespace) -> int:
    """Bring every stage to completion and report; return 1 if an export differs from what was trained."""
    from megatron_ads.demo_model import Preset
    from megatron_ads.launching.processes import termination_as_interrupt
    from megatron_ads.observability.metrics import read_metrics
    from megatron_ads.observability.provenance import own_code_digest, provenance
    from megatron_ads.quickstart import content
    from megatron_ads.quickstart.stages import run_stages
    from megatron_ads.quickstart.workflow import QuickstartFolder, make_plan
    from megatron_ads.reporting.page import write_report

    folder = QuickstartFolder(args.out.resolve())
    machine, data = provenance(), describe_data()
    steps = [] if args.steps is None else [f"train.max_steps={args.steps}"]
    overrides = [f"data={data['source']}", *steps, *args.overrides]
    identity = {"code": own_code_digest(), "versions": machine["versions"], "data": data}
    preset = Preset(args.preset)
    plan = make_plan(folder, overrides=overrides, identity=identity, rl_steps=args.rl, preset=preset)
    opening = f"quickstart: on {data['description']}; everything goes to {folder.root}"
    with termination_as_interrupt():
        records = run_stages(plan.stages, folder.root, plan.commands, opening=opening)
    metrics, of_rl = read_metrics(folder.run), [] if args.rl is None else read_metrics(folder.rl_run)
    facts = content.gather_facts(folder, plan, records, metrics, data=data, provenance=machine, of_rl=of_rl)
    write_report(folder.root, content.page(facts, metrics, of_rl), facts)
    print("\n".join(["", *content.summary_lines(facts), "", f"report: {folder.report_html}"]))
    return 0 if facts["parity"]["passed"] and facts["fp8_export"]["equal"] else 1


def describe_data() -> dict[str, Any]:
    """Say which rows will be used: the real pairs where ``MEGATRON_ADS_DATA`` has them, else simulated ones."""
    root = os.environ.get(DATA_ROOT)
    if not root:
        return {"source": "simulated_pairs", "description": "query-ad pairs of a simulated ads business"}
    file = Path(root) / PAIRS
    try:
        content = file.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"{DATA_ROOT} is {root}, but {file} cannot be read ({error.strerror}). "
            f"Point {DATA_ROOT} at the folder that has it, or unset it to use simulated rows."
        ) from None
    return {
        "source": "esci",
        "description": f"{content.count(10):,} real query-product pairs (Amazon ESCI, split by query)",
        "path": str(file),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
