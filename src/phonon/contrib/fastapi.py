"""FastAPI: the same as for Starlette, see `phonon.contrib.starlette`."""

from phonon.contrib.starlette import CountRequests, Phonon

__all__ = ["CountRequests", "Phonon"]
