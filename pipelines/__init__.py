"""What runs: one job a file, each readable top to bottom; the command line; the configuration."""

__version__ = "0.1.0"
