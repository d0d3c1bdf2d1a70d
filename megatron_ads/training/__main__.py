"""One rank of a job, as torchrun or srun starts it.

    torchrun --nproc-per-node 4 --module megatron_ads.training --recipe sft/quickstart [key=value ...]

`megatron-ads train` and `launch/torchrun.sh` start this under torchrun, `launch/slurm.sbatch` under srun.
"""

import argparse
import sys

from megatron_ads.config.preference import PreferenceConfig
from megatron_ads.config.recipes import load_job
from megatron_ads.config.rl import RlConfig
from megatron_ads.config.run import RunConfig, SftConfig
from megatron_ads.errors import DivergedError, MegatronAdsError
from megatron_ads.layout import rank
from megatron_ads.observability.log import get_logger, start_logging
from megatron_ads.runtime.health.rank_record import (
    ExitStatus,
    exit_status,
    forget_record,
    last_lines,
    refusal_before_restart,
    write_record,
)
from megatron_ads.training.stopping import StopRequest

logger = get_logger(__name__)


def main() -> int:
    """Run one rank; return its exit status."""
    parser = argparse.ArgumentParser(prog="megatron_ads.training", description="Run one rank of a training job.")
    parser.add_argument("--recipe", required=True, metavar="R", help="a name under recipes/, or a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    start_logging()
    if refused := refusal_before_restart():
        status, message = refused.status, f"not started again after the error of rank {refused.rank}"
        write_record(rank(), status, message)
        return exit_status(status)
    try:
        forget_record(rank())
    except MegatronAdsError as error:
        logger.error("%s", error)
        return exit_status(ExitStatus.USER_ERROR)
    with StopRequest() as stop:  # before the imports, which take seconds: a signal during them must not be lost
        try:
            status, message = _run(args, stop)
        except BaseException as error:  # whatever ends the rank: without a record it would seem to have been killed
            write_record(rank(), ExitStatus.CRASHED, last_lines(error))
            raise
    if message:
        logger.error("%s", message)
    write_record(rank(), status, message)
    return exit_status(status)


def _run(args: argparse.Namespace, stop: StopRequest) -> tuple[ExitStatus, str]:
    from megatron_ads.runtime import cpu_compat, process_groups

    cpu_compat.install()  # before anything imports Megatron-Core
    process_groups.silence_upstream_warnings()
    from megatron_ads.runtime.health.activity import CommunicationError

    try:
        return _run_job(load_job(args.recipe, args.overrides), stop), ""
    except CommunicationError as error:  # not the user's: the next attempt may succeed
        return ExitStatus.PEER_LOST, str(error)
    except DivergedError as error:
        return ExitStatus.DIVERGED, str(error)
    except MegatronAdsError as error:
        return ExitStatus.USER_ERROR, str(error)


def _run_job(config: RunConfig, stop: StopRequest) -> ExitStatus:
    """Run a job of any kind; what the others need is not imported."""
    if isinstance(config, RlConfig):
        from megatron_ads.training import rl

        return rl.run(config, stop)
    if isinstance(config, PreferenceConfig):
        from megatron_ads.training import preference

        return preference.run(config, stop)
    from megatron_ads.training import sft

    assert isinstance(config, SftConfig)
    return sft.run(config, stop)


if __name__ == "__main__":
    sys.exit(main())
