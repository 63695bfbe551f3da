"""Starting what machines are to do: after the commit that ordered it, for the row is the order."""

import logging

from api.deps import Parts
from api.patience import promptly
from kiln.errors import UnavailableError
from kiln.models import OperationRef
from workflows.start import start_operation

log = logging.getLogger("kiln.api")


async def start_machine_work(parts: Parts, ref: OperationRef) -> None:
    """Starts an operation's workflow; where Temporal does not answer, the dispatcher does it later."""
    try:
        await promptly(start_operation(parts.temporal, ref))
    except UnavailableError:
        log.warning(
            "Temporal does not answer; operation %d of machine %d waits for the dispatcher", ref.number, ref.machine_id
        )
