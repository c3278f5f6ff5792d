"""Sources to shards; never torch, so that a job on a CPU node starts at once."""
