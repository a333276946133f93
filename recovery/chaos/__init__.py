"""
Faults against an installation of its own, judged from outside: `recovery chaos --seconds 60 --seed 1`.

A fleet of simulated servers is brought up in a folder of its own, beside nothing real. Then workers, clock, keepers, API,
Redis and servers are killed and frozen, the log disk fills, connections go half-open, operators interfere. What the
loop says of itself proves nothing: the servers write down their own exec and exit, and that journal is the judge.

| file | holds |
| --- | --- |
| plan | which fault comes when: a pure function of the seed |
| world | the installation under test: parts, Redis, fleet |
| proxy | a connection that can go half-open |
| deeds | what each fault does, and how it is taken back |
| watch | whether all is well, asked from outside; how large the parts are |
| judge | overlaps, budget breaks, starts against the operator's will, out of the journal |
| report, run | what came of it; the whole run from up to down |
"""
