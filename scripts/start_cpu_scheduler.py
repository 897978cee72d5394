"""Start the scheduler of a deployment: `python scripts/start_cpu_scheduler.py --config FILE`. Needs no torch."""

import sys

from hbserve_scheduler.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
