"""Runs `jax-lora demo`, and draws what it prints: `uv run python tools/demo_picture.py`."""

import pathlib
import re

from jax_lora.cli.demo import demo
from jax_lora.cli.terminal import stdout

PICTURE = pathlib.Path(__file__).parents[1] / "docs/pictures/demo.svg"

if __name__ == "__main__":
    stdout.record, stdout.width = True, 80
    demo()
    drawn = stdout.export_svg(title="jax-lora demo", unique_id="demo")
    # rich names a font of another server; a picture takes the reader's own.
    PICTURE.write_text(re.sub(r"@font-face \{.*?\}\s*", "", drawn, flags=re.DOTALL))
