"""What runs before anything is installed: the environment, its packages, `doctor`, `test`, `lab`.

Invariant: the standard library only, and nothing of the engine. vLLM has no counterpart; it is
installed by its user.
"""
