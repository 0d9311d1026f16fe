"""llama-cpp-python's OpenAI-compatible server, whose conversations outlive it: serve.py MODEL.gguf FOLDER [PORT]."""

import sys

import uvicorn
from llama_cpp.server import app as server
from llama_cpp.server.settings import ModelSettings, ServerSettings

from kvmmap.integrations.llama_cpp import LlamaKvmmapCache, spare_sequence


def main(model: str, folder: str, port: int = 8000) -> None:
    with spare_sequence():
        app = server.create_app(
            server_settings=ServerSettings(port=port),
            model_settings=[ModelSettings(model=model, n_ctx=4096)],
        )
    llama = server._llama_proxy()  # the model that the app serves: it has no public name
    llama.set_cache(LlamaKvmmapCache(folder, max_bytes=10 << 30))
    uvicorn.run(app, host="127.0.0.1", port=port)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
