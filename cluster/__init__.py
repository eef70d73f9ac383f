"""How it is spread and kept: Ray sessions, Lance tables, commits, leases, segments on actors. No models."""
