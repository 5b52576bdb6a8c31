"""Draws Granite 4 Vision checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.engine.families.drawn.checkpoint import (
    Drawn,
    Unavailable,
    draw_ends,
    place_tied,
    same_weights,
    write_json,
    write_model,
)
from tests.engine.families.drawn.choices import Draw
from tests.engine.families.drawn.decoder import draw_decoder
from tests.engine.families.drawn.llava_next import draw_pinpoints, tiles_style, write_tiles
from tests.engine.families.drawn.rope import nested_lengths_of
from tests.engine.families.drawn.vision import draw_tower
from tests.engine.families.granite4_vision import (
    HAS_GRANITE4_VISION,
    Granite4VisionReference,
    projector_sizes,
)
from tests.engine.families.llava_next import SPECIALS, llava_next_tokenizer

_TOKENS = 1024
_ARCHITECTURE = "Granite4VisionForConditionalGeneration"


class Granite4VisionFamily:
    """The whole image and its tiles, CLIP or SigLIP, projectors of any number, and a Granite."""

    name = "granite4_vision"
    architectures = (_ARCHITECTURE,)

    def make(self, draw: Draw, path: Path) -> Drawn:
        if not HAS_GRANITE4_VISION:
            raise Unavailable("this release of Transformers has no Granite 4 Vision")
        tok = llava_next_tokenizer()
        tok.save_pretrained(path)
        text = draw_decoder(draw, "granite", len(tok), tokens=_TOKENS)
        text |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 4}
        text |= {"model_type": "granite4_vision_text", "num_hidden_layers": 7}
        queries, patch = draw.choice("queries", (1, 2)), draw.choice("patch", (4, 7))
        side = patch * 2 * queries * draw.choice("windows", (1, 2))
        tower = draw_tower(draw, side=side, patch=patch)
        tower["model_type"] = draw.variant("tower", ("siglip_vision_model", "clip_vision_model"), 0.4)
        clip = tower["model_type"] == "clip_vision_model"
        # The projectors' heads have 64 numbers.
        tower |= {"hidden_size": draw.choice("tower width", (64, 128)), "num_attention_heads": 2}
        if not clip:
            tower["vision_use_head"] = False
        image = SPECIALS.index("<image>")
        pinpoints, rate = draw_pinpoints(draw, side), f"{queries}/{2 * queries}"
        raw: dict[str, Any] = {
            "model_type": "granite4_vision",
            "torch_dtype": "float32",
            "text_config": text,
            "vision_config": tower,
            "image_token_index": image,
            "image_grid_pinpoints": pinpoints,
            "vision_feature_select_strategy": "default" if clip else "full",
            "downsample_rate": rate,
            "qformer_config": {
                "model_type": "blip_2_qformer",
                **projector_sizes(tower["hidden_size"]),
                "num_hidden_layers": draw.choice("blocks", (1, 2)),
                "intermediate_size": draw.choice("projectors' intermediate", (24, 48)),
                "cross_attention_frequency": 1,
                "use_qformer_text_input": False,
                "layer_norm_eps": draw.variant("projectors' norm eps", (1e-12, 1e-3), 0.3),
                "hidden_act": draw.variant("projectors' activation", ("gelu", "relu"), 0.3),
            },
            **_targets(draw, tower["num_hidden_layers"]),
        }
        place_tied(draw, raw, text)
        model = write_model(draw, path, raw, _ARCHITECTURE)
        draw_ends(draw, path, text, 2, 0)
        write_json(path / "config.json", {"architectures": [_ARCHITECTURE], **raw})
        write_tiles(draw, path, side, pinpoints)
        return Drawn(
            path,
            same_weights(Granite4VisionReference(path), model),
            tiles_style(side),
            _TOKENS,
            media=frozenset({image}),
            lengths=nested_lengths_of("granite", text),
        )


def _targets(draw: Draw, layers: int) -> dict[str, Any]:
    """Layers of the tower that are read, and those of the decoder that get them, among them the first one."""
    rng = draw.stream("layers of projectors")
    count = rng.randint(0, 2)
    targets = [0, *rng.sample(range(1, 7), 4 + count)]
    rng.shuffle(targets)
    read = [rng.choice([*range(1, layers + 1), *range(-layers, 0)]) for _ in range(count + 2)]
    return {
        "deepstack_layer_map": [list(pair) for pair in zip(read, targets[4:], strict=False)],
        "spatial_target_layers": targets[:4],
        "spatial_vision_layer": read[-1],
    }
