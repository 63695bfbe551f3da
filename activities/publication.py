"""The moment at which a container build succeeds, and what is cleaned up after one, however it ended."""

import time
from datetime import timedelta

from temporalio import activity

from activities.cleanup import wait
from activities.manifest_tree import tree
from kiln.errors import LeftoversError, SourceUnavailableError, UnavailableError, VerificationFailedError
from kiln.models import BuildEnd, BuildKind, BuildRef, CleanupReport, PublishRequest
from kiln.naming import context_key, staging_repository
from kiln.ports import Contexts, ImageFacts, Ledger, LogBook, Publication, Registry

VERIFY_ATTEMPTS = 4
# A push whose client was killed may still be finishing its last request.
SETTLE = timedelta(seconds=1)
PASSES = 10


class PublicationActivities:
    """Light work on the control queue: catalog, registry and object store. After a disorderly end the staging
    repository is looked at again after `settle`."""

    def __init__(
        self, ledger: Ledger, registry: Registry, contexts: Contexts, logs: LogBook, settle: timedelta = SETTLE
    ) -> None:
        self._ledger = ledger
        self._registry = registry
        self._contexts = contexts
        self._logs = logs
        self._settle = settle

    @activity.defn(name="publish-container")
    def publish(self, request: PublishRequest) -> BuildEnd:
        """Verifies what was staged, commits it, and has the registry point the user's tag at it.

        From the commit on, a cancel changes nothing, and what remains is repeated until it is done. Raises
        VerificationFailedError, BuildCancelledError, BuildOverError, AttemptLostError before it; UnavailableError.
        """
        build_id = request.build.build_id
        facts = self._verified(request)
        publication = self._ledger.begin_publication(request.image, build_id, facts, self._registry.host)
        self._carry_out(build_id, publication)
        return self._ledger.finish_publication(build_id)

    def _verified(self, request: PublishRequest) -> ImageFacts:
        build, digest = request.build, request.image.image_id
        facts = self._registry.facts(staging_repository(build.build_id), digest)
        if facts is None:
            raise _refused(f"{digest} is not in the registry, though its builder reported it")
        if facts.digest != digest:
            raise _refused(f"the registry has {facts.digest}, and its builder reported {digest}")
        if build.kind is BuildKind.CONTAINER and build.platform not in facts.platforms:
            has = ", ".join(facts.platforms) or "none"
            raise _refused(f"{digest} is for {has}, and {build.platform} was asked for")
        return facts

    def _carry_out(self, build_id: str, publication: Publication) -> None:
        """The image in its own repository, and the tag where the catalog has it.

        Raises UnavailableError also if the registry lacks the image: what is committed cannot fail any more.
        """
        try:
            self._registry.copy(staging_repository(build_id), publication.digest, publication.repository)
            self._move_tag(publication)
        except SourceUnavailableError as error:
            raise UnavailableError(str(error)) from error

    def _move_tag(self, publication: Publication) -> None:
        """Points the tag at whatever digest the catalog says by the time it is moved."""
        repository, tag = publication.repository, publication.tag
        wanted: str | None = publication.digest
        moved = None
        while wanted is not None and moved != wanted:
            try:
                self._registry.tag(repository, wanted, tag)
            except SourceUnavailableError:
                if wanted == publication.digest:
                    raise
                return  # another build's publication is on its way, and moves the tag itself
            moved, wanted = wanted, self._ledger.tagged(repository, tag)

    @activity.defn(name="clean-up-container")
    def clean_up(self, build: BuildRef) -> CleanupReport:
        """Removes what the build staged, and its context. A publication that was begun is brought to its end first.

        Raises LeftoversError while something is still there, UnavailableError; both are retried without limit.
        """
        footprint = self._ledger.fence_container(build.build_id)
        wait(footprint.remaining_lease)
        if footprint.publication is not None:
            self._carry_out(build.build_id, footprint.publication)
            self._ledger.finish_publication(build.build_id)
        self._contexts.delete(context_key(build.build_id))
        removed = self._unstage(build.build_id) if footprint.attempt else set()
        if footprint.attempt and not footprint.orderly:
            wait(self._settle)
            removed |= self._unstage(build.build_id)
        if not footprint.orderly:
            for name in sorted(removed):
                self._logs.note(build.build_id, footprint.attempt, f"removed {name}")
        return CleanupReport(removed=tuple(sorted(removed)))

    def _unstage(self, build_id: str) -> set[str]:
        """Deletes every staged manifest, and tags that have none; returns their names."""
        repository, removed = staging_repository(build_id), set[str]()
        for _ in range(PASSES):
            tags = self._registry.tags(repository)
            if not tags:
                return removed
            for tag in tags:
                self._delete(repository, tag)
                removed.add(f"{repository}:{tag}")
            time.sleep(0.05)
        raise LeftoversError(f"still there: {repository}")

    def _delete(self, repository: str, tag: str) -> None:
        staged = self._registry.manifest(repository, tag)
        if staged is None:
            self._registry.untag(repository, tag)  # a registry that died while it wrote the tag still lists it
            return
        for each in reversed(tree(self._registry, repository, staged)):
            self._registry.delete(repository, each.digest)


def _refused(problem: str) -> VerificationFailedError:
    return VerificationFailedError(problem, final=activity.info().attempt >= VERIFY_ATTEMPTS)
