"""The operator's view of a namespace, without a process, lanes or the user's classes."""
