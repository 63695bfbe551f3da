"""Agents: what an organization's cloud builds are of."""

import uuid
from dataclasses import dataclass
from datetime import UTC, datetime

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session, aliased

from kiln.catalog.builds import BuildWithImage
from kiln.catalog.tables import Agent, Build, Image
from kiln.models import Api


@dataclass(frozen=True)
class Undeployed:
    """An agent of which nothing was ever deployed, its newest build, and how many builds it has."""

    agent_name: str
    latest: BuildWithImage
    total_builds: int


def ensure(tx: Session, organization_id: str, name: str) -> Agent:
    """The organization's agent of this name, made if it is not there, and kept from others until the transaction's end.

    So two submissions for one agent follow each other, and the second sees the first one's build. Where another
    transaction makes the agent at the same moment, the block raises AlreadyThereError: the next try finds it.
    """
    query = select(Agent).where(Agent.organization_id == organization_id, Agent.name == name)
    row = tx.scalars(query.with_for_update()).first()
    if row is None:
        row = Agent(id=str(uuid.uuid4()), organization_id=organization_id, name=name, created_at=datetime.now(UTC))
        tx.add(row)
        tx.flush()
    return row


def find(session: Session, organization_id: str, agent_id: str, *, lock: bool = False) -> Agent | None:
    """An organization's agent by its id; with `lock`, kept from other transactions that write until this one's end."""
    query = select(Agent).where(Agent.organization_id == organization_id, Agent.id == agent_id)
    return session.scalars(query.with_for_update() if lock else query).first()


def note_deployed(tx: Session, image_id: str) -> None:
    """Writes that a pod ran from an image of the agent's builds. An image of no agent, or a later pod, changes nothing."""
    of_image = select(Build.agent_id).join(Image, Image.build_id == Build.id).where(Image.id == image_id)
    tx.execute(
        update(Agent)
        .where(Agent.id == of_image.scalar_subquery(), Agent.deployed_at.is_(None))
        .values(deployed_at=datetime.now(UTC))
    )


def undeployed(session: Session, organization_id: str) -> list[Undeployed]:
    """The organization's agents that have builds and were never deployed, the one with the newest build first."""
    newest_first = (Build.created_at.desc(), Build.id.desc())
    ranked = (
        select(
            Build.id.label("build_id"),
            func.row_number().over(partition_by=Build.agent_id, order_by=newest_first).label("rank"),
            func.count().over(partition_by=Build.agent_id).label("total"),
        )
        .join(Agent, Agent.id == Build.agent_id)
        .where(
            Build.organization_id == organization_id,
            Build.api == Api.CLOUD_BUILDS.value,
            Agent.deployed_at.is_(None),
        )
        .subquery()
    )
    latest = aliased(Build)
    query = (
        select(Agent.name, latest, Image, ranked.c.total)
        .join(latest, latest.id == ranked.c.build_id)
        .join(Agent, Agent.id == latest.agent_id)
        .outerjoin(Image, Image.build_id == latest.id)
        .where(ranked.c.rank == 1)
        .order_by(latest.created_at.desc(), latest.id.desc())
    )
    return [
        Undeployed(name, BuildWithImage(build, image), total)
        for name, build, image, total in session.execute(query.select_from(ranked))
    ]
