"""Where model runners live: in this process (others follow: worker processes, torchrun, Ray)."""
