"""The server's OpenAPI document: bodies from the models that check them, answers as `answers` makes them."""

from importlib.metadata import version
from typing import Any

from pydantic.json_schema import models_json_schema

from jaxdistill.serve.schema import ChatBody, CompletionBody

_STRING, _INTEGER, _NUMBER = {"type": "string"}, {"type": "integer"}, {"type": "number"}
_REFUSALS = {
    "400": "The body is not as described, or asks for more than the model has positions for",
    "401": "The key is missing or wrong",
    "404": "There is no such model",
    "405": "The path has no such method",
    "408": "The body did not arrive in time",
    "413": "The body is too long",
    "415": "The body is not application/json",
    "429": "Too many calls or samples at once; try again later",
    "503": "The engine failed",
}


def document(model: str, key: bool) -> dict[str, Any]:
    """The document, in OpenAPI 3.1.

    Args:
      model: the name that calls give.
      key: whether calls need one.
    """
    bodies = [(kind, "validation") for kind in (ChatBody, CompletionBody)]
    _, schemas = models_json_schema(bodies, ref_template="#/components/schemas/{model}")  # type: ignore[arg-type]
    definitions = schemas["$defs"]
    for kind, _ in bodies:
        definitions[kind.__name__]["properties"]["model"]["const"] = model
    definitions |= _ANSWERS
    paths = {
        "/v1/chat/completions": {"post": _call("Answers a conversation", "ChatBody", "ChatCompletion")},
        "/v1/completions": {"post": _call("Continues a text or tokens", "CompletionBody", "Completion")},
        "/v1/models": {"get": _get("The model that is served", _json("ModelList"), "401", "405", "429")},
        "/v1/models/{name}": {
            "get": {
                **_get("The model, if that is its name", _json("Model"), "401", "404", "405", "429"),
                "parameters": [{"name": "name", "in": "path", "required": True, "schema": _STRING}],
            }
        },
        "/metrics": {"get": _get("For Prometheus", {"text/plain": {"schema": _STRING}}, "401", "405", "429")},
        "/health": {"get": {**_get("Whether the engine runs", _json("Health"), "405", "503"), "security": []}},
    }
    paths["/health"]["get"]["responses"]["503"]["content"] = _json("Health")
    return {
        "openapi": "3.1.0",
        "info": {"title": "jaxdistill serve", "version": version("jaxdistill")},
        "paths": paths,
        "components": {"schemas": definitions, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
        "security": [{"key": []}] if key else [],
    }


def _json(name: str) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}


def _responses(content: dict[str, Any], refusals: tuple[str, ...]) -> dict[str, Any]:
    refused = {status: {"description": _REFUSALS[status], "content": _json("Error")} for status in refusals}
    return {"200": {"description": "Done", "content": content}, **refused}


def _get(summary: str, content: dict[str, Any], *refusals: str) -> dict[str, Any]:
    return {"summary": summary, "responses": _responses(content, refusals)}


def _call(summary: str, body: str, answer: str) -> dict[str, Any]:
    content = {**_json(answer), "text/event-stream": {}}
    return {
        "summary": summary,
        "requestBody": {"required": True, "content": _json(body)},
        "responses": _responses(content, tuple(_REFUSALS)),
    }


def _object(**properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _list(items: Any) -> dict[str, Any]:
    return {"type": "array", "items": items}


def _or_null(schema: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [schema, {"type": "null"}]}


def _answer(kind: str, logprobs: dict[str, Any], **said: Any) -> dict[str, Any]:
    """An object around choices, as `answers.Reply` makes it."""
    finish = {"enum": ["stop", "length"]}
    choice = _object(index=_INTEGER, **said, logprobs=_or_null(logprobs), finish_reason=finish)
    return _object(
        id=_STRING,
        object={"const": kind},
        created=_INTEGER,
        model=_STRING,
        system_fingerprint=_STRING,
        choices=_list(choice),
        usage=_object(prompt_tokens=_INTEGER, completion_tokens=_INTEGER, total_tokens=_INTEGER),
    )


_TOKEN = {"token": _STRING, "logprob": _NUMBER, "bytes": _or_null(_list(_INTEGER))}
_MODEL = _object(id=_STRING, object={"const": "model"}, created=_INTEGER, owned_by=_STRING, max_model_len=_INTEGER)
_ANSWERS = {
    "ChatCompletion": _answer(
        "chat.completion",
        _object(content=_list(_object(**_TOKEN, top_logprobs=_list(_object(**_TOKEN))))),
        message=_object(role={"const": "assistant"}, content=_STRING),
    ),
    "Completion": _answer(
        "text_completion",
        _object(
            tokens=_list(_STRING),
            token_logprobs=_list(_or_null(_NUMBER)),
            top_logprobs=_list(_or_null({"type": "object", "additionalProperties": _NUMBER})),
            text_offset=_list(_INTEGER),
        ),
        text=_STRING,
    ),
    "Model": _MODEL,
    "ModelList": _object(object={"const": "list"}, data=_list(_MODEL)),
    "Health": _object(status={"enum": ["ok", "the engine failed"]}),
    "Error": _object(
        error=_object(message=_STRING, type=_STRING, param=_or_null(_STRING), code=_or_null(_STRING)),
    ),
}
