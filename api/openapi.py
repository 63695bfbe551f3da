"""What OpenAPI says of bodies that routes read by themselves: `POST /api/v1/images/build` takes either contract's."""

import re
from collections.abc import Collection
from itertools import chain
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

from api.agent_requests import (
    AGENT_FIELDS,
    PACKAGES,
    PACKAGES_LENGTH,
    URL,
    URL_LENGTH,
    VERSION,
    VERSION_LENGTH,
    AgentImageRequest,
)
from api.client_errors import CLIENT_PREFIX
from api.container_requests import (
    CONTAINER_FIELDS,
    PATH_LENGTH,
    PLATFORM_SCOPE,
    ContainerBuildRequest,
    StartRequest,
)
from api.container_updates import UpdateRequest
from api.deps import Parts
from api.machine_requests import FIELD_VARIABLES, MachineBuildRequest
from api.organization_requests import BODIES
from api.pod_errors import POD_PREFIXES
from api.pod_requests import POD_BODIES
from api.runner_models import BODIES as RUNNER_BODIES
from kiln.models import Provider, Visibility
from kiln.naming import DEFAULT_TEMPLATE
from kiln.pod_orders import order_schema

MACHINE_BODY = MachineBuildRequest.__name__
CONTAINER_BODY = ContainerBuildRequest.__name__
AGENT_BODY = AgentImageRequest.__name__
REFERENCE = "#/components/schemas/{model}"
# What the shared route's body may be.
EITHER_BODY = {"oneOf": [{"$ref": REFERENCE.format(model=name)} for name in (MACHINE_BODY, CONTAINER_BODY, AGENT_BODY)]}
NULL = {"type": "null"}
FORMS = ("template", "template_source")
# Between fields: a provider, and both spellings alike.
ONE_PROVIDER = [
    {"anyOf": [{"required": [name], "properties": {name: {"type": "string"}}} for name in AGENT_FIELDS]},
    {"anyOf": [{"properties": {name: {"enum": [provider, None]} for name in AGENT_FIELDS}} for provider in Provider]},
]
ONE_FORM = {"anyOf": [{"properties": {name: NULL}} for name in FORMS]}

_WORD = "[a-z0-9]+(?:(?:_|__|-+)[a-z0-9]+)*"
_PART = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
# Below any owner's name a repository's has at most 255 characters in all.
_SHORT = r"(?=[\s\S]{1,150}$)"
NAME = rf"^{_SHORT}(?!platform/){_PART}(?:/{_PART})*$"
TAG = r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}$"
REGISTRIES = ("docker.io", "ghcr.io", "quay.io", "public.ecr.aws", "registry.k8s.io", "mcr.microsoft.com")
# Not absolute, not climbing out, and a file's.
PATH = (
    r"^(?!/)(?!(?:[^/]*/)*\.\.(?:/|$))(?!(?:\.?/)*\.?$)"
    r"[^\u0000-\u001f\u007f]*[^/\u0000-\u001f\u007f]$"
)
SEVERAL = r"^[\s\S]*[^,\s][\s\S]*,[\s\S]*[^,\s][\s\S]*$"
SOURCES = ("source_image", "sourceImage")
TEAMS = ("team_id", "teamId")
SCOPES = ("owner_scope", "ownerScope")


def describe_bodies(app: FastAPI, parts: Parts) -> None:
    """Adds the bodies to the app's document, as exactly as this server's settings and templates allow."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = generate()
            document["components"]["schemas"].update(_body_schemas(parts))
            _forget_422(document)
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _forget_422(document: dict[str, Any]) -> None:
    """FastAPI adds it to every route with parameters; organization-images and pods say 400 or 404 instead."""
    for path, item in document["paths"].items():
        for operation in item.values() if path.startswith((CLIENT_PREFIX, *POD_PREFIXES)) else ():
            operation["responses"].pop("422", None)


def _body_schemas(parts: Parts) -> dict[str, Any]:
    """The bodies' schemas and those that they refer to, by their names."""
    containers = _container_body(parts.settings.transfer_registries)
    models = (StartRequest, UpdateRequest, *BODIES, *POD_BODIES, *RUNNER_BODIES)
    plain = (_schemas(model).items() for model in models)
    agents = _agent_body(parts.settings.transfer_registries, parts.settings.registry_host)
    return {**_machine_body(parts), **containers, **agents, **dict(chain.from_iterable(plain)), **_order()}


def _schemas(model: type[BaseModel]) -> dict[str, Any]:
    body = model.model_json_schema(ref_template=REFERENCE)
    return {**body.pop("$defs", {}), model.__name__: body}


def _order() -> dict[str, Any]:
    order = order_schema(REFERENCE)
    return {**order.pop("$defs", {}), "PodOrder": order}


def _machine_body(parts: Parts) -> dict[str, Any]:
    schemas = _schemas(MachineBuildRequest)
    body = schemas[MACHINE_BODY]
    fields = body["properties"]
    fields["region"]["enum"] = [*parts.settings.regions, None]
    template = parts.templates.find(DEFAULT_TEMPLATE)
    schemas["TemplateChoice"]["properties"]["name"]["enum"] = [DEFAULT_TEMPLATE.removeprefix("builtin://")]
    if parts.settings.template_dir is None:
        fields["template_source"]["enum"] = [DEFAULT_TEMPLATE, None]
        # Those that a field also sets are accepted as well, but are better sent as the field.
        names = [name for name in template.public_names if name not in FIELD_VARIABLES]
        fields["variables"]["propertyNames"] = {"enum": names}
    fields.update({name: {**NULL, "description": "of container images"} for name in CONTAINER_FIELDS})
    body["allOf"] = [*ONE_PROVIDER, ONE_FORM]
    return schemas


def _container_body(more_registries: Collection[str]) -> dict[str, Any]:
    schemas = _schemas(ContainerBuildRequest)
    body = schemas[CONTAINER_BODY]
    _restrict_names(body["properties"])
    body["properties"].update({name: {**NULL, "description": "of agents' images"} for name in AGENT_FIELDS})
    body["allOf"] = [{"anyOf": [_of_a_build(), *_of_a_copy(more_registries)]}, *_namespaces()]
    return schemas


def _agent_body(more_registries: Collection[str], own_registry: str) -> dict[str, Any]:
    schemas = _schemas(AgentImageRequest)
    body = schemas[AGENT_BODY]
    fields = body["properties"]
    _restrict_names(fields)
    fields["agent_version"].update(pattern=_whole(VERSION), maxLength=VERSION_LENGTH)
    fields["extra_packages"].update(pattern=_whole(PACKAGES), maxLength=PACKAGES_LENGTH)
    fields["npm_registry"].update(pattern=_whole(URL), maxLength=URL_LENGTH)
    # Which images of Kiln's own registry are the caller's, the document cannot say.
    fields["base_image"]["pattern"] = rf"^{_SHORT}{_image_path((*more_registries, own_registry))}$"
    body["allOf"] = [_of_a_build(), *ONE_PROVIDER, *_namespaces()]
    return schemas


def _whole(pattern: re.Pattern[str]) -> str:
    return f"^(?:{pattern.pattern})$"


def _restrict_names(fields: dict[str, Any]) -> None:
    fields["image_name"]["pattern"] = NAME
    fields["image_tag"]["pattern"] = TAG
    fields["dockerfile_path"].update(pattern=PATH, maxLength=PATH_LENGTH)


def _namespaces() -> list[dict[str, Any]]:
    return [
        {"anyOf": [_all_null(*SCOPES), *(_on_the_platform(name) for name in SCOPES)]},
        {"anyOf": [_all_null(name) for name in TEAMS]},
    ]


def _all_null(*names: str) -> dict[str, Any]:
    return {"properties": dict.fromkeys(names, NULL)}


def _of_a_build() -> dict[str, Any]:
    named = {"image_name": {"type": "string"}, "image_tag": {"type": "string"}}
    return {"required": list(named), "properties": {**named, **dict.fromkeys(SOURCES, NULL)}}


def _of_a_copy(more_registries: Collection[str]) -> list[dict[str, Any]]:
    """One source, or several, in either spelling."""
    single = {"type": "string", "pattern": rf"^{_SHORT}[\s,]*{_image_path(more_registries)}[\s,]*$"}
    several = {"type": "string", "pattern": SEVERAL}
    unnamed = _all_null("image_name", "image_tag")["properties"]
    forms = []
    for name, other in (SOURCES, reversed(SOURCES)):
        forms.append({"required": [name], "properties": {name: single, other: NULL}})
        forms.append({"required": [name], "properties": {name: several, other: NULL, **unnamed}})
    return forms


def _image_path(more_registries: Collection[str]) -> str:
    hosts = "|".join(name.replace(".", r"\.") for name in (*REGISTRIES, *more_registries))
    digest = "@sha256:[0-9a-f]{64}"
    path = rf"(?:(?:{hosts})/{_PART}(?:/{_PART})*|{_WORD}(?:/{_PART})*)"
    return rf"{path}(?::{TAG[1:-1]})?(?:{digest})?"


def _on_the_platform(spelling: str) -> dict[str, Any]:
    public = {"visibility": {"const": Visibility.PUBLIC.value}}
    scoped = {spelling: {"const": PLATFORM_SCOPE}}
    return {
        "required": [spelling, "visibility"],
        "properties": {**scoped, **public, **_all_null(*TEAMS)["properties"]},
    }
