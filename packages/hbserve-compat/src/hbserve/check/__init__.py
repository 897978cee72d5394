"""Looking at a deployment and at this host before anything starts: `hbserve check`."""
