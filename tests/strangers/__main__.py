"""``python -m tests.strangers``: tries hostile inputs at every door and prints how they ended, a line for each door.

It ends with status 1 where one hung, ran, wrote outside, was fetched, was taken for good, or ended in a bare traceback.
"""

from __future__ import annotations

import argparse
import os
import sys

os.environ |= {"HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_TELEMETRY": "1"}

from tests.strangers import frame


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.strangers", description=__doc__)
    parser.add_argument("--door", action="append", choices=frame.DOORS, help="only this one; may be repeated")
    parser.add_argument("--count", type=int, help="cases of each door; without it, as many as the door has by itself")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--show", type=int, default=20, metavar="N", help="bad endings to print, of each door")
    parser.add_argument("--all", action="store_true", help="print every case")
    options = parser.parse_args()
    found: dict[str, list[frame.Result]] = {}
    for door in options.door or frame.DOORS:
        found[door] = frame.try_door(door, options.seed, options.count, workers=options.workers)
        chosen = found[door] if options.all else [result for result in found[door] if result.bad][: options.show]
        for result in chosen:
            ending = f"{result.ending} ({result.seconds:.1f} s)"
            print(f"{door}: {result.case}: {ending} {result.detail!a} {list(result.harms)}")
        sys.stdout.flush()
    results = [result for each in found.values() for result in each]
    print("\n".join(["", *frame.table(found), "", frame.totals(results)]))
    return int(any(result.bad for result in results))


if __name__ == "__main__":
    sys.exit(main())
