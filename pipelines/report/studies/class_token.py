"""Table 7: what becomes of the class token."""

from pipelines.report.frames import Frames
from pipelines.report.other_features import section_of_features
from pipelines.report.studies import Section

TITLES = {
    "original": "Pooled with the others",
    "only_cls": "The class token alone",
    "nopool_cls": "Beside the pooled tokens",
}
NOTE = (
    "Test accuracy of Head2Toe with the class token of a vision transformer pooled as every other token, "
    "alone at every tap, or kept beside the pooled ones; reference: the first row."
)


def section(frames: Frames) -> Section | None:
    """Table and figure; None where the study has not run."""
    return section_of_features(frames, "class-token", "The class token", 210, NOTE, TITLES, "table7 vitb16")
