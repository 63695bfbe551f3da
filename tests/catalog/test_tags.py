"""Tags of container images: claimed, published, renamed and removed."""

from functools import partial

import pytest
from sqlalchemy import select

from kiln.catalog import attempts, builds, images, tags
from kiln.catalog.builds import BuildFilter
from kiln.catalog.session import AlreadyThereError, Catalog
from kiln.catalog.tables import Build, Image
from kiln.catalog.tags import DestinationExistsError, TagFilter
from kiln.errors import ImageBuildingError, ImageNotFoundError
from kiln.models import BuildEnd, BuildStatus, OwnerType, Target, Visibility
from support.container_rows import (
    HOST,
    add_container,
    begin,
    begin_publication,
    image_facts,
    known_tag,
    new_container,
    new_digest,
    public,
    publish,
    published,
    register,
    tag_row,
    target,
)
from support.parallel import Pending, in_parallel
from support.rows import add_organization

PLATFORM = {"owner": "platform", "owner_type": OwnerType.PLATFORM}


@pytest.fixture
def organization(catalog: Catalog) -> str:
    return add_organization(catalog, "acme")


def rename(catalog: Catalog, to: Target, **changes: str) -> None:
    with catalog.transaction() as tx:
        tag = tags.find(tx, to.owner, to.name, to.tag)
        assert tag is not None
        new = to.model_copy(update=changes)
        tags.retag(tx, tag.tag, new.owner_type, new.owner, tag.tag.organization_id, new.name, new.tag, new.visibility)


def remove(catalog: Catalog, to: Target) -> None:
    with catalog.transaction() as tx:
        row = tags.find(tx, to.owner, to.name, to.tag)
        assert row is not None
        tags.remove(tx, row.tag)


def fail(catalog: Catalog, build_id: str) -> None:
    with catalog.transaction() as tx:
        attempts.finish(tx, build_id, BuildEnd(status=BuildStatus.FAILED))


def names(catalog: Catalog, wanted: TagFilter, offset: int = 0, limit: int = 50) -> list[str]:
    with catalog.read() as session:
        rows, _ = tags.page(session, wanted, offset, limit)
    return [f"{row.tag.name}:{row.tag.tag}" for row in rows]


class TestClaim:
    def test_a_new_tag_is_private(self, catalog: Catalog, organization: str) -> None:
        """A tag is there from the submission on, and points at nothing yet."""
        build = add_container(catalog, organization)
        row = known_tag(catalog, target())
        assert (row.tag.build_id, row.build.id, row.image, row.tag.digest) == (build, build, None, None)
        assert (row.tag.organization_id, row.tag.visibility) == (organization, "PRIVATE")

    def test_a_platform_tag_is_public_and_nobodys(self, catalog: Catalog, organization: str) -> None:
        """A platform image belongs to no organization, whoever built it."""
        add_container(catalog, organization, target(**PLATFORM))
        row = known_tag(catalog, target(**PLATFORM))
        assert (row.tag.organization_id, row.tag.visibility) == (None, "PUBLIC")

    def test_a_later_build_becomes_the_tags_newest(self, catalog: Catalog, organization: str) -> None:
        """The tag shows its newest build, still pointing at what an earlier one published, with its own visibility."""
        image = published(catalog, organization, target())
        later = add_container(catalog, organization, public())
        row = known_tag(catalog, target())
        assert (row.tag.build_id, row.tag.image_id, row.tag.visibility) == (later, image.id, "PRIVATE")

    def test_many_that_claim_a_new_tag_at_once_make_one(self, catalog: Catalog, organization: str) -> None:
        """Whoever is too late is told that the tag is there now, and finds it at the next try."""

        def submit() -> str:
            try:
                return add_container(catalog, organization)
            except AlreadyThereError:
                return add_container(catalog, organization)

        made = in_parallel([submit] * 4)
        with catalog.read() as session:
            newest = session.scalars(select(Build.id).order_by(Build.created_at.desc(), Build.id.desc())).first()
        assert len({build for build in made if isinstance(build, str)}) == 4
        assert known_tag(catalog, target()).tag.build_id == newest


class TestPublish:
    def test_the_tag_points_at_the_image(self, catalog: Catalog, organization: str) -> None:
        """A published tag has its image's digest, and the visibility that was asked for."""
        image = published(catalog, organization, public())
        row = known_tag(catalog, target())
        assert (row.tag.digest, row.tag.image_id, row.tag.visibility) == (image.digest, image.id, "PUBLIC")
        assert row.image is not None
        assert row.tag.pushed_at == row.image.created_at

    def test_no_visibility_keeps_the_tags_own(self, catalog: Catalog, organization: str) -> None:
        """A build that asks for none leaves a PUBLIC tag PUBLIC."""
        published(catalog, organization, public())
        published(catalog, organization, target())
        assert known_tag(catalog, target()).tag.visibility == "PUBLIC"

    def test_a_later_build_stays_the_newest(self, catalog: Catalog, organization: str) -> None:
        """A build that publishes after a later one was submitted moves the tag, and not the list."""
        first = add_container(catalog, organization)
        later = add_container(catalog, organization)
        image = publish(catalog, first, target())
        row = known_tag(catalog, target())
        assert (row.tag.build_id, row.tag.digest) == (later, image.digest)

    def test_a_registration_makes_no_tag(self, catalog: Catalog, organization: str) -> None:
        """A finished image has its build and its row; only what Kiln pushed can be listed, renamed or deleted."""
        facts = image_facts()
        build = register(catalog, organization, target(), facts)
        with catalog.read() as session:
            image, row = images.of_build(session, build), builds.get(session, build)
        assert tag_row(catalog, target()) is None
        assert image is not None
        assert row is not None
        assert (row.status, image.digest, image.reference) == (
            "succeeded",
            facts.digest,
            f"{HOST}/acme/app@{facts.digest}",
        )

    @pytest.mark.parametrize(
        ("asked", "before", "seen"),
        [
            (None, None, "PRIVATE"),
            (None, Visibility.PUBLIC, "PUBLIC"),
            (Visibility.PRIVATE, Visibility.PUBLIC, "PRIVATE"),
        ],
    )
    def test_an_answer_says_what_will_be(
        self, catalog: Catalog, organization: str, asked: Visibility | None, before: Visibility | None, seen: str
    ) -> None:
        """Nobody is answered `INHERIT`: a tag's own visibility stands where none is asked."""
        if before is not None:
            published(catalog, organization, target(visibility=before))
        with catalog.read() as session:
            assert tags.resolved_visibility(session, target(visibility=asked)) == seen


class TestRename:
    def test_the_image_follows(self, catalog: Catalog, organization: str) -> None:
        """A renamed tag is found under its new name only, and its image's reference names where it is now."""
        image = published(catalog, organization, target())
        rename(catalog, target(), owner=f"team-{organization}", owner_type=OwnerType.TEAM, name="tool", tag="v2")
        row = known_tag(catalog, target("tool", "v2", owner=f"team-{organization}"))
        assert tag_row(catalog, target()) is None
        assert row.image is not None
        assert row.image.reference == f"{HOST}/team-{organization}/tool@{image.digest}"

    def test_only_the_visibility(self, catalog: Catalog, organization: str) -> None:
        """A tag can be opened to everybody, also while its next build is running."""
        published(catalog, organization, target())
        add_container(catalog, organization)
        rename(catalog, public())
        assert known_tag(catalog, target()).tag.visibility == "PUBLIC"

    def test_a_taken_name_is_refused(self, catalog: Catalog, organization: str) -> None:
        """A tag does not replace another, and the transaction goes on."""
        published(catalog, organization, target())
        published(catalog, organization, target(tag="v2"))
        with catalog.transaction() as tx:
            tag = tags.find(tx, "acme", "app", "v1")
            assert tag is not None
            with pytest.raises(DestinationExistsError, match="acme/app:v2"):
                tags.retag(tx, tag.tag, OwnerType.PERSONAL, "acme", organization, "app", "v2")
            tags.retag(tx, tag.tag, OwnerType.PERSONAL, "acme", organization, "app", "v3")
        assert names(catalog, TagFilter(organization, OwnerType.PERSONAL, "acme")) == ["app:v2", "app:v3"]

    def test_a_name_taken_at_the_same_moment_is_refused(self, catalog: Catalog, organization: str) -> None:
        """A rename to a name that a submission takes meanwhile is refused once that commits."""
        published(catalog, organization, target())
        with catalog.transaction() as tx:
            build = builds.insert(tx, new_container(organization, target(tag="v2")))
            tags.claim(tx, build, target(tag="v2"))
            renaming = Pending(partial(rename, catalog, target(), tag="v2"))
            assert renaming.is_waiting()
        with pytest.raises(DestinationExistsError):
            renaming.result()

    def test_a_tag_that_is_being_built_keeps_its_name(self, catalog: Catalog, organization: str) -> None:
        """A build would publish under the old name."""
        published(catalog, organization, target())
        add_container(catalog, organization)
        with pytest.raises(ImageBuildingError):
            rename(catalog, target(), tag="v2")


class TestRemoval:
    def test_a_removed_tag_is_not_there(self, catalog: Catalog, organization: str) -> None:
        """The tag is off the list, and its image is deleted."""
        image = published(catalog, organization, target())
        remove(catalog, target())
        assert tag_row(catalog, target()) is None
        with catalog.read() as session:
            row = session.get_one(Image, image.id)
        assert (row.status, row.gone_at is None) == ("deleted", False)

    def test_an_image_that_another_tag_needs_stays(self, catalog: Catalog, organization: str) -> None:
        """The same manifest under two tags goes with the second."""
        digest = new_digest()
        first = published(catalog, organization, target(), digest)
        published(catalog, organization, target(tag="v2"), digest)
        with catalog.read() as session:
            assert tags.needed(session, "acme/app", digest) == ["v1", "v2"]
        remove(catalog, target())
        with catalog.read() as session:
            assert tags.needed(session, "acme/app", digest) == ["v2"]
            assert session.get_one(Image, first.id).status == "available"

    def test_a_failed_first_build_leaves_a_tag_to_remove(self, catalog: Catalog, organization: str) -> None:
        """A tag that never pointed at anything can be taken off the list."""
        fail(catalog, add_container(catalog, organization))
        remove(catalog, target())
        assert tag_row(catalog, target()) is None

    @pytest.mark.parametrize("stage", ["queued", "building", "publishing"])
    def test_a_tag_that_is_being_built_stays(self, catalog: Catalog, organization: str, stage: str) -> None:
        """Until its build has ended, nobody takes a tag away."""
        build = add_container(catalog, organization)
        if stage != "queued":
            begin(catalog, build)
        if stage == "publishing":
            begin_publication(catalog, build, target(), image_facts())
        with pytest.raises(ImageBuildingError):
            remove(catalog, target())

    def test_an_older_build_that_goes_on_keeps_it_too(self, catalog: Catalog, organization: str) -> None:
        """The newest build has failed, and one before it is still to publish the tag."""
        add_container(catalog, organization)
        fail(catalog, add_container(catalog, organization))
        with pytest.raises(ImageBuildingError):
            remove(catalog, target())

    def test_a_removal_waits_for_a_submission(self, catalog: Catalog, organization: str) -> None:
        """A build that is submitted while its tag is taken away keeps the tag."""
        published(catalog, organization, target())
        with catalog.transaction() as tx:
            tags.claim(tx, builds.insert(tx, new_container(organization, target())), target())
            removal = Pending(partial(remove, catalog, target()))
            assert removal.is_waiting()
        with pytest.raises(ImageBuildingError):
            removal.result()

    def test_a_submission_waits_for_the_removal(self, catalog: Catalog, organization: str) -> None:
        """A build that is submitted while its tag goes makes it anew."""
        published(catalog, organization, target())
        with catalog.transaction() as tx:
            row = tags.find(tx, "acme", "app", "v1")
            assert row is not None
            tags.remove(tx, row.tag)
            submission = Pending(partial(add_container, catalog, organization))
            assert submission.is_waiting()
        submitted = submission.result()
        assert known_tag(catalog, target()).tag.build_id == submitted

    def test_one_of_two_removals_is_told(self, catalog: Catalog, organization: str) -> None:
        """Whoever takes away what another took away at the same moment learns it."""
        published(catalog, organization, target())
        row = known_tag(catalog, target())

        def remove_it() -> None:
            with catalog.transaction() as tx:
                tags.remove(tx, row.tag)

        outcomes = in_parallel([remove_it] * 3)
        assert [type(outcome) for outcome in outcomes if outcome] == [ImageNotFoundError] * 2


def test_kilns_own_list_finds_a_build_by_its_image(catalog: Catalog, organization: str) -> None:
    """A digest, a reference with the digest, and a reference with the tag each find the build."""
    image = published(catalog, organization, target())
    published(catalog, organization, target("other"))
    for name in (image.digest, image.reference, f"{HOST}/acme/app:v1"):
        with catalog.read() as session:
            found = builds.page(session, BuildFilter(organization, images=[name or ""]), 50, None)
        assert [each.build.id for each in found] == [image.build_id]
    with catalog.read() as session:
        assert builds.page(session, BuildFilter(organization, images=["elsewhere/acme/app:v1"]), 50, None) == []
