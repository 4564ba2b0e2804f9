"""Loops that read messages from a broker, each of which counts once.

* `phonon.sources.kafka`, with the extra ``phonon[kafka]``: ordered, by offsets.
* `phonon.sources.aio_kafka`: the same for tasks.
* `phonon.sources.streams`, for streams of Redis and Valkey: unordered, by ids.

Both use only public calls, with which any program can read another broker: `phonon.Process.source`,
and `phonon.Process.batch` with ``dedupe``.
"""
