"""Reading a published config.json so that nothing in it is passed over.

A setting that nobody reads is a model that is quietly another one. So every key read is noted, and what is left at the
end is refused by name, unless it is null or among the few settings that do not change the mathematics of evaluation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn, TypeVar, overload

D = TypeVar("D")
_REQUIRED: Any = object()

# Names, training, and what the caller of a model decides; nothing that changes the logits of a model in eval mode.
HARMLESS = frozenset(
    """
    _name_or_path architectures auto_map dtype model_type name_or_path torch_dtype transformers_version
    bos_token_id decoder_start_token_id eos_token_id pad_token_id sep_token_id unk_token_id
    forced_bos_token_id forced_eos_token_id image_token_id tokenizer_class
    use_cache cache_implementation output_attentions output_hidden_states output_router_logits output_scores return_dict
    attn_implementation _attn_implementation attn_implementation_autoset _attn_implementation_autoset use_flash_attn
    attention_dropout attn_pdrop dropout embd_pdrop embedding_dropout hidden_dropout hidden_dropout_prob resid_pdrop
    residual_dropout router_jitter_noise emb_pdrop ffn_dropout mlp_dropout embed_dropout classifier_dropout
    init_std initializer_factor initializer_range mup_init
    aux_loss_alpha ep_size load_balance_coeff router_aux_loss_coef router_z_loss_coef seq_aux z_loss_coefficient
    chunk_size_feed_forward finetuning_task id2label label2id num_labels prefix problem_type
    pretraining_tp slow_but_exact task_specific_params
    """.split()
)


class Settings:
    """The keys of one JSON object, `where` naming it in messages. Null counts as absent."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values, self.where = dict(values), where
        self.read: set[str] = set()
        self.sections: dict[str, Settings] = {}

    def has(self, key: str) -> bool:
        """Whether the key is there and not null. Does not count as reading it."""
        return self.values.get(key) is not None

    def assume(self, key: str, value: Any) -> None:
        """Sets what a file that says nothing about `key` means."""
        if not self.has(key):
            self.values[key] = value

    def given(self, key: str) -> bool:
        """Whether the file says anything about it, if only null: for a setting that null switches off."""
        return key in self.values

    def one_of(self, *keys: str) -> str:
        """Of several names for one setting, the one that is there (the first if none is).

        Raises ValueError where two say different things.
        """
        there = [key for key in keys if self.has(key)] or [keys[0]]
        for key in there[1:]:
            if self.values[key] != self.values[there[0]]:
                self.refuse(key, f"contradicts {there[0]} = {_json(self.values[there[0]])}")
        self.read.update(keys)
        return there[0]

    @overload
    def integer(self, key: str) -> int: ...
    @overload
    def integer(self, key: str, default: D) -> int | D: ...
    def integer(self, key: str, default: Any = _REQUIRED) -> Any:
        """A whole number; 3.0 is one."""
        value = self._take(key, default, (int, float), "a whole number")
        if isinstance(value, float) and value is not default:
            if not value.is_integer():
                self.refuse(key, "must be a whole number")
            return int(value)
        return value

    @overload
    def number(self, key: str) -> float: ...
    @overload
    def number(self, key: str, default: D) -> float | D: ...
    def number(self, key: str, default: Any = _REQUIRED) -> Any:
        value = self._take(key, default, (int, float), "a number")
        return float(value) if isinstance(value, int) and not isinstance(value, bool) else value

    @overload
    def flag(self, key: str) -> bool: ...
    @overload
    def flag(self, key: str, default: D) -> bool | D: ...
    def flag(self, key: str, default: Any = _REQUIRED) -> Any:
        return self._take(key, default, (bool,), "true or false")

    @overload
    def text(self, key: str) -> str: ...
    @overload
    def text(self, key: str, default: D) -> str | D: ...
    def text(self, key: str, default: Any = _REQUIRED) -> Any:
        return self._take(key, default, (str,), "a word")

    @overload
    def items(self, key: str) -> list[Any]: ...
    @overload
    def items(self, key: str, default: D) -> list[Any] | D: ...
    def items(self, key: str, default: Any = _REQUIRED) -> Any:
        return self._take(key, default, (list, tuple), "a list")

    def section(self, key: str) -> Settings | None:
        """A nested object, under the same rule; None if it is not there."""
        if key not in self.sections:
            value = self._take(key, None, (dict,), "an object")
            if value is None:
                return None
            self.sections[key] = Settings(value, f"{self.where}: {key}")
        return self.sections[key]

    def choice(self, key: str, known: Mapping[str, D], default: str | None = None) -> D:
        """What our side calls the word that stands there. Raises ValueError for a word not in `known`."""
        word = self.text(key, _REQUIRED if default is None else default)
        if word not in known:
            self.refuse(key, f"must be one of {', '.join(known)}")
        return known[word]

    def only(self, key: str, value: D, default: Any = _REQUIRED) -> D:
        """A setting that is supported at one value; absent, it is `default` (that value, unless given)."""
        self.read.add(key)
        found = self.values.get(key)
        if found is None:
            found = value if default is _REQUIRED else default
        if found != value:
            self.refuse(key, f"only {_json(value)} is supported", found)
        return value

    def refuse(self, key: str, why: str, value: Any = _REQUIRED) -> NoReturn:
        """Raises ValueError naming the file, the key, its value and `why`."""
        raise ValueError(f"{self.where}: {key} = {_json(self.values.get(key) if value is _REQUIRED else value)}: {why}")

    def finish(self) -> None:
        """Raises ValueError for the first key that nobody read, though it may change the model."""
        for key in self.values:
            if self.has(key) and key not in self.read and key not in HARMLESS:
                self.refuse(key, "this setting is not supported")
        for section in self.sections.values():
            section.finish()

    def _take(self, key: str, default: Any, kinds: tuple[type, ...], what: str) -> Any:
        self.read.add(key)
        value = self.values.get(key)
        if value is None:
            if default is _REQUIRED:
                raise ValueError(f"{self.where}: {key} is missing")
            return default
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            self.refuse(key, f"must be {what}")
        return value


def _json(value: Any) -> str:
    words: dict[Any, str] = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else repr(value)
