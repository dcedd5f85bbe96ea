"""What happens in the learner's `work/`: the functions they call in a cell, answers, progress, home page, `check NN`."""
