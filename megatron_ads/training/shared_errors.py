"""Checkpoint errors that one rank finds and all ranks end with.

A rank that raises alone leaves the others waiting in their next collective, and the reason is in its log only.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from megatron_ads.disk import free_bytes
from megatron_ads.errors import CheckpointError, MegatronAdsError

_TORCH_WRITE_ERRORS = ("PytorchStreamWriter failed", "unexpected pos")
"""How torch's C++ file writer says that the system refused a write."""


@contextlib.contextmanager
def raised_on_all_ranks() -> Iterator[None]:
    """Raise on every rank what a rank raised inside the context; a collective at its end.

    Raises:
        MegatronAdsError: A rank's own; on the others, as CheckpointError, that of the lowest rank that raised one.
    """
    found: MegatronAdsError | None = None
    try:
        yield
    except MegatronAdsError as error:
        found = error
    messages: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(messages, None if found is None else str(found))
    if found is not None:
        raise found
    for message in messages:
        if message is not None:
            raise CheckpointError(message)


@contextlib.contextmanager
def failed_writes_named(directory: Path) -> Iterator[None]:
    """Turn the system's refusal to write below ``directory`` into an error that says what to do.

    Raises:
        CheckpointError: For a full disk, a quota, missing permissions and the like.
    """
    try:
        yield
    except CheckpointException as error:  # torch's, raised on all ranks for what happened on some
        for rank, (cause, _) in sorted(error.failures.items()):
            if _is_about_writing(cause):
                raise _failed_write(directory, cause, f" on rank {rank}") from error
        raise
    except (OSError, RuntimeError) as error:
        if not _is_about_writing(error):
            raise
        raise _failed_write(directory, error, "") from error


@contextlib.contextmanager
def misfits_named(folder: Path) -> Iterator[None]:
    """Turn the complaint that a checkpoint does not have what the job trains into an error that says what decides it.

    Raises:
        CheckpointError: Naming a tensor that is missing or has another shape; on every rank.
    """
    try:
        yield
    except CheckpointException as error:  # torch's, raised on all ranks for what happened on some
        cause = error.failures[min(error.failures)][0]
        if isinstance(cause, KeyError) and isinstance(cause.args[0], str):
            what = f"it lacks {cause.args[0].partition(' ')[0]}"  # behind it may be every key that there is
        elif "Global shape mismatch" in str(cause):
            what = str(cause)
        else:
            raise
        raise CheckpointError(
            f"checkpoint {folder} does not fit this job: {what}. Go on with the model.load, model.precision, "
            "model.frozen and model.mtp_loss_weight that it was saved with, or choose another checkpoint.dir."
        ) from error


def _is_about_writing(error: BaseException) -> bool:
    return isinstance(error, OSError) or any(sign in str(error) for sign in _TORCH_WRITE_ERRORS)


def _failed_write(directory: Path, error: BaseException, where: str) -> CheckpointError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).splitlines()[0]
    free = free_bytes(directory) / 1e6
    return CheckpointError(
        f"writing a checkpoint to {directory} failed{where}: {reason}; {free:.0f} MB are free there now. Checkpoints "
        "written before are untouched. Make room, or choose another checkpoint.dir, and start again."
    )
