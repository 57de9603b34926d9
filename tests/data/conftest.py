import pytest

from jaxlm.data import JsonTokenizerSettings
from jaxlm.data.tokenize import train_bpe


@pytest.fixture(scope="session")
def bpe(tmp_path_factory):
    """Settings of a small byte-level BPE."""
    pytest.importorskip("tokenizers", reason="the extra `tokenizers` is not installed")
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    train_bpe(["the cat sat on the mat, the cat <0> <1> <2>\n"] * 20, 300, path)
    return JsonTokenizerSettings(path=str(path))
