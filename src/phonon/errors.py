"""Every error that Phonon raises.

::

    PhononError
    ├── ConfigurationError (ValueError)      an invalid argument or URL
    ├── InvalidMessageError (ValueError)     a message that its model refuses
    ├── NotStorableError (TypeError)         a value that cannot be sent to the server
    ├── UndecodableError                     stored data that cannot be read back
    ├── ServerError                          the server answered with an error
    │   ├── ServerTooOldError                it lacks Redis Functions
    │   ├── ServerFullError                  its memory or its disk is full
    │   ├── AuthenticationError              it refused the user name or password
    │   └── ForeignKeyError                  a key of Phonon's holds a value of another type
    ├── ServerUnreachableError (ConnectionError)   no server answered
    │   └── ConnectionLostError              it stopped answering during a call
    ├── EmbeddedServerError                  the bundled server could not be started
    ├── AlreadyLockedError                   another holder has the lock
    │   └── DeadlockError (RuntimeError)     the holder is this very thread
    ├── LockLostError                        a lock is not held any more
    ├── BacklogFullError                     too much work is unfinished to take in more
    ├── BatchLostError                       a batch was executed here, and taken over meanwhile
    ├── BatchRunningError                    a parked batch cannot run while another one does
    ├── BatchMissingError (LookupError)      there is no such parked batch
    ├── ProcessMissingError (LookupError)    there is no such process
    ├── DeclaredDeadError                    the process counted as dead, and is another one now
    ├── ServerStateLostError                 the server has come back without its data
    ├── SourceLostError                      a claim of a source is not valid any more
    ├── SourceRewoundError                   a broker has fewer messages than are stored
    ├── AlreadyStoredError                   messages were stored by an earlier delivery
    ├── UnknownClassError                    a batch of a class that is not imported here
    ├── ProcessStoppedError                  ``stop()`` was called
    └── ForkedError                          an object of the parent, used in a forked child

An exception that the user's own ``merge``, ``execute`` or callback raises is passed on unchanged.
"""

from typing import Any

from redis.exceptions import LockError, LockNotOwnedError


class PhononError(Exception):
    """The base of every error raised by Phonon."""


class ConfigurationError(PhononError, ValueError):
    """An argument, an environment variable or a URL is invalid."""


class UnstableNameWarning(UserWarning):
    """A class has a name on the server that changes when it is run or imported in another way."""


class InvalidMessageError(PhononError, ValueError):
    """A message has no ID, an unknown field, or a value of the wrong type.

    Nothing of the message was merged.

    Attributes:
        model: The model's qualified name.
        field: The field's name.
        value: The field's value in the message.
    """

    def __init__(self, message: str, model: str = "", field: str = "", value: Any = None) -> None:
        super().__init__(message)
        self.model = model
        self.field = field
        self.value = value


class NotStorableError(PhononError, TypeError):
    """A value has a type that cannot be stored, or is too large; the message names its place."""


class UndecodableError(PhononError):
    """Stored data cannot be read back; the message names where it was found."""


class ServerError(PhononError):
    """The server answered with an error. No part of the call was applied."""


class ServerTooOldError(ServerError):
    """The server has no Redis Functions: Redis 7.0 or Valkey 7.2 is the least."""


class ServerFullError(ServerError):
    """The server takes no data, because its memory is full, or it cannot write to its disk."""


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
    """Another holder has the lock, and the caller did not wait, or waited too long.

    Code that was written for redis-py's locks can catch it as redis-py's `LockError`.

    Attributes:
        holder: The holder, a `phonon.lock.LockHolder`, if it is known.
    """

    def __init__(self, message: str, holder: Any = None) -> None:
        super().__init__(message)
        self.holder = holder


class DeadlockError(AlreadyLockedError, RuntimeError):
    """This thread holds the lock already, and would wait for itself."""


class LockLostError(PhononError, LockNotOwnedError, RuntimeError):
    """A lock is not held any more: it expired, or the server lost it.

    Code for locks of redis-py or of the standard library can catch it as their error.
    """


class BacklogFullError(PhononError):
    """Too much work is unfinished, because the database or the server is in trouble.

    The update was not taken in: hand its message back to the broker.
    """


class BatchLostError(PhononError):
    """A batch was executed here, but another process had taken it over.

    This process was silent for too long and was declared dead. The new owner executes the batch
    under the same token: a database that checks the token has it once, any other may have it
    twice. The error is logged and passed to the process's ``on_error``. It is not raised, because
    an executed batch cannot be undone.

    Attributes:
        resource: The batch's resource.
        token: The batch's token.
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
    """There is no such process: it has stopped, or it was taken over completely."""


class DeclaredDeadError(PhononError):
    """The process was silent for too long and counts as dead; survivors take over.

    The process notices this, goes on under a new id, and repeats the refused calls. So the error is
    not raised, but logged and passed to the process's ``on_error``.
    """


class ServerStateLostError(PhononError):
    """The server has come back without its data; the message names the data.

    The error is logged and passed to the process's ``on_error``. Local data is kept.

    Attributes:
        calls: The number of answered calls that are gone; 0 if it is not known.
    """

    def __init__(self, message: str, calls: int = 0) -> None:
        super().__init__(message)
        self.calls = calls


class SourceLostError(PhononError):
    """Another consumer has claimed a source of this process, or its position has changed.

    The call has stored no new data of the batch. If this consumer is still assigned to the source,
    claim it again, go to its position, and read on from there.

    Attributes:
        source: The source's name.
    """

    def __init__(self, message: str, source: str = "") -> None:
        super().__init__(message)
        self.source = source


class SourceRewoundError(PhononError):
    """More messages of a source are stored than its broker has.

    A topic was deleted and made again under its name, or its broker has lost messages. The new
    messages have the offsets of stored ones, and would be passed over. Only people know which it
    is: move the source with `phonon.source.Source.claim`, as the message says, and start again.

    Attributes:
        source: The source's name.
    """

    def __init__(self, message: str, source: str = "") -> None:
        super().__init__(message)
        self.source = source


class AlreadyStoredError(PhononError):
    """Messages of the batch were stored before, by an earlier delivery.

    The call has not stored the messages that were merged with them. Handle the same messages again:
    this process now knows the stored ones, and skips them.

    Attributes:
        ids: The ids of the stored messages.
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
