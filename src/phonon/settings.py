"""Settings of a process, and the checks of users' arguments."""

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from inspect import iscoroutinefunction
from typing import Any, Final

from phonon._core.checks import check_flag, check_seconds, check_whole, is_number
from phonon._core.outbox import Overflow
from phonon._core.retry import RetryPolicy
from phonon._core.settings import Durability
from phonon._protocol.partitions import MOST_PARTITIONS
from phonon.errors import ConfigurationError

__all__ = [
    "URL_VARIABLE",
    "Durability",
    "Overflow",
    "RetryPolicy",
    "check_flag",
    "check_seconds",
    "check_whole",
]

#: The environment variable with the URL, if no argument names the server.
URL_VARIABLE: Final = "PHONON_URL"
_DEFAULT_ADDRESS: Final = ("localhost", 6379, 1)


# Single values


def check_name(argument: str, value: Any) -> str:
    """Refuse a name that is not text.

    Args:
        argument: The argument's name, for the message.
        value: The value of the argument.

    Returns:
        The name.

    Raises:
        ConfigurationError: The value is not a str.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, bytes | bytearray):
        remedy = f"decode it: {argument}={bytes(value)!r}.decode()"
    elif value is None:
        remedy = "give it a name"
    else:
        remedy = f"write {argument}=str({value!r})"
    raise ConfigurationError(f"{argument} is a str, not {value!r}: {remedy}")


def check_position(value: Any) -> None:
    """Refuse a position in a source that is not an offset.

    Raises:
        ConfigurationError: The value is neither None nor an int of 0 or more.
    """
    if value is not None and (type(value) is not int or value < 0):
        raise ConfigurationError(
            f"position is an offset, an int of 0 or more, not {value!r}: leave it out to go on "
            "where the source is"
        )


def check_timeout(argument: str, value: Any) -> float:
    """Return a number of seconds to wait: infinity for -1, as in `threading`.

    Raises:
        ConfigurationError: The value is refused.
    """
    if not is_number(value) or math.isnan(value):
        raise ConfigurationError(
            f"{argument} is a number of seconds, not {value!r}: give one like {argument}=10.0, or "
            "leave it out"
        )
    if value < 0 and value != -1:  # the rest of a deadline must not become a wait for ever
        raise ConfigurationError(
            f"{argument} is at least 0, not {value!r}: give 0 to ask once, or -1 to wait for ever"
        )
    seconds: float = math.inf if value == -1 else value
    return seconds


def check_count(argument: str, value: Any) -> int:
    """Refuse a number that is not a whole number of 1 or more.

    Raises:
        ConfigurationError: The value is refused.
    """
    count = check_whole(argument, value)
    if count < 1:
        raise ConfigurationError(
            f"{argument} is at least 1, not {value!r}: give {argument}=1 or more"
        )
    return count


def check_iterable(argument: str, value: Any) -> None:
    """Refuse a value that cannot be looped over, or is a single text.

    Raises:
        ConfigurationError: The value is refused.
    """
    if isinstance(value, str | bytes) or not (
        isinstance(value, Iterable) or hasattr(value, "__getitem__")
    ):
        raise ConfigurationError(
            f"{argument} is a list, or anything else to loop over, not {value!r}: put a single one "
            "into a list"
        )


def check_has(argument: str, value: Any, methods: Sequence[str], remedy: str) -> None:
    """Refuse an object that lacks methods.

    Args:
        argument: The argument's name, for the message.
        value: The value.
        methods: The methods that are called.
        remedy: The description of a right value.

    Raises:
        ConfigurationError: The value is refused.
    """
    if isinstance(value, type) or not all(callable(getattr(value, m, None)) for m in methods):
        raise ConfigurationError(f"{argument} is not {value!r}: give {remedy}")


def check_key(value: Any) -> None:
    """Refuse a cache's key that is not hashable.

    Raises:
        ConfigurationError: The value is refused.
    """
    try:
        hash(value)
    except TypeError:
        raise ConfigurationError(
            f"key is hashable, not {value!r}: give a str, a number or a tuple of such"
        ) from None


def check_owner(value: Any) -> Any:
    """Return the parts of a process.

    Raises:
        ConfigurationError: The value is not a process.
    """
    engine = getattr(value, "engine", None)
    if engine is None or isinstance(value, type):
        raise ConfigurationError(
            f"process is a Process, not {value!r}: make one, or an AsyncProcess, and give that"
        )
    return engine


def check_arguments(
    args: Any, kwargs: Any, names: tuple[str, str] = ("args", "kwargs")
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return copies of a callback's arguments.

    Args:
        args: Positional arguments; None for none.
        kwargs: Keyword arguments; None for none.
        names: The arguments' names, for the message.

    Raises:
        ConfigurationError: ``args`` or ``kwargs`` has a wrong type.
    """
    if args is not None and (isinstance(args, str | bytes) or not isinstance(args, Sequence)):
        raise ConfigurationError(
            f"{names[0]} is a list or tuple of the callback's arguments, not {args!r}: write "
            f"{names[0]}=(...,)"
        )
    if kwargs is not None and not (
        isinstance(kwargs, Mapping) and all(isinstance(name, str) for name in kwargs)
    ):
        raise ConfigurationError(
            f"{names[1]} is a dict of the callback's arguments by name, not {kwargs!r}: write "
            f"{names[1]}={{...}}"
        )
    return tuple(args or ()), dict(kwargs or {})


def check_parties(value: Any) -> int | None:
    """Refuse an invalid number of parties.

    Raises:
        ConfigurationError: The value is not a whole number, or below 1.
    """
    return None if value is None else check_count("parties", value)


def check_api(kind: type, *, process_is_async: bool, is_async: bool) -> None:
    """Refuse an object of one API with a process of the other: its calls would do nothing.

    Args:
        kind: The object's class.
        process_is_async: Whether the process is an `AsyncProcess`.
        is_async: Whether the object is made for an `AsyncProcess`.

    Raises:
        ConfigurationError: Object and process do not fit.
    """
    if process_is_async is is_async:
        return
    if is_async:
        raise ConfigurationError(f"{kind.__qualname__} needs an AsyncProcess")
    raise ConfigurationError(
        f"{kind.__qualname__} cannot be used with an AsyncProcess, whose calls it does not await: "
        "await the method of its asyncio twin, in phonon.aio"
    )


def check_callable(argument: str, value: Any, *, is_async: bool) -> None:
    """Refuse a callback that cannot be called. None is allowed.

    Args:
        argument: The argument's name, for the message.
        value: The value of the argument.
        is_async: Whether a coroutine function is allowed.

    Raises:
        ConfigurationError: The value is not callable, or a coroutine function that is not allowed.
    """
    if value is None:
        return
    if not callable(value):
        raise ConfigurationError(
            f"{argument} is a function, not {value!r}: give one without calling it, or leave the "
            "argument out"
        )
    if not is_async and iscoroutinefunction(value):
        raise ConfigurationError(
            f"{argument}={value!r} is a coroutine function, and this process has no event loop: "
            "use phonon.aio.AsyncProcess"
        )


# Arguments of a process


def check_process(
    *,
    session_length: Any,
    heartbeat_interval: Any,
    retry_timeout: Any,
    namespace: Any,
    partitions: Any,
    serializer: Any,
    retry: Any,
    durability: Any,
    on_error: Any,
    max_backlog: Any,
    overflow: Any,
    is_async: bool,
) -> None:
    """Refuse settings of a process that are invalid, before anything has begun.

    Raises:
        ConfigurationError: A setting is invalid. The message has its name, value and remedy.
    """
    for name, value in (
        ("session_length", session_length),
        ("heartbeat_interval", heartbeat_interval),
        ("retry_timeout", retry_timeout),
    ):
        check_seconds(name, value)
    if session_length < 2 * heartbeat_interval:
        raise ConfigurationError(
            f"session_length is {session_length:g} s and heartbeat_interval {heartbeat_interval:g} "
            "s: make session_length at least twice heartbeat_interval"
        )
    check_name("namespace", namespace)
    if partitions is not None and not 1 <= check_whole("partitions", partitions) <= MOST_PARTITIONS:
        raise ConfigurationError(
            f"partitions is 1 to {MOST_PARTITIONS}, not {partitions!r}: leave it out for 16, or "
            "for as many as the namespace has"
        )
    _check_serializer(serializer)
    _check_policy("retry", retry, RetryPolicy, "RetryPolicy(attempts=...)")
    if durability is not None:
        _check_policy("durability", durability, Durability, "Durability(replicas=...)")
    check_callable("on_error", on_error, is_async=is_async)
    check_count("max_backlog", max_backlog)
    if overflow not in ("block", "raise"):
        raise ConfigurationError(f'overflow is "block" or "raise", not {overflow!r}')


def _check_serializer(value: Any) -> None:
    if value is None or isinstance(value, type):
        problem = value is not None
    else:
        named = isinstance(getattr(value, "name", None), str)
        methods = (getattr(value, method, None) for method in ("dumps", "loads"))
        problem = value is json or not (named and all(map(callable, methods)))
    if problem:
        raise ConfigurationError(
            f"serializer is an object with a name and the methods dumps and loads, not {value!r}: "
            "give a phonon.ExactSerializer(), a phonon.SignedPickleSerializer(...) or one of your "
            "own; see phonon.Serializer"
        )


def _check_policy(
    argument: str, value: Any, kind: type[RetryPolicy | Durability], example: str
) -> None:
    if not isinstance(value, kind):
        raise ConfigurationError(
            f"{argument} is a phonon.{kind.__name__}, not {value!r}: write {example}"
        )
    try:
        kind(*value)  # again, because `_replace` checks nothing
    except ConfigurationError as error:
        raise ConfigurationError(f"{argument}: {error}") from None


def check_executor(value: Any) -> None:
    """Refuse an executor that cannot run ``execute``.

    Raises:
        ConfigurationError: The value is not an executor, or has processes instead of threads.
    """
    if isinstance(value, ProcessPoolExecutor):
        raise ConfigurationError(
            "executor= takes threads: updates hold connections and cannot be sent to another "
            "process; give a concurrent.futures.ThreadPoolExecutor"
        )
    if value is not None and not isinstance(value, Executor):
        raise ConfigurationError(
            f"executor is a concurrent.futures.Executor, not {value!r}: give a "
            "concurrent.futures.ThreadPoolExecutor(...)"
        )


# The server's address


def check_hosts(hosts: Any) -> None:
    """Refuse a list of hosts that is none, or empty.

    Raises:
        ConfigurationError: The list is refused.
    """
    is_list = isinstance(hosts, Sequence) and not isinstance(hosts, str | bytes)
    if not is_list or not hosts or not all(isinstance(host, str) for host in hosts):
        raise ConfigurationError(
            f'hosts= is a list of "host:port", not {hosts!r}: write hosts=["localhost:7000"]'
        )


def url_of(
    url: Any, hosts: Sequence[str] | None, client: Any, address: tuple[Any, Any, Any]
) -> str | None:
    """Return the server's URL from the arguments; None if they have a client.

    Args:
        url: The URL, if given.
        hosts: Nodes of a cluster, if given.
        client: A client, if given.
        address: Host, port and database.

    Raises:
        ConfigurationError: The arguments contradict each other, or one is invalid.
    """
    if client is not None:
        if url is not None or hosts is not None:
            raise ConfigurationError("give one of client=, url= and hosts=")
        return None
    if url is not None and hosts is not None:
        raise ConfigurationError("give one of url= and hosts=")
    if url is not None:
        return check_name("url", url)
    if hosts is not None:
        check_hosts(hosts)
        return "redis+cluster://" + ",".join(hosts)
    if address == _DEFAULT_ADDRESS and os.environ.get(URL_VARIABLE):
        return os.environ[URL_VARIABLE]
    return _url_at(*address)


def _url_at(host: Any, port: Any, db: Any) -> str:
    """Return the URL of a server at an address."""
    if "://" in check_name("host", host):
        raise ConfigurationError("host is the name of a host, not a URL: give that as url=")
    for name, number in (("port", port), ("db", db)):
        if check_whole(name, number) < 0:
            raise ConfigurationError(
                f"{name} is at least 0, not {number!r}: leave it out for the default"
            )
    return f"redis://{f'[{host}]' if ':' in host else host}:{port}/{db}"
