"""Phi-3: fused matrices, partial rotary, sliding window, and LongRoPE across the length where its factors switch."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Phi3Config

from .parity import Case, FamilyChecks, Pair, assert_same, ragged, reference_logits

ORIGINAL = 24


def config(**changes: Any) -> Phi3Config:
    sizes: dict[str, Any] = {
        "hidden_size": 48,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "intermediate_size": 50,
        "num_hidden_layers": 2,
        "vocab_size": 97,
        "max_position_embeddings": 96,
        "original_max_position_embeddings": ORIGINAL,
        "pad_token_id": 0,
    }
    return Phi3Config(**(sizes | changes))


def longrope(pairs: int, **more: Any) -> dict[str, Any]:
    return {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0 + 0.1 * i for i in range(pairs)],
        "long_factor": [1.5 + 0.5 * i for i in range(pairs)],
        **more,
    }


class TestPhi3(FamilyChecks):
    cases = {
        "window": Case(config(sliding_window=7, tie_word_embeddings=True), gradients=True),
        "longrope": Case(config(rope_parameters=longrope(4)), length=40),
        "partial_longrope": Case(config(rope_parameters=longrope(2, partial_rotary_factor=0.5)), length=40),
    }

    @torch.no_grad()
    def test_logits(self, pair: Pair) -> None:
        """Row by row: transformers takes the long factors for a whole batch as soon as its longest row needs them, so
        that there a row's logits depend on its neighbours. Here each document has its own."""
        for left in (True, False):
            ids, mask = ragged(pair.case, left)
            ours = pair.model(input_ids=ids, attention_mask=mask).logits
            for row in range(len(ids)):
                real = mask[row].bool()
                known = ids[row, real][None]
                alone = reference_logits(pair.reference, known, torch.ones_like(known))
                assert_same(ours[row, real][None], alone, torch.ones_like(known), pair.case.bound)

    @torch.no_grad()
    def test_greedy_decoding_with_a_cache_is_the_full_forward(self, pair: Pair) -> None:
        """Step by step: the full forward of the finished row would read its first tokens by the long factors too."""
        ids, mask = ragged(pair.case, left=True)
        new = pair.model.generate(ids, mask, max_new_tokens=6, temperature=0.0, stop=())
        for row in range(len(ids)):
            known = ids[row][mask[row].bool()][None]
            for step in range(6):
                logits = pair.model(input_ids=torch.cat([known, new[row : row + 1, :step]], 1)).logits[0, -1]
                assert logits.argmax(-1) == new[row, step], f"row {row}, step {step}"


def test_the_second_row_crosses_the_length_while_it_is_decoded():
    """Or the test of decoding above would not have tried it: 21 tokens, and 6 more."""
    ids, mask = ragged(TestPhi3.cases["longrope"], left=True)
    assert mask.sum(1).tolist() == [40, 21, 3] and 21 <= ORIGINAL < 21 + 6
