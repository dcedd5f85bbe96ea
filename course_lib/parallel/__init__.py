"""Several processes as one engine: who belongs together, and how they add up and hand on tensors.

Layers, models and runners are given the groups they work in; nothing here is process-wide, so two engines can live in
one process. vLLM: `vllm/distributed/`.
"""
