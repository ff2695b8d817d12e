"""What a client is told when something is wrong: one base class, one envelope."""

from __future__ import annotations

import errno

from access import WRONG_KEYS_S

RETRY_AFTER_S = 5


class SpeechError(Exception):
    """Base of what a client is told; `status` is the HTTP status, the rest is OpenAI's envelope."""

    status = 500
    type = "server_error"
    code: str | None = None
    retry_after_s: int | None = None

    def __init__(self, message: str, param: str | None = None, code: str | None = None, quoted: str = ""):
        super().__init__(message.replace(quoted, "...") if quoted else message)  # no log may show the client's text
        self.message, self.param, self.code = message, param, code or self.code

    def headers(self) -> dict[str, str]:
        """Headers beside the envelope: when to come back, where that makes sense."""
        after_s = self.retry_after_s
        return {"Retry-After": str(after_s), "retry-after-ms": str(after_s * 1000)} if after_s else {}


class InvalidRequest(SpeechError):
    """400: the request is wrong, and the message says how to put it right."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_value"


class UnknownVoice(SpeechError):
    """404: there is no such voice of a client's own."""

    status = 404
    type = "invalid_request_error"
    code = "voice_not_found"


class TooLarge(SpeechError):
    """413: a recording of more bytes than are taken."""

    status = 413
    type = "invalid_request_error"
    code = "request_too_large"

    def __init__(self, limit: int):
        super().__init__(f"The recording is too large: this server takes TTS_MAX_UPLOAD_BYTES, {limit} bytes.")


class NoSpace(SpeechError):
    """507: a recording could not be written."""

    status = 507
    code = "insufficient_storage"


class InvalidKey(SpeechError):
    """401: no key, or not one of TTS_API_KEYS."""

    status = 401
    type = "invalid_request_error"
    code = "invalid_api_key"


class Busy(SpeechError):
    """429: the queue is full."""

    status = 429
    type = "rate_limit_error"
    code = "queue_full"
    retry_after_s = RETRY_AFTER_S


class TooManyWrongKeys(SpeechError):
    """429: an address that goes on trying keys."""

    status = 429
    type = "rate_limit_error"
    code = "too_many_wrong_keys"
    retry_after_s = WRONG_KEYS_S


class Unavailable(SpeechError):
    """503: loading, unhealthy, or too late."""

    status = 503
    code = "unavailable"
    retry_after_s = RETRY_AFTER_S


class EngineFault(SpeechError):
    """500: the engine gave something that is not speech."""

    code = "engine_fault"


class ClientGone(ConnectionResetError):
    """The client left; gunicorn closes such a connection quietly and without ending the body."""

    def __init__(self) -> None:
        super().__init__(errno.ECONNRESET, "the client left")


def printable(text: str, limit: int) -> str:
    """Text fit for a message or a log line: one line, no control characters, at most `limit` characters."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text[:limit])
