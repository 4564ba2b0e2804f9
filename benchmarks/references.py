"""Measures references and locks against bare calls and redis-py's lock.

python benchmarks/references.py
"""

from common import in_turns, plain_client, processes

EMPTY = "#!lua name=bench\nredis.register_function('noop', function() return 1 end)"
CALLS = 100


def main() -> None:
    with processes() as (process,):
        client = plain_client(process)
        client.function_load(EMPTY, replace=True)

        def pairs() -> None:
            for _ in range(CALLS):
                process.create_reference("resource").dereference()

        def bare_pairs() -> None:
            for _ in range(CALLS):
                client.execute_command("FCALL", "noop", 1, "key", "argument")
                client.execute_command("FCALL", "noop", 1, "key", "argument")

        ours, bare, ratio = in_turns(pairs, bare_pairs)
        print(
            f"create_reference + dereference: {ours / CALLS * 1e6:.0f} us, two bare calls: "
            f"{bare / CALLS * 1e6:.0f} us, ratio {ratio:.2f} (target 0.7)"
        )

        lock = process.lock("lock")
        redis_lock = client.lock("redis-lock", timeout=60)

        def locks() -> None:
            for _ in range(CALLS):
                with lock:
                    pass

        def redis_locks() -> None:
            for _ in range(CALLS):
                with redis_lock:
                    pass

        ours, theirs, ratio = in_turns(locks, redis_locks)
        print(
            f"lock + unlock: {ours / CALLS * 1e6:.0f} us, redis-py's Lock: "
            f"{theirs / CALLS * 1e6:.0f} us, ratio {ratio:.2f} (target 0.8)"
        )
        client.close()


if __name__ == "__main__":
    main()
