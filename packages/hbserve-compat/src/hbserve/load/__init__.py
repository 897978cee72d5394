"""A load generator for servers with OpenAI's API: `hbserve bench serve`."""
