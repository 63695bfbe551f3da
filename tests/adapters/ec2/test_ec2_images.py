"""Reading AMIs: one, those of a build, and those of a list, completely."""

from datetime import UTC, datetime, timedelta

import pytest

from kiln.adapters.ec2 import CloudRefusedError, Ec2Cloud
from kiln.naming import BUILD_TAG
from kiln.ports import Ami
from support.ec2_editing import EditingProxy
from support.ec2_message import Reply, Request
from support.ec2_things import MOTO_IMAGE_ID, BuildThings
from support.ec2_xml import Document
from support.moto import REGION, ec2_client

FILTER_VALUES_LIMIT = 200
UNKNOWN_IMAGE_ID = "ami-00000000000000000"


def found_ids(images: list[Ami]) -> set[str]:
    return {image.image_id for image in images}


def another_build_of(things: BuildThings, installation: str | None = None) -> BuildThings:
    return BuildThings(things.ec2, installation or things.installation)


def test_an_image_is_read_as_ec2_has_it(cloud: Ec2Cloud, things: BuildThings) -> None:
    """Name, state, time, tags, snapshots, size and architecture come from DescribeImages."""
    image_id = things.image(things.instance())

    image = cloud.image(REGION, image_id)

    assert image is not None
    assert image.name.endswith(f"{things.build_id}-1")
    assert (image.image_id, image.state, image.tags) == (image_id, "available", things.tags)
    assert list(image.snapshot_ids) == things.snapshots_of(image_id)
    assert (image.size_gib, image.architecture, image.state_reason) == (15, "x86_64", None)
    assert abs(datetime.now(UTC) - image.created_at) < timedelta(minutes=5)


@pytest.mark.parametrize("image_id", [UNKNOWN_IMAGE_ID, MOTO_IMAGE_ID])
def test_an_image_that_is_not_the_accounts_is_none(cloud: Ec2Cloud, image_id: str) -> None:
    """An AMI that EC2 doesn't have, or that is Amazon's, is not the account's own."""
    assert cloud.image(REGION, image_id) is None


def test_a_pending_image_is_read_without_snapshots(cloud: Ec2Cloud, things: BuildThings, proxy: EditingProxy) -> None:
    """A pending AMI has its state, and no snapshots as long as EC2 doesn't name them."""
    proxy.hold_available(mapped=False)
    image_id = BuildThings(ec2_client(proxy.url), build_id=things.build_id).image(things.instance(), tagged=False)

    image = cloud.image(REGION, image_id)

    assert image is not None
    assert (image.state, image.snapshot_ids, image.size_gib) == ("pending", (), 0)


def test_both_snapshots_of_an_image_are_read(cloud: Ec2Cloud, things: BuildThings, proxy: EditingProxy) -> None:
    """An AMI of two volumes has two snapshots and the size of both."""
    proxy.second_snapshot()
    image_id = BuildThings(ec2_client(proxy.url)).image(things.instance(), tagged=False)

    image = cloud.image(REGION, image_id)

    assert image is not None
    assert (len(set(image.snapshot_ids)), image.size_gib) == (2, 30)


def test_a_tagged_image_of_another_name_is_the_builds(cloud: Ec2Cloud, things: BuildThings) -> None:
    """An operator's template may name AMIs as it likes: the tag tells."""
    image_id = things.image(things.instance(), name="golden")

    assert found_ids(cloud.images_of_build(REGION, things.marks())) == {image_id}


def test_an_untagged_image_is_found_by_its_name(cloud: Ec2Cloud, things: BuildThings) -> None:
    """An AMI that Packer had no time to tag is the build's by the end of its name."""
    image_id = things.image(things.instance(tagged=False), tagged=False)

    assert found_ids(cloud.images_of_build(REGION, things.marks())) == {image_id}


def test_an_untagged_image_is_found_by_its_instance(cloud: Ec2Cloud, things: BuildThings) -> None:
    """An AMI of the operator's own name, which nothing has tagged, is the build's if its instance is."""
    image_id = things.image(things.instance(), tagged=False, name="golden-by-instance")

    assert found_ids(cloud.images_of_build(REGION, things.marks())) == {image_id}


def test_an_untagged_image_is_found_by_an_instance_of_the_log(cloud: Ec2Cloud, things: BuildThings) -> None:
    """The instance may be known from the log alone."""
    instance_id = things.instance(tagged=False)
    image_id = things.image(instance_id, tagged=False, name="golden-by-log")

    assert found_ids(cloud.images_of_build(REGION, things.marks(instance_id))) == {image_id}


def test_an_image_that_only_the_log_knows_is_the_builds(cloud: Ec2Cloud, things: BuildThings) -> None:
    """An AMI without name, tag or instance of the build is the build's if the log names it."""
    image_id = things.ec2.register_image(Name="registered")["ImageId"]

    assert found_ids(cloud.images_of_build(REGION, things.marks(image_id))) == {image_id}


def test_the_source_image_is_not_the_builds(cloud: Ec2Cloud, things: BuildThings) -> None:
    """A log names the source AMI too. Even if it is the account's own, the build has not made it."""
    made = things.image(things.instance(tagged=False), tagged=False, name="base-of-a-machine")
    registered = things.ec2.register_image(Name="base")["ImageId"]
    things.instance(image_id=made)
    things.instance(image_id=registered)

    assert cloud.images_of_build(REGION, things.marks(made, registered)) == []


def test_images_of_others_are_not_the_builds(cloud: Ec2Cloud, things: BuildThings) -> None:
    """AMIs of another build, another installation, or nobody stay out, even where a log names them."""
    other = another_build_of(things)
    stranger = another_build_of(things, installation="installation-2")
    others = [other.image(other.instance()), stranger.image(stranger.instance())]
    namesake = stranger.image(stranger.instance(), name=f"kiln-{things.build_id}-1")
    half_tagged = other.image(other.instance(), tagged=False, name=f"kiln-{things.build_id}-2")
    things.ec2.create_tags(Resources=[half_tagged], Tags=[{"Key": BUILD_TAG, "Value": other.build_id}])

    assert cloud.images_of_build(REGION, things.marks(*others, namesake, half_tagged)) == []


def test_images_of_a_build_come_newest_first(cloud: Ec2Cloud, things: BuildThings, proxy: EditingProxy) -> None:
    """Of two attempts' AMIs, the later one comes first."""
    instance_id = things.instance()
    images = [things.image(instance_id, name=f"golden-{things.build_id}-{attempt}") for attempt in (1, 2)]
    ages = dict(zip(images, ("2026-01-02T00:00:00.000Z", "2026-01-01T23:59:59.000Z"), strict=True))

    def date(_: Request, reply: Reply) -> Reply:
        document = Document(reply.body)
        for item in document.items("imagesSet"):
            item.set_text("creationDate", ages[item.text("imageId")])
        return reply.with_body(document.to_bytes())

    proxy.edit("DescribeImages", date)

    assert [image.image_id for image in cloud.images_of_build(REGION, things.marks())] == images


def test_many_images_are_asked_for_in_pieces(cloud: Ec2Cloud, things: BuildThings, proxy: EditingProxy) -> None:
    """Of 450 ids EC2 has two; EC2 is asked for no more than 200 at once."""
    instance_id = things.instance()
    own = {things.image(instance_id, name=f"own-{things.build_id}-{number}") for number in (1, 2)}
    wanted = own | {f"ami-{number:017x}" for number in range(448)}

    images = cloud.own_images(REGION, wanted)

    asked = [sum(".Value." in name for name in call.params) for call in proxy.calls_of("DescribeImages")]
    assert images.keys() == own
    assert sum(asked) == len(wanted)
    assert max(asked) <= FILTER_VALUES_LIMIT


def test_a_listing_that_breaks_off_is_no_listing(cloud: Ec2Cloud, proxy: EditingProxy) -> None:
    """If EC2 refuses the second piece, the first one's answer is not passed off as the whole."""
    wanted = {f"ami-{number:017x}" for number in range(250)}

    def refuse_the_next(_: Request, reply: Reply) -> Reply:
        proxy.fail("DescribeImages", "UnauthorizedOperation", "You are not authorized.", 403)
        return reply

    proxy.edit("DescribeImages", refuse_the_next)

    with pytest.raises(CloudRefusedError):
        cloud.own_images(REGION, wanted)


def test_every_page_is_read(cloud: Ec2Cloud, things: BuildThings, proxy: EditingProxy) -> None:
    """Where EC2 answers in pages, the AMIs of all of them are in the answer."""
    instance_id = things.instance()
    own = sorted(things.image(instance_id, name=f"paged-{things.build_id}-{number}") for number in (1, 2))

    def page(request: Request, reply: Reply) -> Reply:
        first = "NextToken" not in request.params
        document = Document(reply.body)
        document.remove_items("imagesSet", lambda item: item.text("imageId") != own[0 if first else 1])
        body = document.to_bytes()
        end = b"</DescribeImagesResponse>"
        return reply.with_body(body.replace(end, b"<nextToken>2</nextToken>" + end) if first else body)

    proxy.edit("DescribeImages", page)

    assert sorted(cloud.own_images(REGION, own)) == own


def test_a_deregistered_image_is_not_there(cloud: Ec2Cloud, things: BuildThings, proxy: EditingProxy) -> None:
    """An AMI that EC2 still lists as deregistered is left out."""
    image_id = things.image(things.instance())
    proxy.set_text("DescribeImages", "imagesSet", {"imageState": "deregistered"})

    assert cloud.own_images(REGION, [image_id]) == {}


def test_a_disabled_image_is_still_there(cloud: Ec2Cloud, proxy: EditingProxy) -> None:
    """EC2 hides disabled AMIs unless it is asked for them, and they are no less there."""
    cloud.own_images(REGION, [UNKNOWN_IMAGE_ID])

    assert [call.params["IncludeDisabled"] for call in proxy.calls] == ["true"]


def test_no_ids_are_no_call(cloud: Ec2Cloud, proxy: EditingProxy) -> None:
    """Without a filter's values EC2 would list everything."""
    assert cloud.own_images(REGION, []) == {}
    assert proxy.calls == ()
