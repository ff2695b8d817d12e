"""The voices: voices.json, checked and resolved, and those that clients made."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from errors import InvalidRequest, printable
from reference_store import OwnVoice

Decibels = Annotated[float, Field(ge=-40, le=20)]


class Gains(BaseModel):
    """What brings each kind of text to the same loudness, in dB."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    en: Decibels
    zh: Decibels
    mixed: Decibels


class EmbeddedStyle(BaseModel):
    """How the embedded engine speaks a voice: a blend of its styles and a gain in dB for each kind of text."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    en: str
    zh: str
    mixed: str  # Mandarin with Latin words in it
    gain_db: Gains


class Voice(BaseModel):
    """One entry of voices.json."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: Annotated[str, Field(pattern=r"^[a-z0-9_-]{1,64}$")]
    name: str
    language: str
    description: dict[Literal["zh", "en"], str]
    reference_audio: str
    embedded: EmbeddedStyle


class Voices(BaseModel):
    """voices.json: the voices in their order, the default, and other names for them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    default: str
    voices: Annotated[list[Voice], Field(min_length=1)]
    aliases: dict[str, str]

    @model_validator(mode="after")
    def check_names(self) -> Voices:
        ids = [voice.id for voice in self.voices]
        for voice_id in ids:
            if ids.count(voice_id) > 1:
                raise ValueError(f"two voices have the id {voice_id!r}")
        for alias, target in [*self.aliases.items(), ("default", self.default)]:
            if target not in ids:
                raise ValueError(f"{alias!r} means {target!r}, which is not the id of a voice")
            if alias in ids:
                raise ValueError(f"the alias {alias!r} is the id of a voice")
        return self

    @classmethod
    def load(cls, path: Path) -> Voices:
        """Read voices.json; raise ValueError naming the file, the line and what is wrong."""
        try:
            text = path.read_text(encoding="utf-8")
            return cls.model_validate(json.loads(text))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{error.lineno}: {error.msg}") from None
        except (OSError, UnicodeDecodeError, RecursionError) as error:
            raise ValueError(f"{path} (TTS_VOICES_FILE) cannot be read: {error}") from None
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            told = first["msg"].removeprefix("Value error, ")
            line = line_of(text, first["loc"]) if first["loc"] else line_of_name(text, told)
            raise ValueError(f"{path}:{line}: {'.'.join(map(str, first['loc']))} {told}") from None

    def resolve(self, name: str | None) -> Voice:
        """Return the voice of an id or alias, the default for None; raise InvalidRequest listing the voices."""
        wanted = self.default if name is None else self.aliases.get(name, name)
        for voice in self.voices:
            if voice.id == wanted:
                return voice
        ids = ", ".join(voice.id for voice in self.voices)
        unknown = printable(wanted, 64)
        raise InvalidRequest(f"Unknown voice {unknown!r}. The voices are: {ids}.", "voice", "voice_not_found")

    def of_reference(self, path: str) -> Voice | None:
        """Return the voice whose reference audio has this path's base name, whatever its folder."""
        base = re.split(r"[/\\]", path)[-1]
        return next((voice for voice in self.voices if Path(voice.reference_audio).name == base), None)


def own_voice(made: OwnVoice, like: Voice) -> Voice:
    """Return a client's own voice as one of the voices."""
    told = {"id": made.id, "name": made.name, "description": {}, "reference_audio": str(made.audio)}
    return like.model_copy(update=told)


def line_of(text: str, location: tuple[int | str, ...]) -> int:
    """Line of voices.json that a validation error is about: its voice's `id`, else its first key."""
    if len(location) > 1 and location[0] == "voices":
        starts = [m.start() for m in re.finditer(r'"id"\s*:', text)]
        offset = starts[int(location[1])] if int(location[1]) < len(starts) else 0
    else:
        offset = max(0, text.find(f'"{location[0]}"')) if location else 0
    return text.count("\n", 0, offset) + 1


def line_of_name(text: str, told: str) -> int:
    """Line of voices.json where the name that a message quotes stands last: as a key, as an id, or anywhere."""
    quoted = re.search("'(.+?)'", told)
    name = f'"{re.escape(quoted[1])}"' if quoted else "$"
    for pattern in (rf"{name}\s*:", rf'"id"\s*:\s*{name}', name):
        if found := list(re.finditer(pattern, text)):
            return text.count("\n", 0, found[-1].start()) + 1
    return 1
