"""The model runner: turns a `SchedulerOutput` into tensors, runs the model, samples."""
