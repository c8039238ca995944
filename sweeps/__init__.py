"""What sweep.py does: reads a sweep, finds the runs of its cells, starts and stops the others.

No torch here, but in what `costs` calls: the runs train in processes of their own.
"""
