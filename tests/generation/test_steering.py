"""Steering: the attribute grows likelier, nothing else happens, and it is the maths of the paper written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mm.decoder.attention.latent import LatentAttention
from mm.decoder.attention.ssm import Mamba2
from mm.decoder.cache import Cache
from mm.decoder.embedding import Embedding
from mm.generation import generate, generate_ids, stream
from mm.generation.batching import Engine
from mm.generation.options import Decoding
from mm.generation.requests import Prompts
from mm.generation.steered import Past, SteeredRows
from mm.generation.steering import BagOfWords, Steering, Towards, mean_states, train_discriminator
from mm.model import MultimodalModel
from mm.testing import tiny_decoder, tiny_model

BAG = BagOfWords((100, 101, 102, 103))
IDS = torch.tensor([[40, 50, 60, 70], [90, 30, 0, 0], [80, 0, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])


@pytest.fixture(scope="module")
def model() -> MultimodalModel:
    torch.manual_seed(0)
    return tiny_model().eval()


@pytest.fixture(scope="module")
def towards(model) -> Towards:
    texts = ["red red shape red", "is it red?", "blue or blue", "the blue shape", "red or red?", "blue blue blue?"]
    labels = ["red" if "red" in text else "blue" for text in texts]
    return Towards(train_discriminator(model, texts, labels), "blue")


def share(ids: Tensor, bag: BagOfWords) -> float:
    return float(torch.isin(ids, torch.tensor(bag.ids)).float().mean())


def test_words_come_more_often_the_further_it_moves(model) -> None:
    found = [
        share(generate_ids(model, IDS, MASK, 12, stop=[], steer=Steering([BAG], size)), BAG) for size in (0, 0.3, 3)
    ]
    assert found[0] < found[1] < found[2] and found[2] > 0.7


@pytest.mark.parametrize("step_size", [0.1, 1.0])
def test_words_are_likelier_at_every_step(model, step_size: float) -> None:
    """Along sampled answers; the row of one token has no past to move before its first."""
    rows = steered_rows(model, Steering([BAG], step_size))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        logits = rows.read()
        for step in range(8):
            moved, own = (x.log_softmax(-1)[:, list(BAG.ids)].logsumexp(-1) for x in (logits, rows.own))
            gain = (moved - own)[: 2 if step == 0 else 3]
            assert (gain > 0.1 if step_size < 1 else gain > 0.3).all()
            logits = rows.step(torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0])


def test_answers_go_where_the_discriminator_points(model, towards) -> None:
    """Sampled ones, read again by the model as it is: what each label's steering makes of a label's probability."""
    ids, found = IDS[:1].repeat(12, 1), {}
    for label in ("red", "blue"):
        steer = Steering([Towards(towards.discriminator, label)], 0.3)
        answers = generate_ids(model, ids, max_new_tokens=10, stop=[], temperature=1.0, steer=steer)
        with torch.no_grad():
            mean = model(input_ids=torch.cat([ids, answers], 1)).hidden.mean(1)
        found[label] = towards.discriminator(mean).mean(0)
    blue, red = found["blue"] - found["red"]
    assert blue > 0.05 and red < -0.3


def test_a_discriminator_learns_its_texts(model, towards) -> None:
    texts = ["red red shape red", "blue or blue"]
    assert towards.discriminator(mean_states(model, texts)).argmax(-1).tolist() == [1, 0]
    again = train_discriminator(model, texts, ["red", "blue"])
    assert again.labels == ("blue", "red")
    same = train_discriminator(model, texts, ["red", "blue"], batch_size=1)
    torch.testing.assert_close(again.linear.weight, same.linear.weight, rtol=1e-3, atol=1e-4)
    assert not any(parameter.requires_grad for parameter in again.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("options", [{}, {"temperature": 1.3, "seed": 1}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("still", [{"step_size": 0.0}, {"gm_scale": 0.0}, {"step_size": 1e-7}], ids=str)
def test_no_move_no_change(model, towards, options: Any, still: Any) -> None:
    plain = generate_ids(model, IDS, MASK, 12, stop=[], **options)
    steer = Steering([BAG, towards], **still)
    assert torch.equal(generate_ids(model, IDS, MASK, 12, stop=[], steer=steer, **options), plain)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.8, "repetition_penalty": 1.4}], ids=["greedy", "sampled"])
def test_rows_do_not_touch_one_another(model, towards, ask, options: Any) -> None:
    samples = [ask("what colour is it?", "a", image=3), ask("red?", "b"), ask("or blue or green?", "c", image=1)]
    options |= {"max_new_tokens": 5, "seed": 2, "steer": Steering([BAG, towards], 0.5, steps=2), "logprobs": 1}
    together = generate(model, samples, **options)
    alone = [generate(model, [sample], **options)[0] for sample in samples]
    assert [answer.ids for answer in together] == [answer.ids for answer in alone]
    assert ["".join(stream(model, sample, **options)) for sample in samples] == [a.text for a in together]
    plain = generate(model, samples, 5, seed=2)
    assert [answer.ids for answer in plain] != [answer.ids for answer in together]


def test_logprobs_are_the_models_own(model) -> None:
    """Not those of the steered distribution: the first token's are the same whatever was moved."""
    rows = steered_rows(model, Steering([BAG], 2.0))
    logits = rows.read()
    with torch.no_grad():
        expected = model(input_ids=IDS, attention_mask=MASK).logits[torch.arange(3), MASK.sum(1) - 1]
    torch.testing.assert_close(rows.own, expected)
    assert (logits.log_softmax(-1) - expected.log_softmax(-1)).abs()[:2].amax() > 0.1


def steered_rows(model: MultimodalModel, steering: Steering, ids: Tensor = IDS, mask: Tensor = MASK) -> SteeredRows:
    inputs = {"input_ids": ids, "attention_mask": mask}
    prompts = Prompts(inputs, [row[: int(real.sum())] for row, real in zip(ids, mask, strict=True)], ["row"] * 3, [])
    with torch.no_grad():
        return SteeredRows(model, prompts, Decoding(steer=steering), [])


@pytest.mark.parametrize("mixer", ["grouped", "latent"])
@pytest.mark.parametrize("window", [None, 2])
def test_it_is_the_paper_written_out(tokenizer, towards, mixer: str, window: int | None) -> None:
    """One row, keys and values moved by hand: three gradient steps a token, over four tokens."""
    torch.manual_seed(3)
    latent = lambda width: LatentAttention(width, heads=2, kv_rank=8, nope_dim=6, rope_dim=4, v_dim=6)  # noqa: E731
    decoder = tiny_decoder(vocab_size=tokenizer.vocab_size, mixer=latent if mixer == "latent" else None)
    model = MultimodalModel(tokenizer, decoder).eval()
    steering = Steering([BAG, towards], 0.4, 3, kl_scale=0.2, gm_scale=0.8, horizon=1, window=window, gamma=1.2)
    text = [40, 50, 60, 70, 20]
    rows = steered_rows(model, steering, torch.tensor([text]), torch.ones(1, len(text)))
    found: Tensor | None = None
    with torch.no_grad():
        past = model.new_cache()
        model(input_ids=torch.tensor([text[:-1]]), cache=past)
    for _ in range(4):
        with torch.no_grad():
            found = rows.read() if found is None else rows.step(found.argmax(-1))
        expected, past = by_hand(model, past, text, steering)
        torch.testing.assert_close(found.log_softmax(-1), expected, rtol=1e-3, atol=1e-3)
        text.append(int(found.argmax()))


def by_hand(model: MultimodalModel, past: Cache, text: list[int], steering: Steering) -> tuple[Tensor, Cache]:
    """The steered log probabilities (1, V) after `text`, whose moved past `past` is; and the past moved on."""
    with torch.no_grad():
        output = model(input_ids=torch.tensor([text]))
    own, states = output.logits[:, -1].log_softmax(-1), output.hidden
    moved = [{name: x.clone() for name, x in layer.items()} for layer in past.layers]
    reach = len(text) - 1 if steering.window is None else steering.window

    def run(layers: Any, embeddings: Tensor, places: Any, place: int) -> tuple[Tensor, Past]:
        cache, at = Past(len(layers)), torch.tensor([place])
        cache.layers, cache.places = [dict(layer) for layer in layers], places
        sequence = model.text_after(torch.zeros(1, 1, dtype=torch.long), at, at)
        sequence.embeddings = embeddings
        return model.decoder(sequence, cache)[0][:, 0], cache

    newest, last = model.decoder.embed(torch.tensor([[text[-1]]])).detach(), len(text) - 1
    for _ in range(steering.steps):
        layers = [{name: x.detach().requires_grad_() for name, x in layer.items()} for layer in moved]
        hidden, cache = run(layers, newest, past.places, last)
        log_p = model.logits(hidden).log_softmax(-1)
        expected = (log_p.exp() @ model.decoder.embed.weight)[:, None]
        ahead, _ = run(cache.layers, expected, cache.places, last + 1)
        mean = (states[:, :-1].sum(1) + hidden + ahead) / (len(text) + 1)
        loss = -log_p[:, list(BAG.ids)].exp().sum().log() - steering.attributes[1].log_p(mean, log_p).sum()
        loss = loss + steering.kl_scale * (log_p.exp() * (log_p - own)).sum()
        for layer, each in zip(layers, moved, strict=True):
            gradients = dict(
                zip(layer, torch.autograd.grad(loss, list(layer.values()), retain_graph=True), strict=True)
            )
            for gradient in gradients.values():
                gradient[:, : gradient.shape[1] - reach] = 0
            length = sum(float(gradient.square().sum()) for gradient in gradients.values()) ** 0.5
            for name, gradient in gradients.items():
                each[name] = each[name] - steering.step_size * gradient / length**steering.gamma
    with torch.no_grad():
        hidden, cache = run(moved, newest, past.places, last)
        log_p = model.logits(hidden).log_softmax(-1)
    fused = log_p.exp() ** steering.gm_scale * own.exp() ** (1 - steering.gm_scale)
    return (fused / fused.sum()).log(), cache


def test_nothing_before_the_first_token_is_no_error(model) -> None:
    """One token, and so no past: the first answer is the model's own, and the second is steered."""
    steer = Steering([BAG], 3.0)
    found = generate_ids(model, IDS[2:, :1], max_new_tokens=6, stop=[], steer=steer)
    plain = generate_ids(model, IDS[2:, :1], max_new_tokens=6, stop=[])
    assert found[0, 0] == plain[0, 0] and share(found, BAG) > share(plain, BAG)


def test_it_goes_with_forms_and_budgets_and_inference_mode(model, ask) -> None:
    steer = Steering([BagOfWords.of(model.tokenizer, ["b", "d"])], 3.0)
    (answer,) = generate(model, [ask("?")], 12, regex="[abcd]{8}", steer=steer)
    assert len(answer.text) == 8 and answer.text.count("b") + answer.text.count("d") >= 6
    with torch.inference_mode():
        assert generate(model, [ask("?")], 12, regex="[abcd]{8}", steer=steer) == [answer]


def test_a_scaled_embedding_is_expected_scaled(towards, tokenizer) -> None:
    """What is expected of a certain token is that token's own embedding."""
    decoder = tiny_decoder(vocab_size=tokenizer.vocab_size, embedding=Embedding(scale=3.0))
    model = MultimodalModel(tokenizer, decoder).eval()
    rows = steered_rows(model, Steering([towards]))
    with torch.no_grad():
        rows.read()
        before = model.text_after(torch.tensor([[5]]), torch.tensor([4]), torch.tensor([9]))
        certain = torch.nn.functional.one_hot(torch.tensor([77]), tokenizer.vocab_size).float()
        after = rows._expected(certain, before)
    torch.testing.assert_close(after.embeddings[:, 0], model.decoder.embed(torch.tensor([77])))
    assert (after.index.item(), after.positions.unique().item()) == (5, 10)


def test_words_are_single_tokens(model) -> None:
    tokenizer = model.tokenizer
    bag = BagOfWords.of(tokenizer, ["red", "a"])
    texts = {tokenizer.decode([token]).strip() for token in bag.ids}
    assert texts <= {"red", "a"} and "a" in texts
    with pytest.raises(ValueError, match=r"words=\['antidisestablishment'\]: the tokenizer has no single token"):
        BagOfWords.of(tokenizer, ["a", "antidisestablishment"])
    with pytest.raises(ValueError, match="words: give at least one"):
        BagOfWords.of(tokenizer, [])


@pytest.mark.parametrize(
    "options",
    [{"attributes": []}, {"step_size": -1.0}, {"step_size": float("nan")}, {"kl_scale": -0.1}, {"gm_scale": 1.1},
     {"steps": 0}, {"horizon": -1}, {"window": 0}, {"gamma": float("inf")}],
)  # fmt: skip
def test_nonsense_is_named(options: Any) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        Steering(**{"attributes": [BAG]} | options)


def test_what_cannot_be_steered_is_refused_by_name(model, towards, tokenizer, ask) -> None:
    steer = Steering([BAG])
    with pytest.raises(ValueError, match="steer: Mamba2 keeps no past of positions"):
        recurrent = tiny_decoder(vocab_size=tokenizer.vocab_size, mixer=lambda width: Mamba2(width, head_dim=8))
        generate_ids(MultimodalModel(tokenizer, recurrent).eval(), IDS, MASK, steer=steer)
    for cache in ("int8", "int4", "window", "sinks:1+4", "evict:64"):
        with pytest.raises(ValueError, match="steer and a cache other than dynamic do not go together"):
            Decoding(steer=steer, cache=cache)
    with pytest.raises(ValueError, match="steer=.*give a mm.generation.steering.Steering"):
        Decoding(steer=BAG)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="steer: the engine decodes token by token"):
        Engine(model).submit(ask("?"), steer=steer)
    with pytest.raises(ValueError, match="label='green' is none of the discriminator's: blue, red"):
        Towards(towards.discriminator, "green")
    with pytest.raises(ValueError, match="give at least two"):
        train_discriminator(model, ["a", "b"], ["x", "x"])
    with pytest.raises(ValueError, match="text 1 .* is empty"):
        train_discriminator(model, ["a", ""], ["x", "y"])
    with pytest.raises(ValueError, match="2 texts, but 1 labels"):
        train_discriminator(model, ["a", "b"], ["x"])
