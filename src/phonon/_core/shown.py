"""Names and numbers as errors and operators' commands show them."""

#: How the names of records begin whose update named neither database nor collection.
UNNAMED = "test.test."


def shown(resource: str) -> str:
    """Return a resource's name for an error: without a database that the user never named."""
    return repr(resource.removeprefix(UNNAMED))


def counted(count: int, noun: str, plural: str = "") -> str:
    """Return a number with its noun, as in "1 batch" and "1,200 batches"."""
    return f"{count:,} {noun if count == 1 else plural or f'{noun}s'}"
