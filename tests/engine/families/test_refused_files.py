"""Checkpoints whose JSON files hold a value that a family doesn't support: the error names the field.

A row adds to the table of its family: the change of a file, and a regular expression for the error.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from engine.errors import CheckpointError
from tests.engine.families import minicpm_v_reference as minicpm_v
from tests.engine.families.ernie4_5_vl import make_ernie4_5_vl
from tests.engine.families.granite4_vision import make_granite4_vision
from tests.engine.families.hunyuan_vl import make_hunyuan_vl
from tests.engine.families.idefics import make_idefics3
from tests.engine.families.llava_variants import make_llava_variant
from tests.engine.families.minicpm_v4_6 import OCR as MINICPM_OCR
from tests.engine.families.minicpm_v4_6 import make_minicpm_v4_6
from tests.engine.families.molmo2 import make_molmo2
from tests.engine.families.onevision import make_onevision
from tests.engine.families.opened import copy_json, media_processor
from tests.engine.families.phi3_v_reference import make_phi3_v
from tests.engine.families.qwen import make_qwen2_5_vl, make_qwen3_vl
from tests.engine.tiny import make_llava, make_qwen2_vl

MAKE: dict[str, Callable[[Path], object]] = {
    "LLaVA": make_llava,
    "LLaVA with SigLIP": partial(make_llava_variant, tower="siglip", processor="Siglip"),
    "LLaVA with Pixtral": partial(make_llava_variant, tower="pixtral", processor="Pixtral"),
    "LLaVA-OneVision": make_onevision,
    "ERNIE 4.5 VL": make_ernie4_5_vl,
    "HunyuanOCR": partial(make_hunyuan_vl, hub=True),
    "Idefics3": make_idefics3,
    "Phi-3.5-vision": make_phi3_v,
    "Qwen2-VL": partial(make_qwen2_vl, hub_names=True),
    "Qwen2.5-VL": make_qwen2_5_vl,
    "Qwen3-VL": make_qwen3_vl,
    "MiniCPM-V": minicpm_v.make,
    "Molmo 2": partial(make_molmo2, hub=True),
    "Granite 4 Vision": make_granite4_vision,
    "MiniCPM-OCR": partial(make_minicpm_v4_6, hub=True, version=MINICPM_OCR),
}
CONFIG, IMAGES, VIDEOS = "config.json", "preprocessor_config.json", "video_preprocessor_config.json"
PROCESSOR = "processor_config.json"

#: Fields with a dot are those of a nested object; null removes a field.
REFUSED: dict[str, list[tuple[str, Mapping[str, Any], str]]] = {
    "LLaVA": [
        (CONFIG, {"vision_feature_layer": [-2, -9]}, "vision_feature_layer"),
        (CONFIG, {"vision_feature_layer": [0]}, "vision_feature_layer"),
        (CONFIG, {"vision_feature_layer": -9}, "vision_feature_layer"),
        (CONFIG, {"vision_feature_select_strategy": "cls"}, "vision_feature_select_strategy"),
        (CONFIG, {"vision_config": {"model_type": "pixtral"}}, "should be full"),
        (CONFIG, {"vision_config": {"model_type": "dinov2"}}, "dinov2"),
        (CONFIG, {"text_config": {"model_type": "opt"}}, "opt"),
        (CONFIG, {"text_config": "llama"}, "text_config should be an object"),
        (CONFIG, {"vision_config": []}, "vision_config should be an object"),
        (CONFIG, {"projector_hidden_act": "mish"}, "projector_hidden_act 'mish'"),
        (CONFIG, {"image_token_index": "<image>"}, "image_token_index should be an integer"),
        (CONFIG, {"eos_token_id": [2, "</s>"]}, "eos_token_id should be token ids"),
    ],
    "LLaVA with SigLIP": [
        (IMAGES, {"size": {"height": 30, "width": 31}}, "size should give images of the tower's size"),
        (IMAGES, {"size": {"shortest_edge": 30}}, "size should give images of the tower's size"),
        (IMAGES, {"size": {"longest_edge": 30}}, "size should be shortest_edge"),
        (IMAGES, {"do_center_crop": True, "crop_size": 29}, "crop_size should give"),
        (IMAGES, {"image_processor_type": "BlipImageProcessor"}, "BlipImageProcessor"),
        (
            IMAGES,
            {"image_processor_type": "LlavaImageProcessor", "do_pad": True, "do_resize": False},
            "do_pad",
        ),
    ],
    "LLaVA with Pixtral": [
        (CONFIG, {"vision_config.hidden_act": "tanh"}, "hidden_act"),
        (CONFIG, {"vision_config.num_channels": 1}, "3 channels"),
        ("processor_config.json", {"patch_size": 16}, "patch_size 16 differs"),
        (IMAGES, {"size": {"shortest_edge": 30}}, "size should be longest_edge"),
        (IMAGES, {"do_center_crop": True}, "do_center_crop"),
        (IMAGES, {"image_processor_type": "CLIPImageProcessor"}, "CLIPImageProcessor doesn't fit"),
    ],
    "LLaVA-OneVision": [
        (CONFIG, {"text_config": {"model_type": "llama"}}, "llama"),
        (CONFIG, {"vision_config": {"model_type": "clip_vision_model"}}, "clip"),
        (CONFIG, {"vision_feature_layer": [-2, -9]}, "vision_feature_layer"),
        (CONFIG, {"vision_feature_select_strategy": "default"}, "vision_feature_select_strategy"),
        (CONFIG, {"vision_feature_layer": -9}, "vision_feature_layer"),
        (CONFIG, {"vision_aspect_ratio": "square"}, "vision_aspect_ratio"),
        (CONFIG, {"image_grid_pinpoints": [[32, 33]]}, "image_grid_pinpoints"),
        (CONFIG, {"image_grid_pinpoints": [[32, 32]]}, "image_grid_pinpoints"),
        (VIDEOS, {"size": {"height": 31, "width": 32}}, "video_preprocessor_config.json: size"),
        (VIDEOS, {"image_std": [1, 1, 1]}, "image_std"),
    ],
    "ERNIE 4.5 VL": [
        (CONFIG, {"text_config.use_bias": True}, "use_bias"),
        (CONFIG, {"text_config.moe_norm_min": 0.1}, "moe_norm_min 0.1 should be at most"),
        (CONFIG, {"text_config.moe_intermediate_size": [24]}, "moe_intermediate_size should be two sizes"),
        (CONFIG, {"text_config.moe_intermediate_size": 24}, "moe_intermediate_size should be two sizes"),
        (CONFIG, {"text_config.moe_k": 7}, "moe_k 7 should be at most moe_num_experts 6"),
        (CONFIG, {"text_config.mlp_layer_types": ["dense", "sparse"]}, "mlp_layer_types should be"),
        (CONFIG, {"text_config.mlp_layer_types": ["dense", "moe", "moe"]}, "mlp_layer_types should be"),
        (CONFIG, {"text_config.rope_parameters.rope_type": "yarn"}, "rope type 'yarn' is not supported"),
        (CONFIG, {"text_config.rope_parameters.mrope_section": [2, 4, 2]}, "two equal numbers"),
        (CONFIG, {"text_config.rope_parameters.mrope_section": [4, 4, 0]}, "one above 0"),
        (CONFIG, {"vision_config.temporal_merge_size": 4}, "temporal_merge_size 4 should be 2"),
        (CONFIG, {"vision_config.in_channels": 1}, "3 channels"),
        (IMAGES, {"temporal_patch_size": 2}, "temporal_patch_size 2 differs from the tower's 1"),
        (VIDEOS, {"temporal_patch_size": 4}, "temporal_patch_size 4 differs from the tower's 2"),
        (VIDEOS, {"font": "../Letters.ttf"}, "font '../Letters.ttf' should be the name"),
        (VIDEOS, {"font": "config.json"}, "config.json is no font file"),
    ],
    "HunyuanOCR": [
        (CONFIG, {"vision_config.interpolate_mode": "nearest"}, "interpolate_mode 'nearest'"),
        (CONFIG, {"vision_config.temporal_patch_size": 2}, "temporal_patch_size"),
        (CONFIG, {"vision_config.num_channels": 1}, "3 channels"),
        (CONFIG, {"rope_scaling.xdrope_section": None}, "mrope_section should be three or four"),
        (CONFIG, {"rope_scaling.xdrope_section": [0.25] * 4}, "mrope_section should be three or four"),
        (CONFIG, {"rope_scaling.alpha": None}, "depend|chooses frequencies"),
        (CONFIG, {"rope_scaling.alpha": -1}, "alpha should be a positive number"),
    ],
    "Idefics3": [
        (CONFIG, {"text_config": {"model_type": "mistral"}}, "mistral"),
        (CONFIG, {"scale_factor": 3}, "scale_factor"),
        (CONFIG, {"vision_config": {"image_size": 64, "patch_size": 4}}, "max_image_size"),
    ],
    "Phi-3.5-vision": [
        (CONFIG, {"embd_layer": {"hd_transform_order": "glb_sub"}}, "hd_transform_order"),
    ],
    "Qwen2-VL": [
        (CONFIG, {"rope_scaling": {"type": "ntk"}}, "ntk"),
        (CONFIG, {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 1]}}, "mrope_section"),
        (CONFIG, {"rope_scaling": None}, "mrope_section"),
        (CONFIG, {"hidden_size": "64"}, "hidden_size"),
        (CONFIG, {"num_attention_heads": -4}, "num_attention_heads"),
        (CONFIG, {"quantization_config": {"bits": 4}}, "quantization_config"),
        (CONFIG, {"vision_config": {"hidden_size": 65}}, "hidden_size"),
        (IMAGES, {"do_resize": False}, "do_resize"),
        (IMAGES, {"merge_size": 4}, "merge_size"),
        (IMAGES, {"size": 5}, "size should be an object"),
        (IMAGES, {"min_pixels": "x"}, "min_pixels, .*not 'x'"),
        (CONFIG, {"architectures": 1}, "architectures should be a list"),
        (CONFIG, {"architectures": [1]}, "architectures should be a list"),
        (CONFIG, {"num_hidden_layers": 10**12}, "num_hidden_layers should be at most"),
        (CONFIG, {"vision_config.depth": 10**12}, "depth should be at most"),
    ],
    "Qwen2.5-VL": [
        (CONFIG, {"vision_config.rope_parameters": [1]}, "rope_parameters of the vision part"),
        (CONFIG, {"vision_config.rope_scaling": "x"}, "rope_scaling of the vision part"),
        (CONFIG, {"vision_config.fullatt_block_indexes": [None]}, "fullatt_block_indexes should be a list"),
        (CONFIG, {"vision_config.out_hidden_size": 65}, "out_hidden_size"),
        (CONFIG, {"vision_config.window_size": 7}, "window_size"),
        (CONFIG, {"vision_config.hidden_act": "tanh"}, "hidden_act"),
        (CONFIG, {"vision_config.in_channels": 1}, "3 channels"),
        (VIDEOS, {"image_mean": [0.5, 0.5, 0.5]}, "image_mean"),
        (VIDEOS, {"rescale_factor": 1.0}, "rescale_factor"),
        (VIDEOS, {"do_resize": False}, "do_resize"),
    ],
    "Qwen3-VL": [
        (CONFIG, {"vision_config.out_hidden_size": 65}, "out_hidden_size"),
        (CONFIG, {"vision_config.num_position_embeddings": 37}, "num_position_embeddings"),
        (CONFIG, {"vision_config.deepstack_visual_indexes": [0, 4]}, "deepstack_visual_indexes"),
        (CONFIG, {"vision_config.hidden_act": "relu6"}, "hidden_act"),
    ],
    "MiniCPM-V": [
        (CONFIG, {"version": 2.0}, "version 2.0 .*its tower"),
        (CONFIG, {"version": 2.5}, "version 2.5 .*beside it"),
        (CONFIG, {"version": None}, "no version"),
        (CONFIG, {"version": "o"}, "version o of"),
        (CONFIG, {"hidden_size": 200}, "hidden_size"),
        (CONFIG, {"query_num": 0}, "query_num"),
        (IMAGES, {"slice_mode": False}, "slice_mode"),
        (IMAGES, {"patch_size": 14}, "patch_size"),
        (IMAGES, {"image_feature_size": 64}, "image_feature_size"),
    ],
    "MiniCPM-OCR": [
        (CONFIG, {"merge_kernel_size": 2}, "merge_kernel_size 2 is not supported"),
        (CONFIG, {"vision_config.window_kernel_size": 0}, "window_kernel_size 0 is not supported"),
        (CONFIG, {"vision_config.layer_norm_eps": -1}, "layer_norm_eps should be a positive number"),
        (CONFIG, {"vision_config.layer_norm_eps": []}, "layer_norm_eps should be a positive number"),
        (PROCESSOR, {"image_processor": 1}, "image_processor should be an object"),
        (PROCESSOR, {"video_processor": "x"}, "video_processor should be an object"),
        (IMAGES, {"small_image_upsize": ["never"]}, "small_image_upsize ..never.. is not supported"),
        (IMAGES, {"small_image_upsize": "adaptive"}, "small_image_upsize 'adaptive' is not supported"),
        (IMAGES, {"downsample_mode": "16x"}, "downsample_mode should be 4x"),
        (VIDEOS, {"stack_frames": 2}, "stack_frames 2"),
    ],
    "Granite 4 Vision": [
        (CONFIG, {"downsample_rate": None}, "downsample_rate None"),
        (CONFIG, {"downsample_rate": "1/4"}, "should be a half"),
        (CONFIG, {"downsample_rate": "3/6"}, "windows that fill 8 patches"),
        (CONFIG, {"deepstack_layer_map": None}, "deepstack_layer_map should be pairs"),
        (CONFIG, {"deepstack_layer_map": [[1, 4]]}, "the first one among them"),
        (CONFIG, {"deepstack_layer_map": [[1, 0], [2, 5]]}, "different layers"),
        (CONFIG, {"spatial_target_layers": [1, 2, 3]}, "four spatial_target_layers"),
        (CONFIG, {"spatial_target_layers": [1, 2, 3, 6]}, "layer 6 is behind the last"),
        (CONFIG, {"spatial_vision_layer": 9}, "vision_feature_layer"),
        (CONFIG, {"qformer_config.cross_attention_frequency": 2}, "cross_attention_frequency should be 1"),
        (CONFIG, {"vision_config.hidden_size": 96}, "multiple of 64"),
        (CONFIG, {"text_config.model_type": "llama"}, "'llama' is not supported"),
    ],
    "Molmo 2": [
        (CONFIG, {"text_config.qk_norm_type": "none"}, "qk_norm_type 'none'"),
        (CONFIG, {"tie_word_embeddings": True}, "tie_word_embeddings True"),
        (
            CONFIG,
            {
                "text_config.rope_scaling": {"rope_type": "dynamic", "factor": 2.0},
                "text_config.rope_scaling_layers": [0],
            },
            "depend on a sequence's length",
        ),
        (CONFIG, {"vit_config.num_key_value_heads": 1}, "KV heads"),
        (CONFIG, {"adapter_config.head_dim": 9}, "adapter_config should have"),
        (CONFIG, {"adapter_config.vit_layers": [9, 1]}, "vision_feature_layer"),
        (CONFIG, {"vit_config.image_default_input_size": [70, 84]}, "two equal sides"),
        (CONFIG, {"vit_config.image_num_pos": 26}, "num_position_embeddings should be 25"),
        (PROCESSOR, {"image_processor.size": {"height": 84, "width": 84}}, "tower's 70 and 14"),
        (PROCESSOR, {"image_processor.resample": 3}, "bilinear"),
        (PROCESSOR, {"image_processor.overlap_margins": [3, 2]}, "leave nothing"),
        (PROCESSOR, {"image_processor.pooling_size": 2}, "pooling_size should be two numbers"),
        (CONFIG, {"text_config.rope_scaling_layers": 1}, "numbers of layers, not 1"),
        (PROCESSOR, {"video_processor.pooling_size": [3]}, "video.*pooling_size should be two numbers"),
        (PROCESSOR, {"video_processor.size": {"height": 84, "width": 84}}, "video.*tower's 70 and 14"),
        (PROCESSOR, {"video_processor.image_mean": [0.1, 0.2, 0.3]}, "differs from the one for images"),
    ],
}
ROWS = [pytest.param(name, *row, id=f"{name}-{row[1]}") for name, rows in REFUSED.items() for row in rows]


@pytest.fixture(scope="module")
def unchanged(tmp_path_factory) -> Callable[[str], Path]:
    """The checkpoint of a family, made at its first use."""
    found: dict[str, Path] = {}

    def path(name: str) -> Path:
        if name not in found:
            folder = tmp_path_factory.mktemp("unchanged")
            MAKE[name](folder)
            media_processor(folder)
            found[name] = folder
        return found[name]

    return path


@pytest.mark.parametrize(("name", "file", "change", "error"), ROWS)
def test_the_error_names_the_field(tmp_path, unchanged, name, file, change, error):
    copy_json(unchanged(name), tmp_path)
    changed = tmp_path / file
    content = json.loads(changed.read_text()) if changed.exists() else {}
    for field, value in change.items():
        _set(content, field.split("."), value)
    changed.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=error):
        media_processor(tmp_path)


def _set(content: dict[str, Any], field: list[str], value: Any) -> None:
    *parents, last = field
    for parent in parents:
        content = content[parent]
    if value is None:
        content.pop(last, None)
    else:
        content[last] = value
