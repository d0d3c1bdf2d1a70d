"""With which status a rank ends, and what a scheduler may conclude from it."""

from enum import IntEnum


class ExitStatus(IntEnum):
    """Process exit statuses of a training rank. Statuses from 74 on are those of BSD's sysexits where one fits."""

    DONE = 0
    """The job reached its last step and exported its weights."""
    CRASHED = 1
    """An error in the program, with a traceback."""
    USER_ERROR = 2
    """A setting, a checkpoint, a data file or the topology is wrong; the log says what to do. Do not start again."""
    PEER_LOST = 74
    """Another rank died, failed, or could not be reached; the log names it. Start again from the last checkpoint."""
    STOPPED = 75
    """Stopped by a signal after a whole step, with a checkpoint. Start again to go on (EX_TEMPFAIL)."""
    HUNG = 76
    """Nothing moved for the job's timeout; every rank's log names the cause, ``hang.txt`` in the log folder has the
    report. Start again from the last checkpoint, on other machines if one of them was the cause."""
