"""The parts of a process, with one topic each: conversations with the server as flows."""
