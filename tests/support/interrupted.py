"""The common part of the two programs whose calls a signal handler breaks off.

See `signals_program.py` and `aio_signals_program.py`. They need the folder of `support` on their
path.
"""

import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from phonon import RetryPolicy

#: Seconds between the timer's start and its signal, at the most: as long as a call takes.
SOONEST, LATEST = 0.00002, 0.001
#: Seconds after which a call that has not come back is called a hang.
HANG = 30
SOON = RetryPolicy(attempts=1_000_000, first_delay=0.01, longest_delay=0.05)


class TimeLimit(Exception):  # noqa: N818 - as Celery's soft time limit, an ordinary exception
    """The exception of a signal handler."""


def told(
    tried: Counter[str],
    acknowledged: Counter[str],
    written: Mapping[tuple[Any, int], int],
    modified: int | None = None,
) -> dict[str, Any]:
    """Return the numbers of attempts, acknowledgements and executions, by record.

    Args:
        tried: The number of attempts to store data of each record.
        acknowledged: The number of these that were acknowledged.
        written: The writes to the database, by record and token.
        modified: The number of modifications of a resource, if that is compared.
    """
    found: Counter[str] = Counter()
    for (record, _), n in written.items():
        found[record] += n
    if modified is not None:
        found["modified"] = modified
    return {"tried": tried, "acknowledged": acknowledged, "found": found}


def main(runs: Mapping[str, Callable[[str, str, int, int, str], dict[str, Any]]]) -> None:
    """Run the program that the command line names, and print the result."""
    sys.unraisablehook = lambda *_: None  # an error in a finalizer gets no further
    action, url, namespace, seed, count, kind = sys.argv[1:]
    began = time.monotonic(), time.process_time()
    result = runs[action](url, namespace, int(seed), int(count), kind)
    result |= {"seconds": time.monotonic() - began[0], "cpu": time.process_time() - began[1]}
    sys.stdout.write(json.dumps(result))
