"""The description of the control interface (OpenAPI 3.1), made of what its operations say. Pure.

It is served at GET /v1/openapi.json and kept as docs/openapi.json."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from types import UnionType
from typing import Any

from pydantic import BaseModel, TypeAdapter
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import core_schema

from tierblk import __version__, messages
from tierblk.values import NAME_PATTERN

JSON = "application/json"

_INTRODUCTION = """\
HTTP/JSON over the Unix socket /run/tierblk/<uuid of the cache>/control.sock, which the daemon's user may
open, and the group that `daemon.group` names. Who hangs up gives up an attach or a reading; everything else
goes on without its client. Keys that are not described are refused, in bodies and in queries. Later versions
may answer with further keys, and only with further keys."""

_PARAMETERS = {
    "name": {
        "name": "name",
        "in": "path",
        "required": True,
        "description": "device.name of its config",
        "schema": {"type": "string", "pattern": f"^{NAME_PATTERN}$"},
    }
}

_ERRORS = {
    400: "The request is wrong, or the config in it: the message names every key.",
    404: "There is no device of this name.",
    409: "It conflicts with what the daemon or the device does: attached already, in use, fenced, stopping.",
    413: "The body is larger than any config.",
    415: "The body is not application/json, or has a Content-Encoding.",
    500: "The cache directory is full or damaged, or there is a bug, of which the log has the details.",
    502: "The object storage does not answer, or refuses.",
}


@dataclass(frozen=True)
class Operation:
    """One method of one path. name: of the method of ControlServer that does it, without its underscore.
    answer: model of what status 200, or `status`, brings, or a JSON schema, or None for what is text of
    another `media` type. body: None where there is none. errors: statuses beside those that every such
    operation may have. abandoned: ends when its client hangs up."""

    method: str
    path: str
    name: str
    summary: str
    answer: type[BaseModel] | UnionType | Mapping[str, Any] | None
    body: type[messages.Body] | None = None
    status: int = 200
    media: str = JSON
    errors: tuple[int, ...] = ()
    query: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Parameters: JSON schemas by name; all can be left out."""
    abandoned: bool = False

    @property
    def body_required(self) -> bool:
        """Whether it can do without."""
        return self.body is not None and any(f.is_required() for f in self.body.model_fields.values())

    @property
    def statuses(self) -> list[int]:
        """Of all errors."""
        found = {400, 500, *self.errors}
        if "{name}" in self.path:
            found.add(404)
        if self.body is not None:
            found |= {409, 413, 415}
        return sorted(found)


class _Schemas(GenerateJsonSchema):
    """Without defaults (configs/reference.toml has them, with their units) and without titles that only
    repeat the key."""

    def default_schema(self, schema: core_schema.WithDefaultSchema) -> dict[str, Any]:
        return self.generate_inner(schema["schema"])

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def text(operations: Iterable[Operation]) -> str:
    """The same as docs/openapi.json has it."""
    return json.dumps(document(operations), indent=1) + "\n"


def document(operations: Iterable[Operation]) -> dict[str, Any]:
    """The whole description, made of what JSON has."""
    operations = list(operations)
    schemas, components = _schemas(operations)
    paths: dict[str, dict[str, Any]] = {}
    for operation in operations:
        paths.setdefault(operation.path, {})[operation.method.lower()] = _described(operation, schemas)
        if operation.status == HTTPStatus.CREATED:
            made = paths[operation.path][operation.method.lower()]["responses"][str(operation.status)]
            made["links"] = _links(operations)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "tierblk control",
            "version": __version__,
            "description": _INTRODUCTION,
        },
        "servers": [{"url": "http://localhost"}],
        "paths": paths,
        "components": {"schemas": components},
    }


def _schemas(operations: list[Operation]) -> tuple[dict[Any, Any], dict[str, Any]]:
    """(by model: its schema), and the schemas that those refer to, by name."""
    models: list[Any] = [messages.ErrorAnswer]
    for operation in operations:
        said = (operation.body, operation.answer)
        models += [model for model in said if isinstance(model, type | UnionType)]
    adapters = [(model, "validation", TypeAdapter[Any](model)) for model in dict.fromkeys(models)]
    made, shared = TypeAdapter.json_schemas(
        adapters,  # type: ignore[arg-type]  # a list of tuples with a literal
        ref_template="#/components/schemas/{model}",
        schema_generator=_Schemas,
    )
    return {model: schema for (model, _), schema in made.items()}, dict(sorted(shared["$defs"].items()))


def _links(operations: list[Operation]) -> dict[str, Any]:
    """What can be done with a device that was made."""
    parameters = {"name": "$response.body#/name"}
    return {
        operation.name: {"operationId": operation.name, "parameters": parameters}
        for operation in operations
        if "{name}" in operation.path
    }


def _described(operation: Operation, schemas: Mapping[Any, Any]) -> dict[str, Any]:
    answer = operation.answer
    if answer is None:
        schema: Any = {"type": "string"}
    else:
        schema = answer if isinstance(answer, Mapping) else schemas[answer]
    error = {JSON: {"schema": schemas[messages.ErrorAnswer]}}
    responses = {
        str(operation.status): {
            "description": HTTPStatus(operation.status).phrase,
            "content": {operation.media: {"schema": schema}},
        },
        **{str(code): {"description": _ERRORS[code], "content": error} for code in operation.statuses},
    }
    parameters = [each for name, each in _PARAMETERS.items() if f"{{{name}}}" in operation.path]
    parameters += [
        {"name": name, "in": "query", "required": False, "schema": dict(schema)}
        for name, schema in operation.query.items()
    ]
    described: dict[str, Any] = {
        "operationId": operation.name,
        "summary": operation.summary,
        "parameters": parameters,
        "responses": responses,
    }
    if operation.body is not None:
        content = {JSON: {"schema": schemas[operation.body]}}
        described["requestBody"] = {"required": operation.body_required, "content": content}
    return described
