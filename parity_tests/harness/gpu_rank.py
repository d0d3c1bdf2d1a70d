"""One rank on a CUDA device: make the call that a file holds and write its answer to another.

A process of its own for each call: ``rank_server`` forks its ranks, and a CUDA context does not survive a fork. The job
itself joins its process group (``process_groups.start``) and moves its batch to the device.

    python -m parity_tests.harness.gpu_rank CALL ANSWER      with the variables of torchrun set
"""

import sys

import torch
import torch.distributed as dist

from megatron_ads.runtime import cpu_compat


def main(call: str, answer: str) -> None:
    """Make the call; an exception ends the process with its traceback and status 1."""
    cpu_compat.install()  # nothing where there is a device; first, so that without one the call runs on the CPU
    # A function and records of this project's own, which only full unpickling restores. The process that started this
    # one has just written them to a folder that it made for itself alone.
    function, args = torch.load(call, weights_only=False)
    try:
        torch.save(function(*args), answer)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
