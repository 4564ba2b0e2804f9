"""The number of hypothesis's examples: a tenth in `make test`, all in `make test-all`."""

import os

SHARE = float(os.environ.get("PHONON_TEST_EXAMPLES", "0.1"))


def examples(count: int) -> int:
    """Return the number of examples to try.

    Args:
        count: As many as an exhaustive run tries.
    """
    return max(10, round(count * SHARE))
