"""The chaos run: workers that are killed and paused all the time, and an audit of every message.

It runs from a checkout: ``make chaos``, or ``python -m chaos --help``. `run` deals the messages
out to the worker processes of ``phonon demo`` (`phonon_demo.pool`), `killer` strikes, `proxy` cuts
connections, `numbered` gives each message a number, `ledger` audits them, and `report` prints.
"""
