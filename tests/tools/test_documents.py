"""Documents before the question, sources after the answer."""

from __future__ import annotations

import copy

import pytest

from mm.tools.documents import cite, with_documents
from mm.tools.index import Index


def test_documents_stand_before_the_question(index: Index) -> None:
    hits = index.search("heron fish kiln", 2)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What does it eat?"}]
    before = copy.deepcopy(messages)
    out = with_documents(messages, hits)
    assert messages == before and out[0] == messages[0]
    text = out[1]["content"]
    assert text.index("[1] Heron") < text.index("[2] Kiln") < text.index("What does it eat?")
    assert hits[0].chunk.text in text and text.endswith("Question: What does it eat?")


def test_media_stay_where_they_are(index: Index) -> None:
    content = [{"type": "image", "media": 0}, {"type": "text", "text": "what is it?"}]
    (message,) = with_documents([{"role": "user", "content": content}], index.search("heron"))
    assert message["content"][1:] == content
    assert message["content"][0]["type"] == "text"


def test_without_hits_the_chat_is_as_it_was(index: Index) -> None:
    messages = [{"role": "user", "content": "hello"}]
    assert with_documents(messages, []) == messages


def test_the_last_message_must_be_a_question(index: Index) -> None:
    with pytest.raises(ValueError, match="last message must be the user's"):
        with_documents([{"role": "assistant", "content": "x"}], index.search("heron"))


def test_marks_name_the_sources_in_their_order(index: Index) -> None:
    hits = index.search("heron kiln tariff", 3)
    cited = cite("It is a tax [3], or a bird [1, 2]. See [3] and [9] and [0].", hits)
    assert (cited.by, [number for number, _ in cited.sources]) == ("marks", [3, 1, 2])
    assert cited.footer.splitlines()[1] == f"[3] {hits[2].chunk.place}"
    assert str(cited).startswith("It is a tax [3]") and str(cited).endswith(cited.footer)


def test_without_marks_the_document_with_its_words_is_the_source(index: Index) -> None:
    hits = index.search("heron kiln tariff", 3)
    number = next(n for n, hit in enumerate(hits, 1) if hit.chunk.title == "Kiln")
    cited = cite("A kiln is an oven for clay and pottery.", hits)
    assert (cited.by, [n for n, _ in cited.sources]) == ("words", [number])


@pytest.mark.parametrize("answer", ["Nobody knows anything whatsoever.", "", "[7]"])
def test_an_answer_from_elsewhere_has_no_source(index: Index, answer: str) -> None:
    cited = cite(answer, index.search("heron", 3))
    assert (cited.by, cited.sources) == ("none", [])
    assert cited.footer == "Sources: none of the documents found"


def test_letters_of_a_formula_do_not_hide_the_source(index: Index) -> None:
    cited = cite("A kiln is an oven: e = m + c + 1 - 0.", index.search("kiln heron", 2))
    assert [hit.chunk.title for _, hit in cited.sources] == ["Kiln"]
