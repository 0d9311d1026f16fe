"""Ask a question about a text, and print how long the first token took: python -m serving.client URL FILE QUESTION."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from openai import OpenAI


def main() -> None:
    """Ask, and print the answer as it comes."""
    parser = argparse.ArgumentParser(prog="serving.client", description=(__doc__ or "").partition(",")[0])
    parser.add_argument("url", help="of the server, such as http://127.0.0.1:8000")
    parser.add_argument("file", type=Path)
    parser.add_argument("question")
    parser.add_argument("--tokens", type=int, default=40, help="of the answer, at most")
    options = parser.parse_args()
    # Retries are enough for a server that is just loading the model.
    with OpenAI(base_url=f"{options.url}/v1", api_key="none", max_retries=30) as client:
        model = client.models.list().data[0].id
        start = time.perf_counter()
        stream = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": f"{options.file.read_text()}\n\n{options.question}"}],
            max_tokens=options.tokens,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
        first = 0.0
        for chunk in stream:
            for choice in chunk.choices:
                if (choice.delta.content or choice.finish_reason) and not first:
                    first = time.perf_counter() - start
                print(choice.delta.content or "", end="", flush=True)
            usage = chunk.usage
    assert usage is not None
    assert usage.prompt_tokens_details is not None
    print(
        f"\n[{usage.prompt_tokens_details.cached_tokens} of {usage.prompt_tokens} tokens were there, the first token "
        f"came after {first:.2f} s]"
    )


if __name__ == "__main__":
    main()
