"""
A stand-in vLLM server with bad manners on demand: `python -m recovery.simulator --port 8001`.

It speaks vLLM's HTTP surface, runs an EngineCore-like child process, prints vLLM's own log lines and
fails on command, by flags or over an admin endpoint. For demos, drills and tests; product code never
talks to the admin endpoint. Its text is a pure function of token ids: see `recovery.simulator.tokens`.

| file | holds |
| --- | --- |
| tokens | the tokenizer and the rule by which the next token follows: import it to know the expected text |
| options, faults | the command line; what may go wrong and its settings |
| engine | the scheduler that makes the tokens, and the child process it runs in |
| link | how the server speaks to its engine |
| http, api | HTTP/1.1, the endpoints |
| wanted, generation | what a completion or chat asks for, and its answer |
| metrics, lines, journal | vLLM's series, vLLM's log lines, the record of exec and exit |
| server | load, signals, timers, the ways to end |
"""
