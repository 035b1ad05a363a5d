"""Record `edgellm chat` as it runs in a terminal, as an SVG that plays once and then shows the end:

python docs/record.py docs/chat.svg

Keys are typed as a person does, and what the program draws is kept with its times; pauses are cut to a second. Lines
that stand after the file's name are said in place of those below. Needs the extra dev.
"""

import fcntl
import os
import re
import select
import struct
import sys
import termios
import time
from itertools import groupby, pairwise
from pathlib import Path
from xml.sax.saxutils import escape

import pyte

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from terminal import BEGINS_LINE, Terminal

LINES = [
    "/system You are a helpful assistant. Answer in one short sentence.",
    "What is the capital of France?",
    "And of Italy?",
    "/system -",
    "/clear",
    "Write a Python function is_even(n).",
]
COLUMNS, ROWS = 96, 25
WIDTH, HEIGHT, MARGIN = 8, 18, 14  # of a character, and around all of them, in pixels
FRAME, KEY, LONGEST_PAUSE = 0.08, 0.03, 1.0  # seconds
COLORS = {
    "default": "#d4d4d4", "black": "#1e1e1e", "red": "#f48771", "green": "#89d185", "brown": "#dcdcaa",
    "blue": "#569cd6", "magenta": "#c586c0", "cyan": "#4ec9b0", "white": "#d4d4d4", "brightblack": "#8a8a8a",
    "brightred": "#f48771", "brightgreen": "#b5cea8", "brightbrown": "#e5e510", "brightblue": "#9cdcfe",
    "brightmagenta": "#d670d6", "brightcyan": "#29b8db", "brightwhite": "#ffffff",
}  # fmt: skip


class Screen(pyte.Screen):
    """What a terminal shows, kept each time that it has changed."""

    def __init__(self, terminal):
        super().__init__(COLUMNS, ROWS)
        self.terminal, self.frames = terminal, []  # [(seconds, rows)]: a row is [(column, text, style)]
        self._stream, self._now, self._before = pyte.ByteStream(self), 0.0, time.monotonic()

    def write_process_input(self, data):
        """What a terminal answers when it is asked where the cursor is."""
        self.terminal.type(data)

    def hear(self, until, seconds=60.0):
        """What comes up to a text, or for some seconds."""
        end, new, drawn = time.monotonic() + seconds, b"", []
        while until is None or until not in new:
            left = end - time.monotonic()
            if left <= 0 or not select.select([self.terminal._ours], [], [], left)[0]:
                assert until is None, f"{until!r} did not come after {new!r}"
                break
            data = os.read(self.terminal._ours, 4096)
            new += data
            drawn.append((time.monotonic(), data))
        # Drawn when the program waits: it needs all cores for an answer.
        for at, data in drawn:
            self._draw(at, data)

    def _draw(self, at, data):
        self._now, self._before = self._now + min(at - self._before, LONGEST_PAUSE), at
        # The emulator knows no faint text: grey comes nearest.
        self._stream.feed(re.sub(rb"\x1b\[2(?=[m;])", b"\x1b[90", data))
        rows = [row(self.buffer[y]) for y in range(ROWS)]
        if self.frames and (rows == self.frames[-1][1] or self._now - self.frames[-1][0] < FRAME):
            self.frames[-1] = (self.frames[-1][0], rows)
        else:
            self.frames.append((self._now, rows))


def recorded(lines):
    """The frames of a conversation."""
    ready = BEGINS_LINE.encode()
    environment = {"TERM": "xterm-256color", "COLORTERM": "truecolor", "PROMPT_TOOLKIT_NO_CPR": "0"}
    with Terminal("chat", "--temp", "0", "-n", "120", **environment) as terminal:
        fcntl.ioctl(terminal._ours, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
        screen = Screen(terminal)
        screen.hear(ready)
        for line in lines:
            screen.hear(None, 0.8)
            for key in line:
                terminal.type(key)
                screen.hear(None, KEY)
            terminal.type("\r")
            screen.hear(ready)
        screen.hear(None, 1)
    return screen.frames


def row(cells):
    runs, column = [], 0
    for style, group in groupby((cells[x] for x in range(COLUMNS)), style_of):
        text = "".join(cell.data for cell in group)
        if text.strip() or style[3]:
            runs.append((column, text if style[3] else text.rstrip(), style))
        column += len(text)
    return runs


def style_of(cell):
    fg, bg = (COLORS.get(name, f"#{name}") for name in (cell.fg, cell.bg))
    bg = None if cell.bg == "default" else bg
    if cell.reverse:
        fg, bg = bg or COLORS["black"], fg
    return fg, cell.bold, cell.italics, bg


def svg(frames):
    n_rows = max(y + 1 for _, rows in frames for y, runs in enumerate(rows) if runs)
    width, height = COLUMNS * WIDTH + 2 * MARGIN, n_rows * HEIGHT + 2 * MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" font-size="13.3" '
        'font-family="ui-monospace, SFMono-Regular, Menlo, Consolas, DejaVu Sans Mono, monospace" fill="#d4d4d4">',
        "<title>edgellm chat</title>",
        f'<rect width="{width}" height="{height}" rx="8" fill="{COLORS["black"]}"/>',
    ]
    for y in range(n_rows):
        here = [(at, rows[y]) for at, rows in frames]
        changes = [now for before, now in pairwise([(0, None), *here]) if now[1] != before[1]]
        for (begin, runs), (end, _) in pairwise([*changes, (None, None)]):
            if runs:
                parts.append(shown("".join(text_of(y, *run) for run in runs), begin, end))
    return "\n".join([*parts, "</svg>\n"])


def shown(line, begin, end):
    """A line that is there for some time. What is there at last is so too where nothing moves."""
    if end is None:
        return f'<g>{line}<set attributeName="display" to="none" begin="0s" end="{begin:.2f}s"/></g>'
    when = f'<set attributeName="display" to="inline" begin="{begin:.2f}s" end="{end:.2f}s"/>'
    return f'<g display="none">{line}{when}</g>'


def text_of(y, column, text, style):
    fg, bold, italic, bg = style
    x, top = MARGIN + column * WIDTH, MARGIN + y * HEIGHT
    box = f'<rect x="{x}" y="{top}" width="{len(text) * WIDTH}" height="{HEIGHT}" fill="{bg}"/>' if bg else ""
    left = len(text) - len(text.lstrip())
    words = text.strip()
    looks = (f' fill="{fg}"' if fg != COLORS["default"] else "") + (' font-weight="bold"' if bold else "")
    looks += ' font-style="italic"' if italic else ""
    place = f'x="{x + left * WIDTH}" y="{top + 13}" textLength="{len(words) * WIDTH}"'
    words = escape(words).replace(" ", "\u00a0")  # of other spaces, only the first of several would stay
    return box + (f"<text {place}{looks}>{words}</text>" if words else "")


if __name__ == "__main__":
    target, *lines = sys.argv[1:]
    Path(target).write_text(svg(recorded(lines or LINES)), encoding="utf-8")
