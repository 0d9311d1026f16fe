"""A chat server over a library of caches, with OpenAI's interface: `cd examples && python -m serving caches/`.

Several processes answer at one port. Each has the model, and all share the library: a prompt that begins as an earlier
one did is computed from there on, whichever process computed that, and also after a restart.

    __main__  options, the port, the processes      service   model, tokenizer and library of a process
    app       addresses of HTTP                     engine    what is answered at a time, and what has to wait
    requests  what may be asked                     answer    one prompt: a session, the model's steps, sampling
    replies   what is answered                      text      tokens as text, and where it stops
    errors    errors in OpenAI's form               activity  the last requests of each process, for the page
    client    asks, and says how long it took       settings  options, as the processes get them
    page/     the page that shows the library live  tree      the library as the page shows it
"""
