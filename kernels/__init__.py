"""Device kernels of the engine: pure functions on tensors that know nothing of requests.

`reference` is the plain-torch truth; `triton`, `pallas` and `nki` hold the same functions written for
an accelerator. Importing this package imports none of them, so it works where Triton has no wheel.
"""
