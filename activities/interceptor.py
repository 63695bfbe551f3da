"""Where Kiln's errors become Temporal's: the class of an error decides whether another attempt can help."""

from typing import Any

from temporalio.exceptions import ApplicationError
from temporalio.worker import ActivityInboundInterceptor, ExecuteActivityInput, Interceptor

from kiln.errors import BuildCancelledError, BuildError, BuildOverError, KilnError

CANCELLED_TYPE = "cancelled"
OVER_TYPE = "over"


class ErrorInterceptor(Interceptor):
    """Put on every worker. Errors that aren't Kiln's own pass as they are, and are retried as their policy says."""

    def intercept_activity(self, next: ActivityInboundInterceptor) -> ActivityInboundInterceptor:  # noqa: A002
        return _Translator(next)


class _Translator(ActivityInboundInterceptor):
    async def execute_activity(self, input: ExecuteActivityInput) -> Any:  # noqa: A002
        try:
            return await super().execute_activity(input)
        except KilnError as error:
            raise translate(error) from error


def translate(error: KilnError) -> ApplicationError:
    """A Temporal error of the same meaning; its type is what the workflow decides by."""
    if isinstance(error, BuildCancelledError):
        return ApplicationError(str(error), type=CANCELLED_TYPE, non_retryable=True)
    if isinstance(error, BuildOverError):
        return ApplicationError(str(error), type=OVER_TYPE, non_retryable=True)
    if isinstance(error, BuildError):
        return ApplicationError(
            str(error),
            type=error.code.value,
            non_retryable=not error.retryable or error.final,
            next_retry_delay=error.retry_after,
        )
    return ApplicationError(str(error), type=type(error).__name__, non_retryable=not error.retryable)
