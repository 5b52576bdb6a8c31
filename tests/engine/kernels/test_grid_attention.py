import pytest
import torch

from engine.kernels.grid_attention import grid_attention_reference, grid_attention_triton

from .compare import assert_close


class Grids:
    """Queries, keys and values of images of ``side`` by ``side`` patches, and what depends on distances."""

    def __init__(
        self, device, dtype, *, side, window, dim, images=1, heads=2, distances=True, empty=True, further=0
    ):
        fused = torch.randn(images * side**2, 3 * heads, dim, device=device, dtype=dtype)
        self.q, self.k, self.v = fused.split(heads, dim=1)
        table = torch.randn(2 * (2 * window - 1) + further, dim, device=device, dtype=dtype)
        self.products = self.q @ table.T if distances else None
        self.empty = tuple(torch.randn(2, heads, dim, device=device, dtype=dtype)) if empty else None
        self.options = {"side": side, "window": window, "scale": dim**-0.5}

    def run(self):
        return grid_attention_triton(self.q, self.k, self.v, self.products, self.empty, **self.options)

    def expected(self):
        q, k, v = (x.double() for x in (self.q, self.k, self.v))
        products = None if self.products is None else self.products.double()
        empty = None if self.empty is None else tuple(x.double() for x in self.empty)
        return grid_attention_reference(q, k, v, products, empty, **self.options)


@pytest.mark.parametrize(
    ("side", "window", "dim", "further"),
    [
        # Whole images, with one and with several lines of keys in a step.
        (17, 17, 16, {"empty": False, "heads": 1}),
        (16, 16, 16, {"empty": False}),
        (5, 5, 16, {"empty": False, "images": 3}),
        (1, 1, 16, {"empty": False}),
        # Windows that divide a side and such that don't; one that is larger than the image.
        (4, 2, 24, {"empty": False}),
        (7, 3, 16, {"images": 2, "further": 6}),
        (10, 6, 64, {}),
        (3, 5, 8, {}),
        (7, 3, 16, {"empty": False}),
        (7, 3, 16, {"distances": False}),
        (5, 5, 16, {"distances": False, "empty": False}),
    ],
)
def test_triton_equals_reference(device, dtype, side, window, dim, further):
    grids = Grids(device, dtype, side=side, window=window, dim=dim, **further)
    assert_close(grids.run(), grids.expected())


@pytest.mark.gpu
@pytest.mark.parametrize(("side", "window"), [(64, 64), (48, 48), (64, 14), (48, 14)])
def test_images_of_public_sizes_equal_the_reference(hopper, side, window):
    sizes = {"side": side, "window": window, "dim": 64, "images": 2, "heads": 3, "further": 2}
    grids = Grids(hopper, torch.bfloat16, **sizes)
    assert_close(grids.run(), grids.expected())


def test_the_reference_is_softmax_over_a_window():
    """One query, by hand: of a window at the lower right, which has one patch and three empty places."""
    grids = Grids(torch.device("cpu"), torch.float64, side=3, window=2, dim=8, images=1, heads=1)
    table = torch.randn(6, 8, dtype=torch.float64)
    grids.products = grids.q @ table.T
    q = grids.q[8, 0]
    keys = torch.stack([grids.k[8, 0], *[grids.empty[0][0]] * 3])
    values = torch.stack([grids.v[8, 0], *[grids.empty[1][0]] * 3])
    # Keys are as far down and as far along: tables are of the distances -1, 0 and 1 from a key to the query.
    scores = keys @ q * 8**-0.5 + table[[1, 1, 0, 0]] @ q + table[[4, 3, 4, 3]] @ q
    torch.testing.assert_close(grids.expected()[8, 0], scores.softmax(0) @ values)
