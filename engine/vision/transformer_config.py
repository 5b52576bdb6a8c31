"""The switches of the one vision transformer. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class GridConvConfig:
    """The blocks with :class:`engine.vision.grid_conv.GridConv` in place of attention.

    Attributes:
        layers: these blocks.
        size: side of the convolution's kernel in patches, an odd number.
        merge_size: side, in patches, of the square whose patches are neighbours in a segment.
    """

    layers: tuple[int, ...]
    size: int
    merge_size: int


@dataclass(frozen=True, slots=True)
class VisionConfig:
    """A pre-norm vision transformer: CLIP, SigLIP, InternViT, and the towers of Qwen and Pixtral for
    images of any size.

    Attributes:
        num_layers: number of blocks that are built and run: those up to the last one whose output is used.
        num_kv_heads: heads of keys and values, each of which serves ``num_heads / num_kv_heads`` consecutive
            heads of queries; None: as many as ``num_heads``.
        patch_dim: numbers per flattened patch, channels before pixels.
        patch_bias: whether the patch projection has a bias.
        patch_frames: frames of a patch that the checkpoint's projection has before channels (Muse Glimmer); 1
            where channels come first, as in patches.
        bias: whether the blocks' projections have biases; an ungated MLP always has.
        qkv_bias: the same for queries, keys and values alone; None as ``bias``.
        mlp_bias: the same for a gated MLP alone; None as ``bias``.
        qk_norm_eps: of the RMSNorms over the queries and the keys of all heads together; None without them.
        qk_norm_each: whether they are over each head by itself.
        layer_scale: whether the outputs of attention and MLP are multiplied by learned vectors.
        activation: of the MLP, by its Hugging Face name.
        gated_mlp: ``down(act(gate) * up)`` instead of ``fc2(act(fc1))``.
        norm: LayerNorm or RMSNorm.
        class_token: whether a learned token precedes the patches.
        num_positions: rows of the learned position table, class token included; 0 if there is no table.
        pre_norm, post_norm: whether there is a norm before the first and after the last block.
        positions_last: whether positions, of the table or of the caller, are added behind the norm before the
            first block.
        full_layers: the blocks that attend over whole segments even if the input has windows; None: all.
        rope_theta: base of two-dimensional rotary embeddings, half of the angles for rows and half for
            columns; None if there are none.
        rope_alternates: whether rows rotate by the even and columns by the odd frequencies of a
            one-dimensional embedding (Pixtral); else both rotate by the even ones (Qwen).
        rope_columns_first: whether columns have the first half of the angles (Muse Glimmer); else rows have.
        sandwich: norms behind attention and MLP as well, and one of values; each half of a head rotates by
            itself, by columns and by rows; see :mod:`engine.vision.sandwich`.
        bounded: inputs and outputs of the linear layers of such blocks are cut to bounds of the checkpoint.
        features: hidden states that are concatenated to the tower's output, 0 being the input of the first
            block and ``n`` the output of block ``n - 1``; empty takes the last block's output alone.
        conv: the blocks that convolve in place of attention; None if all attend.
        stored_layers: number of blocks in the checkpoint, if that is more than ``num_layers``.
    """

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    patch_dim: int
    num_kv_heads: int | None = None
    patch_bias: bool = False
    patch_frames: int = 1
    bias: bool = True
    qkv_bias: bool | None = None
    mlp_bias: bool | None = None
    qk_norm_eps: float | None = None
    qk_norm_each: bool = False
    layer_scale: bool = False
    activation: str = "quick_gelu"
    gated_mlp: bool = False
    norm: Literal["layer", "rms"] = "layer"
    norm_eps: float = 1e-6
    class_token: bool = False
    num_positions: int = 0
    pre_norm: bool = False
    post_norm: bool = False
    positions_last: bool = False
    rope_theta: float | None = None
    full_layers: tuple[int, ...] | None = None
    rope_alternates: bool = False
    rope_columns_first: bool = False
    sandwich: bool = False
    bounded: bool = False
    features: tuple[int, ...] = ()
    conv: GridConvConfig | None = None
    stored_layers: int = 0

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def out_features(self) -> int:
        """Width of the tower's output."""
        return self.hidden_size * max(1, len(self.features))
