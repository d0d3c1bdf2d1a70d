"""Reasoning SFT: the job that every rank runs, from an empty process to exported weights.

    torchrun --nproc-per-node 4 --module megatron_ads.training.sft --recipe sft/quickstart [key=value ...]

`megatron-ads train` starts this under torchrun on one machine.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from conversion.sources import open_source
from megatron_ads.config import SftConfig, load_recipe, validate
from megatron_ads.errors import MegatronAdsError
from megatron_ads.observability.log import get_logger, start_logging, world_size
from megatron_ads.runtime import process_groups
from megatron_ads.runtime.device import set_threads
from megatron_ads.runtime.exit_status import ExitStatus
from megatron_ads.runtime.seeds import seed_everything
from megatron_ads.training.build import build_model, lay_out
from megatron_ads.training.export import export_shards
from megatron_ads.training.outcome import Outcome, write_outcome
from megatron_ads.training.position import Position
from megatron_ads.training.rows import open_streams
from megatron_ads.training.run_log import RunLog
from megatron_ads.training.signals import StopRequest
from megatron_ads.training.step import run_evaluation, run_step
from megatron_ads.training.topology import preflight

logger = get_logger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one rank; return its exit status (``runtime.exit_status``)."""
    parser = argparse.ArgumentParser(description="Run one rank of a supervised fine-tuning job.")
    parser.add_argument("--recipe", required=True, metavar="R", help="a name under recipes/, or a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args(argv)
    start_logging()
    try:
        return run(load_recipe(args.recipe, args.overrides))
    except MegatronAdsError as error:
        logger.error("%s", error)
        return ExitStatus.USER_ERROR


def run(config: SftConfig) -> ExitStatus:
    """Join the job and train; leave checkpoints, metrics and, after the last step, ``<log.dir>/export``.

    Raises:
        MegatronAdsError: For anything the user can mend; the message says what and how.
    """
    source = open_source(Path(config.model.load))
    shards = lay_out(config, source, world_size())
    validate(config, shards.layout.world, source.shape)
    set_threads(config.runtime.threads)
    process_groups.start(
        shards.layout, timeout_seconds=config.runtime.timeout_seconds, create_gloo_process_groups=False
    )
    try:
        seed_everything(config.train.seed, config.train.deterministic)
        model = build_model(config, source, shards)
        preflight(config, model, shards)
        training, validation = open_streams(config, source, shards.layout)
        position = Position.resumed(config, model, training, shards.layout, source)
        with StopRequest() as stop, RunLog(config, model, shards, resume_step=position.step) as log:
            stopped = train(config, model, training, validation, position, log, stop)
        if not stopped:
            export_shards(Path(config.log.dir) / "export", model.models, model.spec, source, shards)
        write_outcome(Path(config.log.dir), Outcome.STOPPED if stopped else Outcome.FINISHED, position.step)
        return ExitStatus.STOPPED if stopped else ExitStatus.DONE
    finally:
        process_groups.stop()


def train(config, model, training, validation, position: Position, log: RunLog, stop: StopRequest) -> bool:
    """Step until the last step, or until some rank is told to stop; return whether it was stopped."""
    while position.step < config.train.steps:
        learning_rate = model.schedule.at(model.optimizer.updates)
        report = run_step(
            training.next_step(),
            model.chunks,
            model.optimizer,
            learning_rate=learning_rate,
            stop_requested=stop.received is not None,
        )
        position.step += 1
        log.step(position.step, report, learning_rate)
        if validation and position.is_due(config.train.evaluate_every):
            log.validation(position.step, run_evaluation(validation, model.chunks))
        if (
            report.stop_requested
            or position.is_due(config.checkpoint.save_every)
            or position.step == config.train.steps
        ):
            log.saved(position.step, position.save())
        if report.stop_requested:
            return True
    return False
