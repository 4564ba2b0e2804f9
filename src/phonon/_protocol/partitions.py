"""Partitions and keys: the only module that hashes names and builds keys.

A namespace and a resource may be any text. The keys of partition ``p`` begin with its *prefix*,
``{<namespace>/<p>}:``, whose hash tag puts all of them into one slot of a cluster. A resource's
name follows the prefix, so it needs no escaping. ``_lua/README.md`` lists the keys.
"""

import binascii
from zlib import crc32

ENCODING = "utf-8"
#: A lone surrogate (a file name from ``os.fsdecode``, say) is text too.
ERRORS = "surrogatepass"

#: The partitions of a namespace, unless its first process asks for another number.
DEFAULT_PARTITIONS = 16
#: The number of slots in a cluster.
MOST_PARTITIONS = 16384
_SLOTS = 16384

# A semaphore is independent of a resource of the same name. A resource's own leading NUL is
# escaped, so that no two names are equal.
_SEMAPHORE = b"\0s"
_RESOURCE = b"\0r"


def encode_resource(resource: str) -> bytes:
    """Return the name under which the server knows a resource."""
    raw = resource.encode(ENCODING, ERRORS)
    return _RESOURCE + raw if raw.startswith(b"\0") else raw


def encode_semaphore(name: str) -> bytes:
    """Return the name under which the server knows a semaphore."""
    return _SEMAPHORE + name.encode(ENCODING, ERRORS)


def is_semaphore(name: bytes) -> bool:
    """Return whether the server knows a semaphore under a name, not a resource."""
    return name.startswith(_SEMAPHORE)


def decode(name: bytes) -> str:
    """Return the resource, or the semaphore, that the server knows under a name.

    A name that is not UTF-8 cannot be Phonon's: it is shown with escapes.
    """
    if name.startswith((_SEMAPHORE, _RESOURCE)):
        name = name[2:]
    try:
        return name.decode(ENCODING, ERRORS)
    except UnicodeDecodeError:
        return name.decode(ENCODING, "backslashreplace")


def _escape(text: str) -> bytes:
    # A brace would end the hash tag early; a slash would make "a/3" the third partition of "a".
    for char in "%{}/":
        text = text.replace(char, f"%{ord(char):02X}")
    return text.encode(ENCODING, ERRORS)


def _spread(namespace: bytes, partition: int, count: int) -> bytes:
    """Return a partition's hash tag, in the partition's own share of a cluster's slots."""
    first, last = partition * _SLOTS // count, (partition + 1) * _SLOTS // count
    tag = b"%b/%d" % (namespace, partition)
    salt = 0
    while not first <= binascii.crc_hqx(tag, 0) % _SLOTS < last:
        salt += 1
        tag = b"%b/%d.%d" % (namespace, partition, salt)
    return tag


class Partitions:
    """The partitions of one namespace.

    Args:
        namespace: Any text; processes of different namespaces do not see each other.
        count: The number of partitions.
    """

    __slots__ = ("count", "namespace", "prefix", "prefixes")

    def __init__(self, namespace: str, count: int = DEFAULT_PARTITIONS) -> None:
        self.namespace = namespace
        self.count = count
        escaped = _escape(namespace)
        #: The prefix of the namespace's own keys, which are in a slot of their own.
        self.prefix = b"{%b}:" % escaped
        #: The prefix of the keys of each partition.
        self.prefixes = [b"{%b}:" % _spread(escaped, p, count) for p in range(count)]

    def place(self, resource: str) -> tuple[int, bytes]:
        """Return the partition of a resource, and the server's name of it."""
        name = resource.encode(ENCODING, ERRORS)
        if name[:1] == b"\0":
            name = _RESOURCE + name
        return crc32(name) % self.count, name

    def of(self, name: bytes) -> int:
        """Return the partition of a resource, by the server's name of it."""
        return crc32(name) % self.count
