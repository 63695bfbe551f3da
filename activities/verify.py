"""The moment at which a build succeeds: the image is looked at in the cloud, and then written down."""

from temporalio import activity

from kiln.errors import VerificationFailedError
from kiln.models import BuildEnd, PublishRequest
from kiln.naming import BUILD_TAG, resource_tags
from kiln.ports import Ami, Cloud, Ledger

# EC2 may hide a finished AMI from reads for a while; after about a minute of looking its absence is believed.
VERIFY_ATTEMPTS = 12


class VerifyActivities:
    """Either it commits, and a later cancel changes nothing, or it doesn't."""

    def __init__(self, ledger: Ledger, cloud: Cloud) -> None:
        self._ledger = ledger
        self._cloud = cloud

    @activity.defn(name="publish-image")
    def publish(self, request: PublishRequest) -> BuildEnd:
        """Writes `succeeded` and the image in one transaction.

        Raises VerificationFailedError, BuildCancelledError, BuildOverError, AttemptLostError.
        """
        image, build_id = request.image, request.build.build_id
        ami = self._verified(request)
        if ami.tags.get(BUILD_TAG) != build_id:
            tags = resource_tags(self._ledger.installation, build_id, image.attempt)
            self._cloud.tag(image.region, [ami.image_id, *ami.snapshot_ids], tags)
        return self._ledger.publish(image, build_id, ami, simulated=self._cloud.simulated)

    def _verified(self, request: PublishRequest) -> Ami:
        image = request.image
        ami = self._cloud.image(image.region, image.image_id)
        if ami is None:
            raise _refused(f"{image.image_id} is not in EC2, though its builder reported it")
        if ami.state != "available":
            reason = f" ({ami.state_reason})" if ami.state_reason else ""
            raise _refused(f"{image.image_id} is {ami.state} in EC2, not available{reason}")
        if not ami.snapshot_ids:
            raise _refused(f"{image.image_id} has no snapshot behind it")
        return ami


def _refused(problem: str) -> VerificationFailedError:
    return VerificationFailedError(problem, final=activity.info().attempt >= VERIFY_ATTEMPTS)
