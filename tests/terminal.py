"""A pseudo-terminal with a command in it, as a person would sit before it."""

import os
import re
import select
import subprocess
import sys
import time

ESCAPES = re.compile(r"\x1b(\[[0-9;?]*[ -/]*[@-~]|\][^\x07]*\x07|[=>])|\r")


PROMPT = ">>> "
BEGINS_LINE = "\x1b[?2004h"
"""What prompt_toolkit sends when it begins to read a line; the prompt itself it draws again and again."""


class Terminal:
    def __init__(self, *arguments, **environment):
        import fcntl
        import pty
        import struct
        import termios

        self._ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
        self._unread, self._ready = "", PROMPT if environment.get("TERM") == "dumb" else BEGINS_LINE
        self.process = subprocess.Popen(
            [sys.executable, "-m", "edgellm", *arguments], stdin=theirs, stdout=theirs, stderr=theirs,
            start_new_session=True, preexec_fn=lambda: fcntl.ioctl(theirs, termios.TIOCSCTTY, 0),
            env={**os.environ, "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", **environment},
        )  # fmt: skip
        os.close(theirs)

    def type(self, text):
        os.write(self._ours, text.encode())

    def say(self, line):
        """A line; returns what comes up to the next prompt."""
        self.type(line + "\r")
        return self.until_ready()

    def until_ready(self):
        """What comes up to the next prompt."""
        return self.until(self._ready)

    def until(self, expected, seconds=60):
        """What has come since the last call, up to an expected text, without colours and moves of the cursor."""
        deadline = time.monotonic() + seconds
        while expected not in self._unread:
            ready, _, _ = select.select([self._ours], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"{expected!r} did not come after {self._unread!r}"
            self._unread += os.read(self._ours, 4096).decode(errors="replace")
        found, _, self._unread = self._unread.partition(expected)
        return ESCAPES.sub("", found)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.kill()
        self.process.wait()
        os.close(self._ours)
