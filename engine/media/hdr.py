"""Images of high dynamic range on a usual screen."""

from __future__ import annotations

import numpy as np
from PIL import Image

#: Numbers of ITU-T H.273: transfer functions PQ and HLG; primaries of BT.2020 and of Display P3.
_PQ, _HLG, _BT2020, _P3 = 16, 18, 9, 12
#: Luminance in cd/m² of white that is no highlight (ITU-R BT.2408); what is brighter is white as well.
_WHITE = 203.0
#: Linear RGB to that of sRGB.
_TO_SRGB = {
    _BT2020: np.array(
        [
            [1.660491, -0.587641, -0.072850],
            [-0.124550, 1.132900, -0.008349],
            [-0.018151, -0.100579, 1.118730],
        ],
        np.float32,
    ),
    _P3: np.array(
        [[1.224940, -0.224940, 0.0], [-0.042057, 1.042057, 0.0], [-0.019638, -0.078636, 1.098274]], np.float32
    ),
}
_STRIP = 1 << 20


def is_hdr(transfer: int) -> bool:
    """Return whether a transfer function is one of high dynamic range."""
    return transfer in (_PQ, _HLG)


def on_screen(image: Image.Image, primaries: int, transfer: int) -> Image.Image:
    """An RGB image whose samples mean light by ``primaries`` and ``transfer``, as sRGB.

    White of 203 cd/m² becomes white. The numbers are those of ITU-T H.273.
    """
    samples = np.asarray(image)
    light = (_pq() if transfer == _PQ else _hlg()).astype(np.float32)
    shown = np.empty_like(samples)
    rows = max(1, _STRIP // max(image.width, 1))
    for start in range(0, image.height, rows):
        linear = light[samples[start : start + rows]]
        if transfer == _HLG:
            # The system gamma of a screen of 1000 cd/m² (ITU-R BT.2100).
            brightness = linear @ np.array([0.2627, 0.6780, 0.0593], np.float32)
            linear *= 1000 * np.power(brightness, 0.2)[..., None]
        linear /= _WHITE
        if (matrix := _TO_SRGB.get(primaries)) is not None:
            linear = linear @ matrix.T
        linear = linear.clip(0, 1)
        encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
        shown[start : start + rows] = np.rint(encoded * 255)
    return Image.fromarray(shown)


def _pq() -> np.ndarray:
    """Luminance in cd/m² of each byte (SMPTE ST 2084)."""
    powered = (np.arange(256) / 255) ** (32 / 2523)
    return 10_000 * (np.maximum(powered - 3424 / 4096, 0) / (2413 / 128 - 2392 / 128 * powered)) ** (
        8192 / 1305
    )


def _hlg() -> np.ndarray:
    """Scene light from 0 to 1 of each byte (ITU-R BT.2100)."""
    signal, a = np.arange(256) / 255, 0.17883277
    b = 1 - 4 * a
    c = 0.5 - a * np.log(4 * a)
    return np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12)
