"""Plain values as a short text: JSON, deflated with a dictionary of what heads say, in base85.

A head on one feature of twenty is small, and what it says of itself in JSON would be a sixth of its file.
"""

import json
import zlib
from base64 import b85decode, b85encode
from typing import Any

from h2t.errors import UserError

LARGEST = 2**24
"""Bytes of the JSON: what is larger is not written, and not unpacked, however short it is when packed."""

# Never to be changed: what was packed with it could not be read. A longer one goes with a new format.
DICTIONARY = (
    b'"layer1_0_act1","layer1_0_act2","layer1_0_act3","blocks_0_0_bn1","blocks_0_0_bn2","blocks_0_0_bn3",'
    b'"blocks_1_0_bn1","blocks_0_attn","blocks_0_mlp","blocks_0_norm1","norm","pre_logits","logits"],'
    b'"train_loss":0.0,"widths":[768,512,384,256,320,448,672,1024,1152,1280,1000]}'
    b'{"classes":2,"format":"head2toe-head-5","hyperparameters":{"coefficient":1e-05,"keep_fraction":0.05,'
    b'"learning_rate":0.01,"method":"head2toe","offset":0,"steps":500,"target_size":512},"neighbours":null,'
    b'"provenance":{"backbone":"{\\"name\\": \\"efficientnet_lite0\\", \\"weights\\": \\"auto\\", '
    b'\\"sha256\\": \\"\\", \\"image_size\\": 224, \\"taps\\": \\"auto\\", \\"cls_token\\": \\"normal\\", '
    b'\\"resize\\": \\"bilinear\\", \\"normalization\\": \\"backbone\\", \\"precision\\": \\"float32\\"}",'
    b'"peak_memory_bytes":"1","processor":"","task":"","threads":"1","train_seconds":"1."},"raw":false,'
    b'"seed":0,"sha256":"","taps":["bn1",'
)


def pack(content: dict[str, Any]) -> str:
    """Plain values as text; equal ones give equal text. Raises UserError for more than LARGEST bytes."""
    data = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    if len(data) > LARGEST:
        raise UserError(f"expected at most {LARGEST:,} bytes beside the weights, got {len(data):,}")
    deflating = zlib.compressobj(zlib.Z_BEST_COMPRESSION, memLevel=9, zdict=DICTIONARY)
    return b85encode(deflating.compress(data) + deflating.flush()).decode()


def unpack(text: str) -> dict[str, Any]:
    """The values again. Raises ValueError for anything that :func:`pack` does not write."""
    inflating = zlib.decompressobj(zdict=DICTIONARY)
    try:
        data = inflating.decompress(b85decode(text), LARGEST)
    except zlib.error as error:
        raise ValueError(f"it cannot be unpacked: {error}") from None
    if not inflating.eof:
        raise ValueError(f"it is cut short, or holds more than {LARGEST:,} bytes")
    content: dict[str, Any] = json.loads(data)
    return content
