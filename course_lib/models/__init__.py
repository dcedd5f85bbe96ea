"""Model architectures, the registry that picks one, and the loader that fills its weights."""
