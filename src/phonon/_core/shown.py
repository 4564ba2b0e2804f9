"""Formats names and numbers for errors and operators' commands."""

#: The prefix of records' names if the update named neither database nor collection.
UNNAMED = "test.test."


def shown(resource: str) -> str:
    """Return a resource's name for an error, without default database and collection."""
    return repr(resource.removeprefix(UNNAMED))


def counted(count: int, noun: str, plural: str = "") -> str:
    """Return a number with its noun, as in "1 batch" and "1,200 batches"."""
    return f"{count:,} {noun if count == 1 else plural or f'{noun}s'}"
