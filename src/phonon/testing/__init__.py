"""Tools to test programs that use Phonon: real servers, a clock to advance, processes to kill.

The pytest plugin has the fixtures ``phonon_process``, ``phonon_processes``,
``phonon_clock``, ``phonon_server``, ``phonon_namespace``, ``phonon_url`` and ``phonon_lab``.
"""

from phonon.testing.clock import Clock
from phonon.testing.exact import assert_exact
from phonon.testing.faults import kill, lose_answers, pause
from phonon.testing.lab import Lab, Server
from phonon.testing.mergeable import assert_mergeable

__all__ = [
    "Clock",
    "Lab",
    "Server",
    "assert_exact",
    "assert_mergeable",
    "kill",
    "lose_answers",
    "pause",
]
