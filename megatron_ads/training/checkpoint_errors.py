"""What can be wrong with a checkpoint: found by one rank, raised on all of them, and named.

A rank that raises alone leaves the others waiting in their next collective, and the reason is in its log only.
"""

import contextlib
import errno
import os
import pickle
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from conversion.torch_dist_pickle import read_metadata
from megatron_ads.disk import free_bytes, readable_bytes
from megatron_ads.errors import CheckpointError, DiskFullError, MegatronAdsError, TopologyError
from megatron_ads.runtime.process_groups import wait_for_all

_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO, errno.ESTALE, errno.EFBIG}
_TORCH_SHORT_WRITE = "unexpected pos"
_TORCH_WRITE_ERRORS = ("PytorchStreamWriter failed", _TORCH_SHORT_WRITE)
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
    if raised := [message for message in messages if message is not None]:
        raise CheckpointError(raised[0])


@contextlib.contextmanager
def raised_once_all_are_done(purpose: str, timeout_seconds: float) -> Iterator[None]:
    """Do as ``raised_on_all_ranks``, around what may take ranks longer than a communication may last.

    Arguments are those of ``wait_for_all``.

    Raises:
        MegatronAdsError: As there.
        TopologyError: If a rank is not done in time.
    """
    with raised_on_all_ranks():
        try:
            yield
        except MegatronAdsError:
            with contextlib.suppress(TopologyError):  # this rank's own error says more
                wait_for_all(purpose, timeout_seconds)
            raise
        wait_for_all(purpose, timeout_seconds)


@contextlib.contextmanager
def failed_writes_named(directory: Path, *, rank: int | None = None) -> Iterator[None]:
    """Turn the system's refusal to write below ``directory`` into an error that says what to do.

    ``rank`` is named as the one that wrote, where the others will read the message too.

    Raises:
        CheckpointError: For a full disk, a quota, missing permissions and the like.
    """
    try:
        yield
    except (CheckpointException, OSError, RuntimeError) as error:
        causes: list[tuple[str, BaseException]] = [("" if rank is None else f" on rank {rank}", error)]
        if isinstance(error, CheckpointException):  # torch's, raised on all ranks for what happened on some
            causes = [(f" on rank {failed}", cause) for failed, (cause, _) in sorted(error.failures.items())]
        for where, cause in causes:
            if isinstance(cause, OSError) or any(sign in str(cause) for sign in _TORCH_WRITE_ERRORS):
                reason = cause.strerror if isinstance(cause, OSError) and cause.strerror else str(cause).splitlines()[0]
                if _TORCH_SHORT_WRITE in reason:
                    reason = "not all bytes were written, as on a full disk or beyond a quota"
                what = f"writing a checkpoint to {directory} failed{where}: {reason}"
                raise _failed_write(what, directory, "checkpoint.dir") from error
        raise


@contextlib.contextmanager
def failed_log_named(directory: Path) -> Iterator[None]:
    """Turn the refusal to write a log or a report below ``directory`` into an error that says what to do.

    Raises:
        CheckpointError: For a full disk, a quota, missing permissions and the like.
    """
    try:
        yield
    except (OSError, DiskFullError) as error:  # DiskFullError: of small files, in the words of a conversion
        if isinstance(error, OSError) and error.errno not in _DISK_ERRORS:  # a tracker's, of the network
            raise
        reason = error.strerror if isinstance(error, OSError) else os.strerror(errno.ENOSPC)
        raise _failed_write(f"log.dir {directory} cannot be written: {reason}", directory, "log.dir") from error


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


def _failed_write(what: str, directory: Path, setting: str) -> CheckpointError:
    return CheckpointError(
        f"{what}; {readable_bytes(free_bytes(directory))} are free there now. Checkpoints written before are "
        f"untouched. Make room, or choose another {setting}, and start again."
    )


def refuse_foreign_pickles(folder: Path) -> None:
    """Read the pickled parts with readers that admit plain values and tensors only.

    Raises:
        ConversionError: If ``.metadata``, which torch unpickles freely, refers to anything but its format's classes.
        CheckpointError: If ``common.pt`` refers to anything but plain values and tensors, or ``.metadata`` names a
            pickled object where there should be a tensor: asked for, it would be unpickled freely too.
    """
    stored = read_metadata(folder / ".metadata").state_dict_metadata
    # Linears have a pickled _extra_state, which is written for stock Megatron and not asked for.
    objects = [key for key, entry in stored.items() if isinstance(entry, BytesStorageMetadata)]
    if foreign := [key for key in objects if "_extra_state" not in key]:
        raise CheckpointError(f"{folder} has {foreign[0]} as a pickled object, not as a tensor. {_UNTRUSTED}")
    try:
        torch.load(folder / "common.pt", map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).split("\n")[0]
        raise CheckpointError(f"{folder / 'common.pt'} cannot be read safely: {reason} {_UNTRUSTED}") from None


_UNTRUSTED = "It is not loaded; continue from a checkpoint that this program wrote."
