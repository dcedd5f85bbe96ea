"""What a run of the engine did, step by step: the recorder, its data, and runs of the scheduler alone."""
