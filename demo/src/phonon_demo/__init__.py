"""``phonon demo``: how a program of many processes uses Phonon, on real data.

Read `worker` first, which looks like a user's program; `async_worker` is its twin for asyncio.
`models` has the records, and a plain loop for the same figures. `demo` sends the flights to a
stream, kills one of the workers of `pool`, and compares the table with the plain loop. `app` has
the options, and `rows` reads the user's own rows.
"""
