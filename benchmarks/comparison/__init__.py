"""Benchmarks: Phonon beside its peers, on one server, in one run.

`stream` makes the messages, `contenders` has one function for each way to process them,
`workers` those that take several processes, `run` measures them in turns, and `report` prints,
writes and draws what came out.
"""
