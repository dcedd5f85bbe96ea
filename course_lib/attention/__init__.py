"""Attention over the paged KV cache: metadata, backends, and the layer that models use."""
