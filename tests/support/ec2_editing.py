"""The EC2 proxy, with what single tests need besides: changed answers, requests to look at, and a filter of EC2's."""

from collections.abc import Callable, Mapping

from support.ec2_faults import Call
from support.ec2_message import Reply, Request
from support.ec2_proxy import Ec2Proxy
from support.ec2_xml import Document, matches, without_filter

SNAPSHOT_FILTER = "block-device-mapping.snapshot-id"
SNAPSHOT_PATH = "blockDeviceMapping/item/ebs/snapshotId"

Edit = Callable[[Request, Reply], Reply]


class EditingProxy(Ec2Proxy):
    """`requests` and `calls` are those since `start_over`. Knows the filter by an AMI's snapshot, as moto does not."""

    def __init__(self, upstream_url: str) -> None:
        super().__init__(upstream_url)
        self.requests: list[Request] = []
        self._edits: list[tuple[str, Edit]] = []
        self._earlier_calls = 0

    @property
    def calls(self) -> tuple[Call, ...]:
        return super().calls[self._earlier_calls :]

    def start_over(self) -> None:
        """Forgets what was set and what came, for the next test."""
        self.clear()
        self.release()
        self.hide_fresh(0)
        self.second_snapshot(enabled=False)
        self._edits.clear()
        self.requests.clear()
        self._earlier_calls = len(super().calls)

    def edit(self, action: str, change: Edit) -> None:
        """Passes successful answers to `action` through `change`, in the order of the calls of this method."""
        self._edits.append((action, change))

    def share_snapshot(self, snapshot_id: str, image_id: str) -> None:
        """Shows the AMI as made of this snapshot, as RegisterImage would make it."""

        def change(_: Request, reply: Reply) -> Reply:
            document = Document(reply.body)
            for item in document.items("imagesSet"):
                if item.text("imageId") == image_id:
                    item.set_text(SNAPSHOT_PATH, snapshot_id)
            return reply.with_body(document.to_bytes())

        self.edit("DescribeImages", change)

    def set_text(self, action: str, list_name: str, texts: Mapping[str, str]) -> None:
        """Changes texts in every item of a list of the answers to `action`."""

        def change(_: Request, reply: Reply) -> Reply:
            document = Document(reply.body)
            for item in document.items(list_name):
                for path, text in texts.items():
                    item.set_text(path, text)
            return reply.with_body(document.to_bytes())

        self.edit(action, change)

    def hide(self, action: str, list_name: str, path: str, text: str) -> None:
        """Leaves the items out of a list whose text at `path` is this one."""

        def change(_: Request, reply: Reply) -> Reply:
            document = Document(reply.body)
            document.remove_items(list_name, lambda item: item.text(path) == text)
            return reply.with_body(document.to_bytes())

        self.edit(action, change)

    def remove_all(self, action: str, list_name: str) -> None:
        """Empties a list of the answers to `action`."""

        def change(_: Request, reply: Reply) -> Reply:
            document = Document(reply.body)
            document.remove_items(list_name, lambda _item: True)
            return reply.with_body(document.to_bytes())

        self.edit(action, change)

    def requests_with_filter(self, name: str) -> list[Request]:
        return [request for request in self.requests if without_filter(dict(request.params), name)[1] is not None]

    def headers_of(self, name: str) -> list[str]:
        """All values of a header, of all requests."""
        return [value for each in self.requests for key, value in each.headers if key.lower() == name.lower()]

    def answer(self, request: Request) -> Reply | None:
        self.requests.append(request)
        params, wanted = without_filter(dict(request.params), SNAPSHOT_FILTER)
        reply = super().answer(request if wanted is None else request.asking(params))
        if reply is None or not reply.is_success:
            return reply
        for action, change in self._edits:
            if action == request.action:
                reply = change(request, reply)
        return reply if wanted is None else _with_snapshots(reply, wanted)


def _with_snapshots(reply: Reply, wanted: list[str]) -> Reply:
    document = Document(reply.body)
    document.remove_items("imagesSet", lambda item: not matches(item.text(SNAPSHOT_PATH), wanted))
    return reply.with_body(document.to_bytes())
