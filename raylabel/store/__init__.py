"""A run directory: plan, shards, manifests, resume, readers; local paths and object stores alike."""
