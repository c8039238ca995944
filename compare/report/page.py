"""Writes the report: one HTML page that holds all it needs and asks no network for anything.

`content.py` computes what the page says, as JSON; the scripts in `web/` turn it into elements and
let Plotly draw the curves. Names of runs and samples are text of others: the scripts insert them as
text, and the page's Content-Security-Policy allows only its own script and Plotly, by their hashes,
and no request, so that no such text can run as code or call home.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import json
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Any

from compare.output import check_folder, write
from compare.reading.run import Run
from compare.report.content import report
from compare.report.text import utf8_text
from config import ConfigError

_FOLDER = Path(__file__).parent / "web"
_SCRIPTS = ("page.js", "curves.js", "parallel.js", "start.js")
# 'unsafe-inline' for styles only: Plotly sets them on the elements it draws.
_POLICY = (
    "default-src 'none'; script-src {scripts}; style-src 'unsafe-inline'; img-src data: blob:; "
    "base-uri 'none'; form-action 'none'"
)


def write_report(runs: Sequence[Run], output: Path, over: Sequence[str] = ()) -> None:
    """Writes the page; raises WriteError, and ConfigError if plotly is not installed.

    over: options in which the runs of a group may differ; by default the seed.
    """
    check_folder(output)
    write(output, page(runs, over).encode())


def page(runs: Sequence[Run], over: Sequence[str] = ()) -> str:
    """Returns the report as HTML."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise ConfigError("the report needs plotly: pip install plotly") from None
    content = report(runs, over)
    script = script_text("\n".join(map(_read, _SCRIPTS)))
    plotly = get_plotlyjs().replace("\r\n", "\n")
    hashes = " ".join(f"'sha256-{_sha256(source)}'" for source in (plotly, script))
    return Template(_read("page.html")).substitute(
        policy=_POLICY.format(scripts=hashes),
        title=html.escape(utf8_text(content["headline"])),
        style=_read("page.css"),
        data=data_text(content),
        # 4.8 MB, of which the page would be nearly all: `start.js` inflates it.
        plotly=base64.b64encode(gzip.compress(plotly.encode(), mtime=0)).decode(),
        script=script,
    )


def data_text(content: Any) -> str:
    """Returns JSON that can stand in a script element: no character of it can end the element."""
    text = json.dumps(content, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def script_text(source: str) -> str:
    """Returns a script as a browser reads it back: the policy's hash is of exactly these bytes."""
    return source.replace("\r\n", "\n").replace("</script>", "<\\/script>")


def _read(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
