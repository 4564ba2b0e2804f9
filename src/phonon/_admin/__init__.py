"""The operator's view of a namespace: it has no process and no lanes, and needs no user class."""
