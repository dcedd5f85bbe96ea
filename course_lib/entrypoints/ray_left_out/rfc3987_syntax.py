"""In the place of a package that Ray's processes do without; `ray_local.py` says why."""

raise ImportError("left out by course_lib.entrypoints.ray_local")
