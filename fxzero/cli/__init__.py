"""Not built yet: the timeline simulator comes with the scheduler."""
