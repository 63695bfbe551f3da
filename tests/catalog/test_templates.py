"""Images of organizations (templates): their status, pages of them, and their end."""

from datetime import timedelta

import pytest

from kiln.catalog import builds, images, numbered_pages, templates
from kiln.catalog.builds import BuildFilter
from kiln.catalog.images import ImageFilter
from kiln.catalog.ledger import CatalogLedger
from kiln.catalog.session import Catalog
from kiln.errors import NotFoundError
from kiln.models import Api, ClientCode, ImageRef
from support.machine_rows import (
    add_machine,
    add_template,
    assign,
    bring,
    create_machine,
    delete,
    image_of,
    make_image,
    refused,
    rewrite_machine,
    start,
    template_of,
)
from support.rows import add_organization, build_row, request_cancel, rewrite

HUGE = 2**63
# What is searched for, and the names that have it.
FOUND = {
    "%": ["100%_off"],
    "_": ["100%_off"],
    "😀": ["Blender 😀"],
    "bLENDER": ["Blender 😀"],
    "STRASSE": ["Straße"],
    "ß": ["Straße"],
    "é": ["cafe\u0301"],
    "a": ["cafe\u0301", "Straße"],
    "\\": [],
}


def page(catalog: Catalog, organization: str, q: str = "", number: int = 1, size: int = 20) -> tuple[list[int], int]:
    with catalog.read() as session:
        found, total = templates.page(session, organization, q, number, size)
    return [known.template.id for known in found], total


class TestStatus:
    @pytest.mark.parametrize("status", ["pending", "building", "available", "failed"])
    def test_it_is_its_builds(self, catalog: Catalog, organization: str, status: str) -> None:
        """A template is what has become of the build that makes it."""
        template = add_template(catalog, organization, status)
        assert template_of(catalog, organization, template).status == status

    def test_one_whose_ami_is_gone_has_failed(self, catalog: Catalog, organization: str) -> None:
        """Nothing can be launched from an AMI that is no longer in EC2, and the template's time says since when."""
        template = template_of(catalog, organization, add_template(catalog, organization, "gone"))
        assert template.status == "failed"
        assert template.image is not None
        assert template.updated_at == template.image.gone_at

    def test_a_lost_attempt_makes_it_pending_again(
        self, ledger: CatalogLedger, catalog: Catalog, organization: str
    ) -> None:
        """While its build waits for another attempt, a template is pending."""
        template = template_of(catalog, organization, add_template(catalog, organization, "building"))
        rewrite(catalog, template.build.id, lease_until=template.build.created_at)
        ledger.requeue_lapsed()
        assert template_of(catalog, organization, template.template.id).status == "pending"

    def test_a_cancelled_build_is_building_until_its_end(self, catalog: Catalog, organization: str) -> None:
        """The contract has no word for a build that is being cancelled."""
        template = template_of(catalog, organization, add_template(catalog, organization, "building"))
        request_cancel(catalog, template.build.id)
        assert template_of(catalog, organization, template.template.id).status == "building"

    def test_a_name_is_made_up_of_the_id(self, catalog: Catalog, organization: str) -> None:
        """Without a name of its own, a template has a number."""
        template = add_template(catalog, organization)
        assert template_of(catalog, organization, template).template.name == f"Template #{template}"

    def test_another_organizations_is_not_found(self, catalog: Catalog, organization: str) -> None:
        """Templates are their organization's own, and no id is too large to ask for."""
        template = add_template(catalog, add_organization(catalog))
        with catalog.read() as session:
            assert [templates.find(session, organization, number) for number in (template, HUGE, 0)] == [None] * 3


class TestPages:
    def test_every_page_is_a_slice_of_the_whole(
        self, catalog: Catalog, organization: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Whichever way a page is read, it is the newest templates in order, with the exact total."""
        whole = [add_template(catalog, organization, "pending") for _ in range(9)][::-1]
        for at_once in (1, 4, 500):
            monkeypatch.setattr(numbered_pages, "READ_AT_ONCE", at_once)
            for size in (1, 2, 4, 20):
                for number in range(1, 11):
                    shown = whole[(number - 1) * size : number * size]
                    assert page(catalog, organization, "", number, size) == (shown, 9), (at_once, size, number)

    def test_a_name_is_found_by_its_parts(self, catalog: Catalog, organization: str) -> None:
        """What is searched for means itself, in any case and however it is written."""
        there = {
            add_template(catalog, organization, "pending", name=name): name
            for name in ("100%_off", "Blender 😀", "Straße", "cafe\u0301")
        }
        for q, names in FOUND.items():
            ids, total = page(catalog, organization, q)
            assert ([there[number] for number in ids], total) == (names, len(names)), q

    def test_what_is_deleted_or_anothers_is_not_counted(self, catalog: Catalog, organization: str) -> None:
        """A page holds the organization's own templates, less the deleted ones."""
        mine, deleted = (add_template(catalog, organization) for _ in range(2))
        add_template(catalog, add_organization(catalog))
        delete(catalog, organization, deleted)
        assert page(catalog, organization) == page(catalog, organization, "template") == ([mine], 1)


class TestDeletion:
    def test_a_pending_ones_build_is_cancelled(self, catalog: Catalog, organization: str) -> None:
        """A template that waits for its build goes, and its build with it."""
        build = template_of(catalog, organization, template := add_template(catalog, organization, "pending")).build
        deleted = delete(catalog, organization, template)
        assert (deleted.build_to_cancel, deleted.image) == (build.id, None)
        assert build_row(catalog, build.id).status == "cancelled"
        assert page(catalog, organization) == ([], 0)

    def test_an_available_ones_ami_is_being_deleted(
        self, ledger: CatalogLedger, catalog: Catalog, organization: str
    ) -> None:
        """The deletion of the AMI is written with the template's, so that the house-keeping comes to it in any case."""
        template = add_template(catalog, organization)
        image = image_of(catalog, template_of(catalog, organization, template).build.id)
        ref = ImageRef(image_id=image.id, organization_id=organization)
        assert delete(catalog, organization, template).image == ref
        assert ledger.stuck_deletions(timedelta(0)) == [ref]

    def test_a_failed_one_leaves_nothing_to_do(self, catalog: Catalog, organization: str) -> None:
        """A template that never had an AMI is only taken off the list."""
        template = add_template(catalog, organization, "failed")
        deleted = delete(catalog, organization, template)
        assert (deleted.build_to_cancel, deleted.image) == (None, None)
        assert page(catalog, organization) == ([], 0)

    def test_a_gone_ami_leaves_its_snapshots_to_delete(
        self, ledger: CatalogLedger, catalog: Catalog, organization: str
    ) -> None:
        """Somebody who deregisters an AMI leaves its snapshots, and they go with the template."""
        template = add_template(catalog, organization, "gone")
        image = image_of(catalog, template_of(catalog, organization, template).build.id)
        ref = delete(catalog, organization, template).image
        assert ref == ImageRef(image_id=image.id, organization_id=organization)
        doomed = ledger.doomed(image.id)
        assert doomed is not None
        assert doomed.snapshot_ids == tuple(image.snapshot_ids)

    def test_one_that_is_building_stays(self, catalog: Catalog, organization: str) -> None:
        """A template that is being built cannot be deleted."""
        template = add_template(catalog, organization, "building")
        with refused(ClientCode.IMAGE_BUILDING):
            delete(catalog, organization, template)
        assert page(catalog, organization) == ([template], 1)

    def test_an_awaited_one_stays(self, catalog: Catalog, organization: str) -> None:
        """A template from which a machine is to be recreated is kept, and the refusal names the machine."""
        template, machine = add_template(catalog, organization), add_machine(catalog, organization, name="Ada's desk")
        assign(catalog, organization, template, machine)
        with refused(None, match="Ada's desk"):
            delete(catalog, organization, template)

    def test_one_that_is_launched_from_stays(self, catalog: Catalog, organization: str) -> None:
        """A template from which a machine is being recreated is kept, whatever is assigned to it meanwhile."""
        launching, other = (add_template(catalog, organization) for _ in range(2))
        machine = add_machine(catalog, organization)
        assign(catalog, organization, launching, machine)
        start(catalog, organization, machine)
        assign(catalog, organization, other, machine)
        with refused(None):
            delete(catalog, organization, launching)

    def test_one_that_a_machine_was_made_from_goes(self, catalog: Catalog, organization: str) -> None:
        """Once its machine runs, a template is needed no longer."""
        template = add_template(catalog, organization)
        created = create_machine(catalog, organization, template_id=template)
        rewrite_machine(catalog, created.machine_id, operation=None, launching_template_id=None, built_assignment=1)
        assert delete(catalog, organization, template).image is not None

    def test_it_is_deleted_once(self, catalog: Catalog, organization: str) -> None:
        """What is deleted, or another organization's, is not there to be deleted."""
        template, others = add_template(catalog, organization), add_template(catalog, add_organization(catalog))
        delete(catalog, organization, template)
        for number in (template, others, HUGE):
            with pytest.raises(NotFoundError):
                delete(catalog, organization, number)


def test_a_snapshot_is_a_build_like_any_other(ledger: CatalogLedger, catalog: Catalog, organization: str) -> None:
    """The list of builds finds it by its kind and contract, and EC2 is asked after its AMI; machine-images has nothing to
    do with it."""
    known = make_image(catalog, organization, add_machine(catalog, organization))
    bring(catalog, known.build.id, "available")
    image = image_of(catalog, known.build.id)
    with catalog.read() as session:
        wanted = BuildFilter(organization, apis=["organization-images"], kinds=["snapshot"], images=[image.reference])
        assert [found.build.id for found in builds.page(session, wanted, 10, None)] == [known.build.id]
        machine_images = ImageFilter(organization, Api.MACHINE_IMAGES)
        assert images.listing(session, machine_images, image.created_at) == []
    assert [living.reference for living in ledger.living_images()] == [image.reference]
