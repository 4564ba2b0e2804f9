"""Every error that Phonon raises.

::

    PhononError
    ├── ConfigurationError (ValueError)      an argument or a URL that cannot be meant
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
    ├── LockLostError                        a lock that was ours is ours no longer
    ├── StaleOperationError                  the server saw a later operation before this one
    ├── UnknownClassError                    a batch of a class that is not imported here
    ├── ProcessStoppedError                  ``stop()`` was called
    └── ForkedError                          an object of the parent, used in a forked child

An exception that the user's own ``merge``, ``execute`` or callback raises is passed on as it is.
"""


class PhononError(Exception):
    """The base of every error raised by Phonon."""


class ConfigurationError(PhononError, ValueError):
    """An argument, an environment variable or a URL cannot be meant as it stands."""


class NotStorableError(PhononError, TypeError):
    """A value has a type that cannot be stored; the message names the attribute."""


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


class AlreadyLockedError(PhononError):
    """A lock is held by somebody else, and waiting was not wanted or took too long."""


class LockLostError(PhononError):
    """A lock that was held is held no longer: it expired, or the server lost it."""


class StaleOperationError(PhononError):
    """The server has seen a later operation of this process on this resource.

    Only a repeat that was delayed past its successor can be stale, so the data of the later
    operation stands and this one changes nothing.
    """


class UnknownClassError(PhononError):
    """A batch belongs to an ``Update`` class that this process has not imported."""


class ProcessStoppedError(PhononError):
    """The ``Process`` was stopped; make a new one."""


class ForkedError(PhononError):
    """The object was made before ``fork()`` and belongs to the parent process."""
