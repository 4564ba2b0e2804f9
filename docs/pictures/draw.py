"""Draws the pictures of the documentation: python docs/pictures/draw.py.

Each is an SVG of boxes, lines and text, readable on a light and on a dark page.
"""

from pathlib import Path
from xml.sax.saxutils import escape

#: Fills that dark text is read on; lines and free text stand on either background.
BLUE, GREEN, RED, SAND, GREY = "#c7d2fe", "#bbf7d0", "#fecaca", "#fde68a", "#e5e7eb"
LINE, INK, FREE = "#7c83a0", "#111827", "#7c83a0"


class Picture:
    """An SVG picture.

    Args:
        width: Its width.
        height: Its height.
        title: What it shows, for those who cannot see it.
    """

    def __init__(self, width: int, height: int, title: str) -> None:
        font = 'font-family="system-ui, sans-serif" font-size="14"'
        size = f'viewBox="0 0 {width} {height}" width="{width}"'
        place = 'viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7"'
        head = f'<path d="M0 0 10 5 0 10z" fill="{LINE}"/>'
        self._parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" {font}>',
            f"<title>{escape(title)}</title>",
            f'<defs><marker id="arrow" {place} orient="auto">{head}</marker></defs>',
        ]

    def box(self, x: int, y: int, width: int, height: int, fill: str, *lines: str) -> None:
        """Draw a box with lines of text in its middle."""
        self._parts.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="6" fill="{fill}" '
            f'stroke="{LINE}"/>'
        )
        first = y + height / 2 - (len(lines) - 1) * 9 + 5
        for i, line in enumerate(lines):
            self._text(x + width / 2, first + 18 * i, line, INK, "middle")

    def arrow(self, x1: int, y1: int, x2: int, y2: int, *, dashed: bool = False) -> None:
        """Draw an arrow."""
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        self._parts.append(
            f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{LINE}" stroke-width="1.6" '
            f'marker-end="url(#arrow)"{dash}/>'
        )

    def line(self, x1: int, y1: int, x2: int, y2: int) -> None:
        """Draw a line."""
        self._parts.append(
            f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{LINE}" stroke-width="1.6"/>'
        )

    def note(self, x: int, y: int, text: str, *, anchor: str = "start") -> None:
        """Write text on the background."""
        self._text(x, y, text, FREE, anchor)

    def cross(self, x: int, y: int) -> None:
        """Draw a death."""
        for sign in (1, -1):
            self._parts.append(
                f'<line x1="{x - 8}" y1="{y - 8 * sign}" x2="{x + 8}" y2="{y + 8 * sign}" '
                'stroke="#dc2626" stroke-width="3"/>'
            )

    def _text(self, x: float, y: float, text: str, fill: str, anchor: str) -> None:
        self._parts.append(
            f'<text x="{x:g}" y="{y:g}" fill="{fill}" text-anchor="{anchor}">{escape(text)}</text>'
        )

    def write(self, name: str) -> None:
        """Write the file."""
        text = "\n".join([*self._parts, "</svg>"])
        Path(__file__).with_name(name).write_text(text + "\n", encoding="utf-8")


def merged_where() -> None:
    """Show what is merged where."""
    picture = Picture(720, 330, "Messages are merged in each worker, then on the server, then once")
    for i, (name, messages) in enumerate(
        [
            ("worker 1", ("ada +1", "bob +1", "ada +1")),
            ("worker 2", ("ada +1", "eve +1")),
            ("worker 3", ("bob +1", "ada +1")),
        ]
    ):
        y = 20 + 100 * i
        picture.box(10, y, 110, 70, GREY, *messages)
        picture.arrow(120, y + 35, 158, y + 35)
        sums = {"worker 1": ("ada 2", "bob 1"), "worker 2": ("ada 1", "eve 1")}
        picture.box(160, y, 140, 70, BLUE, f"cache of {name}", *sums.get(name, ("ada 1", "bob 1")))
        picture.arrow(300, y + 35, 367, 120 + 35 * i)
    picture.box(370, 95, 150, 120, SAND, "server", "ada: 2, 1, 1", "bob: 1, 1", "eve: 1")
    picture.arrow(520, 155, 565, 155)
    picture.box(570, 95, 140, 120, GREEN, "database", "ada 4", "bob 2", "eve 1")
    picture.note(65, 322, "messages", anchor="middle")
    picture.note(230, 322, "merged in memory", anchor="middle")
    picture.note(445, 240, "partials", anchor="middle")
    picture.note(640, 240, "one write a key", anchor="middle")
    picture.write("merged-where.svg")


def session() -> None:
    """Show the life of a session."""
    picture = Picture(720, 260, "The life of a session")
    picture.note(10, 24, "time →")
    for i, name in enumerate(("worker 1", "worker 2")):
        picture.note(10, 75 + 70 * i, name)
    picture.box(90, 50, 330, 40, BLUE, "joined: adds, adds, adds")
    picture.arrow(420, 90, 420, 205)  # before the box that it goes behind
    picture.box(180, 120, 380, 40, BLUE, "joined: adds, adds")
    picture.box(565, 120, 80, 40, GREEN, "execute")
    picture.arrow(560, 160, 560, 205)
    picture.box(90, 205, 470, 40, SAND, "the session: its partials come together on the server")
    picture.box(565, 205, 80, 40, GREY, "batch")
    picture.note(424, 66, "leaves: idle, or")
    picture.note(424, 84, "out of the cache")
    picture.note(652, 140, "leaves")
    picture.note(652, 158, "last")
    picture.note(652, 230, "token")
    picture.write("session.svg")


def death() -> None:
    """Show who does what when a worker dies."""
    picture = Picture(720, 270, "Who does what when a worker dies")
    picture.note(10, 75, "worker 1")
    picture.note(10, 145, "worker 2")
    picture.note(10, 225, "server")
    picture.box(90, 50, 190, 40, BLUE, "stores, acknowledges")
    picture.cross(285, 70)
    picture.note(300, 75, "kill -9")
    picture.line(90, 140, 700, 140)
    picture.box(90, 205, 200, 40, SAND, "lease: renewed by beats")
    picture.box(290, 205, 160, 40, RED, "4 intervals pass")
    picture.box(450, 205, 250, 40, GREY, "nothing of worker 1 is left")
    for x in (110, 180, 250, 320, 390):
        picture.arrow(x, 140, x, 203, dashed=True)
    picture.box(440, 120, 80, 40, BLUE, "marks it")
    picture.box(525, 120, 80, 40, BLUE, "reaps it")
    picture.box(610, 120, 100, 40, GREEN, "executes")
    picture.note(440, 105, "memberships, locks, then batches")
    picture.write("death.svg")


if __name__ == "__main__":
    merged_where()
    session()
    death()
