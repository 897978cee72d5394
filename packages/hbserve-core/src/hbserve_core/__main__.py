"""`python -m hbserve_core`: see instance/process.py."""

import sys

from hbserve_core.instance.process import main

sys.exit(main(sys.argv[1:]))
