"""Where model runners live: in this process, in worker processes, under torchrun, or in Ray actors."""
