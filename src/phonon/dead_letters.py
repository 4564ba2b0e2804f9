"""Dead letters: batches that failed too often, kept until somebody replays or discards them."""

from phonon._core.dead_letters import Parked

__all__ = ["Parked"]
