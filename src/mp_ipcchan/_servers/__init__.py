"""Names at which processes that don't know each other meet."""
