"""10,000 KV transfers over a one-sided transport and as many over a two-sided one, while everything goes wrong.

The output has the memory of this process after each slice.

    python benchmarks/kv_chaos.py
"""

import argparse
import asyncio
import logging
import sys
from pathlib import Path
from time import perf_counter

sys.path.append(str(Path(__file__).resolve().parent.parent / "packages/hbserve-kv/tests"))

from hbserve_kv_chaos import Chaos

PAGE_BYTES = 4096


def resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES / (1 << 20)


async def run(num_slices: int, slice_size: int, two_sided: bool) -> None:
    for seed in range(num_slices):
        began_s = perf_counter()
        report = await Chaos(seed=seed, two_sided=two_sided).run(slice_size)
        print(
            f"{'two' if two_sided else 'one'}-sided: {report.num_ended} transfers ended in "
            f"{perf_counter() - began_s:.0f} s: {dict(report.outcomes)}, "
            f"{report.restarts} restarts, {report.wrong_blocks} wrong blocks, "
            f"left behind: {report.left_behind or 'nothing'}; {resident_mib():.0f} MiB resident",
            flush=True,
        )
        assert (report.num_ended, report.wrong_blocks, report.left_behind) == (slice_size, 0, "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slices", type=int, default=5)
    parser.add_argument("--slice-size", type=int, default=2000)
    parser.add_argument("--sides", choices=["one", "two", "both"], default="both")
    arguments = parser.parse_args()
    logging.getLogger("hbserve_kv").setLevel(logging.ERROR)  # what fails is meant to
    for two_sided in {"one": [False], "two": [True], "both": [False, True]}[arguments.sides]:
        asyncio.run(run(arguments.slices, arguments.slice_size, two_sided))


if __name__ == "__main__":
    main()
