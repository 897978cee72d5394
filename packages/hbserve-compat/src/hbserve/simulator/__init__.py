"""A simulator of deployments: the scheduler itself, in virtual time, over instances modelled by a profile."""
