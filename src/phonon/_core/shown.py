"""Names of resources as errors show them."""

#: How the names of records begin whose update named neither database nor collection.
UNNAMED = "test.test."


def shown(resource: str) -> str:
    """Return a resource's name for an error: without a database that the user never named."""
    return repr(resource.removeprefix(UNNAMED))
