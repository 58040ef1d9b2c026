"""The benchmark: every operator beside what it replaces, in one process, with values checked before anything is timed.

    python -m bench                    the whole suite; the table, then bench/results/latest.json and latest.html
    python -m bench --quick            fewer rounds, under two minutes
    python -m bench --op gru --list    which cases there are
    pytest bench -k "gru and D768"     the same suite through pytest-benchmark's own options

| file | holds |
|---|---|
| `<room>.py` | the case table of one room: inputs, FLOPs, bytes, peers, goals |
| `harness.py` | checking, interleaved timing, statistics, the rates of this machine |
| `memory.py` | peak memory of a training step |
| `suite.py`, `test_suite.py`, `conftest.py` | the pytest-benchmark suite made of the cases |
| `record.py` | the JSON file of a run |
| `tables.py`, `report.py` | terminal and Markdown tables; the HTML page |

A new room adds `bench/<room>.py` with a list `CASES`; it is found by the name of its package in `seqops`.
"""
