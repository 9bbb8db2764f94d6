"""Token ids of Megatron core's own tiktoken tokenizer: the tests run it beside a megatron-core.

    python core_tiktoken.py VOCABULARY PATTERN NUMBER_OF_SPECIALS SIZE TEXTS OUTPUT

TEXTS is a JSON list; OUTPUT becomes a list of id lists, whose last one holds the end-of-document id.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from megatron.core.tokenizers.text.libraries.tiktoken_tokenizer import TikTokenTokenizer


def main(vocabulary: str, pattern: str, specials: str, size: str, texts: str, output: str) -> None:
    """Encode each text."""
    tokenizer = TikTokenTokenizer(vocabulary, num_special_tokens=int(specials), pattern=pattern, vocab_size=int(size))
    ids = [tokenizer.text_to_ids(text) for text in json.loads(Path(texts).read_text())]
    Path(output).write_text(json.dumps([*ids, [tokenizer.eod]]))


if __name__ == "__main__":
    main(*sys.argv[1:])
