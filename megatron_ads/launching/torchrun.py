"""torchrun, which ends without a traceback where `train` says what happened, and leaves Ctrl-C to `train`."""

import signal
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str]) -> int:
    """Run torchrun with its own arguments.

    Returns 1 if a rank failed, or if the nodes did not meet, or lost the one that they meet at; 0 also after a signal:
    the records of the ranks say how they ended.
    """
    # A terminal sends Ctrl-C to every process. torchrun would kill the ranks 30 s later, which is too short for a
    # large checkpoint. Not SIG_IGN, which the ranks would inherit.
    signal.signal(signal.SIGINT, lambda number, frame: None)
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError

    try:
        run.main(list(arguments))
    except RendezvousError as error:
        print(f"torchrun: {' '.join(str(error.__cause__ or error).split())}", file=sys.stderr)
        return 1
    except ChildFailedError:  # a rank prints its own traceback
        return 1
    except SignalException:
        return 0
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
