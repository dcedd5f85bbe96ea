"""Requests, blocks and schedules: the engine's decisions, without a tensor in sight."""
