"""What `benchmarks/gpu.py` is made of.

    device        what a section is told; optional libraries; waiting for a device and asking how much memory is free
    environment   part: which machine, which versions
    conformance   part: every check on each backend of the device, and where the nodes of our graphs run
    steps         the attention step that is timed, and its reference in float64
    peers         that step in PyTorch: eager, compiled, with its own attention, with FlexAttention
    ours          that step in our graphs and in our reference
    contenders    all of these by name
    speed         part: time of a step
    memory        part: device memory of a step
    streams       a whole model's step in its steady state, and its contenders by name
    flex          the strongest of its peers: PyTorch with cached keys and values and FlexAttention
    streaming     part: time of such a step
    choices       part: kernels and ways to run them that the design chooses from
    traces        which kernels and copies a call runs
    sections      one part's sections, each recorded however it ends
    record        the JSON file

A part is a dict of sections, `sections(settings)`: name -> generator of that section's record, the last one counts.
"""
