"""The Python of the README."""

import re

from tests.support.paths import ROOT

README = (ROOT / "README.md").read_text()


def blocks(several_devices):
    """Its blocks, those for several devices or all others."""
    found = re.findall(r"```python\n(.*?)```", README, re.S)
    # Choosing a backend has to come before the first import of keras.
    found = [block for block in found if "KERAS_BACKEND" not in block]
    return [block for block in found if ("distribute(" in block) == several_devices]
