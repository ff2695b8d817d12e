"""The OpenAPI description at /openapi.json: made from the request models that also check the requests."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

JSON = "application/json"
ERROR = {"$ref": "#/components/schemas/Error"}
NATIVE_ERROR = {"$ref": "#/components/schemas/NativeError"}
REFUSALS = {
    "400": "the request is wrong: the message says which field and what would do",
    "401": "no key, or a wrong one", "413": "the body is too large", "415": "the body is not JSON",
    "429": "the queue is full, or too many wrong keys: Retry-After says when to come back",
    "500": "a fault of the server's", "503": "loading, unhealthy, or too late: come back after Retry-After",
}  # fmt: skip
NULLABLE_STRING = {"type": ["string", "null"]}
SCHEMAS: dict[str, Any] = {
    "Error": {
        "type": "object", "required": ["error"],
        "properties": {"error": {
            "type": "object", "required": ["message", "type", "param", "code"],
            "properties": {"message": {"type": "string"}, "type": {"type": "string"},
                           "param": NULLABLE_STRING, "code": NULLABLE_STRING},
        }},
    },
    "NativeError": {
        "type": "object", "required": ["status", "error"],
        "properties": {"status": {"const": "error"}, "error": {"type": "string"}},
    },
}  # fmt: skip


def describe(title: str, version: str, speech: type[BaseModel], native: type[BaseModel], audio: list[str]) -> dict:
    """Return the description; audio: the content types that createSpeech answers."""
    create = post("createSpeech", "Speak a text", "SpeechRequest", [*audio, "text/event-stream"], ERROR)
    paths = {
        "/v1/audio/speech": create,
        "/audio/speech": renamed(create, "createSpeechWithoutV1"),
        "/tts_url": post("createNativeSpeech", "IndexTTS's native call", "NativeRequest", ["audio/wav"], NATIVE_ERROR),
        "/v1/audio/voices": get("listVoices", "The voices", listed("voices", "id", "name", "language")),
        "/audio/voices": get("listVoicesWithoutV1", "The voices", listed("voices", "id", "name", "language")),
        "/v1/models": get("listModels", "The model names", listed("data", "id", "object", "owned_by")),
        "/v1/audio/models": get("listAudioModels", "The model names, as Open WebUI reads them", listed("models", "id")),
        "/health": health(),
        "/metrics": get("metrics", "Figures for Prometheus", {"type": "string"}, "text/plain", needs_key=True),
        "/openapi.json": get("describe", "This description", {"type": "object"}),
    }
    schemas = {**SCHEMAS, "SpeechRequest": request_schema(speech), "NativeRequest": request_schema(native)}
    keys = {
        "bearer": {"type": "http", "scheme": "bearer"},
        "header": {"type": "apiKey", "in": "header", "name": "X-Api-Key"},
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": title, "version": version},
        "paths": paths,
        "components": {"schemas": schemas, "securitySchemes": keys},
    }


def post(name: str, summary: str, request: str, audio: list[str], error: dict[str, str]) -> dict[str, Any]:
    """Describe a route that speaks."""
    spoken = {"description": "the audio", "content": {kind: {"schema": {}} for kind in audio}}
    refused = {status: answer(told, error) for status, told in REFUSALS.items()}
    body = {"required": True, "content": {JSON: {"schema": {"$ref": f"#/components/schemas/{request}"}}}}
    operation = {"operationId": name, "summary": summary, "requestBody": body, "responses": {"200": spoken, **refused}}
    return {"post": {**operation, "security": [{}, {"bearer": []}, {"header": []}]}}


def renamed(path: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the description of the same route under another path."""
    return {method: {**operation, "operationId": name} for method, operation in path.items()}


def get(
    name: str, summary: str, schema: dict[str, Any], content_type: str = JSON, needs_key: bool = False
) -> dict[str, Any]:
    """Describe a route that tells something."""
    refused = {status: answer(REFUSALS[status], ERROR) for status in ("401", "429") if needs_key}
    responses = {"200": answer(summary, schema, content_type), **refused}
    security = {"security": [{}, {"bearer": []}, {"header": []}]} if needs_key else {}
    return {"get": {"operationId": name, "summary": summary, "responses": responses, **security}}


def health() -> dict[str, Any]:
    """Describe /health."""
    told = ["status", "message", "timestamp", "engine", "model", "release"]
    status = {"enum": ["healthy", "loading", "unhealthy"]}
    schema = {"type": "object", "required": told, "properties": {"status": status}}
    path = get("health", "Whether an utterance would be spoken", schema)
    path["get"]["responses"]["503"] = answer("it would not, and why", schema)
    return path


def answer(description: str, schema: dict[str, Any], content_type: str = JSON) -> dict[str, Any]:
    """Describe one response."""
    return {"description": description, "content": {content_type: {"schema": schema}}}


def listed(key: str, *fields: str) -> dict[str, Any]:
    """Describe an object that holds a list of objects with these text fields."""
    row = {"type": "object", "required": list(fields), "properties": {name: {"type": "string"} for name in fields}}
    return {"type": "object", "required": [key], "properties": {key: {"type": "array", "items": row}}}


def request_schema(model: type[BaseModel]) -> dict[str, Any]:
    """Return a request model's schema, in which every field that may be left out may also be null."""
    schema = model.model_json_schema()
    for name, field in schema["properties"].items():
        kinds = field.pop("anyOf", None) or [{k: field.pop(k) for k in list(field) if k not in ("title", "default")}]
        null = [] if name in schema["required"] or {"type": "null"} in kinds else [{"type": "null"}]
        field["anyOf"] = [*kinds, *null]
    return schema
