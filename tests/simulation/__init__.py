"""The runtime's own code through random schedules of faults, on a simulated store, in simulated time.

`world` is time, machines and processes; `store` an object store with faults; `pool` stands in for Ray; `schedule` is
one schedule from a seed, with what has to hold in it. ``python -m tests.simulation --seed N`` replays one.
"""
