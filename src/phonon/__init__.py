"""Distributed references, locks and session-aggregated updates over Redis or Valkey."""

from phonon.admin import Admin
from phonon.cache import LruCache
from phonon.collection import Collection
from phonon.dead_letters import Parked
from phonon.errors import AlreadyLockedError, LockLostError, PhononError
from phonon.lock import Lock, Semaphore
from phonon.model import Model
from phonon.process import Process
from phonon.reference import Reference
from phonon.serializers import ExactSerializer, Serializer, SignedPickleSerializer
from phonon.settings import Durability, RetryPolicy
from phonon.update import ConflictFreeUpdate, Update

__version__ = "4.0.0a1"

__all__ = [
    "Admin",
    "AlreadyLockedError",
    "Collection",
    "ConflictFreeUpdate",
    "Durability",
    "ExactSerializer",
    "Lock",
    "LockLostError",
    "LruCache",
    "Model",
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
