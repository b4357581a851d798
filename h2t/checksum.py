"""The checksum of a safetensors file's tensors, which its metadata holds."""

import hashlib


def tensor_digest(data: bytes) -> str:
    """SHA-256 of what follows the header of a safetensors file: its tensors, whatever the metadata says."""
    start = 8 + int.from_bytes(data[:8], "little")
    return hashlib.sha256(memoryview(data)[start:]).hexdigest()


def check_digest(data: bytes, stated: str) -> None:
    """Raise ValueError unless the tensors are those that were written."""
    if tensor_digest(data) != stated:
        raise ValueError("its tensors are not those that were written (checksum)")
