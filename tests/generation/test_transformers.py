"""Generation against transformers: the same tokens, the same beams and scores, the same filtered distributions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DeepseekV3Config, GptOssConfig, LlamaConfig, Qwen3MoeConfig
from transformers.generation import logits_process as theirs

from mm.generation.beams import beam_search
from mm.generation.engine import generate_ids
from mm.generation.options import Decoding
from mm.generation.requests import Prompts, pad_right
from mm.generation.sampling import History, Sampler, filter_min_p, filter_top_k, filter_top_p, filter_typical
from tests.decoder.families.parity import Case, Pair, make_pair

SIZES: dict[str, Any] = {
    "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 24,
    "num_hidden_layers": 2, "vocab_size": 61,
}  # fmt: skip
LATENT_SIZES: dict[str, Any] = SIZES | {
    "num_key_value_heads": 4, "kv_lora_rank": 8, "q_lora_rank": 12, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4,
    "v_head_dim": 6, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 4, "topk_group": 2,
    "moe_intermediate_size": 10, "first_k_dense_replace": 1,
}  # fmt: skip
MOE: dict[str, Any] = {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "qwen3_moe": Qwen3MoeConfig(**SIZES, **MOE),
    "deepseek_v3": DeepseekV3Config(**LATENT_SIZES),
    "gpt_oss": GptOssConfig(
        **SIZES, head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=6,
        layer_types=["sliding_attention", "full_attention"],
    ),
}  # fmt: skip
STOP, PAD, NEW = 7, 1, 16  # PAD 0 is none to the beams of transformers


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(Case(CONFIGS[request.param]), tmp_path_factory.mktemp(request.param))


@pytest.fixture
def prompts() -> tuple[Tensor, Tensor]:
    ids = torch.randint(8, 61, (3, 11), generator=torch.Generator().manual_seed(3))
    mask = torch.tensor([[0] * missing + [1] * (11 - missing) for missing in (0, 4, 8)])
    return ids, mask


def reference(pair: Pair, ids: Tensor, mask: Tensor, **options: Any) -> Any:
    """`generate` of transformers, ended by STOP."""
    return pair.reference.generate(
        ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, eos_token_id=STOP, pad_token_id=PAD,
        return_dict_in_generate=True, output_scores=True, **options,
    )  # fmt: skip


def padded(ids: Tensor) -> Tensor:
    return torch.nn.functional.pad(ids, (0, NEW - ids.shape[1]), value=PAD)


@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.7}], ids=["greedy", "repetition_penalty"])
def test_greedy_tokens(pair: Pair, prompts: tuple[Tensor, Tensor], options: dict[str, Any]) -> None:
    ids, mask = prompts
    # Row by row: for padding on the left transformers' penalty counts the padding as seen.
    for row, real in zip(ids, mask.bool(), strict=True):
        expected = reference(pair, row[real][None], torch.ones_like(row[real])[None], **options).sequences
        ours = generate_ids(pair.model, row[real][None], None, NEW, stop=[STOP], pad_id=PAD, **options)
        assert ours.tolist() == expected[:, int(real.sum()) :].tolist()
    together = generate_ids(pair.model, ids, mask, NEW, stop=[STOP], pad_id=PAD)
    assert torch.equal(padded(together), padded(reference(pair, ids, mask).sequences[:, 11:]))


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 4, "length_penalty": 0.2, "early_stopping": True},
        {"num_beams": 2, "length_penalty": -1.0, "early_stopping": "never"},
        {"num_beams": 3, "length_penalty": 2.0, "early_stopping": "never"},
    ],
    ids=["plain", "early", "short", "never"],
)
def test_beams_and_scores(pair: Pair, prompts: tuple[Tensor, Tensor], options: dict[str, Any]) -> None:
    ids, mask = prompts
    beams = options["num_beams"]
    expected = reference(pair, ids, mask, **options, num_return_sequences=beams)
    moved, real = pad_right(ids, mask)
    rows = [row[here] for row, here in zip(moved, real, strict=True)]
    asked = Prompts({"input_ids": moved, "attention_mask": real}, rows, ["a", "b", "c"], [])
    found = beam_search(pair.model, asked, Decoding(**options), [STOP], NEW)
    flat = [hypothesis for row in found for hypothesis in row]
    assert len(flat) == 3 * beams
    tokens = torch.tensor([each.ids + [PAD] * (NEW - len(each.ids)) for each in flat])
    assert torch.equal(tokens, padded(expected.sequences[:, 11:]))
    # Sums of up to 16 log probabilities, each of logits that agree to 2e-5 of their scale (parity.BOUND).
    torch.testing.assert_close(torch.tensor([h.score for h in flat]), expected.sequences_scores, rtol=1e-4, atol=1e-4)
    assert torch.equal(
        padded(generate_ids(pair.model, ids, mask, NEW, stop=[STOP], pad_id=PAD, **options)), tokens[::beams]
    )


@pytest.mark.parametrize("seed", range(5))
def test_filtered_distributions(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(4, 200, generator=generator)
    ids = torch.randint(0, 200, (4, 30), generator=generator)
    pairs: list[tuple[Tensor, Any]] = [
        (filter_top_k(logits, 7), theirs.TopKLogitsWarper(7)),
        (filter_top_p(logits, 0.83), theirs.TopPLogitsWarper(0.83)),
        (filter_min_p(logits, 0.07), theirs.MinPLogitsWarper(0.07)),
        (filter_typical(logits, 0.4), theirs.TypicalLogitsWarper(0.4)),
        (filter_typical(logits, 0.95), theirs.TypicalLogitsWarper(0.95)),
        (Sampler(0.7).filter(logits), theirs.TemperatureLogitsWarper(0.7)),
        (
            Sampler(repetition_penalty=1.3).filter(logits, History.of(list(ids), 200, logits.device)),
            theirs.RepetitionPenaltyLogitsProcessor(1.3),
        ),
    ]
    for ours, process in pairs:
        assert torch.equal(ours, process(ids, logits.clone())), type(process).__name__


def test_the_order_of_the_filters_is_theirs() -> None:
    logits = 3 * torch.randn(4, 200, generator=torch.Generator().manual_seed(0))
    ids = torch.randint(0, 200, (4, 9), generator=torch.Generator().manual_seed(1))
    chain: Any = theirs.LogitsProcessorList(
        [
            theirs.RepetitionPenaltyLogitsProcessor(1.2), theirs.TemperatureLogitsWarper(1.4),
            theirs.TopKLogitsWarper(50), theirs.TopPLogitsWarper(0.9), theirs.MinPLogitsWarper(0.02),
            theirs.TypicalLogitsWarper(0.8),
        ]
    )  # fmt: skip
    ours = Sampler(1.4, top_k=50, top_p=0.9, min_p=0.02, typical_p=0.8, repetition_penalty=1.2)
    history = History.of(list(ids), 200, logits.device)
    assert torch.equal(ours.filter(logits, history), chain(ids, logits.clone()))


def test_groups_of_beams_differ(pair: Pair, prompts: tuple[Tensor, Tensor]) -> None:
    """Diverse beams: with groups of one and a large penalty, every group begins with another token."""
    moved, real = pad_right(*prompts)
    rows = [row[here] for row, here in zip(moved, real, strict=True)]
    asked = Prompts({"input_ids": moved, "attention_mask": real}, rows, ["a", "b", "c"], [])
    decoding = Decoding(num_beams=4, num_beam_groups=4, diversity_penalty=1e3)
    for row, found in enumerate(beam_search(pair.model, asked, decoding, [STOP], 1)):
        first = [hypothesis.ids[0] for hypothesis in sorted(found, key=lambda each: -each.score)]
        with torch.no_grad():
            expected = pair.model(input_ids=rows[row][None]).logits[0, -1].topk(4).indices.tolist()
        assert first == expected
    alike = beam_search(
        pair.model, asked, Decoding(num_beams=4, num_beam_groups=2, diversity_penalty=1e-6), [STOP], NEW
    )
    plain = beam_search(pair.model, asked, Decoding(num_beams=2), [STOP], NEW)
    for both, alone in zip(alike, plain, strict=True):  # two groups of two that hardly mind one another
        assert sorted(each.ids for each in both[::2]) == sorted(each.ids for each in alone)


def test_beams_by_reward(pair: Pair, prompts: tuple[Tensor, Tensor]) -> None:
    """A reward that outweighs all probabilities decides; one that weighs nothing changes nothing."""
    ids, mask = prompts

    class Letters:
        """Token ids as text: what a reward reads here, as these models have no tokenizer."""

        def decode(self, ids: list[int]) -> str:
            return " ".join(map(str, ids))

    pair.model.tokenizer = Letters()  # pyright: ignore[reportAttributeAccessIssue]
    wanted = 60

    def reward(text: str) -> float:
        return float(text.split().count(str(wanted)))

    options: Any = {"stop": [STOP], "pad_id": PAD, "num_beams": 4, "early_stopping": True}
    plain = generate_ids(pair.model, ids, mask, NEW, **options)
    found = generate_ids(pair.model, ids, mask, NEW, **options, reward=reward, reward_weight=50.0)
    assert (found == wanted).sum() > (plain == wanted).sum()
    for weight in (0.0, 1e-9):
        same = generate_ids(pair.model, ids, mask, NEW, **options, reward=reward, reward_weight=weight)
        assert torch.equal(same, plain)
