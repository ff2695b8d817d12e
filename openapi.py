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
KEYS = {"security": [{}, {"bearer": []}, {"header": []}]}
INTEGER = {"type": "integer"}
SHORT = {"type": "string", "minLength": 1, "maxLength": 256}
RECORDING = {"type": "string", "format": "binary"}
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


def describe(title: str, version: str, requests: list[type[BaseModel]], audio: list[str]) -> dict:
    """Return the description; requests: the models of JSON bodies; audio: the content types createSpeech answers."""
    voices = listed("voices", "id", "name", "language")
    create = post("createSpeech", "Speak a text", "SpeechRequest", [*audio, "text/event-stream"], ERROR)
    paths = {
        "/v1/audio/speech": create,
        "/audio/speech": renamed(create, "createSpeechWithoutV1"),
        "/tts_url": post("createNativeSpeech", "IndexTTS's native call", "NativeRequest", ["audio/wav"], NATIVE_ERROR),
        "/tts_url_with_cloning": post(
            "createClonedSpeech", "IndexTTS's native call in the voice of an upload", "CloningRequest", ["audio/wav"],
            NATIVE_ERROR,
        ),
        "/upload_audio": receive(
            "uploadAudio", "Keep a recording for /tts_url_with_cloning", {"file": RECORDING},
            with_fields("server_path", "filename", "status", size=INTEGER), NATIVE_ERROR,
        ),
        "/v1/audio/voices": {**get("listVoices", "The voices", voices), **create_voice("createVoice")},
        "/audio/voices": {
            **get("listVoicesWithoutV1", "The voices", voices), **create_voice("createVoiceWithoutV1"),
        },
        "/v1/audio/voices/{voice_id}": delete_voice("deleteVoice"),
        "/audio/voices/{voice_id}": delete_voice("deleteVoiceWithoutV1"),
        "/v1/models": get("listModels", "The model names", listed("data", "id", "object", "owned_by")),
        "/v1/audio/models": get("listAudioModels", "The model names, as Open WebUI reads them", listed("models", "id")),
        "/health": health(),
        "/metrics": get("metrics", "Figures for Prometheus", {"type": "string"}, "text/plain", needs_key=True),
        "/openapi.json": get("describe", "This description", {"type": "object"}),
    }
    schemas = {**SCHEMAS, **{model.__name__: request_schema(model) for model in requests}}
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
    return {"post": {**operation, **KEYS}}


def receive(name: str, summary: str, fields: dict[str, Any], told: dict[str, Any], error: dict[str, str]) -> dict:
    """Describe a route that takes a recording in a multipart body, all of whose fields are needed."""
    statuses = [status for status in REFUSALS if status != "415"]
    refused = {status: answer(REFUSALS[status], error) for status in statuses}
    refused["507"] = answer("the recording could not be written", error)
    schema = {"type": "object", "required": list(fields), "properties": fields}
    body = {"required": True, "content": {"multipart/form-data": {"schema": schema}}}
    responses = {"200": answer(summary, told), **refused}
    return {"post": {"operationId": name, "summary": summary, "requestBody": body, "responses": responses, **KEYS}}


def create_voice(name: str) -> dict[str, Any]:
    """Describe OpenAI's making of a custom voice."""
    fields = {"name": SHORT, "consent": SHORT, "audio_sample": RECORDING}
    told = with_fields("id", "object", "type", "name", created_at=INTEGER)
    return receive(name, "Make a voice of a recording", fields, told, ERROR)


def delete_voice(name: str) -> dict[str, Any]:
    """Describe the forgetting of a custom voice."""
    refused = {status: answer(REFUSALS[status], ERROR) for status in ("401", "429", "500")}
    refused["404"] = answer("there is no such voice of a client's own", ERROR)
    told = answer("it is forgotten", with_fields("id", "object", deleted={"type": "boolean"}))
    voice_id = {"name": "voice_id", "in": "path", "required": True, "schema": {"type": "string"}}
    operation = {"operationId": name, "summary": "Forget a voice", "parameters": [voice_id]}
    return {"delete": {**operation, "responses": {"200": told, **refused}, **KEYS}}


def renamed(path: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the description of the same route under another path."""
    return {method: {**operation, "operationId": name} for method, operation in path.items()}


def get(
    name: str, summary: str, schema: dict[str, Any], content_type: str = JSON, needs_key: bool = False
) -> dict[str, Any]:
    """Describe a route that tells something."""
    refused = {status: answer(REFUSALS[status], ERROR) for status in ("401", "429") if needs_key}
    responses = {"200": answer(summary, schema, content_type), **refused}
    return {"get": {"operationId": name, "summary": summary, "responses": responses, **(KEYS if needs_key else {})}}


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
    return {"type": "object", "required": [key], "properties": {key: {"type": "array", "items": with_fields(*fields)}}}


def with_fields(*texts: str, **others: dict[str, Any]) -> dict[str, Any]:
    """Describe an object with these text fields and others."""
    fields = {**{name: {"type": "string"} for name in texts}, **others}
    return {"type": "object", "required": list(fields), "properties": fields}


def request_schema(model: type[BaseModel]) -> dict[str, Any]:
    """Return a request model's schema, in which every field that may be left out may also be null."""
    schema = model.model_json_schema()
    for name, field in schema["properties"].items():
        kinds = field.pop("anyOf", None) or [{k: field.pop(k) for k in list(field) if k not in ("title", "default")}]
        null = [] if name in schema["required"] or {"type": "null"} in kinds else [{"type": "null"}]
        field["anyOf"] = [*kinds, *null]
    return schema
