"""``phonon demo``: an example of how a program of many processes uses Phonon, on real data.

Begin with `worker`: it is what a user's program looks like. `demo` reads rows (`rows`), deals them
out to worker processes (`broker`, `pool`), kills one of them (`deaths`), and checks (`check`) what
they have written to SQLite (`sink`). `flights` and `sums` are the two updates.
"""
