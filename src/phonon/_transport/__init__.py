"""Connections to servers: routing, repeats, and the reading of answers.

The logic is written once, as generators that yield steps (`steps.Steps`). `sync_io` and
`async_io` carry the steps out, on connections of redis-py's and of redis.asyncio's.
"""
