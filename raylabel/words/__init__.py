"""Words by characters, families, phrases, FastText vectors, neighbours and nulls."""
