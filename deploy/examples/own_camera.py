"""A frame source of your own. Register it in your package:

    [project.entry-points."edgepriv.frame_sources"]
    stripes = "own_camera:open_source"

Then `[source] kind = "stripes"` in device.toml uses it. Run: python own_camera.py
"""

import time

import numpy as np

from edgepriv import Frame


class Stripes:
    exhausted, index = False, 0

    def read(self) -> Frame:
        self.index += 1
        return Frame(np.full((480, 640, 3), self.index % 256, np.uint8), time.time(), self.index)

    def close(self) -> None: ...


def open_source(options: dict) -> Stripes:
    return Stripes(**{k: v for k, v in options.items() if k not in {"folder", "clock"}})


print(open_source({}).read().pixels.shape)
