"""What EC2's refusals mean: every error of botocore is translated here, by its code and never by its text."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    HTTPClientError,
    IncompleteReadError,
    MetadataRetrievalError,
    PaginationError,
)
from botocore.exceptions import ConnectionError as EndpointError
from botocore.parsers import ResponseParserError

from kiln.errors import (
    CapacityError,
    ConflictError,
    ImageNotFoundError,
    KilnError,
    NotFoundError,
    RefusedError,
    UnavailableError,
)

IMAGE_GONE_CODES: Final = frozenset({"InvalidAMIID.NotFound", "InvalidAMIID.Unavailable"})
GONE_CODES: Final = IMAGE_GONE_CODES | {
    "InvalidInstanceID.NotFound",
    "InvalidSnapshot.NotFound",
    "InvalidVolume.NotFound",
    "InvalidKeyPair.NotFound",
    "InvalidGroup.NotFound",
    "InvalidGroupId.NotFound",
    "InvalidSecurityGroupID.NotFound",
}
BUSY_CODES: Final = frozenset(
    {
        "DependencyViolation",
        "IncorrectInstanceState",
        "IncorrectState",
        "InvalidGroup.InUse",
        "InvalidSnapshot.InUse",
        "ResourceInUse",
        "VolumeInUse",
    }
)
# EC2's codes for "no room now": https://docs.aws.amazon.com/AWSEC2/latest/APIReference/errors-overview.html
CAPACITY_CODES: Final = frozenset(
    {
        "InstanceLimitExceeded",
        "InsufficientCapacity",
        "InsufficientCapacityOnHost",
        "InsufficientFreeAddressesInSubnet",
        "InsufficientHostCapacity",
        "InsufficientInstanceCapacity",
        "InsufficientReservedInstanceCapacity",
        "InsufficientReservedInstancesCapacity",
        "MaxIOPSLimitExceeded",
        "MaxSpotInstanceCountExceeded",
        "ReservationCapacityExceeded",
        "UnavailableHostRequirements",
        "UnfulfillableCapacity",
        "VcpuLimitExceeded",
        "VolumeLimitExceeded",
    }
)
# A name, or a client token, that came with something else.
TAKEN_CODES: Final = frozenset({"IdempotentParameterMismatch", "InvalidAMIName.Duplicate"})
WRONG_STATE_CODES: Final = frozenset({"IncorrectInstanceState"})
UNAVAILABLE_CODES: Final = frozenset(
    {
        "BandwidthLimitExceeded",
        "ConcurrentSnapshotLimitExceeded",
        "EC2ThrottledException",
        "InternalError",
        "InternalFailure",
        "PendingSnapshotLimitExceeded",
        "PriorRequestNotComplete",
        "RequestLimitExceeded",
        "RequestThrottled",
        "RequestThrottledException",
        "RequestTimeout",
        "RequestTimeoutException",
        "ServiceUnavailable",
        "SnapshotCreationPerVolumeRateExceeded",
        "Throttling",
        "ThrottlingException",
        "TooManyRequestsException",
        "Unavailable",
    }
)
# The text of these repeats what was signed: headers, a session token among them.
_TELLING_CODES: Final = frozenset({"IncompleteSignature", "InvalidSignatureException", "SignatureDoesNotMatch"})
_TRANSIENT_ERRORS: Final = (
    CredentialRetrievalError,
    EndpointError,
    HTTPClientError,
    IncompleteReadError,
    MetadataRetrievalError,
    PaginationError,
    ResponseParserError,
)
_TEXT_LIMIT: Final = 300
# The first that has the code.
_KINDS: Final[tuple[tuple[frozenset[str], type[KilnError]], ...]] = (
    (IMAGE_GONE_CODES, ImageNotFoundError),
    (GONE_CODES, NotFoundError),
    (TAKEN_CODES, ConflictError),
    (WRONG_STATE_CODES, RefusedError),
)


class CloudUnavailableError(UnavailableError):
    """EC2 or STS did not answer, throttled, or failed inside, after all attempts; the same call may succeed later."""


class CloudRefusedError(KilnError):
    """EC2 or STS refuses the call: no or wrong credentials, no permission, a wrong parameter. `code` is AWS's own."""

    retryable = False

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code


def code_of(error: ClientError) -> str:
    """AWS's code of an error, such as `InvalidAMIID.NotFound`; "" if the answer has none."""
    return error.response.get("Error", {}).get("Code", "")


def is_unavailable(error: ClientError) -> bool:
    """Whether the same call may succeed later: EC2 throttles or fails inside."""
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return code_of(error) in UNAVAILABLE_CODES or status >= 500


def hindrance(delete: Callable[[], object]) -> ClientError | None:
    """Runs one deletion. None if the thing is gone now, by this call or before it; else what EC2 says against it.

    Raises ClientError if EC2 is unavailable: that says nothing of the thing.
    """
    try:
        delete()
    except ClientError as error:
        if is_unavailable(error):
            raise
        return None if code_of(error) in GONE_CODES else error
    return None


def is_busy(error: ClientError | None) -> bool:
    """Whether a deletion has to wait for something else. Raises the error if waiting cannot help."""
    if error is not None and code_of(error) not in BUSY_CODES:
        raise error
    return error is not None


@contextmanager
def translated(region: str) -> Iterator[None]:
    """Raises Kiln's errors in place of botocore's; the message keeps the action, the region and AWS's code.

    Raises CloudUnavailableError, CloudRefusedError, CapacityError, ConflictError (a name or a client token is
    taken), RefusedError (an instance is in the wrong state), ImageNotFoundError and NotFoundError.
    """
    # Without the cause: Temporal writes causes into histories, and botocore's may repeat signed headers.
    try:
        yield
    except ClientError as error:
        raise _of_client_error(error, region) from None
    except _TRANSIENT_ERRORS as error:
        raise CloudUnavailableError(f"EC2 in {region} does not answer: {_shortened(str(error))}") from None
    except BotoCoreError as error:
        kind = type(error).__name__
        raise CloudRefusedError(f"EC2 in {region}: {kind}: {_shortened(str(error))}", code=kind) from None


def _of_client_error(error: ClientError, region: str) -> KilnError:
    code = code_of(error)
    message = told(error, region)
    if code in CAPACITY_CODES:  # before the status: EC2 says 500 to some of these
        return CapacityError(message)
    if is_unavailable(error):
        return CloudUnavailableError(message)
    for codes, kind in _KINDS:
        if code in codes:
            return kind(message)
    return CloudRefusedError(message, code=code)


def told(error: ClientError, region: str) -> str:
    """An error as users may read it: the action, the region, AWS's code and words."""
    return f"{error.operation_name} in {region}: {_described(error)}"


def _described(error: ClientError) -> str:
    code = code_of(error) or "no error code"
    text = error.response.get("Error", {}).get("Message", "")
    return code if code in _TELLING_CODES or not text else f"{code}: {_shortened(text)}"


def _shortened(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _TEXT_LIMIT else f"{line[:_TEXT_LIMIT]}…"
