"""The section of explained predictions."""

import numpy as np
import pandas as pd

from pipelines.report.frames import SCHEMAS, Frames
from pipelines.report.studies.explanations import section
from pipelines.thumbnails import thumbnail


def test_a_panel_for_every_image_and_the_largest_taps_in_the_table() -> None:
    assert section(Frames()) is None
    image = thumbnail(np.full((40, 60, 3), 120, np.uint8))
    rows = [
        {
            "backbone": "efficientnet_lite0", "task": task, "group": "natural", "method": "head2toe",
            "seed": 0, "index": index, "label": "<oak>", "prediction": "<oak>" if index else "elm",
            "logit": 1.25,
            "bias": 0.25, "placeless": 0.5, "taps": ["a", "b", "c", "d"], "parts": [0.5, -2.0, 0.1, 2.4],
            "image": image, "heat": image,
        }
        for task in ("solar_cells", "mnist") for index in range(2)
    ]  # fmt: skip
    found = section(Frames(explanations=pd.DataFrame(rows, columns=SCHEMAS["explanations"].names)))
    assert found is not None
    assert found.words.startswith("Shown are 4 test images, of which 2 are predicted wrong;")
    assert [len(strip.pictures) for strip in found.strips] == [4, 4]
    assert found.strips[0].title == "MNIST"
    assert [picture.text for picture in found.strips[0].pictures] == [
        "elm, not <oak>", "why elm: logit +1.25", "<oak>", "why <oak>: logit +1.25",
    ]  # fmt: skip
    assert [figure.name for figure in found.figures] == ["explanations-mnist", "explanations-solar_cells"]
    assert len(found.figures[0].data) == 8
    assert set(found.figures[0].data["Image"]) == {"image 0: elm, not <oak>", "image 1: <oak>"}
    assert found.figures[0].svg.count("<oak>") == 0  # escaped
    (table,) = found.tables
    assert table.display["Taps"].tolist() == ["d +2.40, b -2.00, a +0.50"] * 4
