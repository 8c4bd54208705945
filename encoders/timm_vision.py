"""Any image model of timm (Wightman, https://github.com/huggingface/pytorch-image-models) as an encoder."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

from torch import Tensor, nn

from mm.encoders.images import ImageTower, load_weights, read_weights
from mm.encoders.light_imports import compiler_put_off

with compiler_put_off():
    import timm


class TimmEncoder(ImageTower):
    """Patch features of a timm model: a ViT's tokens without class and register tokens, or a CNN's feature map.

    name      a model of `timm.list_models()`; a tag after a dot (`vit_base_patch16_clip_224.openai`) says whose mean
              and std are used, so name the tag that `weights` belong to
    weights   local file in timm's naming (a Hub `model.safetensors`); None = random. Nothing is ever downloaded.
    layer     -1: the last block, with the model's final norm. -2 and so on: the output of an earlier block (of an
              earlier stage in a CNN), without norm; LLaVA-1.5 (arXiv:2310.03744) reads -2. Later blocks are removed.
    options   further arguments of `timm.create_model`, as `{"img_size": [224, 448]}`

    Models with `dynamic_img_size` take every size, their position embeddings being resampled; a few (BEiT) take one.
    See `ImageTower` for shapes. Batch norm mixes the items of a training batch, as ever: `freeze` to avoid that.
    Raises ValueError for an unknown name, a layer that does not exist, and weights that are absent or do not fit.
    """

    def __init__(
        self,
        in_dim: int,
        name: str = "vit_tiny_patch16_224",
        weights: str | None = None,
        layer: int = -1,
        freeze: bool = False,
        options: dict[str, Any] | None = None,
    ) -> None:
        if not timm.is_model(name):
            similar = ", ".join(get_close_matches(name, timm.list_models(), cutoff=0))
            raise ValueError(f"name: timm has no model {name!r}; the nearest are {similar}")
        model = create(name, options or {})
        taps = len(model.feature_info)  # type: ignore[arg-type]
        if not -taps <= layer < 0:
            raise ValueError(f"layer must lie in -{taps} .. -1 for {name}, got {layer}")
        if weights is not None:
            load_weights(model, without_classifier(read_weights(weights), model), weights)
        info: dict[str, Any] = model.feature_info[layer]  # type: ignore[index]
        # Blocks behind the layer and the head would be run for nothing, and their gradients would be missing.
        model.prune_intermediate_layers([taps + layer], prune_norm=layer != -1, prune_head=True)  # type: ignore[operator]
        config: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
        super().__init__(
            in_dim,
            model,
            f"timm {name}",
            width=info["num_chs"],
            stride=info["reduction"],
            mean=config["mean"],
            std=config["std"],
            image_size=fixed_size(model),
            freeze=freeze,
        )
        self.tap, self.norm = taps + layer, layer == -1

    def feature_map(self, images: Tensor) -> Tensor:
        return self.model.forward_intermediates(  # type: ignore[operator]
            images, indices=[self.tap], norm=self.norm, stop_early=True, output_fmt="NCHW", intermediates_only=True
        )[0]


def create(name: str, options: dict[str, Any]) -> nn.Module:
    """The model without classifier and with random weights, for every image size if its class can do that."""
    fixed = {"pretrained": False, "num_classes": 0}
    try:
        try:
            return timm.create_model(name, **{"dynamic_img_size": True, **options, **fixed})
        except TypeError as error:  # no list says which classes know the argument
            if "dynamic_img_size" not in str(error) or "dynamic_img_size" in options:
                raise
            return timm.create_model(name, **{**options, **fixed})
    except TypeError as error:
        raise ValueError(f"options: timm {name} does not take {options}: {error}") from error


def fixed_size(model: nn.Module) -> tuple[int, int] | None:
    """(H, W) if the model's patch embedding takes no other size."""
    embed = getattr(model, "patch_embed", None)
    if embed is None or not getattr(embed, "strict_img_size", False):
        return None
    height, width = embed.img_size
    return (height, width)


def without_classifier(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The file's tensors less those of its classifier, which an encoder has not."""
    names = model.pretrained_cfg["classifier"]  # type: ignore[index]
    heads = tuple(f"{name}." for name in ([names] if isinstance(names, str) else names or ()))
    return {key: value for key, value in state.items() if not key.startswith(heads)}
