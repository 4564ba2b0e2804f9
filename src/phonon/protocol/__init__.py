"""The protocol, without I/O: flows, what they ask of a driver, keys, messages, the Lua library.

Nothing in this package opens a socket, reads a clock or starts a thread.
"""
