"""EC2's lag: AMIs that stay pending, resources too fresh to be seen, AMIs of two volumes.

A setting holds for what is made after it. Two rules of EC2 that moto lacks hold always: a repeated
ClientToken repeats the answer and not the action, and a second AMI of one name is refused (EC2 API Reference,
"Ensuring idempotency" and CreateImage).
"""

import math
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from support.ec2_backend import Backend
from support.ec2_message import Reply, Request, Upstream
from support.ec2_xml import Document, Item, error_reply, matches, without_filter

# What a reply has created: where its ids stand, and the parameter that later asks for them.
CREATED: Mapping[str, tuple[tuple[str, str], ...]] = {
    "RunInstances": (
        ("instancesSet/item/instanceId", "InstanceId"),
        ("instancesSet/item/blockDeviceMapping/item/ebs/volumeId", "VolumeId"),
    ),
    "CreateImage": (("imageId", "ImageId"),),
    "CopyImage": (("imageId", "ImageId"),),
    "CreateSnapshot": (("snapshotId", "SnapshotId"),),
    "CreateSnapshots": (("snapshotSet/item/snapshotId", "SnapshotId"),),
    "CopySnapshot": (("snapshotId", "SnapshotId"),),
    "CreateSecurityGroup": (("groupId", "GroupId"),),
    "CreateKeyPair": (("keyPairId", "KeyPairId"), ("keyName", "KeyName")),
    "ImportKeyPair": (("keyPairId", "KeyPairId"), ("keyName", "KeyName")),
}
# The list that a read answers with, and the id of its items.
LISTED = {
    "DescribeInstances": ("instancesSet", "instanceId"),
    "DescribeInstanceStatus": ("instanceStatusSet", "instanceId"),
    "DescribeImages": ("imagesSet", "imageId"),
    "DescribeSnapshots": ("snapshotSet", "snapshotId"),
    "DescribeSecurityGroups": ("securityGroupInfo", "groupId"),
    "DescribeVolumes": ("volumeSet", "volumeId"),
    "DescribeKeyPairs": ("keySet", "keyPairId"),
    "DescribeTags": ("tagSet", "resourceId"),
}
NOT_FOUND = {
    "InstanceId": ("InvalidInstanceID.NotFound", "The instance ID '{}' does not exist"),
    "ImageId": ("InvalidAMIID.NotFound", "The image id '[{}]' does not exist"),
    "SnapshotId": ("InvalidSnapshot.NotFound", "The snapshot '{}' does not exist."),
    "GroupId": ("InvalidGroup.NotFound", "The security group '{}' does not exist"),
    "GroupName": ("InvalidGroup.NotFound", "The security group '{}' does not exist"),
    "VolumeId": ("InvalidVolume.NotFound", "The volume '{}' does not exist."),
    "KeyPairId": ("InvalidKeyPair.NotFound", "The key pair '{}' does not exist"),
    "KeyName": ("InvalidKeyPair.NotFound", "The key pair '{}' does not exist"),
}


class State(NamedTuple):
    filter_name: str
    path: str


STATES = {"DescribeImages": State("state", "imageState"), "DescribeSnapshots": State("status", "status")}
MAKES_IMAGE = frozenset({"CreateImage", "CopyImage"})
NUMBERED = re.compile(r"\.\d+$")
SECOND_DEVICE = "/dev/sdb"

Handle = tuple[str, str]  # a parameter's name and the value that names a resource in it


@dataclass
class MadeImage:
    """An AMI made through the proxy. `available_at` is on the monotonic clock, infinite while held."""

    snapshot_ids: tuple[str, ...]
    second_snapshot_id: str | None
    available_at: float
    is_mapped_while_pending: bool

    def is_pending(self) -> bool:
        return time.monotonic() < self.available_at


class ResourceLag:
    """What EC2's answers say about resources, and when. All methods may be called from any thread."""

    def __init__(self) -> None:
        # One call of EC2 at a time: nobody may see an AMI before it has been noted that it's pending.
        self._turn = threading.RLock()
        self._late_seconds = 0.0
        self._hidden_seconds = 0.0
        self._shown_kinds: frozenset[str] = frozenset()
        self._is_mapped_while_pending = True
        self._has_second_snapshot = False
        self._visible_at: dict[Handle, float] = {}
        self._images: dict[str, MadeImage] = {}
        self._answers: dict[tuple[str, str, str], tuple[Mapping[str, str], Reply]] = {}

    # For tests

    def late_available(self, seconds: float, *, mapped: bool = True) -> None:
        """AMIs made from now on are `pending` for `seconds`, and so are their snapshots.

        Without `mapped`, their block device mapping is empty as long as they are.
        """
        with self._turn:
            self._late_seconds = seconds
            self._is_mapped_while_pending = mapped

    def hold_available(self, *, mapped: bool = True) -> None:
        """AMIs made from now on are `pending` until `release()`."""
        self.late_available(math.inf, mapped=mapped)

    def release(self) -> None:
        """Pending AMIs become available now, and later ones at once."""
        with self._turn:
            self.late_available(0.0)
            for image in self._images.values():
                image.available_at = time.monotonic()

    def hide_fresh(self, seconds: float, *, but: frozenset[str] = frozenset()) -> None:
        """Hide instances, AMIs, snapshots, volumes, security groups and key pairs made from now on for `seconds`; not
        the kinds in `but`, by the parameter that names one (`VolumeId`).

        They are missing from the lists of Describe*; asked for by id or name, it says that they don't exist.
        """
        with self._turn:
            self._hidden_seconds, self._shown_kinds = seconds, but

    def show_fresh(self) -> None:
        """What is hidden can be seen from now on, and what is made later at once."""
        with self._turn:
            self.hide_fresh(0.0)
            self._visible_at.clear()

    def second_snapshot(self, *, enabled: bool = True) -> None:
        """AMIs made from now on have a second EBS volume, and so a second snapshot."""
        with self._turn:
            self._has_second_snapshot = enabled

    # For the proxy

    def execute(self, request: Request, upstream: Upstream) -> Reply:
        """Have the request executed, unless a rule of EC2 refuses it, and tell its answer as EC2 would now.

        Raises OSError or http.client.HTTPException when the simulated EC2 doesn't answer.
        """
        if not request.is_ec2:
            return upstream.send(request)
        with self._turn:
            backend = Backend(upstream, request)
            told = self._earlier_answer(request) or self._not_found(request)
            return told or self._conflict(request, backend) or self._executed(request, backend)

    def _executed(self, request: Request, backend: Backend) -> Reply:
        asked, states = self._without_state_filter(request)
        reply = backend.upstream.send(asked)
        if reply.is_success:
            self._keep_answer(request, reply)
            if request.action in CREATED:
                self._remember(request, Document(reply.body), backend)
            elif request.action in LISTED:
                return self._as_seen_now(request.action, reply, states)
        return reply

    # Refusals

    def _earlier_answer(self, request: Request) -> Reply | None:
        kept = self._answers.get(_token_key(request))
        if kept is None:
            return None
        params, reply = kept
        if params == request.params:
            return replace(reply, fault="client_token")
        message = "Arguments on this idempotent request are inconsistent with arguments used before."
        return error_reply("IdempotentParameterMismatch", message, 400, "client_token")

    def _keep_answer(self, request: Request, reply: Reply) -> None:
        if request.params.get("ClientToken"):
            self._answers[_token_key(request)] = (request.params, reply)

    def _not_found(self, request: Request) -> Reply | None:
        if not request.action.startswith("Describe"):
            return None
        asked = [(NUMBERED.sub("", name), value) for name, value in request.params.items()]
        for param, value in self._hidden().intersection(asked):
            code, message = NOT_FOUND[param]
            return error_reply(code, message.format(value), 400, "hide_fresh")
        return None

    def _conflict(self, request: Request, backend: Backend) -> Reply | None:
        if request.action == "CreateImage":
            return _name_conflict(request.params.get("Name", ""), backend)
        if request.action == "DeleteSnapshot":
            return self._use_of(request.params.get("SnapshotId", ""), backend)
        return None

    def _use_of(self, snapshot_id: str, backend: Backend) -> Reply | None:
        """Refuses to delete a second snapshot while its AMI is registered, as moto does for the first."""
        for image_id, image in self._images.items():
            if image.second_snapshot_id == snapshot_id and backend.is_registered(image_id):
                message = f"The snapshot {snapshot_id} is currently in use by {image_id}"
                return error_reply("InvalidSnapshot.InUse", message, 400, "second_snapshot")
        return None

    # What was made

    def _remember(self, request: Request, reply: Document, backend: Backend) -> None:
        handles = [(param, value) for path, param in CREATED[request.action] for value in reply.texts(path)]
        if request.action == "CreateSecurityGroup":
            handles.append(("GroupName", request.params.get("GroupName", "")))
        self._hide(handles)
        if request.action in MAKES_IMAGE:
            self._remember_image(reply.texts("imageId")[0], backend)

    def _remember_image(self, image_id: str, backend: Backend) -> None:
        if not (self._late_seconds or self._hidden_seconds or self._has_second_snapshot):
            return
        first = backend.snapshot_ids_of(image_id)
        second = [backend.add_snapshot_like(first[0])] if self._has_second_snapshot else []
        self._images[image_id] = MadeImage(
            snapshot_ids=(*first, *second),
            second_snapshot_id=next(iter(second), None),
            available_at=time.monotonic() + self._late_seconds,
            is_mapped_while_pending=self._is_mapped_while_pending,
        )
        self._hide([("SnapshotId", snapshot_id) for snapshot_id in (*first, *second)])

    def _hide(self, handles: list[Handle]) -> None:
        if self._hidden_seconds:
            hidden = [handle for handle in handles if handle[0] not in self._shown_kinds]
            self._visible_at |= dict.fromkeys(hidden, time.monotonic() + self._hidden_seconds)

    def _hidden(self) -> set[Handle]:
        now = time.monotonic()
        return {handle for handle, visible_at in self._visible_at.items() if now < visible_at}

    # What is seen

    def _without_state_filter(self, request: Request) -> tuple[Request, list[str] | None]:
        """The request without its filter by state, of which moto knows nothing, and that filter's values."""
        if request.action not in STATES or not self._images:
            return request, None
        params, values = without_filter(dict(request.params), STATES[request.action].filter_name)
        return (request, None) if values is None else (request.asking(params), values)

    def _as_seen_now(self, action: str, reply: Reply, states: list[str] | None) -> Reply:
        hidden_ids = {value for _, value in self._hidden()}
        if not hidden_ids and not (action in STATES and self._images):
            return reply
        document = Document(reply.body)
        if action == "DescribeImages":
            self._show_images(document)
        elif action == "DescribeSnapshots":
            self._show_snapshots(document)
        list_name, id_name = LISTED[action]
        if any(item.text(id_name) in hidden_ids for item in document.items(list_name)):
            reply = replace(reply, fault="hide_fresh")
        document.remove_items(list_name, lambda item: item.text(id_name) in hidden_ids)
        if states is not None:
            path = STATES[action].path
            document.remove_items(list_name, lambda item: not matches(item.text(path), states))
        if action == "DescribeInstances":
            document.remove_items("reservationSet", lambda item: item.is_empty("instancesSet"))
        return reply.with_body(document.to_bytes())

    def _show_images(self, document: Document) -> None:
        for item in document.items("imagesSet"):
            image = self._images.get(item.text("imageId"))
            if image is not None:
                _show_image(item, image)

    def _show_snapshots(self, document: Document) -> None:
        pending = {one for image in self._images.values() if image.is_pending() for one in image.snapshot_ids}
        for item in document.items("snapshotSet"):
            if item.text("snapshotId") in pending:
                item.set_text("status", "pending")
                item.set_text("progress", "40%")


def _show_image(item: Item, image: MadeImage) -> None:
    if image.second_snapshot_id:
        changes = {"deviceName": SECOND_DEVICE, "ebs/snapshotId": image.second_snapshot_id}
        item.append_copy("blockDeviceMapping", changes)
    if image.is_pending():
        item.set_text("imageState", "pending")
        if not image.is_mapped_while_pending:
            item.clear("blockDeviceMapping")


def _name_conflict(name: str, backend: Backend) -> Reply | None:
    image_id = backend.image_named(name)
    if image_id is None:
        return None
    message = f"AMI name {name} is already in use by AMI {image_id}"
    return error_reply("InvalidAMIName.Duplicate", message, 400, "unique_name")


def _token_key(request: Request) -> tuple[str, str, str]:
    return request.region, request.action, request.params.get("ClientToken", "")
