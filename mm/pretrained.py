"""Published checkpoints as our model: a Hugging Face directory, or a GGUF file. transformers is not needed.

    config.json -> family -> the decoder's config, and the weight map -> weights

What the directory says beside the weights is kept in `model.origin`, so that `mm export` can write it again:

    config   the config.json            files   name -> text of generation_config.json, tokenizer_config.json, ...
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mm.datasets.published_template import PublishedTemplate
from mm.decoder.decoder import Decoder
from mm.decoder.families import family_of
from mm.decoder.interchange import transfer
from mm.decoder.interchange.family import Tree, part
from mm.decoder.interchange.gguf import GGUFFile
from mm.decoder.interchange.gguf_llama import GGUFSource
from mm.decoder.interchange.sources import Source, open_directory
from mm.model import MultimodalModel
from mm.parts import build
from mm.tokenizers.gguf import from_gguf
from mm.tokenizers.missing import MissingTokenizer
from mm.tokenizers.text import TextTokenizer

# Kept as text and written again: how text is read, and where it ends.
SIDE_FILES = (
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
)


@dataclass
class Published:
    """A checkpoint of others, opened: `config` is config.json's content and `where` the file that it is from."""

    config: dict[str, Any]
    where: Path
    source: Source
    tokenizer: TextTokenizer | None
    files: dict[str, str]

    @property
    def weights(self) -> str:
        """What messages about tensors name."""
        return str(self.where.parent if self.where.name == "config.json" else self.where)


def load(path: Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> MultimodalModel:
    """Opens a Hugging Face directory or a GGUF file, in eval mode, with its weights as `dtype`.

    Raises ValueError naming the file, and in it the setting that is unknown, or the tensor and both shapes.
    """
    return assemble(open_published(path), dtype, device)


def load_decoder_weights(decoder: Decoder, path: Path) -> None:
    """Copies the weights of a published checkpoint into a decoder that is built as its family is.

    What the config alone says (positions, windows, eps) is the decoder's own, and not compared. Errors as `load`.
    """
    published = open_published(path)
    family = family_of(str(published.config.get("model_type")), str(published.where))
    rules = family.read(published.config, str(published.where))[1]
    transfer.fill(decoder, family, rules, published.source, published.weights)


def open_published(path: Path) -> Published:
    """Reads everything but the weights. Errors as `load`."""
    if path.is_file():
        return _open_gguf(path)
    config = read_json(path / "config.json")
    files = {name: (path / name).read_text(encoding="utf-8") for name in SIDE_FILES if (path / name).is_file()}
    named = next((path / name for name in ("tokenizer.json", "tokenizer.model") if (path / name).is_file()), None)
    tokenizer = None if named is None else TextTokenizer.load(named)
    where, source = path / "config.json", open_directory(path)
    config = family_of(str(config.get("model_type")), str(where)).settle(config, source.shapes.keys())
    return Published(config, where, source, tokenizer, files)


def _open_gguf(path: Path) -> Published:
    file = GGUFFile(path)
    source = GGUFSource(file)
    tokenizer = None
    if "tokenizer.ggml.model" in file.metadata:
        try:
            tokenizer = TextTokenizer(from_gguf(file.metadata))
        except ValueError as error:
            raise ValueError(f"{path}: its tokenizer cannot be used: {error}") from error
    return Published(source.config, path, source, tokenizer, _gguf_side_files(file))


def assemble(published: Published, dtype: torch.dtype, device: torch.device | str) -> MultimodalModel:
    """The model of an opened checkpoint. Errors as `load`."""
    config, where, tokenizer = published.config, published.where, published.tokenizer
    family = family_of(str(config.get("model_type")), str(where))
    tree, rules = family.read(config, str(where))
    vocab_size = tree["init_args"]["vocab_size"]
    if tokenizer is not None and tokenizer.vocab_size > vocab_size:
        raise ValueError(f"{where}: vocab_size {vocab_size} is below the {tokenizer.vocab_size} ids of its tokenizer")
    tokenizer = tokenizer or MissingTokenizer(vocab_size, str(where.parent))
    template = _template(config, published.files, tokenizer, where)
    with torch.device("meta"):
        model = MultimodalModel(tokenizer, build(tree, Decoder), template=template)
    transfer.materialise(model, device, dtype)
    nn.init.normal_(model.slots.weight, std=0.02)  # our own: what a media slot adds
    transfer.fill(model.decoder, family, rules, published.source, published.weights)
    model.config = _model_tree(model, tree, template)
    model.origin = {"config": config, "files": published.files}
    return model.eval()


def _model_tree(model: MultimodalModel, decoder: Tree, template: PublishedTemplate) -> Tree:
    """What makes this model again, for a checkpoint of ours."""
    arguments: dict[str, Any] = {"tokenizer": "tokenizer.json"}
    if isinstance(model.tokenizer, MissingTokenizer):
        size, origin = model.tokenizer.vocab_size, model.tokenizer.origin
        arguments["tokenizer"] = part("mm.tokenizers.missing.MissingTokenizer", vocab_size=size, origin=origin)
    settings = {"stop": list(template.stop), "source": template.source, "specials": list(template.specials)}
    variables = template.variables or None
    arguments["template"] = part("mm.datasets.published_template.PublishedTemplate", **settings, variables=variables)
    return part("mm.model.MultimodalModel", **arguments, decoder=decoder)


def read_json(file: Path) -> dict[str, Any]:
    """Raises ValueError naming a file that is not a JSON object."""
    return parse_json(file.read_bytes(), file)


def parse_json(text: str | bytes, file: Path) -> dict[str, Any]:
    """As `read_json`, of what the file holds."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{file}: not JSON ({error}); the file is damaged") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file}: must be a JSON object")
    return value


def _template(
    config: dict[str, Any], files: dict[str, str], tokenizer: TextTokenizer, where: Path
) -> PublishedTemplate:
    """The chat template of chat_template.jinja, .json or tokenizer_config.json, and where answers end."""
    settings = _json_file(files, "tokenizer_config.json", where)
    source = files.get("chat_template.jinja")
    for other in (_json_file(files, "chat_template.json", where), settings):
        source = source or other.get("chat_template")
    if isinstance(source, list):  # several by name
        source = next((entry["template"] for entry in source if entry.get("name") == "default"), None)
    variables = {}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        token = settings.get(name)
        if token is not None:
            variables[name] = str(token["content"] if isinstance(token, dict) else token)
    source = source if isinstance(source, str) and tokenizer.has_text else None
    written = [name for name in tokenizer.specials if source and (name in source or name in variables.values())]
    stop = _stop_ids(config, _json_file(files, "generation_config.json", where))
    return PublishedTemplate(stop, source, written, variables if source else None)


def _stop_ids(config: dict[str, Any], generation: dict[str, Any]) -> list[int]:
    """eos_token_id of generation_config.json, or else of config.json: one id, several, or none."""
    stop = generation.get("eos_token_id", config.get("eos_token_id"))
    return [] if stop is None else [int(i) for i in (stop if isinstance(stop, list) else [stop])]


def _json_file(files: dict[str, str], name: str, where: Path) -> dict[str, Any]:
    return parse_json(files.get(name, "{}"), where.parent / name)


def _gguf_side_files(file: GGUFFile) -> dict[str, str]:
    """What a Hugging Face directory would say in tokenizer_config.json and chat_template.jinja."""
    files: dict[str, str] = {}
    tokens = file.metadata.get("tokenizer.ggml.tokens", [])
    roles = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {role: file.metadata.get(f"tokenizer.ggml.{name}_token_id") for role, name in roles.items()}
    if tokens:
        named = {role: tokens[i] for role, i in ids.items() if i is not None and i < len(tokens)}
        files["tokenizer_config.json"] = json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **named}, indent=2)
    if template := file.metadata.get("tokenizer.chat_template"):
        files["chat_template.jinja"] = template
    return files
