"""One file a stage: its pure functions and the worker that runs one work unit."""
