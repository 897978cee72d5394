"""Ten thousand things that go wrong: every transfer ends, no block is ever wrong, and everything is back.

HBSERVE_CHAOS_TRANSFERS is the number of transfers; benchmarks/kv_chaos.py runs 10,000.
"""

import os

import pytest
from hbserve_kv_chaos import Chaos

NUM_TRANSFERS = int(os.environ.get("HBSERVE_CHAOS_TRANSFERS", "800"))


@pytest.mark.parametrize("two_sided", [False, True], ids=["one-sided", "two-sided"])
async def test_no_fault_hangs_a_transfer_or_corrupts_a_block_or_leaves_something_behind(two_sided):
    report = await Chaos(seed=1, two_sided=two_sided).run(NUM_TRANSFERS)
    assert report.num_ended == NUM_TRANSFERS
    assert report.wrong_blocks == 0
    assert report.left_behind == ""
    # The faults did happen, and so did successes: otherwise this shows nothing.
    assert all(report.faults.get(name, 0) > NUM_TRANSFERS / 100 for name in ("drop", "delay", "fail", "duplicate"))
    assert report.outcomes["completed"] > NUM_TRANSFERS / 10
    assert report.restarts > NUM_TRANSFERS / 100
