"""Whose an object is: only labels of ours, and only where all of them and the name agree."""

from __future__ import annotations

from uuid import uuid4

import pytest

from app.runtime.docker import names
from app.runtime.driver import Ref
from tests.drivers.looks import Eventually, heard, inventory, leftovers
from tests.drivers.rigs import DockerRig

PUBLIC_ID = "opensandbox.io/id"
"""What the public server labels its containers with. It lists and removes whatever bears it."""
INSTALLATION, OBJECT = uuid4(), uuid4()


def labels(**changes: str) -> dict[str, str]:
    plain = names.labels_of(INSTALLATION, OBJECT, names.MAIN, tenant="default", generation=1, position=5)
    return plain | {f"sandledger.io/{name}": value for name, value in changes.items()}


@pytest.mark.engine
async def test_labels_are_identity_and_nothing_else(docker_rig: DockerRig):
    work = docker_rig.work(tenant="acme", generation=7, position=12, env={"TOKEN": "s3cr3t-value"})
    await docker_rig.driver.ensure(work)
    found = await docker_rig.inspect(f"sandbox-{work.ref.object_id}")
    assert found is not None
    assert found["Config"]["Labels"] == {
        "sandledger.io/installation": str(docker_rig.options.installation),
        "sandledger.io/object": str(work.ref.object_id),
        "sandledger.io/role": "main",
        "sandledger.io/tenant": "acme",
        "sandledger.io/generation": "7",
        "sandledger.io/position": "12",
    }


@pytest.mark.engine
async def test_what_the_public_server_made_is_not_ours(docker_rig: DockerRig, eventually: Eventually):
    """Both products may use one engine, and both name containers alike."""
    object_id, ours = uuid4(), docker_rig.work()
    await docker_rig.stranger(f"sandbox-{object_id}", {PUBLIC_ID: str(object_id)})
    async with heard(docker_rig, eventually) as ids:
        assert await inventory(docker_rig.driver) == []
        assert await leftovers(docker_rig.driver) == []
        assert await docker_rig.driver.observe(Ref(object_id)) is None
        assert await docker_rig.driver.remove(Ref(object_id)) is True
        theirs = docker_rig.direct.containers.container(f"sandbox-{object_id}")
        await theirs.start()
        await theirs.kill()
        await docker_rig.driver.ensure(ours)
        await docker_rig.kill(ours.ref.object_id)
        await eventually(lambda: ids)
        assert ids == {ours.ref.object_id}
    assert await docker_rig.exists(f"sandbox-{object_id}")


@pytest.mark.engine
async def test_nothing_of_ours_looks_like_the_public_servers(docker_rig: DockerRig):
    await docker_rig.driver.ensure(docker_rig.work())
    await docker_rig.driver.prepare()
    containers = await docker_rig.direct.containers.list(all="1", filters=f'{{"label":["{PUBLIC_ID}"]}}')
    volumes = await docker_rig.direct.volumes.list(filters={"label": [PUBLIC_ID]})
    installation = str(docker_rig.options.installation)
    assert [one for one in containers if one["Labels"].get(names.INSTALLATION) == installation] == []
    assert [one for one in volumes["Volumes"] or () if one["Labels"].get(names.INSTALLATION) == installation] == []


@pytest.mark.engine
async def test_a_copy_that_carries_our_labels_is_a_stranger(docker_rig: DockerRig):
    """As when somebody commits a sandbox to an image and runs that: labels travel with images."""
    work = docker_rig.work()
    copied = names.labels_of(
        docker_rig.options.installation, work.ref.object_id, names.MAIN, tenant="t", generation=1, position=1
    )
    copy = f"copy-{uuid4()}"
    await docker_rig.stranger(copy, copied)
    assert await inventory(docker_rig.driver) == []
    assert await leftovers(docker_rig.driver) == []
    await docker_rig.driver.remove(work.ref)
    assert await docker_rig.exists(copy)
    assert not (await docker_rig.driver.ensure(work)).adopted


@pytest.mark.engine
async def test_a_volume_of_a_stranger_is_no_mark(docker_rig: DockerRig):
    name = names.mark_name(docker_rig.options.installation)
    await docker_rig.direct.volumes.create({"Name": name, "Labels": {names.MARK: "theirs"}})
    assert (await docker_rig.driver.check()).mark is None
    with pytest.raises(Exception, match="NAME_TAKEN") as caught:
        await docker_rig.driver.prepare()
    assert name in str(caught.value)


def test_all_labels_and_the_name_must_agree():
    name = f"/sandbox-{OBJECT}"
    found = names.identify(labels(), [name], INSTALLATION)
    assert found == names.Identity(OBJECT, "main", f"sandbox-{OBJECT}")
    assert names.identify(labels(role="egress"), [f"/sandbox-egress-{OBJECT}"], INSTALLATION) is not None
    wrong = [
        (labels(installation=str(uuid4())), name),
        (labels(object=str(uuid4())), name),
        (labels(object="none"), name),
        (labels(role="egress"), name),
        (labels(role="sidecar"), name),
        (labels(), f"/sandbox-egress-{OBJECT}"),
        (labels(), f"/copy-of-sandbox-{OBJECT}"),
        ({PUBLIC_ID: str(OBJECT)}, name),
        ({}, name),
    ]
    for given, called in wrong:
        assert names.identify(given, [called], INSTALLATION) is None, (given, called)
    for missing in (names.INSTALLATION, names.OBJECT, names.ROLE):
        some = {key: value for key, value in labels().items() if key != missing}
        assert names.identify(some, [name], INSTALLATION) is None, missing


@pytest.mark.parametrize(
    ("text", "generation", "position"),
    [("7", 7, 7), ("", 1, None), ("-1", 1, None), ("x", 1, None), ("9" * 30, 1, None), ("\u0663", 1, None)],
)
def test_numbers_that_somebody_tampered_with(text: str, generation: int, position: int | None):
    given = labels(generation=text, position=text)
    assert (names.generation_in(given), names.position_in(given)) == (generation, position)


@pytest.mark.engine
async def test_a_mark_can_be_put_back_by_hand(docker_rig: DockerRig):
    """The way out where somebody pruned the volumes of an engine: the log knows the mark, and the volume is made anew."""
    installation, known = docker_rig.options.installation, (await docker_rig.driver.prepare()).mark
    assert known is not None
    await docker_rig.forget_mark()
    assert (await docker_rig.driver.check()).mark is None
    labels = names.mark_labels(installation, known)
    await docker_rig.direct.volumes.create({"Name": names.mark_name(installation), "Labels": labels})
    assert (await docker_rig.driver.check()).mark == known
    assert (await docker_rig.driver.prepare()).mark == known
