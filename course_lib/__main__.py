"""`python3 -m course_lib COMMAND`, started on a bare Python.

Owns one decision: is this Python new enough to read the rest? Therefore this file, alone in the
package, keeps to syntax that old Pythons parse.
"""

import shutil
import sys

OLDEST = (3, 11)


def main():
    if sys.version_info < OLDEST:
        found = [name for name in ("python3.13", "python3.12", "python3.11") if shutil.which(name)]
        remedy = (
            "run `%s -m course_lib` instead" % found[0] if found else "install a newer one from python.org"
        )
        print(
            "course_lib: this is Python %d.%d and the course needs Python %d.%d or newer: %s."
            % (sys.version_info[0], sys.version_info[1], OLDEST[0], OLDEST[1], remedy),
            file=sys.stderr,
        )
        return 1
    if sys.platform == "win32":
        print(
            "course_lib: the course runs on Linux and macOS: on Windows use WSL (`wsl --install`).",
            file=sys.stderr,
        )
        return 1
    if not __package__:  # started as `python3 path/to/course_lib`: the folder above is not on the path
        import os

        sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    from course_lib.cli import main as command_line

    return command_line(sys.argv[1:])


if __name__ == "__main__":
    raise SystemExit(main())
