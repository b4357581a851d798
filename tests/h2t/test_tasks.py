"""The 19 tasks and the demo's."""

import pytest

from h2t.errors import UserError
from h2t.tasks import DEMO, VTAB_1K, demo_task, find_task


def test_vtab_has_the_papers_columns() -> None:
    assert [task.title for task in VTAB_1K] == [
        "CIFAR-100", "Caltech101", "DTD", "Flowers102", "Pets", "SVHN", "Sun397",
        "Camelyon", "EuroSAT", "Resisc45", "Retinopathy",
        "Clevr-Count", "Clevr-Dist", "DMLab", "KITTI-Dist",
        "dSpr-Loc", "dSpr-Ori", "sNORB-Azim", "sNORB-Elev",
    ]  # fmt: skip
    groups = [task.group for task in VTAB_1K]
    assert groups == ["natural"] * 7 + ["specialized"] * 4 + ["structured"] * 8


def test_sizes_of_vtab() -> None:
    assert all(task.n_train == 1000 for task in VTAB_1K)
    assert sum(task.n_test for task in VTAB_1K) == 387_904
    classes = [100, 102, 47, 102, 37, 10, 397, 2, 10, 45, 5, 8, 6, 6, 4, 16, 16, 18, 9]
    assert [task.n_classes for task in VTAB_1K] == classes


def test_folders_and_test_sizes_of_vtab() -> None:
    assert {task.folder: task.n_test for task in VTAB_1K} == {
        "cifar": 10_000, "caltech101": 6_084, "dtd": 1_880, "oxford_flowers102": 6_149,
        "oxford_iiit_pet": 3_669, "svhn": 26_032, "sun397": 21_750, "patch_camelyon": 32_768,
        "eurosat": 5_400, "resisc45": 6_300, "diabetic_retinopathy": 42_670, "clevr_count": 15_000,
        "clevr_dist": 15_000, "dmlab": 22_735, "kitti": 711, "dsprites_loc": 73_728,
        "dsprites_ori": 73_728, "smallnorb_azi": 12_150, "smallnorb_ele": 12_150,
    }  # fmt: skip


def test_no_name_alias_or_folder_means_two_tasks() -> None:
    for names in (lambda task: {task.name, *task.aliases}, lambda task: {task.folder}):
        everything = [name for task in VTAB_1K for name in names(task)]
        assert len(everything) == len(set(everything))


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("cifar", "cifar100"),
        ("CIFAR-100", "cifar100"),
        ("pets", "oxford_iiit_pet"),
        ("oxford-iiit-pet", "oxford_iiit_pet"),
        ("Flowers102", "oxford_flowers102"),
        ("sNORB-Azim", "smallnorb_azi"),
        ("KITTI-Dist", "kitti"),
        ("Camelyon", "patch_camelyon"),
        (" MNIST ", "mnist"),
    ],
)
def test_names_people_use(name: str, found) -> None:
    assert find_task(name).name == found


def test_every_task_is_found_by_all_its_names() -> None:
    for task in VTAB_1K:
        assert all(find_task(name) is task for name in (task.name, task.title, *task.aliases))


def test_unknown_task_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean eurosat"):
        find_task("eurosatt")


def test_demo_tasks_cover_the_groups_and_differ_in_test_size() -> None:
    assert [task.name for task in DEMO] == ["mnist", "solar_cells", "dsprites_loc", "dsprites_ori"]
    assert {task.group for task in DEMO} == {"natural", "specialized", "structured"}
    assert all((task.n_train, task.n_test) == (1000, 1000) for task in DEMO)
    assert find_task("dsprites_loc").n_test == 73_728
    assert demo_task("dsprites-loc").n_test == 1000
    assert demo_task("solar_cells").licence == "CC-BY-NC-SA-4.0"
    with pytest.raises(UserError, match="unknown demo task 'cifar100'"):
        demo_task("cifar100")
