"""One file a source of exemplars."""
