"""torchrun with the exit code of train.py, so that a scheduler knows whether to run it again.

    python launch.py --standalone --nproc_per_node=8 train.py my_experiment.yaml

Takes torchrun's arguments. torchrun itself exits with 1 whatever happened, and kills processes that
take more than 30 seconds to save. docs/reliability.md lists the codes.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from pathlib import Path
from types import FrameType

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

from settings.errors import STOP_EXIT_CODES
from settings.torchrun import LAUNCH

FOLLOWS = (1, STOP_EXIT_CODES[signal.SIGTERM], -signal.SIGTERM)
"""Exit codes of processes that end because another one did: they lost it, or were stopped."""


def children() -> list[int]:
    """Returns the process ids of the children of this process."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent = path.read_bytes().rpartition(b")")[2].split()[1]  # after the name and state
            found += [int(path.parent.name)] if int(parent) == os.getpid() else []
    return found


def forward(number: int, frame: FrameType | None) -> None:
    """Passes a signal on to the workers, which save and end; without any, ends this process."""
    del frame
    workers = children()
    if not workers:
        sys.exit(STOP_EXIT_CODES[signal.Signals(number)])
    for pid in workers:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def main() -> int:
    """Returns the exit code of the process that failed first; 128 + N if signal N killed it."""
    for number in STOP_EXIT_CODES:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, forward)
    os.environ[LAUNCH] = "1"
    try:
        # A signal that torchrun handles ends all processes after 30 seconds, saved or not: it is
        # left SIGQUIT.
        torchrun(["--signals-to-handle=SIGQUIT", *sys.argv[1:]])
    except ChildFailedError as error:
        # Times are whole seconds, in which one process can fail and another one lose it.
        failures = error.failures.values()
        code = min(failures, key=lambda one: (one.timestamp, one.exitcode in FOLLOWS)).exitcode
        if code not in STOP_EXIT_CODES.values():
            print(error, file=sys.stderr)
        return code if code > 0 else 128 - code
    return 0


if __name__ == "__main__":
    sys.exit(main())
