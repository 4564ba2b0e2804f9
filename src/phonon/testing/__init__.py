"""Help for tests of programs that use Phonon."""

from phonon.testing.mergeable import assert_mergeable

__all__ = ["assert_mergeable"]
