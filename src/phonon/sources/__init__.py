"""Loops that read messages from a broker. Each message counts once.

* `phonon.sources.kafka`, with the extra ``phonon[kafka]``: ordered, by offsets.
* `phonon.sources.aio_kafka`: the same for tasks.
* `phonon.sources.streams`, for streams of Redis and Valkey: unordered, by ids.

They use only public calls, so that any program can read another broker in the same way:
`phonon.Process.source`, and `phonon.Process.batch` with ``dedupe``.
"""
