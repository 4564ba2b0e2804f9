"""Distributed references, locks and session-aggregated updates over Redis or Valkey."""

from phonon.cache import LruCache
from phonon.drivers.server import Durability
from phonon.errors import AlreadyLockedError, LockLostError, PhononError
from phonon.lock import Lock, Semaphore
from phonon.parked import Parked
from phonon.process import Process
from phonon.protocol.updates import RetryPolicy
from phonon.reference import Reference
from phonon.serializers import ExactSerializer, Serializer, SignedPickleSerializer
from phonon.update import ConflictFreeUpdate, Update

__all__ = [
    "AlreadyLockedError",
    "ConflictFreeUpdate",
    "Durability",
    "ExactSerializer",
    "Lock",
    "LockLostError",
    "LruCache",
    "Parked",
    "PhononError",
    "Process",
    "Reference",
    "RetryPolicy",
    "Semaphore",
    "Serializer",
    "SignedPickleSerializer",
    "Update",
]
