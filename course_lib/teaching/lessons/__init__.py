"""A lesson as its author wrote it: the percent source, its header, the tables made from all of them, and a run under nbval."""
