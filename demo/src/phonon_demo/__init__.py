"""``phonon demo``: an example of how a program of many processes uses Phonon, on real data.

Begin with `worker`, which looks like a user's program; `async_worker` is the same for asyncio.
`aggregations` has the models, and `updates` the same flights as an `Update`. `demo` reads rows
(`rows`), sends them to a broker (`brokers`), kills one of the workers (`pool`), and compares the
table with a plain loop.
"""
