"""One file a family: config keys and rename tables, for both formats."""
