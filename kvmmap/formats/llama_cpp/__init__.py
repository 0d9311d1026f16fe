"""llama.cpp's saved states: slot files, session files, and the buffers of its `llama_state_*` functions.

    ggml      types of numbers, and rows of them
    model     what a GGUF file says about the rows: shapes, order, identity
    source    the bytes of a file or a buffer
    framing   what stands before the keys and values: kind, version, tokens
    memory    cells, and where each layer's rows lie
    importing, exporting   a state into a cache, and back

Nothing here needs llama.cpp. What a state holds is described in docs/llama-cpp.md.
"""
