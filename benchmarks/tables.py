"""Figures as text, Markdown tables and JSON files."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from servers import RESULTS


def spread(values: Iterable[float], digits: int = 2) -> str:
    """Return `median (least to most)`."""
    known = list(values)
    return f"{statistics.median(known):.{digits}f} ({min(known):.{digits}f} to {max(known):.{digits}f})"


def markdown(header: list[str], rows: Iterable[list[str]]) -> str:
    """Return a Markdown table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows])


def plain(content: Any) -> Any:
    """Return what JSON can hold: dataclasses as objects, what is not a number as null."""
    if is_dataclass(content):
        content = asdict(content)
    if isinstance(content, dict):
        return {key: plain(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [plain(value) for value in content]
    return None if isinstance(content, float) and math.isnan(content) else content


def save(name: str, content: object) -> Path:
    """Write results/NAME.json and return its path."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(plain(content), indent=1) + "\n")
    return path
