"""List every installed package with its licence; exit 1 where one is under the GPL (the LGPL may ship)."""

import re
import sys
from importlib.metadata import Distribution, distributions


def licence(package: Distribution) -> str:
    """Return a package's licence as its metadata names it: expression, classifiers or free text."""
    meta = package.metadata
    named = [line.split(" :: ")[-1] for line in meta.get_all("Classifier", []) if line.startswith("License ::")]
    free = (meta.get("License") or "").strip().splitlines()[:1]
    return meta.get("License-Expression") or ", ".join(named) or "".join(free)[:80] or "not named"


def main() -> int:
    """Print the list; return the exit status."""
    rows = sorted({(d.metadata["Name"].lower(), d.version, licence(d)) for d in distributions()})
    for name, version, named in rows:
        print(f"{name:32} {version:14} {named}")
    forbidden = [
        name for name, _, named in rows if re.search(r"(?<!L)(?<!Lesser )\bA?GPL|(?<!Lesser )General Public", named)
    ]
    if forbidden:
        print(f"under the GPL: {', '.join(forbidden)}", file=sys.stderr)
    return 1 if forbidden else 0


if __name__ == "__main__":
    sys.exit(main())
