"""`hbserve check`: looks at a deployment and at this host before anything is started."""
