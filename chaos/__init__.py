"""The chaos run: workers that are killed and paused all the time, and an audit of every message.

It runs from a checkout: ``make chaos``, or ``python -m chaos --help``. `run` deals the messages
out to worker processes (`pool`, `worker`), `killer` strikes, `proxy` cuts connections, `jobs` gives
each message a number, `ledger` audits them, and `report` prints. `pipeline` strikes the workers of
``phonon demo``, which read from a broker and write to PostgreSQL.
"""
