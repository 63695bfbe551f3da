"""Kiln's errors, each with its place in the tree, its code on the wire and whether a retry can help.

KilnError
├── InvalidRequestError        the caller's mistake; names the field
├── NotFoundError
│   ├── BuildNotFoundError
│   └── ImageNotFoundError
├── ConflictError
│   ├── ImageBuildingError
│   ├── RefusedError           of an organization's image or machine, with the contract's own code
│   └── IdempotencyKeyReusedError
├── OperationOverError         a machine's operation is closed already, or another took its place
├── OperationFailedError       a machine's operation cannot be carried out
├── ToolMissingError
├── UnavailableError           a part that Kiln needs does not answer
└── BuildError                 why a build ended, or an attempt of it
    ├── ToolFailedError
    ├── BuildTimedOutError
    ├── BuildCancelledError
    ├── BuildOverError         the row is closed already; nothing is to be done
    ├── CapacityError          EC2 has no room or throttles
    ├── ContextMissingError      the build context is not in the object store
    ├── ContextInvalidError      the build context is no archive that can be built from
    │   └── ContextTooLargeError
    ├── SourceUnavailableError   an image that the build needs cannot be read, or may not be
    ├── VerificationFailedError
    ├── AttemptLostError       this attempt may not go on: its lease is another's or over
    ├── WorkerStoppingError    this worker is shutting down; another takes the build up
    └── LeftoversError         a cleanup found resources that are not gone yet
"""

from datetime import timedelta
from typing import ClassVar

from kiln.models import ClientCode, ErrorCode


class KilnError(Exception):
    """Root of all errors that Kiln raises on purpose. `retryable` says whether the same call may succeed later."""

    retryable: ClassVar[bool] = True


class InvalidRequestError(KilnError):
    """A request that cannot be served as it stands. `field` is the name that the caller used."""

    retryable = False

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field
        self.problem = problem


class NotFoundError(KilnError):
    """What was asked for does not exist, or belongs to another organization."""


class BuildNotFoundError(NotFoundError):
    """No build of the caller's organization has this id."""


class ImageNotFoundError(NotFoundError):
    """No image of the caller's organization, or of the cloud account, has this id."""


class ConflictError(KilnError):
    """The request is sound, but the state that it meets forbids it."""


class ImageBuildingError(ConflictError):
    """The image is still being built."""


class RefusedError(ConflictError):
    """An organization's image or machine is in a state that forbids the request. `code` None: the contract has none of
    its own for it."""

    retryable = False

    def __init__(self, message: str, code: ClientCode | None = None) -> None:
        super().__init__(message)
        self.code = code


class IdempotencyKeyReusedError(ConflictError):
    """The same idempotency key came with another body."""


class OperationOverError(KilnError):
    """A machine's operation is closed already, or another took its place; nothing is to be done."""

    retryable = False


class OperationFailedError(KilnError):
    """A machine's operation cannot be carried out; the message is for the machine's users."""

    retryable = False


class ToolMissingError(KilnError):
    """A program that Kiln runs is not installed; the message names it and its setting."""


class UnavailableError(KilnError):
    """A part that Kiln needs (catalog, Temporal, EC2) does not answer; the same call may succeed later."""


class BuildError(KilnError):
    """Why a build, or one attempt of it, ended. Subclasses fix the code and whether another attempt can help."""

    code: ClassVar[ErrorCode] = ErrorCode.INTERNAL
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, final: bool = False, retry_after: timedelta | None = None) -> None:
        """`final` forbids a further attempt of an error that could be retried; `retry_after` delays the next one."""
        super().__init__(message)
        self.final = final
        self.retry_after = retry_after


class ToolFailedError(BuildError):
    """The tool (Packer) exited with an error; the message is the tool's own last error line."""

    code = ErrorCode.TOOL_FAILED


class BuildTimedOutError(BuildError):
    """The build's time limit, kept over all attempts, is over."""

    code = ErrorCode.TIMED_OUT


class BuildCancelledError(BuildError):
    """The build's row asks for its cancellation."""


class BuildOverError(BuildError):
    """The build's row is closed already."""


class CapacityError(BuildError):
    """EC2 had no capacity, or throttled the tool until it gave up."""

    code = ErrorCode.CAPACITY
    retryable = True


class ContextMissingError(BuildError):
    """The build context was not uploaded in its time, or is no longer in the object store."""

    code = ErrorCode.CONTEXT_MISSING


class ContextInvalidError(BuildError):
    """The build context is no archive that can be built from; the message says which rule it breaks."""

    code = ErrorCode.CONTEXT_INVALID


class ContextTooLargeError(ContextInvalidError):
    """The build context is longer than it may be."""


class SourceUnavailableError(BuildError):
    """An image that the build needs does not exist, does not answer, or is not the organization's to read."""

    code = ErrorCode.SOURCE_UNAVAILABLE


class VerificationFailedError(BuildError):
    """The tool reported an image, and EC2 does not have it as reported. EC2's reads lag: it is looked for again."""

    code = ErrorCode.VERIFICATION_FAILED
    retryable = True


class AttemptLostError(BuildError):
    """Another attempt holds the build, or this one's lease could not be renewed."""

    retryable = True


class WorkerStoppingError(BuildError):
    """This worker is shutting down; the build goes on elsewhere."""

    retryable = True


class LeftoversError(BuildError):
    """Resources of a build are not gone yet; the message names them."""

    retryable = True
