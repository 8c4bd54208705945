"""Against plain forward passes of a random tiny model: one row a choice, no branches, no batches."""

import pytest
import torch

from mm.evaluation import likelihood
from mm.evaluation.likelihood import encode_pair, rolling_windows, score_choices, score_documents, start_id
from mm.testing import picture, tiny_model
from mm.types import Sample

CHOICES = ["red", "green or blue", "two beeps", "red"]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return tiny_model().eval()


def chat(key: str, text: str, image: bool = False) -> Sample:
    parts = [{"type": "image", "media": 0}] if image else []
    media = [picture(3)] if image else []
    return Sample(key, [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}], media)


def plain(key: str, text: str) -> Sample:
    return Sample(key, [{"role": "user", "content": text}])


def naive(model, context: list[int], continuation: list[int]) -> float:
    ids = torch.tensor([context + continuation])
    with torch.inference_mode():
        logs = model(input_ids=ids).logits[0].log_softmax(-1).double()
    return sum(float(logs[len(context) - 1 + i, token]) for i, token in enumerate(continuation))


@pytest.mark.parametrize("batch_size", [1, 16])
def test_plain_choices(model, batch_size):
    contexts = ["what color is the shape? ", "is it red or blue?", "what"]
    samples = [plain(str(i), text) for i, text in enumerate(contexts)]
    texts = [[f" {choice}" for choice in CHOICES]] * 3
    found = score_choices(model, samples, texts, plain=True, batch_size=batch_size)
    for context, choices, row in zip(contexts, texts, found, strict=True):
        for choice, scored in zip(choices, row, strict=True):
            before, after = encode_pair(model, context, choice)
            assert scored.tokens == len(after)
            assert scored.loglikelihood == pytest.approx(naive(model, before, after), abs=2e-4)
        # The same choice has the same likelihood, but for the order in which a product of many rows adds (float32).
        assert row[0].loglikelihood == pytest.approx(row[3].loglikelihood, rel=1e-6)
        assert (row[0].tokens, row[0].greedy) == (row[3].tokens, row[3].greedy)


def test_chat_choices_with_a_picture(model):
    sample = chat("a", "what color?", image=True)
    [together] = score_choices(model, [sample], [CHOICES], plain=False, batch_size=4)
    alone = [score_choices(model, [sample], [[c]], plain=False, batch_size=4)[0][0] for c in CHOICES]
    for one, other in zip(together, alone, strict=True):
        assert one.loglikelihood == pytest.approx(other.loglikelihood, abs=2e-4)
        assert (one.tokens, one.greedy) == (other.tokens, other.greedy)
    blind = score_choices(model, [chat("b", "what color?")], [CHOICES], plain=False, batch_size=4)[0]
    assert abs(blind[0].loglikelihood - together[0].loglikelihood) > 1e-3, "the picture is read"


def test_greedy_is_what_decoding_gives(model):
    context = model.tokenizer.encode("what color is the")
    from mm.generation.engine import generate_ids

    ids = generate_ids(model, torch.tensor([context]), max_new_tokens=3, stop=())[0].tolist()
    row = likelihood._plain_row(plain("x", ""), [(context, ids), (context, [*ids[:2], (ids[2] + 1) % 200])])
    [scored] = likelihood._score(model, [row], 4, 100)
    assert [s.greedy for s in likelihood._per_branch(scored, 2)] == [True, False]


def test_trailing_spaces_belong_to_the_continuation(model):
    tokenizer = model.tokenizer
    before, after = encode_pair(model, "what color ", "red")
    assert before == tokenizer.encode("what color") and before + after == tokenizer.encode("what color red")
    before, after = encode_pair(model, "", "red")
    assert before == [start_id(model)] and after == tokenizer.encode("red")


@pytest.mark.parametrize(
    ("n", "length", "expected"),
    [
        (3, 5, [([9], [0, 1, 2])]),
        (5, 5, [([9], [0, 1, 2, 3, 4])]),
        (7, 3, [([9], [0, 1, 2]), ([2], [3, 4, 5]), ([3, 4, 5], [6])]),
        (2, 1, [([9], [0]), ([0], [1])]),
    ],
)
def test_rolling_windows_are_those_of_lm_eval(n, length, expected):
    # lm-eval: make_disjoint_window over get_rolling_token_windows(tokens, prefix, length, context_len=1)
    assert list(rolling_windows(range(n), 9, length)) == expected
    assert [token for _, predicted in expected for token in predicted] == list(range(n))


def test_documents(model):
    texts = ["what color is the shape? red, green or blue.", "how many beeps?"]
    found = score_documents(model, texts, max_length=8, batch_size=3)
    for text, scored in zip(texts, found, strict=True):
        ids = model.tokenizer.encode(text)
        windows = rolling_windows(ids, start_id(model), 8)
        assert scored.tokens == len(ids)
        assert scored.loglikelihood == pytest.approx(sum(naive(model, *window) for window in windows), abs=5e-4)


def test_errors_name_the_sample(model):
    with pytest.raises(ValueError, match="sample a: a choice is empty"):
        score_choices(model, [chat("a", "what?")], [["red", ""]], plain=False, batch_size=1)
    with pytest.raises(ValueError, match="text 1 is empty"):
        score_documents(model, ["red", ""], max_length=4, batch_size=1)
    with pytest.raises(ValueError, match="sample p: without a chat template only one message of text"):
        score_choices(model, [chat("p", "what?", image=True)], [["red"]], plain=True, batch_size=1)
    with pytest.raises(ValueError, match="training mode"):
        score_choices(tiny_model().train(), [plain("a", "x")], [["y"]], plain=True, batch_size=1)
    broken = tiny_model().eval()
    with torch.no_grad():
        broken.decoder.embed.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="sample a: the model's logits are NaN"):
        score_choices(broken, [plain("a", "what")], [[" red"]], plain=True, batch_size=1)
