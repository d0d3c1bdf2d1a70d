"""Check everything that is checked before a release, and write one page to sign. Started by launch/release_check.sh.

    python -m parity_tests.release_check [--hf DIR] [--quick] [--out DIR]

Each part is a process with a time limit: tests, parity ladder, conversion to two layouts and back, public benchmarks
and ads tasks before and after that round trip, speed; without --quick also rung 10, ranks that are killed, faults in
reinforcement learning, damaged inputs, another Python and Megatron-Core, and the suites of Slurm, of vLLM and of a GPU
where there is one. With --hf the checkpoint in DIR takes the place of a small random one. MEGATRON_ADS_DATA names the
folder of the public benchmarks.

A part that fails does not stop the others. The same command continues where it was interrupted: what has passed is not
run again, unless the code, a version, the checkpoint or a setting has changed; what has failed is. OUT/release.html has
every figure with its limit, what was not run and why, and a line to sign; OUT/release.json the same, OUT/PART/ the
results and logs of a part.

Exit status: 0 all that was run has passed, 1 something failed, 2 the request cannot be carried out, 130 interrupted.
"""

import argparse
import signal
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import FrameType

from megatron_ads.cli import exit_status
from megatron_ads.disk import make_writable_folder
from megatron_ads.observability.provenance import provenance
from parity_tests.release import parts
from parity_tests.release.full_parts import full_parts
from parity_tests.release.page import summary, write_page
from parity_tests.release.part import Outcome, Part
from parity_tests.release.request import Request, read_request
from parity_tests.release.run_parts import circumstances, run_parts


def main(argv: Sequence[str] | None = None) -> int:
    """Run what has not passed yet, write the page, and print the table."""
    return exit_status("release_check", partial(_run, _parse(argv)))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hf", type=Path, metavar="DIR", help="Hugging Face folder to check (default: a small one)")
    parser.add_argument("--quick", action="store_true", help="what can be seen in half an hour on two cores")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/release"),
        metavar="DIR",
        help="folder to write into (default %(default)s)",
    )
    return parser.parse_args(argv)


def _run(arguments: argparse.Namespace) -> int:
    signal.signal(signal.SIGTERM, _interrupt)
    request = read_request(arguments.hf, quick=arguments.quick, out=arguments.out)
    make_writable_folder(request.out)
    about = provenance()
    write = partial(write_page, request.out, about=about, request=request)
    found = run_parts(all_parts(request), request.out, circumstances(request, about), write)
    print(summary(found, request.out))
    return int(any(one.outcome is Outcome.failed for one in found))


def all_parts(request: Request) -> list[Part]:
    """Return the parts in the order they are run: the quick ones first."""
    makers = (
        parts.tests, parts.ladder, parts.checkpoint_parity, parts.conversion, parts.dense_conversion, parts.regress,
        parts.ads, parts.speed,
    )  # fmt: skip
    return [*(make(request) for make in makers), *full_parts(request)]


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    """Take SIGTERM as Ctrl-C: what was started is ended."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
