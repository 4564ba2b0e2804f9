"""The process between an embedded server and its users: it stops the server when all have left.

``phonon.embedded`` runs this file as a script, detached from the program that asked for the server,
so it outlives that program and no Ctrl-C reaches it. It imports the standard library only, and not
all of that, because each user who starts a server waits for it.

A ``flock`` shows whether a process lives, because the kernel drops it when its holder ends in any
way; no process id is ever read from a file. The folder ``phonon-server`` of a server has:

==============  =================================================================================
``users.lock``  shared, by every user for as long as it uses the server. The supervisor waits for
                it exclusively, without polling, and gets it when the last user has left or died.
``start.lock``  exclusively, by a user while it joins or starts, by the supervisor while it stops
                the server, so that no user joins a server that is stopping.
the folder      exclusively, by the supervisor until it ends, after its server. (A lock on the
                folder itself also keeps systemd-tmpfiles from clearing it out of ``/tmp``.)
``server.lock``  exclusively, by the server, which inherits it: after a supervisor was killed, the
                next one waits for it, so that two servers never write one append-only file.
==============  =================================================================================

If the supervisor is killed, the kernel stops the server (``PR_SET_PDEATHSIG``). macOS has no such
signal: there the server stays until the next start in the same folder, which stops it first.

All paths are relative to the folder, so they stay right if it is moved, and a folder that was
deleted and made again is not taken for the old one.
"""

# Importing pathlib would take a quarter of the time that this file needs to start.
# ruff: noqa: PTH105, PTH108, PTH118, PTH123

import contextlib
import ctypes
import fcntl
import os
import signal
import socket
import sys
import threading
import time
from typing import NoReturn

USERS = "users.lock"
START = "start.lock"
SERVER = "server.lock"
ADDRESS = "socket-path"
"""Holds the path of the server's socket, absolute or relative to the folder."""

STARTED = b"started\n"
BUSY = b"busy\n"
"""The exit status if another supervisor has the folder."""

SHUTDOWN = b"SHUTDOWN NOSAVE"
"""No snapshot, that is; the append-only file is written in any case."""

STOP_TIMEOUT = 5.0
"""Seconds that a server has to write its data and exit before it is killed."""

PROBE_TIMEOUT = 0.5
POLL_INTERVAL = 0.001
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def try_lock(descriptor: int, kind: int, timeout: float = 0) -> bool:
    """Take a ``flock``, giving up after a while.

    Args:
        descriptor: An open file.
        kind: ``fcntl.LOCK_SH`` or ``fcntl.LOCK_EX``.
        timeout: Seconds to try; zero for one attempt.

    Returns:
        Whether the lock was obtained.

    Raises:
        OSError: The file system has no locks.
    """
    deadline = time.monotonic() + timeout
    while True:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(POLL_INTERVAL)
        else:
            return True


def ask(path: str, command: bytes, timeout: float) -> bytes:
    """Send one inline command to the server at a unix socket.

    Args:
        path: The path of the socket.
        command: One line, such as ``PING``.
        timeout: Seconds to wait for the connection and for the answer, each.

    Returns:
        The beginning of the answer; empty if no server answers.
    """
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(timeout)
            connection.connect(path)
            connection.sendall(command + b"\r\n")
            return connection.recv(256)
    except OSError:
        return b""


def read_address(folder: str) -> str:
    """Return the content of ``ADDRESS`` in a folder; empty if the file is missing."""
    try:
        with open(os.path.join(folder, ADDRESS), "rb") as file:
            return os.fsdecode(file.read())
    except FileNotFoundError:
        return ""


def _write_address(address: str) -> None:
    with open(ADDRESS + ".new", "wb") as file:
        file.write(os.fsencode(address))
    os.replace(ADDRESS + ".new", ADDRESS)


def _remove(path: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)


def _open(name: str) -> int:
    return os.open(name, os.O_RDWR | os.O_CREAT, 0o600)


def _report(pipe: int, message: bytes) -> None:
    # The user who started this may be dead by now, and its pipe closed.
    with contextlib.suppress(OSError):
        os.write(pipe, message)
    os.close(pipe)  # the reader waits for the end


def _spawn(command: list[str], server_lock: int) -> int:
    # Loaded before the fork, so that the child does as little as possible.
    libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
    # Lua's string comparison must not depend on the first user's locale; and with a locale that is
    # not installed, as often in containers, Valkey 9.0 does not start (valkey-io/valkey#3067).
    environment = {**os.environ, "LC_ALL": "C"}
    supervisor = os.getpid()
    child = os.fork()
    if child:
        return child
    try:
        os.set_inheritable(server_lock, True)  # noqa: FBT003 - it is positional-only
        if libc is not None:
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != supervisor:  # the supervisor died before the call above
                os._exit(1)
        os.chdir("..")
        os.execve(command[0], command, environment)  # noqa: S606 - no shell is needed
    except BaseException as error:  # noqa: BLE001 - a child that returned would be a second supervisor
        os.write(2, f"{command[0]!r}: {error}\n".encode(errors="backslashreplace"))
    os._exit(127)


def _wait_for_last_user(users: int, start: int) -> None:
    while True:
        fcntl.flock(users, fcntl.LOCK_EX)
        # Released before `start` is taken: a process that joins takes them in the other order.
        fcntl.flock(users, fcntl.LOCK_UN)
        fcntl.flock(start, fcntl.LOCK_EX)
        if try_lock(users, fcntl.LOCK_EX):
            return
        fcntl.flock(start, fcntl.LOCK_UN)  # a user joined in between


def _stop_after_last_user(
    server: int, gone: threading.Event, address: str, users: int, start: int
) -> None:
    try:
        _wait_for_last_user(users, start)
    finally:  # after an error with a lock the server must be stopped as well
        # The command ends it at once; a signal would be noticed only every 100 ms.
        ask(address, SHUTDOWN, PROBE_TIMEOUT)
        if not gone.wait(PROBE_TIMEOUT):  # a user may have set a password
            os.kill(server, signal.SIGTERM)
        # An endless script may block it. All acknowledged data is in the file.
        if not gone.wait(STOP_TIMEOUT):
            os.kill(server, signal.SIGKILL)


def _supervise(pipe: int, address: str, command: list[str]) -> None:
    folder = os.open(".", os.O_RDONLY)
    users, start, server_lock = _open(USERS), _open(START), _open(SERVER)
    # Longer than the moment for which a user who checks for a supervisor has the lock.
    if not try_lock(folder, fcntl.LOCK_EX, PROBE_TIMEOUT):
        _report(pipe, BUSY)
        return
    previous = read_address(".")
    if not try_lock(server_lock, fcntl.LOCK_EX):
        # Its supervisor was killed. The server is about to end, except on macOS.
        ask(previous, SHUTDOWN, PROBE_TIMEOUT)
        if not try_lock(server_lock, fcntl.LOCK_EX, STOP_TIMEOUT):
            _report(pipe, b"a server whose supervisor was killed is still running there\n")
            return
    if previous:
        _remove(previous)
    _write_address(address)
    server = _spawn(command, server_lock)
    os.close(server_lock)  # from here on only the server has this lock
    # When the machine shuts down the server writes its data and ends, and so does this process.
    signal.signal(signal.SIGTERM, lambda *_: os.kill(server, signal.SIGTERM))
    _report(pipe, STARTED)
    gone = threading.Event()
    threading.Thread(
        target=_stop_after_last_user, args=(server, gone, address, users, start), daemon=True
    ).start()
    os.waitpid(server, 0)
    gone.set()
    # This process still has the folder's lock, so no successor has written these files.
    _remove(address)
    _remove(ADDRESS)


def main(folder: str, address: str, *command: str) -> NoReturn:
    """Run a server until its last user has left.

    Args:
        folder: The server's ``phonon-server``.
        address: The address of the server's socket, absolute or relative to ``folder``.
        command: The program and its arguments; it is started in the parent of ``folder``.
    """
    # The user's process waits for its child, which ends here, so that no unknown child appears in
    # its `os.wait()`.
    if os.fork():
        os._exit(0)
    try:
        # Signal settings are inherited, through exec too: a blocked SIGTERM could never end the
        # server.
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        os.umask(0o077)
        # The pipe to the user is for the report, not for the server's output.
        pipe = os.dup(1)
        os.dup2(2, 1)
        os.chdir(folder)
        _supervise(pipe, address, list(command))
    except BaseException:  # noqa: BLE001 - any error belongs in the server's log
        sys.excepthook(*sys.exc_info())
        os._exit(1)
    os._exit(0)  # not `exit`, which would wait for files and threads


if __name__ == "__main__":
    main(*sys.argv[1:])
