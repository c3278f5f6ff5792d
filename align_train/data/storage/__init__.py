"""Where shards lie, here or far away, and what is in them."""
