"""Tests of LFM2-VL alone; ``test_laws.py`` compares whole answers of all families."""

import numpy as np
import pytest
import torch
from PIL import Image

from engine.families.lfm2_vl.encoder import resizing


@pytest.mark.parametrize("size", [(3, 1), (1, 3), (9, 2), (4, 4), (1, 1)])
def test_positions_are_resized_as_pillow_resizes(size):
    table = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    height, width = size
    expected = Image.fromarray(table.numpy()).resize((width, height), Image.Resampling.BILINEAR)
    down, along = (resizing(4, length, table.device) for length in size)
    np.testing.assert_allclose(down @ table @ along.T, np.asarray(expected), atol=1e-6)
