"""Other rules that keep features, against the group lasso."""

from pipelines.report.frames import Frames
from pipelines.report.studies import Section
from pipelines.report.variants_of_method import section_of_methods

NOTE = (
    "Test accuracy of a head on features that different rules keep: by the weights of a head with a group "
    "lasso (Head2Toe), at random, or by the training images alone (scikit-learn); fraction, rate and steps "
    "by cross-validation; reference: Head2Toe."
)


def section(frames: Frames) -> Section | None:
    """Table and figure; None where the study has not run."""
    return section_of_methods(frames, "selection-rules", "Other rules of selection", 190, NOTE)
