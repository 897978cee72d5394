"""Start a deployment, or one instance of it.

python scripts/start_pd_disagg.py --config FILE                            scheduler and every instance, on this host
python scripts/start_pd_disagg.py --config FILE --instance-id prefill-0    that instance only
"""

import sys

from hbserve.__main__ import app

if __name__ == "__main__":
    app(["instance" if any(word.startswith("--instance-id") for word in sys.argv) else "serve", *sys.argv[1:]])
