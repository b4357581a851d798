"""Section 3.3: unit norm per example and tap, against normalising each feature, and none."""

from pipelines.report.frames import Frames
from pipelines.report.studies import Section
from pipelines.report.variants_of_method import section_of_methods

NOTE = (
    "Test accuracy of Head2Toe with features of unit norm per example and tap, of zero mean and unit "
    "variance each over the training images, and as they are; everything else by cross-validation; "
    "reference: the first. The paper says that the first works better than the others, without numbers."
)


def section(frames: Frames) -> Section | None:
    """Table and figure; None where the study has not run."""
    return section_of_methods(frames, "normalisation", "Normalisation of features", 180, NOTE)
