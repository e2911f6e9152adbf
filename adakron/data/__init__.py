"""From raw texts to batches: tokenisation with a cache on disk, the order of examples, padding."""
