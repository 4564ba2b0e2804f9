"""The records of an `Admin`, as JSON values."""

from typing import Any


def plain(value: Any) -> Any:
    """Return a value as a JSON value; values that JSON lacks become text, as Python shows them."""
    if hasattr(value, "_asdict"):
        return {name: plain(part) for name, part in value._asdict().items()}
    if isinstance(value, dict):
        return {
            key if isinstance(key, str) else repr(key): plain(part) for key, part in value.items()
        }
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, float):
        return value if abs(value) < float("inf") else repr(value)
    return value if value is None or isinstance(value, bool | int) else repr(value)
