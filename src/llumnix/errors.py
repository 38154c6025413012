"""The errors that llumnix raises on purpose, as a tree.

`UsageError` is the caller's to mend and always names the fix; `ProtocolError` is a bug in one of
our own processes and carries the whole story.
"""


class LlumnixError(Exception):
    """Base of every error that llumnix raises on purpose."""


class UsageError(LlumnixError):
    """Bad input: one line that says what is wrong and how to mend it (exit status 2)."""


class CapacityError(UsageError):
    """The machine or the cluster cannot hold one more instance."""


class UnknownInstanceError(UsageError):
    """No instance has that id."""


class UnknownRequestError(UsageError):
    """No request that is running or waiting has that id."""


class UnknownMigrationError(UsageError):
    """No migration has that id."""


class UnknownQuarantineError(UsageError):
    """No request is quarantined under that id."""


class ConflictError(UsageError):
    """The state of things does not allow the action."""


class LastInstanceError(UsageError):
    """The action would leave no instance that serves."""


class InstanceFailedError(LlumnixError):
    """An instance could not be started, or crashed too often to be started again."""


class ProtocolError(LlumnixError):
    """A process of ours received what its peer must never send."""
