"""The error tree. Input raises one of these; broken invariants assert.

ExpertMeshError
├── InputError                 the request or command is wrong; nothing was started
│   └── UnknownNameError       a name that is not among the known ones
├── CheckpointError            a checkpoint directory cannot be opened as it is
│   ├── UnsupportedModelError  a whole checkpoint, of a kind that is not served
│   └── CorruptCheckpointError truncated, damaged or incomplete files
├── CapacityError              not enough memory, pages, slots or queue room
│   └── RateLimitError         an API key has used what it may use for now
├── UnauthenticatedError       no API key, or none that is known
├── ForbiddenError             the caller's role does not allow it
├── UnavailableError           a part that is needed is away now; trying again may help
│   ├── LinkError              a link broke or its deadline passed
│   └── NoReplicaError         an expert has no live replica
├── ConflictError              another operation is under way
├── NotFoundError              what is asked for is not there, or no longer
└── StateError                 the state store holds something that cannot be used

Each takes one message, so each survives pickling through Ray.
"""


class ExpertMeshError(Exception):
    """Base of all errors that ExpertMesh raises on purpose."""


class InputError(ExpertMeshError):
    """The request or command is wrong. field names what is wrong in it, empty where that is no single field."""

    def __init__(self, message: str, *, field: str = "") -> None:
        super().__init__(message)
        self.field = field


class UnknownNameError(InputError):
    """A name that is not registered; the message lists the known ones."""


class CheckpointError(ExpertMeshError):
    """A checkpoint directory cannot be opened."""


class UnsupportedModelError(CheckpointError):
    """The checkpoint is of a kind that is not served; the message says what was found and what is supported."""


class CorruptCheckpointError(CheckpointError):
    """Files of the checkpoint are truncated, damaged or missing tensors."""


class CapacityError(ExpertMeshError):
    """Not enough memory, pages, slots or queue room. retry_after_s: when there may be; None where nobody can tell."""

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class RateLimitError(CapacityError):
    """An API key has used what it may use for now."""


class UnauthenticatedError(ExpertMeshError):
    """The caller has no API key, or one that is unknown, revoked or expired."""


class ForbiddenError(ExpertMeshError):
    """The caller is known, and its role does not allow this."""


class UnavailableError(ExpertMeshError):
    """A part that is needed is away now."""


class LinkError(UnavailableError):
    """A link broke, or a wait on it passed its deadline."""


class NoReplicaError(UnavailableError):
    """An expert has no live replica."""


class ConflictError(ExpertMeshError):
    """It cannot be begun while something else is under way; the message names that."""


class NotFoundError(ExpertMeshError):
    """What is asked for is not there, or no longer."""


class StateError(ExpertMeshError):
    """The state store holds something that cannot be used."""
