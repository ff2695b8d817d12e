"""Figures as text, Markdown tables and JSON files."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from servers import RESULTS


def spread(values: Iterable[float], digits: int = 2) -> str:
    """Return `median (least to most)`."""
    known = list(values)
    return f"{statistics.median(known):.{digits}f} ({min(known):.{digits}f} to {max(known):.{digits}f})"


def markdown(header: list[str], rows: Iterable[list[str]]) -> str:
    """Return a Markdown table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows])


def save(name: str, content: object) -> Path:
    """Write results/NAME.json and return its path."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(content, indent=1, default=asdict) + "\n")
    return path
