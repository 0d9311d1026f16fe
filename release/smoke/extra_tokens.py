"""kvmmap[tokens]: token ids as text, by a tokenizer.json."""

import base
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

base.make_and_reopen()
Tokenizer(WordLevel({f"word{i}": i for i in range(100)}, unk_token="word0")).save("words.json")
told = base.run("inspect", "a.kvm", "--tokenizer", "words.json")
assert "word0 word1 word2" in told, told
