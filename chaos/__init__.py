"""Chaos: workers that are killed and paused all the time, and a check of every message.

It runs from a checkout: ``make chaos``, or ``python -m chaos --help``. `run` counts messages, each
with a number: `worker` adds them up in updates (`jobs`), and `ledger` audits them. `pipeline` goes
from Kafka or a stream to PostgreSQL, with `pipeline_worker`. Both start workers in the pool of
``phonon demo``, and have them struck by the killer of `strikes`; `journal` has what workers note,
`servers` are killed too, and `proxy` cuts connections.
"""
