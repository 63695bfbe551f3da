"""The deletion of a finished image, seen through over restarts and over EC2's delays."""

from temporalio import workflow

with workflow.unsafe.imports_passed_through():
    from activities.deletion import DeletionActivities
    from kiln.models import ImageRef
    from workflows import options


@workflow.defn(name="delete-image")
class DeleteImageWorkflow:
    """Ends when the AMI and every snapshot behind it are gone, less those that another AMI uses."""

    @workflow.run
    async def run(self, image: ImageRef) -> None:
        workflow.set_current_details("deregistering the AMI, then deleting its snapshots")
        await workflow.execute_activity_method(DeletionActivities.delete, image, **options.cleanup())
        workflow.set_current_details("gone")
