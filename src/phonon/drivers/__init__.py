"""Drivers run flows: they send their commands, hand back the replies, and run the user's code."""
