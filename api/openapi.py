"""What OpenAPI says of the body that `POST /api/v1/images/build` reads by itself, because it may be anything."""

from typing import Any

from fastapi import FastAPI

from api.deps import Parts
from api.machine_requests import FIELD_VARIABLES, MachineBuildRequest
from kiln.models import Provider
from kiln.naming import DEFAULT_TEMPLATE

BODY_NAME = MachineBuildRequest.__name__
SPELLINGS = ("provider", "agent_provider")
FORMS = ("template", "template_source")
# Between fields: a provider, both spellings alike, and one form of the template.
TOGETHER = [
    {"anyOf": [{"required": [name], "properties": {name: {"type": "string"}}} for name in SPELLINGS]},
    {"anyOf": [{"properties": {name: {"enum": [provider, None]} for name in SPELLINGS}} for provider in Provider]},
    {"anyOf": [{"properties": {name: {"type": "null"}}} for name in FORMS]},
]


def describe_bodies(app: FastAPI, parts: Parts) -> None:
    """Adds the body to the app's document, as exactly as this server's settings and templates allow."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = generate()
            document["components"]["schemas"].update(_body_schemas(parts))
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _body_schemas(parts: Parts) -> dict[str, Any]:
    """The body's schema and those that it refers to, by their names."""
    body = MachineBuildRequest.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas: dict[str, Any] = {**body.pop("$defs"), BODY_NAME: body}
    fields = body["properties"]
    fields["region"]["enum"] = [*parts.settings.regions, None]
    template = parts.templates.find(DEFAULT_TEMPLATE)
    schemas["TemplateChoice"]["properties"]["name"]["enum"] = [DEFAULT_TEMPLATE.removeprefix("builtin://")]
    if parts.settings.template_dir is None:
        fields["template_source"]["enum"] = [DEFAULT_TEMPLATE, None]
        # Those that a field also sets are accepted as well, but are better sent as the field.
        names = [name for name in template.public_names if name not in FIELD_VARIABLES]
        fields["variables"]["propertyNames"] = {"enum": names}
    body["allOf"] = TOGETHER
    return schemas
