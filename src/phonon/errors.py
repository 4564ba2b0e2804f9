"""Every error that Phonon raises.

::

    PhononError
    ├── ConfigurationError (ValueError)      an argument or a URL that cannot be meant
    ├── InvalidMessageError (ValueError)     a message that its model does not take
    ├── NotStorableError (TypeError)         a value that cannot be sent to the server
    ├── UndecodableError                     stored data that cannot be read back
    ├── ServerError                          the server answered with an error
    │   ├── ServerTooOldError                it lacks Redis Functions
    │   ├── AuthenticationError              it refused the user name or password
    │   └── ForeignKeyError                  one of our keys holds somebody else's type
    ├── ServerUnreachableError (ConnectionError)   no server answered
    │   └── ConnectionLostError              it stopped answering in the middle of a call
    ├── EmbeddedServerError                  the bundled server could not be started
    ├── AlreadyLockedError                   a lock is held by somebody else
    │   └── DeadlockError (RuntimeError)     by this very thread, which would wait for itself
    ├── LockLostError                        a lock that was ours is ours no longer
    ├── BacklogFullError                     too much is left undone to take in more
    ├── BatchLostError                       a batch was executed here, and taken over meanwhile
    ├── BatchRunningError                    a parked batch cannot run while another one does
    ├── BatchMissingError (LookupError)      there is no such parked batch
    ├── ProcessMissingError (LookupError)    there is no such process
    ├── DeclaredDeadError                    the process counted as dead, and is another one now
    ├── ServerStateLostError                 the server has come back without its data
    ├── SourceLostError                      a source that was claimed here is claimed no longer
    ├── AlreadyStoredError                   messages that another delivery of them has stored
    ├── UnknownClassError                    a batch of a class that is not imported here
    ├── ProcessStoppedError                  ``stop()`` was called
    └── ForkedError                          an object of the parent, used in a forked child

An exception that the user's own ``merge``, ``execute`` or callback raises is passed on as it is.
"""

from typing import Any

from redis.exceptions import LockError, LockNotOwnedError


class PhononError(Exception):
    """The base of every error raised by Phonon."""


class ConfigurationError(PhononError, ValueError):
    """An argument, an environment variable or a URL cannot be meant as it stands."""


class UnstableNameWarning(UserWarning):
    """A class has a name on the server that changes when it is run or imported in another way."""


class InvalidMessageError(PhononError, ValueError):
    """A message has no ID, a field that its model does not have, or a value that it does not take.

    Nothing of the message was merged.

    Attributes:
        model: The model's qualified name.
        field: The field's name.
        value: What the message has there.
    """

    def __init__(self, message: str, model: str = "", field: str = "", value: Any = None) -> None:
        super().__init__(message)
        self.model = model
        self.field = field
        self.value = value


class NotStorableError(PhononError, TypeError):
    """A value is of a type that cannot be stored, or too large; the message says where it is."""


class UndecodableError(PhononError):
    """Stored data cannot be read back; the message names where it was found."""


class ServerError(PhononError):
    """The server answered with an error. Nothing of the call was applied."""


class ServerTooOldError(ServerError):
    """The server has no Redis Functions: Redis 7.0 or Valkey 7.2 is the least."""


class AuthenticationError(ServerError):
    """The server wants a user name or password, or refused the one it was given."""


class ForeignKeyError(ServerError):
    """A key that Phonon uses holds a value of a type that Phonon did not put there."""


class ServerUnreachableError(PhononError, ConnectionError):
    """No server answered at the address given."""


class ConnectionLostError(ServerUnreachableError):
    """The server did not answer in time; whether the call took effect is not known."""


class EmbeddedServerError(PhononError):
    """The bundled server is not installed, or it could not be started."""


class AlreadyLockedError(PhononError, LockError):
    """A lock is held by somebody else, and waiting was not wanted or took too long.

    Code that was written for redis-py's locks catches it as its `LockError`.

    Attributes:
        holder: Who holds it, a `phonon.lock.LockHolder`, as far as it is known.
    """

    def __init__(self, message: str, holder: Any = None) -> None:
        super().__init__(message)
        self.holder = holder


class DeadlockError(AlreadyLockedError, RuntimeError):
    """This thread holds the lock already, and would wait for itself."""


class LockLostError(PhononError, LockNotOwnedError, RuntimeError):
    """A lock that was held is held no longer: it expired, or the server lost it.

    Code that was written for redis-py's locks or the standard library's catches it as theirs.
    """


class BacklogFullError(PhononError):
    """Too much is left undone, because the database or the server is in trouble.

    What was refused was not taken in: hand it back to wherever it came from.
    """


class BatchLostError(PhononError):
    """A batch was executed here, but another process had taken it over.

    This process was silent for too long and was declared dead. The new owner executes the batch
    under the same token: a database that checks the token has it once, any other may have it
    twice. It is not raised, since nobody can undo what was executed, but logged and handed to the
    process's ``on_error``.

    Attributes:
        resource: Whose batch.
        token: Which.
    """

    def __init__(self, message: str, resource: str = "", token: int = 0) -> None:
        super().__init__(message)
        self.resource = resource
        self.token = token


class BatchRunningError(PhononError):
    """A parked batch cannot be replayed while another batch of its resource is executed."""


class BatchMissingError(PhononError, LookupError):
    """There is no such parked batch: it was replayed or discarded, or there never was one."""


class ProcessMissingError(PhononError, LookupError):
    """There is no such process: it has stopped, or it was taken over to its end."""


class DeclaredDeadError(PhononError):
    """The process was silent for too long and counts as dead; survivors take over.

    The process itself notices, goes on under a new id, and repeats what was refused. So this is
    logged and handed to the process's ``on_error``, and not raised.
    """


class ServerStateLostError(PhononError):
    """The server has come back without its data; see the message for what that concerns.

    It is logged and handed to the process's ``on_error``. Local data is kept.

    Attributes:
        calls: How many calls that had been answered are gone; 0 if that is not known.
    """

    def __init__(self, message: str, calls: int = 0) -> None:
        super().__init__(message)
        self.calls = calls


class SourceLostError(PhononError):
    """A source that was claimed here is read by another consumer now, or stands somewhere else.

    Nothing of the batch was stored that was not stored before. If the source is still this
    consumer's, claim it again, go to its position, and read on from there.

    Attributes:
        source: Its name.
    """

    def __init__(self, message: str, source: str = "") -> None:
        super().__init__(message)
        self.source = source


class AlreadyStoredError(PhononError):
    """Messages of the batch were stored before, by another delivery of them.

    What they had been merged with was not stored either. Handle the same messages again: this
    process now knows what is stored, and skips that.

    Attributes:
        ids: Of the messages.
    """

    def __init__(self, message: str, ids: tuple[bytes, ...] = ()) -> None:
        super().__init__(message)
        self.ids = ids


class UnknownClassError(PhononError):
    """A batch belongs to an ``Update`` class that this process has not imported.

    Attributes:
        class_name: The class's qualified name.
    """

    def __init__(self, message: str, class_name: str = "") -> None:
        super().__init__(message)
        self.class_name = class_name


class ProcessStoppedError(PhononError):
    """The ``Process`` was stopped; make a new one."""


class ForkedError(PhononError):
    """The object was made before ``fork()`` and belongs to the parent process."""
