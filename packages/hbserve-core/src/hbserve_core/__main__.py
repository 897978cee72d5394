"""`python -m hbserve_core`: see instance_process."""

import sys

from hbserve_core.instance_process import main

sys.exit(main())
