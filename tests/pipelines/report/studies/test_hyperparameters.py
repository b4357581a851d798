import pandas as pd

from pipelines.report.studies.hyperparameters import hyperparameter_table
from tests.pipelines.report.conftest import chosen_frame


def test_what_a_method_does_not_use_is_left_out(results: pd.DataFrame) -> None:
    display = hyperparameter_table(chosen_frame(results)).display.set_index(["Task", "Method"])
    assert tuple(display.loc[("MNIST", "Linear"), ["T", "F", "Coefficient"]]) == ("–", "–", "–")
    assert tuple(display.loc[("MNIST", "+All-l2"), ["T", "F", "Coefficient"]]) == ("512", "–", "1e-05")
    assert tuple(display.loc[("MNIST", "Head2Toe"), ["T", "F", "Coefficient"]]) == ("512", "0.05", "1e-05")
