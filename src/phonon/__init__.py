"""Distributed references, locks and session-aggregated updates over Redis or Valkey."""

from phonon.cache import LruCache
from phonon.drivers.server import Durability
from phonon.errors import PhononError
from phonon.lock import Lock
from phonon.parked import Parked
from phonon.process import Process
from phonon.protocol.updates import RetryPolicy
from phonon.reference import Reference
from phonon.serializers import ExactSerializer, Serializer, SignedPickleSerializer
from phonon.update import ConflictFreeUpdate, Update

__all__ = [
    "ConflictFreeUpdate",
    "Durability",
    "ExactSerializer",
    "Lock",
    "LruCache",
    "Parked",
    "PhononError",
    "Process",
    "Reference",
    "RetryPolicy",
    "Serializer",
    "SignedPickleSerializer",
    "Update",
]
