"""Dead letters: batches that failed too often, kept until they are replayed or discarded."""

from phonon._core.dead_letters import Parked

__all__ = ["Parked"]
