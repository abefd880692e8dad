"""Which variant is the fastest for which shape: python -m effnet_aot tune.

    calls.py     the op calls that networks make, and their operands
    bundle.py    a library with every candidate in it, built on any machine
    library.py   that library, told which variant to take
    exact.py     what a call gives in float64, and how far rounding may lead from it
    measure.py   on a GPU: checks and times every candidate of every call
    choose.py    from times to lines of the tuning table
    networks.py  whole networks, recorded and made again like calls
    sequence.py  on a GPU: chooses again among the near ones, by the time of whole networks
    weigh.py     by projection: what the GPU that a table is for gains by its lines

The tables (aot/tables.py) are read by the build, which compiles their variants and their lines into the library.
"""
