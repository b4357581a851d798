"""Table 6: which activations are read."""

from pipelines.report.frames import Frames
from pipelines.report.other_features import section_of_features
from pipelines.report.studies import Section

TITLES = {
    "original": "Normalised and activated",
    "pre_normalization": "Before the normalisation",
    "pre_activation": "Before the activation function",
    "with_input": "With the pooled input beside",
}
NOTE = (
    "Test accuracy of Head2Toe with features from before each normalisation, from between it and the "
    "activation function, and with the pooled image among the candidates; reference: the first row."
)


def section(frames: Frames) -> Section | None:
    """Table and figure; None where the study has not run."""
    return section_of_features(
        frames, "activations", "Which activations", 200, NOTE, TITLES, "table6 resnet50"
    )
