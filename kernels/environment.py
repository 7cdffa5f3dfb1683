"""Environment variables that are 0 or 1, read at import."""

import os


def switch(name: str) -> bool:
    """Whether the variable is 1; 0 and "" mean no.

    Raises:
        ValueError: it is something else.
    """
    value = os.environ.get(name, "0").strip() or "0"
    if value not in ("0", "1"):
        raise ValueError(f"{name} is {value!r}: expected 0 or 1")
    return value == "1"
