"""stub"""
def splits(files): return set()
def records(path, wanted): return iter(())
