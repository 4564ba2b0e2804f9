"""The names of all keys. A namespace and a resource may be any text.

A resource's keys begin with its *base*, ``<namespace>:{=<resource>}``, and share that hash tag, so
they live in one slot of a cluster. What could end a tag early or be mistaken for an escape is
escaped, and the ``=`` in front keeps a tag from being empty, so two names never collide.
``lua/README.md`` lists what is behind a base.
"""

ENCODING = "utf-8"
# A lone surrogate (a file name from os.fsdecode, say) is text too.
ERRORS = "surrogatepass"


def _escape(text: str, unsafe: str) -> bytes:
    for char in unsafe:
        if char in text:
            text = text.replace(char, f"%{ord(char):02X}")
    return text.encode(ENCODING, ERRORS)


def _unescape(raw: bytes, unsafe: str) -> str:
    text = raw.decode(ENCODING, ERRORS)
    for char in reversed(unsafe):
        text = text.replace(f"%{ord(char):02X}", char)
    return text


class Keys:
    """The keys of one namespace.

    Args:
        namespace: Any text; processes of different namespaces do not see each other.
    """

    __slots__ = ("_prefix", "namespace", "processes")

    def __init__(self, namespace: str) -> None:
        self.namespace = namespace
        # An open brace in front of ours would take the hash tag's place.
        self._prefix = _escape(namespace, "%{}") + b":"
        self.processes = self._prefix + b"{*}:processes"

    def base(self, resource: str) -> bytes:
        """What all keys of a resource begin with."""
        return self._prefix + b"{=" + _escape(resource, "%}") + b"}"

    def semaphore(self, name: str) -> bytes:
        """What all keys of a semaphore begin with: it is no lock on the resource of that name."""
        return self._prefix + b"{~" + _escape(name, "%}") + b"}"

    def resource(self, base: bytes) -> str:
        """The resource, or the semaphore, whose base this is."""
        return _unescape(base[len(self._prefix) + 2 : -1], "%}")

    def registry(self, process_id: bytes) -> bytes:
        """The sorted set of the bases that a process may be responsible for, by since when."""
        return self._prefix + b"{@" + process_id + b"}:holds"

    def card(self, process_id: bytes) -> bytes:
        """The hash that says where a process runs."""
        return self._prefix + b"{@" + process_id + b"}:card"


# The suffixes behind a base, with the type that Redis reports for each.
TYPES = {
    b":members": "zset",
    b":modified": "hash",
    b":partials": "list",
    b":running": "hash",
    b":batch": "list",
    b":parked": "hash",
    b":lock": "hash",
    b":parties": "hash",
    b":shared": "zset",
    b":sharers": "hash",
    b":queue": "zset",
    b":waiting": "zset",
    b":memory": "hash",
    b":fence": "set",
}
