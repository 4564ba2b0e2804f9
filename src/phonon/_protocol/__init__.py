"""The protocol without I/O: what keys, calls and answers look like, and the lane."""
