"""Runs many random schedules: ``python tests/simulation --seed 1 --count 10000``."""

import argparse
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from simulation.schedules import PROFILES, report, try_schedule
from simulation.server import SimServer, small


def main() -> int:
    """Run schedules and print what they came to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", default="1")
    parser.add_argument(
        "--count", type=int, default=700, help="schedules, of all profiles together"
    )
    parser.add_argument("--profile", choices=[*PROFILES, "all"], default="all")
    parser.add_argument("--first", type=int, default=0, help="the number of the first schedule")
    parser.add_argument("--failures", type=int, default=1, help="stop after so many")
    parser.add_argument(
        "--shrink", type=float, default=20.0, help="seconds to look for a short one"
    )
    options = parser.parse_args()
    profiles = list(PROFILES) if options.profile == "all" else [options.profile]
    seen: Counter[str] = Counter()
    moves = failures = done = 0
    begun = time.monotonic()
    server = SimServer()
    try:
        with small(server):
            for number in range(options.count):
                profile = profiles[number % len(profiles)]
                seed = f"{options.seed} {options.first + number // len(profiles)}"
                schedule, violation = try_schedule(server, profile, seed)
                seen += schedule.world.seen
                moves += schedule.world.steps
                done += 1
                if violation is not None:
                    failures += 1
                    print(f"### {report(schedule, violation, options.shrink)}\n", flush=True)
                    if failures >= options.failures:
                        break
    finally:
        server.close()
    print(
        f"{done} schedules, {moves:,} moves, {server.calls:,} calls, "
        f"{time.monotonic() - begun:.0f} s, {failures} violations"
    )
    print(", ".join(f"{what} {count:,}" for what, count in sorted(seen.items())))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
