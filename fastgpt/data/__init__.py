"""From text to batches: documents, the default corpus, token files, batch loaders.

documents = read_documents(["books/", "more.jsonl.gz"])
write_tokens("corpus.bin", encode_documents(documents, tokenizer), tokenizer.vocab_size,
             tokenizer.describe(), validation_fraction=0.1)
train, validation = TokenFile("corpus.bin").split()
for inputs, targets in BatchLoader(train, batch_size=8, context=256, seed=0): ...
"""

from fastgpt.data.corpus import python_corpus
from fastgpt.data.documents import read_documents
from fastgpt.data.loader import BatchLoader, sequential_batches
from fastgpt.data.token_file import TokenFile, encode_documents, write_tokens

__all__ = [
    "BatchLoader",
    "TokenFile",
    "encode_documents",
    "python_corpus",
    "read_documents",
    "sequential_batches",
    "write_tokens",
]
