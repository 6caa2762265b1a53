"""Pictures of measurements as files."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["write_picture"]


def write_picture(figure: "Figure", path: Path) -> None:
    """Write `figure` as SVG if `path` ends so, else as PNG. Equal pictures are equal files."""
    from matplotlib import rc_context

    svg = path.suffix.lower() == ".svg"
    with rc_context({"svg.hashsalt": "warmfront"}):
        figure.savefig(path, format="svg" if svg else "png", metadata={"Date": None} if svg else None)
