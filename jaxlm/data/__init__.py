"""Text to batches: sources, tokenizers, packing, and the iterators that training reads."""

from jaxlm.data.pipeline import Batch, DataSettings, HeldOutBatches, held_out_batches, train_batches
from jaxlm.data.sources import (
    ArrayRecordSettings,
    Corpus,
    JsonlSettings,
    ParquetSettings,
    PythonStdlibSettings,
    SourceSettings,
    Split,
    TextSettings,
    load_corpus,
)
from jaxlm.data.tokenizers import (
    BytesTokenizerSettings,
    JsonTokenizerSettings,
    StreamDecoder,
    Tokenizer,
    TokenizerSettings,
    load_tokenizer,
)

__all__ = [
    "ArrayRecordSettings",
    "Batch",
    "BytesTokenizerSettings",
    "Corpus",
    "DataSettings",
    "HeldOutBatches",
    "JsonTokenizerSettings",
    "JsonlSettings",
    "ParquetSettings",
    "PythonStdlibSettings",
    "SourceSettings",
    "Split",
    "StreamDecoder",
    "TextSettings",
    "Tokenizer",
    "TokenizerSettings",
    "held_out_batches",
    "load_corpus",
    "load_tokenizer",
    "train_batches",
]
