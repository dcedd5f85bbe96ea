"""Pictures of a recorded run, with a slider: `with record(llm) as trace: …`, then `explore_blocks(trace)`.

Each `explore_*` displays one output; `draw_*` and `describe_*` beside it are the same picture as a figure and
in words, as pure functions of the trace.
"""

from course_lib.teaching.explorers.kv_blocks import describe_blocks, draw_blocks, explore_blocks
from course_lib.teaching.explorers.requests import describe_requests, draw_requests, explore_requests
from course_lib.teaching.explorers.schedule import describe_schedule, draw_schedule, explore_schedule

__all__ = [
    "describe_blocks", "describe_requests", "describe_schedule", "draw_blocks", "draw_requests",
    "draw_schedule", "explore_blocks", "explore_requests", "explore_schedule",
]  # fmt: skip
