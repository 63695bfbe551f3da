"""From machines to an image of one, and from the image to machines again: real Temporal and Packer, simulated EC2."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from support.organization_rig import OrganizationRig, running_organization_rig
from support.processes import eventually


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OrganizationRig]:
    with running_organization_rig(tmp_path_factory.mktemp("rig") / "home") as house:
        yield house


def test_machines_are_launched_imaged_and_recreated(house: OrganizationRig) -> None:
    """Launch, stop, image, wait, assign to three machines, start: three new instances of that AMI, and nothing else;
    then delete."""
    before = house.rig.account.snapshot_of_account()
    seat, *others = house.launch(quantity=4, name="desk", disk_size=40)
    old = {number: house.instance_of(number) for number in others}
    house.call("POST", f"/machines/{seat}/stop", {"gracefully": True})
    house.until(seat, "off")
    image_id = house.image_of(seat, name="desk template")
    build = house.rig.build(house.build_of(image_id))
    assert (build["kind"], build["api"], build["status"]) == ("snapshot", "organization-images", "succeeded")
    assert "is available" in house.rig.log(build["id"])
    for number in others:
        house.call("POST", f"/machines/{number}/stop", {"gracefully": False})
    for number in others:
        house.until(number, "off")
    house.call("POST", f"/images/{image_id}/assign", {"machine_ids": others})
    assert {house.machine(number)["friendly_status"] for number in others} == {"off"}
    for number in others:
        house.call("POST", f"/machines/{number}/start")
    for number in others:
        shown = house.until(number, "ready", seconds=60)
        assert (shown["assigned_image_id"], shown["assigned_image_name"]) == (image_id, "desk template")
    fresh = {number: house.instance_of(number) for number in others}
    ami = build["image"]["ami_id"]
    assert {instance["ImageId"] for instance in fresh.values()} == {ami}
    assert {instance["InstanceId"] for instance in fresh.values()}.isdisjoint(
        {instance["InstanceId"] for instance in old.values()}
    )
    for number in others:
        assert tags_of(fresh[number])["Name"] == house.machine(number)["name"]
        assert house.disk_of(fresh[number]) == 40
    assert eventually(lambda: len(house.rig.account.left_since(before).instances) == 4, 30)
    house.call("DELETE", f"/images/{image_id}")
    assert house.call("GET", f"/images/{image_id}", expected=404)["client_code"] == 404
    assert eventually(lambda: not (house.left(before).images or house.left(before).snapshots), 30)


def test_an_image_of_software_is_a_packer_build(house: OrganizationRig) -> None:
    """An image from a list of software is baked by Packer, and a machine created from software waits for its own."""
    answer = house.call("POST", "/images/install", {"software_ids": [1], "name": "blender"})
    image_id = answer["attributes"]["id"]
    assert (answer["attributes"]["status"], answer["attributes"]["source"]) == ("pending", "pre_installation")
    machine, *_ = house.launch(software_ids=[1], wait=False)
    assert house.machine(machine)["friendly_status"] == "creating"
    house.until_image(image_id, "available")
    build = house.rig.build(house.build_of(image_id))
    assert (build["kind"], build["spec"]["template_source"]) == ("machine", "kiln://workstation")
    shown = house.until(machine, "ready", seconds=90)
    own = house.rig.build(house.build_of(shown["assigned_image_id"]))
    assert house.instance_of(machine)["ImageId"] == own["image"]["ami_id"]


def test_what_happens_behind_kilns_back_shows(house: OrganizationRig) -> None:
    """A machine that is stopped, and one that is terminated in EC2 itself, read `off` within a minute."""
    stopped, terminated = house.launch(quantity=2)
    ids = {number: house.instance_of(number)["InstanceId"] for number in (stopped, terminated)}
    house.rig.account.ec2.stop_instances(InstanceIds=[ids[stopped]])
    house.rig.account.ec2.terminate_instances(InstanceIds=[ids[terminated]])
    house.until(stopped, "off", seconds=60)
    house.until(terminated, "off", seconds=60)
    refused = house.call("POST", "/images", {"machine_id": terminated}, expected=400)
    assert refused["client_code"] == 4208
    refused = house.call("POST", f"/machines/{terminated}/start", expected=400)
    assert "assign an image" in refused["message"]
    house.call("POST", f"/machines/{stopped}/start")
    house.until(stopped, "ready")


def test_an_instance_is_taken_in(house: OrganizationRig) -> None:
    """`kiln machines import` makes an instance that runs already a machine; recreated, it keeps its tags."""
    instance_id = house.foreign_instance({"Name": "old desk", "team": "art"})
    made = json.loads(house.kiln("machines", "import", instance_id, "--json"))
    number = made["id"]
    assert house.machine(number)["name"] == "old desk"
    house.until(number, "ready")
    house.call("POST", f"/machines/{number}/stop")
    house.until(number, "off")
    image_id = house.image_of(number)
    house.call("POST", f"/images/{image_id}/assign", {"machine_ids": [number]})
    house.call("POST", f"/machines/{number}/start")
    house.until(number, "ready", seconds=60)
    fresh = house.instance_of(number)
    assert (tags_of(fresh)["team"], tags_of(fresh)["Name"]) == ("art", "old desk")
    assert eventually(lambda: house.state_of(instance_id) == "terminated", 30)


def tags_of(instance: dict[str, Any]) -> dict[str, str]:
    return {tag["Key"]: tag["Value"] for tag in instance["Tags"]}


def test_a_machine_outlives_a_simulated_ec2_that_was_restarted(house: OrganizationRig) -> None:
    """Its instance is gone, and so are the subnet and the groups that it had: an image that is there recreates it."""
    number, *_ = house.launch()
    house.rig.account.ec2.terminate_instances(InstanceIds=[str(house.row(number).instance_id)])
    house.until(number, "off", seconds=60)
    house.forget_places(number)
    image_id = house.call("POST", "/images/install", {"base_image_id": 3})["attributes"]["id"]
    house.until_image(image_id, "available")
    house.call("POST", f"/images/{image_id}/assign", {"machine_ids": [number]})
    house.call("POST", f"/machines/{number}/start")
    house.until(number, "ready", seconds=60)
    fresh = house.instance_of(number)
    ami = house.rig.build(house.build_of(image_id))["image"]["ami_id"]
    assert (fresh["State"]["Name"], fresh["ImageId"]) == ("running", ami)
    assert house.instances_for(number) == {fresh["InstanceId"]}
