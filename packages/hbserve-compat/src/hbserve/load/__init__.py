"""A load generator for servers of OpenAI's API: `hbserve bench serve`."""
