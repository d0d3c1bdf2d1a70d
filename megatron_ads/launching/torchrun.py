"""torchrun, in which nodes that do not meet end without a traceback: `train` says what that means."""

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str]) -> int:
    """Run torchrun with its own arguments; return 1 if the nodes did not meet, or lost the one that they meet at."""
    from torch.distributed import run
    from torch.distributed.elastic.rendezvous import RendezvousError

    try:
        run.main(list(arguments))
    except RendezvousError as error:
        print(f"torchrun: {' '.join(str(error.__cause__ or error).split())}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
