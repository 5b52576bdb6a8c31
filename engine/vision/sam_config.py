"""The configuration of the tower of Segment Anything. No torch here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SamConfig:
    """A SAM tower for square images (https://arxiv.org/abs/2304.02643), and the convolutions behind it.

    Attributes:
        image_size: side, in pixels, of the images for which positions are stored.
        patch_size: side of a patch in pixels.
        qkv_bias: whether queries, keys and values have biases.
        activation: of the MLP, by its Hugging Face name.
        norm_eps: of the blocks' norms.
        learned_positions: whether there is a table of positions.
        relative_positions: whether scores depend on how far apart a query and a key are.
        window: side, in patches, of the windows within which most blocks attend.
        full_layers: the blocks that attend over the whole image.
        neck: features behind the neck.
        reduced: features behind each of the two convolutions that halve the sides.
    """

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    image_size: int
    patch_size: int
    neck: int
    reduced: tuple[int, int]
    window: int
    full_layers: tuple[int, ...]
    qkv_bias: bool = True
    activation: str = "gelu"
    norm_eps: float = 1e-6
    learned_positions: bool = True
    relative_positions: bool = True

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def grid_side(self) -> int:
        """Patches along the side of an image for which positions are stored."""
        return self.image_size // self.patch_size

    def rows(self, grid_side: int) -> int:
        """Features of an image with ``grid_side`` patches along its side."""
        halves = -(-grid_side // 2)
        return (-(-halves // 2)) ** 2
