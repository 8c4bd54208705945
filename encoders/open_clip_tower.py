"""The image tower of any open_clip ViT (Ilharco et al., https://github.com/mlfoundations/open_clip) as an encoder."""

from __future__ import annotations

import json
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mm.encoders.images import ImageTower, load_weights, read_weights
from mm.encoders.light_imports import compiler_put_off

with compiler_put_off():
    import open_clip
    from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
    from open_clip.model import CLIPVisionCfg, _build_vision_tower, resize_pos_embed  # no public way builds one tower
    from open_clip.pretrained import get_pretrained_cfg
    from open_clip.transformer import VisionTransformer


class OpenClipEncoder(ImageTower):
    """Patch features of a CLIP image tower (Radford et al. 2021, arXiv:2103.00020), without class token and projection.

    name         a model of `open_clip.list_models()`, or the path of its JSON config
    weights      local file with the whole CLIP model or its `visual.` part; None = random. Nothing is downloaded.
    tag          the open_clip pretrained tag that `weights` belong to ("openai", "laion2b_s34b_b79k", ...): it says
                 which mean, std and activation they were trained with
    mean, std    instead of a tag (OpenAI's weights then need a `-quickgelu` name)
    layer        -1: the last block, with the tower's final norm; -2 and so on: an earlier block's output, without
                 norm (LLaVA-1.5, arXiv:2310.03744, reads -2). Later blocks are removed.
    image_size   (H, W) to build the tower for another size; the position embeddings of `weights` are resampled

    A weights file does not say how its images were normalised, and open_clip then assumes OpenAI's constants without
    a word. Here weights need `mean` and `std`, a `tag`, or an `open_clip_config.json` beside the file (as on the Hub).
    Random towers use OpenAI's constants. See `ImageTower` for shapes: the tower takes one image size.
    Raises ValueError for unknown names and tags, unknown preprocessing, and weights that are absent or do not fit.
    """

    def __init__(
        self,
        in_dim: int,
        name: str = "ViT-B-32",
        weights: str | None = None,
        tag: str | None = None,
        mean: tuple[float, float, float] | None = None,
        std: tuple[float, float, float] | None = None,
        layer: int = -1,
        image_size: tuple[int, int] | None = None,
        freeze: bool = False,
    ) -> None:
        pixel_mean, pixel_std, quick_gelu = preprocessing(name, weights, tag, mean, std)
        model = create(name, image_size, quick_gelu)
        blocks = len(model.transformer.resblocks)
        if not -blocks <= layer < 0:
            raise ValueError(f"layer must lie in -{blocks} .. -1 for {name}, got {layer}")
        if weights is not None:
            load_weights(model, visual_part(read_weights(weights), model), weights)
        # The tower's own features are normed in the last block only, and not by a norm that belongs to its pooling.
        norm = layer == -1 and model.attn_pool is None and not model.final_ln_after_pool
        model.prune_intermediate_layers([blocks + layer], prune_norm=not norm, prune_head=True)
        model.attn_pool = None
        rows, columns = model.grid_size
        stride = model.conv1.stride[0]
        super().__init__(
            in_dim,
            model,
            f"open_clip {name}",
            width=model.conv1.out_channels,
            stride=stride,
            mean=pixel_mean,
            std=pixel_std,
            image_size=(rows * stride, columns * stride),
            freeze=freeze,
        )
        self.tap, self.norm = blocks + layer, norm

    def feature_map(self, images: Tensor) -> Tensor:
        return self.model.forward_intermediates(  # type: ignore[operator]
            images, indices=[self.tap], normalize_intermediates=self.norm, stop_early=True, intermediates_only=True
        )["image_intermediates"][0]

    def saved(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """With the normalisation spelled out, which may have been read from a file beside the weights."""
        arguments = super().saved(arguments)
        if arguments.get("tag") is not None:
            return arguments
        return arguments | {"mean": self.mean.flatten().tolist(), "std": self.std.flatten().tolist()}


def preprocessing(
    name: str, weights: str | None, tag: str | None, mean: Seq[float] | None, std: Seq[float] | None
) -> tuple[Seq[float], Seq[float], bool]:
    """Mean, std and whether the weights were trained with QuickGELU, from the first source that says."""
    facts: dict[str, Any] = {}
    beside = Path(weights).expanduser().with_name("open_clip_config.json") if weights else None
    if tag is not None:
        facts = get_pretrained_cfg(name, tag)
        if not facts:
            tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
            raise ValueError(f"tag: open_clip has no weights {tag!r} of {name}; it has {tags}")
    elif mean is None and std is None and beside is not None and beside.is_file():
        facts = json.loads(beside.read_text()).get("preprocess_cfg", {})
    elif weights is None:
        facts = {"mean": OPENAI_DATASET_MEAN, "std": OPENAI_DATASET_STD}
    mean, std = mean or facts.get("mean"), std or facts.get("std")
    if mean is None or std is None:
        raise ValueError(
            f"weights: {weights} does not say how its images were normalised: give tag (one of "
            f"{', '.join(open_clip.list_pretrained_tags_by_model(name)) or 'none known'}), or mean and std, or keep "
            f"its open_clip_config.json beside it"
        )
    return mean, std, bool(facts.get("quick_gelu", False))


def create(name: str, image_size: tuple[int, int] | None, quick_gelu: bool) -> VisionTransformer:
    """The image tower alone, with random weights."""
    config: dict[str, Any] | None = None
    if name in open_clip.list_models():
        config = open_clip.get_model_config(name)
    elif name.endswith(".json") and Path(name).is_file():
        config = json.loads(Path(name).read_text())
    if config is None:
        raise ValueError(f"name: {name!r} is neither one of open_clip.list_models() nor a model's JSON file")
    vision = CLIPVisionCfg(**config["vision_cfg"])
    if vision.timm_model_name:
        raise ValueError(f"name: {name} is timm's {vision.timm_model_name}: use mm.encoders.timm_vision.TimmEncoder")
    if image_size is not None:
        vision.image_size = image_size
    tower = _build_vision_tower(config["embed_dim"], vision, quick_gelu or config.get("quick_gelu", False))
    if not isinstance(tower, VisionTransformer):
        raise ValueError(f"name: {name} is no ViT: use mm.encoders.timm_vision.TimmEncoder (resnet50_clip, ...)")
    return tower


def visual_part(state: dict[str, Tensor], model: VisionTransformer) -> dict[str, Tensor]:
    """The tower's tensors of a whole CLIP (or of a tower alone), position embeddings resampled to the tower's size."""
    state = {key.removeprefix("module."): value for key, value in state.items()}
    visual = {key: value for key, value in state.items() if key.startswith("visual.")}
    visual = visual or {f"visual.{key}": value for key, value in state.items()}
    resize_pos_embed(visual, nn.ModuleDict({"visual": model}))
    return {key.removeprefix("visual."): value for key, value in visual.items()}
