"""In what order the calls of a step run: transfers under compute, within the memory that there is.

    problem         what is to be ordered, as plain arrays: lanes, seconds, what comes first, memory
    legal           what may not be turned around
    clock           the time that passes as calls are issued
    evaluate        how long an order takes, and what memory it holds
    least_memory    the order that holds least, and the memory with which a partial order can still be finished
    list_schedule   an order made front to back, by priorities, within a bound on memory
    out_of_turn     how far compute may run before its turn there
    delays          orders in which a reduction stands later
    local_search    the best of several such orders, improved where compute still waits
    traffic         what a step sends beside what it computes, before its messages share launches
    flow            how long a step takes, about, when they do
    buckets         which of them share a launch, and which parameters stay gathered
    exposed         what of transfers no order hides
    bound           a time below which no order gets, and why

docs/schedule.md tells how they work together. Nothing here reads a clock or depends on the order of a set: ranks with
equal graphs decide alike.
"""
