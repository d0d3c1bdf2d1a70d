"""One rank of a job, as torchrun or srun starts it.

    torchrun --nproc-per-node 4 --module megatron_ads.training --recipe sft/quickstart [key=value ...]

`megatron-ads train` starts this under torchrun on one machine.
"""

import argparse
import sys

from megatron_ads.config import load_recipe
from megatron_ads.errors import MegatronAdsError
from megatron_ads.observability.log import get_logger, start_logging
from megatron_ads.runtime import cpu_compat, upstream_warnings
from megatron_ads.runtime.exit_status import ExitStatus

logger = get_logger(__name__)


def main() -> int:
    """Run one rank; return its exit status."""
    parser = argparse.ArgumentParser(prog="megatron_ads.training", description="Run one rank of a fine-tuning job.")
    parser.add_argument("--recipe", required=True, metavar="R", help="a name under recipes/, or a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    start_logging()
    cpu_compat.install()  # before anything imports Megatron-Core
    upstream_warnings.silence()
    from megatron_ads.training.sft import run

    try:
        return run(load_recipe(args.recipe, args.overrides))
    except MegatronAdsError as error:
        logger.error("%s", error)
        return ExitStatus.USER_ERROR


if __name__ == "__main__":
    sys.exit(main())
