"""The benchmark: every operator beside what it replaces, in one process, with values checked before anything is timed.

    python -m bench                    the whole suite; the table, then bench/results/latest.json and latest.html
    python -m bench --quick            fewer rounds
    python -m bench --op gru --list    which cases there are
    python -m bench --suite lengths    every operator at several lengths; `--suite modules`: the modules of seqops.nn
    python -m bench --from A.json --from B.json --html report.html     one page of several runs
    python -m bench --device cuda      the cases that run on a GPU, by each backend there
    pytest bench -k "gru and D768"     the same suite through pytest-benchmark's own options
    python -m bench.exchange           exchange between the blocks of a GPU, by itself
    python -m bench.cold               first calls, in processes of their own
    python -m bench.gpu                the GPU run: build, tests, sanitizers, benchmark (`make gpu`)
    python -m bench.hardware           docs/hardware.md from the files that it writes

| file | holds |
|---|---|
| `<room>.py`, `<room>_contenders.py` | the case table of one room: inputs, FLOPs, bytes, peers, goals |
| `lengths.py` | every operator at several lengths |
| `modules.py` | the modules of seqops.nn, and the pages that their numbers go to |
| `harness.py` | checking, interleaved timing, statistics, the rates of this machine |
| `cuda.py` | timing and memory on a GPU |
| `exchange.py`, `exchange.cu` | what it costs blocks of a GPU to tell each other something |
| `cold.py` | first calls: compiled, from the cache, of another batch or length |
| `memory.py` | peak memory of a training step |
| `suite.py`, `test_suite.py`, `conftest.py` | the pytest-benchmark suite made of the cases |
| `record.py` | the JSON file of a run |
| `tables.py`, `report.py`, `plots.py` | terminal and Markdown tables; the HTML page; its drawings |
| `gpu.py`, `watch.py`, `lines.py` | the GPU run; the pytest plugin that keeps what its tests do; what both agree on |
| `hardware.py` | which kernel passed on which GPU, and the page |

A new room adds `bench/<room>.py` with a list `CASES`, or `bench/<operator>.py` for one of its operators; they are found
by the names of the packages in `seqops` and of the operators.
"""
