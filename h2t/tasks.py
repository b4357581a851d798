"""The tasks: the 19 of VTAB-1k, the four of the demo, and what a task of a user's own must say."""

from dataclasses import dataclass, replace
from typing import Literal

from h2t.errors import unknown

Group = Literal["natural", "specialized", "structured", "other"]


@dataclass(frozen=True)
class Task:
    """A classification task; labels are the integers 0 to ``n_classes`` - 1."""

    name: str
    title: str
    group: Group
    n_classes: int  # 0 = as many as the images' labels show
    n_train: int = 1000  # 0 = whatever the source has
    n_test: int = 0
    aliases: tuple[str, ...] = ()
    folder: str = ""  # in a VTAB-1k archive
    licence: str = ""  # shown to the user where not empty
    lossless: bool = False  # whether the original images are: a JPEG of one is not the paper's pixels

    @property
    def known(self) -> bool:
        """Whether it is one of the published tasks, and not a user's own."""
        return self.n_train > 0


def _natural(
    name: str,
    title: str,
    n_classes: int,
    n_test: int,
    *aliases: str,
    folder: str = "",
    lossless: bool = False,
) -> Task:
    return Task(name, title, "natural", n_classes, 1000, n_test, aliases, folder or name, lossless=lossless)


def _specialized(
    name: str, title: str, n_classes: int, n_test: int, *aliases: str, lossless: bool = False
) -> Task:
    return Task(name, title, "specialized", n_classes, 1000, n_test, aliases, name, lossless=lossless)


def _structured(
    name: str, title: str, n_classes: int, n_test: int, *aliases: str, lossless: bool = False
) -> Task:
    return Task(name, title, "structured", n_classes, 1000, n_test, aliases, name, lossless=lossless)


# In the order of the columns of the paper's Table 1. Names are those of TensorFlow Datasets where one data
# set is one task; aliases are the folders and names that other repositories and archives use.
VTAB_1K: tuple[Task, ...] = (
    _natural("cifar100", "CIFAR-100", 100, 10000, "cifar", "cifar_100", folder="cifar", lossless=True),
    _natural("caltech101", "Caltech101", 102, 6084, "caltech", "caltech_101"),
    _natural("dtd", "DTD", 47, 1880, "textures"),
    _natural("oxford_flowers102", "Flowers102", 102, 6149, "flowers102", "flowers", "oxford_flowers"),
    _natural("oxford_iiit_pet", "Pets", 37, 3669, "pets", "pet", "oxford_pets"),
    _natural("svhn", "SVHN", 10, 26032, "svhn_cropped", lossless=True),
    _natural("sun397", "Sun397", 397, 21750, "sun_397"),
    _specialized("patch_camelyon", "Camelyon", 2, 32768, "camelyon", "pcam", lossless=True),
    _specialized("eurosat", "EuroSAT", 10, 5400, "eurosat_rgb"),
    _specialized("resisc45", "Resisc45", 45, 6300, "resisc"),
    _specialized(
        "diabetic_retinopathy", "Retinopathy", 5, 42670, "retinopathy", "diabetic_retinopathy_detection"
    ),
    _structured("clevr_count", "Clevr-Count", 8, 15000, "clevr_count_all", lossless=True),
    _structured(
        "clevr_dist", "Clevr-Dist", 6, 15000, "clevr_closest_object_distance", "clevr_distance", lossless=True
    ),
    _structured("dmlab", "DMLab", 6, 22735),
    _structured("kitti", "KITTI-Dist", 4, 711, "kitti_dist", "kitti_closest_vehicle_distance", lossless=True),
    _structured(
        "dsprites_loc", "dSpr-Loc", 16, 73728, "dspr_loc", "dsprites_label_x_position", lossless=True
    ),
    _structured(
        "dsprites_ori", "dSpr-Ori", 16, 73728, "dspr_ori", "dsprites_label_orientation", lossless=True
    ),
    _structured(
        "smallnorb_azi", "sNORB-Azim", 18, 12150, "snorb_azim", "smallnorb_label_azimuth", lossless=True
    ),
    _structured(
        "smallnorb_ele", "sNORB-Elev", 9, 12150, "snorb_elev", "smallnorb_label_elevation", lossless=True
    ),
)


def find_task(name: str) -> Task:
    """The task of that name, title or alias, in any case and with '-' for '_'; VTAB-1k's before the demo's.

    Raises:
        UserError: no such task; names the nearest ones.
    """
    wanted = _normalised(name)
    for task in (*VTAB_1K, *DEMO):
        if wanted in map(_normalised, (task.name, task.title, *task.aliases)):
            return task
    raise unknown("task", name, dict.fromkeys(task.name for task in (*VTAB_1K, *DEMO)))


def demo_task(name: str) -> Task:
    """The demo's task of that name, with 1000 test images.

    Raises:
        UserError: no such task; names the nearest ones.
    """
    for task in DEMO:
        if _normalised(name) == task.name:
            return task
    raise unknown("demo task", name, (task.name for task in DEMO))


def _normalised(name: str) -> str:
    return str(name).strip().lower().replace("-", "_")


def _vtab(name: str) -> Task:
    return next(task for task in VTAB_1K if task.name == name)


DEMO: tuple[Task, ...] = (
    Task("mnist", "MNIST", "natural", 10, 1000, 1000),
    Task("solar_cells", "Solar cells", "specialized", 2, 1000, 1000, ("elpv",), licence="CC-BY-NC-SA-4.0"),
    replace(_vtab("dsprites_loc"), n_test=1000),
    replace(_vtab("dsprites_ori"), n_test=1000),
)
